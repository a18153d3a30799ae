"""Metrics are complete after any end of a run, and a mean is a sum over a weight."""

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


def write(path, start, steps):
    writer = MetricWriter(path, start=start, steps=9)
    for step in steps:
        writer.write(step, {"loss": float(step)})
    writer.close()


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


def test_means_of_a_wrong_number_of_sources_are_an_error():
    with pytest.raises(ValueError, match="zip"):
        means({"loss_by_source": (np.ones(3), np.ones(3))}, ("names", "scenes"))


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    writer = MetricWriter(tmp_path, start=0, steps=9)
    writer.write(1, {"loss": 0.5, "rate": 2.0})
    assert lines(tmp_path) == [{"step": 1, "loss": 0.5, "rate": 2.0}]
    writer.close()


def test_numbers_that_are_not_finite_are_null(tmp_path):
    writer = MetricWriter(tmp_path, start=0, steps=9)
    writer.write(1, {"loss": float("nan"), "norm": float("inf"), "bad": -float("inf"), "rate": 2.0})
    writer.close()
    assert lines(tmp_path) == [{"step": 1, "loss": None, "norm": None, "bad": None, "rate": 2.0}]


def test_without_a_terminal_the_time_left_is_logged(tmp_path, caplog, monkeypatch):
    # The time of each step; the first one included compiling.
    clock = iter([500.0, 530.0, 620.0, 621.0])
    monkeypatch.setattr(metric_writer.Board, "add", lambda *_: None)
    monkeypatch.setattr(metric_writer, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with caplog.at_level("INFO", "emu_jax.metric_writer"):
        write(tmp_path, 2, [3, 4, 5, 6])
    assert [record.getMessage() for record in caplog.records] == [
        "step 5 of 9, loss 5, about 4 min left"
    ]


def test_a_resumed_run_removes_the_lines_that_it_will_write_again(tmp_path):
    write(tmp_path, 0, [1, 2, 3, 4, 5])
    write(tmp_path, 3, [4, 5])
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]
    write(tmp_path, 5, [])
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]
    write(tmp_path, 0, [1])
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
def test_an_incomplete_line_is_removed_and_logged(tmp_path, half, caplog):
    write(tmp_path, 0, [1, 2, 3])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(half)
    write(tmp_path, 3, [4])
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert "removed an incomplete line" in caplog.text


def test_scalars_images_and_captions_reach_tensorboard(tmp_path):
    writer = MetricWriter(tmp_path, start=0, steps=9)
    writer.write(1, {"image_loss": 0.5})
    writer.write_images(1, np.zeros((2, 8, 8, 3), np.uint8), ["a red cat", "two dogs"])
    writer.close()
    board = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    with Image.open(tmp_path / "pictures/1.png") as saved:
        assert saved.size == (8, 16)
    assert all(word in board for word in (b"image_loss", b"PNG", b"0. a red cat", b"1. two dogs"))


def test_images_that_cannot_be_saved_do_not_stop_the_run(tmp_path, caplog):
    writer = MetricWriter(tmp_path, start=0, steps=9)
    (tmp_path / "pictures").write_text("")
    writer.write_images(1, np.zeros((1, 8, 8, 3), np.uint8), ["a red cat"])
    writer.close()
    assert "cannot save the pictures of step 1" in caplog.text


@pytest.mark.parametrize("what", ["file", "board"])
def test_a_full_disk_is_an_error_of_one_line(tmp_path, what):
    writer = MetricWriter(tmp_path, start=0, steps=9)
    # Each write fails when it reaches the disk.
    full = open("/dev/full", "w", buffering=1)
    if what == "file":
        writer.file = full
    else:
        writer.board.events._py_recordio_writer._writer = full.buffer
    with pytest.raises(
        UserError,
        match=f"cannot write metrics to {tmp_path}: No space left on device; once",
    ) as error:
        writer.write(1, {"loss": 1.0})
    assert "\n" not in str(error.value)
    # close() does not report the error a second time.
    writer.close()


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    write(tmp_path, 0, [1])
    assert not list(tmp_path.iterdir())
