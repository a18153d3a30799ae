"""What a run tells is whole after any end, and a mean is a sum over a weight."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from emu_jax import metric_writer
from emu_jax.config import UserError
from emu_jax.metric_writer import MetricWriter, means


def lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def tell(path, start, steps):
    told = MetricWriter(path, start=start, steps=9)
    for step in steps:
        told.write(step, {"loss": float(step)})
    told.close()


def test_means_divide_once():
    got = means(
        {
            "loss": (np.array(6.0), np.array(4.0)),
            "nothing": (np.array(0.0), np.array(0.0)),
            "loss_by_source": (np.array([2.0, 0, 9]), np.array([4.0, 0, 3])),
        },
        ("names", "scenes", "stories"),
    )
    assert got == {"loss": 1.5, "loss/names": 0.5, "loss/stories": 3.0}


def test_means_of_other_sources_are_an_error():
    with pytest.raises(ValueError, match="zip"):
        means({"loss_by_source": (np.ones(3), np.ones(3))}, ("names", "scenes"))


def test_a_line_is_there_as_soon_as_it_is_written(tmp_path):
    told = MetricWriter(tmp_path, start=0, steps=9)
    told.write(1, {"loss": 0.5, "rate": 2.0})
    assert lines(tmp_path) == [{"step": 1, "loss": 0.5, "rate": 2.0}]
    told.close()


def test_what_is_not_finite_is_null(tmp_path):
    told = MetricWriter(tmp_path, start=0, steps=9)
    told.write(1, {"loss": float("nan"), "norm": float("inf"), "bad": -float("inf"), "rate": 2.0})
    told.close()
    assert lines(tmp_path) == [{"step": 1, "loss": None, "norm": None, "bad": None, "rate": 2.0}]


def test_without_a_terminal_the_log_says_how_long_it_takes(tmp_path, caplog, monkeypatch):
    # when each step is told; the first one was compiled for
    clock = iter([500.0, 530.0, 620.0, 621.0])
    monkeypatch.setattr(metric_writer.Board, "add", lambda *_: None)
    monkeypatch.setattr(metric_writer, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with caplog.at_level("INFO", "emu_jax.metric_writer"):
        tell(tmp_path, 2, [3, 4, 5, 6])
    assert [record.getMessage() for record in caplog.records] == [
        "step 5 of 9, loss 5, about 4 minutes left"
    ]


def test_a_resumed_run_takes_out_what_it_will_tell_again(tmp_path):
    tell(tmp_path, 0, [1, 2, 3, 4, 5])
    tell(tmp_path, 3, [4, 5])
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]
    tell(tmp_path, 5, [])
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]
    tell(tmp_path, 0, [1])
    assert [line["step"] for line in lines(tmp_path)] == [1]


@pytest.mark.parametrize(
    "half",
    [
        '{"step": 4, "lo',
        '{"step": 4, "loss"',
        "{",
        '{"loss": 1}',
        "[1]",
        "\x00\x00",
        '{"step": null}',
    ],
)
def test_a_half_written_line_is_left_out_and_said(tmp_path, half, caplog):
    tell(tmp_path, 0, [1, 2, 3])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(half)
    tell(tmp_path, 3, [4])
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert "left out a line that is not whole" in caplog.text


def test_scalars_pictures_and_captions_reach_tensorboard(tmp_path):
    told = MetricWriter(tmp_path, start=0, steps=9)
    told.write(1, {"image_loss": 0.5})
    told.write_images(1, np.zeros((2, 8, 8, 3), np.uint8), ["a red cat", "two dogs"])
    told.close()
    board = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    with Image.open(tmp_path / "pictures/1.png") as saved:
        assert saved.size == (8, 16)
    assert all(word in board for word in (b"image_loss", b"PNG", b"0. a red cat", b"1. two dogs"))


def test_pictures_that_cannot_be_stored_stop_no_run(tmp_path, caplog):
    told = MetricWriter(tmp_path, start=0, steps=9)
    (tmp_path / "pictures").write_text("")
    told.write_images(1, np.zeros((1, 8, 8, 3), np.uint8), ["a red cat"])
    told.close()
    assert "the pictures of step 1 are not on disk" in caplog.text


@pytest.mark.parametrize("what", ["file", "board"])
def test_a_full_disk_is_one_line(tmp_path, what):
    told = MetricWriter(tmp_path, start=0, steps=9)
    # each write fails when it reaches the disk
    full = open("/dev/full", "w", buffering=1)
    if what == "file":
        told.file = full
    else:
        told.board.events._py_recordio_writer._writer = full.buffer
    with pytest.raises(
        UserError,
        match=f"cannot write what is told of the run into {tmp_path}: No space left on device; once",
    ) as error:
        told.write(1, {"loss": 1.0})
    assert "\n" not in str(error.value)
    # says it no second time
    told.close()


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    tell(tmp_path, 0, [1])
    assert not list(tmp_path.iterdir())
