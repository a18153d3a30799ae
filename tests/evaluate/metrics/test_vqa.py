"""VQA accuracy: the official arithmetic and normalisation."""

import pytest

from emu_jax.evaluate.metrics import vqa


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The two dogs", "2 dogs"),
        ("isnt", "isn't"),
        ("couldntve", "couldntve"),
        ("couldn'tve", "couldn't've"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("oclock", "o'clock"),
        ("1,000", "1000"),
        ("a,b", "b"),
        ("x, y", "x y"),
        ("x,y", "x y"),
        ("t-shirt", "t shirt"),
        ("red/white", "red white"),
        ("3.5", "3.5"),
        ("st. john.", "st john"),
        ("None", "0"),
        ("ten apples!", "10 apples"),
        ("an", ""),
        ("yall'd've", "y'all'd've"),
        ("twas", "'twas"),
        ("1.a", "1a"),
        (".5", ".5"),
        ("Im", "im"),
        ("hows it", "how's it"),
        ("eleven", "eleven"),
        ("$5", "$5"),
        ("what's up?", "what's up"),
    ],
)
def test_normalised(answer, normal):
    assert vqa.normalise(answer) == normal


def test_the_official_example():
    """Eight of ten annotators say yes, which scores 1. Two say no, which scores 0.6.

    Source: GT-Vision-Lab/VQA, issue 1.
    """
    truths = ["yes"] * 8 + ["no"] * 2
    assert vqa.accuracy("no", truths) == pytest.approx(0.6)
    assert vqa.accuracy("Yes!", truths) == 1.0


@pytest.mark.parametrize(
    ("agreeing", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_leaving_one_annotator_out(agreeing, accuracy):
    assert vqa.accuracy(
        "cat", ["cat"] * agreeing + ["dog"] * (9 - agreeing) + (["a dog"] if agreeing < 10 else [])
    ) == pytest.approx(accuracy)


def test_what_all_agree_on_is_compared_as_it_is():
    assert vqa.accuracy("The end", ["the end"] * 10) == 0.0
    assert vqa.accuracy(" the\tend\n", ["the end"] * 10) == 1.0
    assert vqa.accuracy("The end", ["the end"] * 9 + ["end"]) == 1.0
