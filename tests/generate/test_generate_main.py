"""The command: streamed text, images, chats, and one-line errors."""

import dataclasses
import io
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from emu_jax import config
from emu_jax.checkpoint import CheckpointManager
from emu_jax.data import tokenizer
from emu_jax.generate import __main__ as command
from emu_jax.generate.session import Session
from emu_jax.models import emu, module
from tests.support import make

WORDS = ["a dog", "a cat", "red and blue", "one two three four"] * 9


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a run (tuned for chat, by its added tokens) and a picture."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer.train(WORDS, 110, folder / "tokenizer.json")
    c = make.cfg(
        "model.llama.vocab=110",
        "model.llama.added=6",
        f"data.tokenizer={folder}/tokenizer.json",
        "data.tokens=96",
    )
    params = jax.tree.map(
        lambda x: 4 * x if x.ndim > 1 else x,
        module.init(emu.Emu, emu.EmuConfig.of(c.model.to_dict()), jax.random.key(0)),
    )
    state = dataclasses.make_dataclass("State", ("trainable", "frozen", "ema", "step"))(
        params, {}, None, jax.numpy.int32(7)
    )
    CheckpointManager(str(folder / "emu"), keep=1, keep_every=0).save(
        7, state, {}, config.to_dict(c), wait=True
    )
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)).save(
        folder / "x.png"
    )
    (folder / "bad.png").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def session(run):
    return Session.load(str(run / "emu"))


def call(run, *arguments):
    return command.main([f"--checkpoint={run}/emu", "--max-new-tokens=8", *map(str, arguments)])


def test_text(run, session, capsys):
    assert call(run, "a dog") == 0
    assert (
        capsys.readouterr().out
        == session.generate_texts([["a dog"]], command.GenerationConfig(max_new_tokens=8))[0] + "\n"
    )
    assert call(run, run / "x.png", "a cat", "--beams=2") == 0
    assert (
        capsys.readouterr().out
        == session.generate_texts(
            [[run / "x.png", "a cat"]], command.GenerationConfig(max_new_tokens=8, beams=2)
        )[0]
        + "\n"
    )


def test_drawing(run, session, capsys, tmp_path):
    for number in (1, 2):
        assert call(run, "--image", "a dog", f"--out={tmp_path}/out") == 0
        assert (
            capsys.readouterr().err.strip().endswith(f"[image: {tmp_path}/out/image-{number}.npy]")
        )
    np.testing.assert_allclose(
        np.load(tmp_path / "out" / "image-1.npy"),
        session.generate_images([["a dog"]])[0],
        atol=1e-4,
    )


def test_chat(run, capsys, monkeypatch):
    monkeypatch.setattr(
        sys, "stdin", io.StringIO(f"a dog\n\n{run}/x.png red\n{run}/bad.png\nblue\n")
    )
    assert call(run, "--chat") == 0
    shown = capsys.readouterr()
    assert (
        len(shown.out.splitlines()) == 3
        and shown.err.count("error: ") == 1
        and "not a usable image" in shown.err
    )


def test_a_line_of_a_chat_may_name_files(run):
    assert command._split_line(f"what is {run}/x.png  and none.png ?") == [
        "what is",
        run / "x.png",
        "and none.png ?",
    ]


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["a", "--checkpoint={run}/none"], "no directory"),
        (["a", "--checkpoint={run}"], "no checkpoint in"),
        ([], "give a prompt"),
        (["--image"], "give a prompt"),
        (["--image", "--chat"], "--image needs a prompt"),
        (["{run}/bad.png"], "bad.png': not a usable image"),
        (["a" * 200], "the prompt has 201 elements"),
        (["a", "--ema"], "no moving average"),
        (["a", "--top-k=3"], "need a temperature"),
        (["a", "--tokenizer={run}/none"], "no tokenizer at"),
        (["a", "--max-new-tokens=x"], "invalid int value"),
        (["a", "--bins=3"], "--bins"),
    ],
)
def test_bad_input_is_one_line(run, capsys, arguments, told):
    arguments = [argument.format(run=run) for argument in arguments]
    assert call(run, *arguments) == 2
    shown = capsys.readouterr()
    assert (
        told in shown.err
        and shown.err.startswith("error: ")
        and shown.err.count("\n") == 1
        and not shown.out
    )


def test_a_missing_file_is_noted(run, capsys):
    assert call(run, "cat.png") == 0
    assert "note: file 'cat.png' not found, so it is part of the text" in capsys.readouterr().err


def test_help_teaches():
    shown = subprocess.run(
        [sys.executable, "-m", "emu_jax.generate", "--help"], capture_output=True, text=True
    )
    assert shown.returncode == 0 and "blend two images" in shown.stdout
