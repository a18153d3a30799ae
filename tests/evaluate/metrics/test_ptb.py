"""The caption tokenizer against the Java program that the field's scores use, and by hand."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from emu_jax.evaluate.metrics import ptb

GOLDEN = json.loads(Path("tests/golden/ptb.json").read_text(encoding="utf-8"))


def test_the_golden_captions():
    ours = ptb.tokenize(GOLDEN["captions"])
    assert len(ours) == len(GOLDEN["tokens"]) > 300
    assert [
        (c, a, b)
        for c, a, b in zip(GOLDEN["captions"], GOLDEN["tokens"], ours, strict=True)
        if a != b
    ] == []


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A man's dog isn't here!", "a man 's dog is n't here"),
        ("cannot, gonna 'twas", "can not gon na 't was"),
        ("", ""),
        ("...", ""),
        ("Mr. Smith, Jr.", "mr. smith jr."),
        ("U.S. Army at 5 p.m. today", "u.s. army at 5 p.m. today"),
        ("state-of-the-art (really) [ok]", "state-of-the-art -lrb- really -rrb- -lsb- ok -rsb-"),
        ("$3.50 or \u00a35 or \u20ac5, 50%", "$ 3.50 or # 5 or $ 5 50 %"),
        ("1 1/2 cups \u00bd", "1\u00a01/2 cups 1/2"),
        ("dog\U0001f600cat", "dog cat"),
        ("\u201cnice\u201d it\u2019s", "nice it 's"),
        ("caf\u00e9 na\u00efve", "caf\u00e9 na\u00efve"),
        ("soft\u00adhyphen", "softhyphen"),
        ("AT&amp;T &lt;b>", "at&t < b >"),
    ],
)
def test_by_hand(caption, tokens):
    assert ptb.tokenize([caption]) == [tokens]


@pytest.mark.parametrize(
    ("end", "tokens"),
    [
        ("we'll", "we ll"),
        ("isn't", "is n't"),
        ("he'd", "he 'd"),
        ("5 p.m", "5 p.m"),
        ("rock 'n", "rock 'n"),
        ("no.", "no"),
        ("n't", "n't"),
        ("5 1/2", "5\u00a01/2"),
        ("dogs'", "dogs"),
    ],
)
def test_the_programs_tokens_at_the_very_end(end, tokens):
    """The Java program's output at the end of the text, where no lookahead can match."""
    assert ptb.tokenize([f"a dog {end}"]) == [f"a dog {tokens}"]


def test_a_line_break_within_a_caption_is_a_space():
    assert ptb.tokenize(["a\ndog\r\nruns", "b\u2028c\x0bd"]) == ["a dog runs", "b c d"]


def test_lookahead_into_the_next_line_is_the_programs():
    assert ptb.tokenize(["a sign says no.", "2 dogs"])[0] == "a sign says no."
    assert ptb.tokenize(["a sign says no.", "two dogs"])[0] == "a sign says no"
    # A few tokens depend on the next line, because some rules look ahead into it.
    alone = [ptb.tokenize([caption, "two dogs"])[0] for caption in GOLDEN["captions"]]
    assert sum(a != b for a, b in zip(alone, GOLDEN["tokens"], strict=True)) < 5


def test_the_java_program_if_it_is_installed(tmp_path):
    tokenizer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    if not shutil.which("java"):
        pytest.skip("no Java")
    captions = GOLDEN["captions"]
    try:
        theirs = tokenizer.PTBTokenizer().tokenize(
            {0: [{"caption": caption} for caption in captions]}
        )[0]
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"the program does not run: {error}")
    assert ptb.tokenize(captions) == theirs
