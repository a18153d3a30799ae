"""CIDEr-D, BLEU and ROUGE-L: pycocoevalcap's numbers, and cases by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from emu_jax.evaluate.metrics import captions

GOLDEN = json.loads(Path("tests/golden/captions.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenized():
    return captions.tokenize(GOLDEN["predictions"], GOLDEN["references"])


def test_pycocoevalcaps_numbers(tokenized):
    assert captions.cider(*tokenized) == pytest.approx(GOLDEN["CIDEr_each"], abs=1e-9)
    assert captions.bleu(*tokenized) == pytest.approx(GOLDEN["Bleu"], abs=1e-9)
    assert captions.rouge(*tokenized) == pytest.approx(GOLDEN["ROUGE_L_each"], abs=1e-9)


def test_cider_of_a_perfect_caption_is_ten_and_repeating_a_word_does_not_pay():
    references = {
        "1": ["a red cat sleeps"],
        "2": ["two big dogs bark loudly"],
        "3": ["one horse in a field"],
    }
    perfect = captions.cider({key: some[0] for key, some in references.items()}, references)
    assert (
        perfect["2"] == pytest.approx(10)
        and perfect["1"] == pytest.approx(10)
        and perfect["3"] == pytest.approx(10)
    )
    again = captions.cider({"1": "cat cat cat cat", "2": "x", "3": "x"}, references)
    assert (
        again["1"] < captions.cider({"1": "cat", "2": "x", "3": "x"}, references)["1"] + 1
        and again["2"] == 0
    )


def test_cider_by_hand():
    """Both words of "cat sleeps" are in one of two documents, so their weights are ln 2.

    The cosine for "cat" is 1 / sqrt(2) with single words and 0 with longer n-grams. The lengths,
    counted in bigrams, are 0 and 1.
    """
    scores = captions.cider({"1": "cat", "2": "x"}, {"1": ["cat sleeps"], "2": ["dog"]})
    assert scores == pytest.approx({"1": 10 / 4 / math.sqrt(2) * math.exp(-1 / 72), "2": 0.0})
    # With a single image, all documents contain every word, so every word's weight is 0.
    assert captions.cider({"1": "cat"}, {"1": ["cat"]}) == {"1": 0.0}


def test_bleu_by_hand():
    """Clipping counts only two of the seven "the"; a short prediction gets a penalty."""
    references = {"1": ["the cat is on the mat", "there is a cat on the mat"]}
    assert captions.bleu({"1": "the the the the the the the"}, references)[0] == pytest.approx(
        2 / 7
    )
    short = captions.bleu({"1": "a cat"}, {"1": ["a cat on a mat"]})
    assert (
        short[0] == pytest.approx(math.exp(1 - 5 / 2))
        and short[1] == pytest.approx(math.exp(1 - 5 / 2))
        and short[2] < 1e-2
    )


def test_rouge_by_hand():
    """The longest common subsequence of "a b c d" and "a c d e f" is "a c d".

    So precision is 3/4 and recall 3/5.
    """
    precision = 3 / 4
    recall = 3 / 5
    f = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    found = captions.rouge(
        {"1": "a b c d", "2": "x", "3": ""}, {"1": ["a c d e f"], "2": ["y"], "3": ["a"]}
    )
    assert found == pytest.approx({"1": f, "2": 0, "3": 0})


def test_best_precision_and_best_recall_may_come_from_two_references():
    assert captions.rouge({"1": "a b"}, {"1": ["a b c d e f", "b"]})["1"] == pytest.approx(1.0)


def test_the_order_of_references_and_images_does_not_matter(tokenized):
    predictions, references = tokenized
    reordered = {key: references[key][::-1] for key in reversed(references)}
    assert captions.cider(predictions, reordered) == pytest.approx(
        captions.cider(predictions, references)
    )
    np.testing.assert_allclose(
        captions.bleu(predictions, reordered), captions.bleu(predictions, references)
    )
