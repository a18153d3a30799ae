"""The command: streamed text, images, chats, and one-line errors."""

import io
import subprocess
import sys

import numpy as np
import pytest

from emu_jax.generate import __main__ as command
from emu_jax.generate.generation_config import GenerationConfig


def call(run, *arguments):
    return command.main([f"--checkpoint={run}/emu", "--max-new-tokens=8", *map(str, arguments)])


def test_text(run, loaded, one_device, capsys):
    greedy = GenerationConfig(max_new_tokens=8)
    assert call(run, "a dog") == 0
    assert capsys.readouterr().out == loaded.generate_texts([["a dog"]], greedy)[0] + "\n"
    beams = GenerationConfig(max_new_tokens=8, beams=2)
    assert call(run, run / "x.png", "a cat", "--beams=2") == 0
    expected = loaded.generate_texts([[run / "x.png", "a cat"]], beams)[0]
    assert capsys.readouterr().out == expected + "\n"


def test_images_on_all_devices(run, loaded, capsys, tmp_path):
    for number in (1, 2):
        assert call(run, "--image", "a dog", f"--out={tmp_path}") == 0
        message = capsys.readouterr().err.strip()
        assert message.endswith(f"[image: {tmp_path}/image-{number}.npy]")
    expected = loaded.generate_images([["a dog"]])[0]
    np.testing.assert_allclose(np.load(tmp_path / "image-1.npy"), expected, atol=1e-4)


def test_chat(run, one_device, capsys, monkeypatch):
    lines = f"a dog\n\n{run}/x.png red\n{run}/bad.png\nblue\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert call(run, "--chat") == 0
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 3
    assert shown.err.count("error: ") == 1 and "not a usable image" in shown.err


def test_a_line_of_a_chat_may_name_files(run):
    assert command._split_line(f"what is {run}/x.png  and none.png ?") == [
        "what is",
        run / "x.png",
        "and none.png ?",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
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
        (["a", "--decoder={run}"], "this model answers with text; add --image"),
        (["a", "--image", "--count=0"], "--count=0 must be at least 1"),
        (["a", "--image", "--out=b.jpg"], "images are written as FILE.png, or into a folder"),
        (["a", "--seed=9223372036854775808"], "seed=9223372036854775808 must be at least -9"),
        (["a\udcff"], r"'a\udcff' is not UTF-8 text"),
    ],
)
def test_bad_input_is_one_line(run, one_device, capsys, arguments, message):
    arguments = [argument.format(run=run) for argument in arguments]
    assert call(run, *arguments) == 2
    shown = capsys.readouterr()
    assert message in shown.err and not shown.out
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1


def test_a_file_that_is_text_is_noted(run, one_device, capsys):
    assert call(run, "cat.png", "README.md", "--max-new-tokens=1", "--", "--a") == 0
    assert capsys.readouterr().err == (
        "note: file 'cat.png' not found, so it is part of the text\n"
        "note: 'README.md' is not an image or a video, so its name is the text\n"
    )


def test_help_has_examples():
    shown = subprocess.run(
        [sys.executable, "-m", "emu_jax.generate", "--help"], capture_output=True, text=True
    )
    assert shown.returncode == 0 and "blend two images" in shown.stdout
