"""WUPS by hand on the small dictionary, and the words of an answer as NLTK makes them."""

import pytest

from emu_jax.evaluate.metrics import wups
from emu_jax.evaluate.metrics.wordnet import WordNet
from tests.support import dictionary


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory):
    return WordNet(str(dictionary.write(tmp_path_factory.mktemp("wordnet"))))


@pytest.mark.parametrize(
    ("said", "true", "at_0", "at_9"),
    [
        # For dog and puppy, NLTK gives 10 / 11 or 8 / 11, depending on which word comes first.
        ("dog", ["dog"], 1.0, 1.0),
        ("dog", ["cat"], 0.6, 0.06),
        ("dog", ["puppy"], 8 / 11, 0.8 / 11),
        ("dog", ["cat", "puppy"], 8 / 11, 0.8 / 11),
        ("xyz", ["dog"], 0.0, 0.0),
        ("xyz", ["xyz"], 1.0, 1.0),
        ("", ["dog"], 0.0, 0.0),
        # The smaller score of both directions counts: dog is found, but cat is only 0.6 similar to
        # dog.
        ("dog cat", ["dog"], 0.6, 0.06),
        # A word that is similar to no word of the true answer is ignored.
        ("the dog", ["dog"], 1.0, 1.0),
        ("dog table", ["puppy cat"], 10 / 11 * 4 / 9, 0.8 / 11 * 0.06),
    ],
)
def test_by_hand(wordnet, said, true, at_0, at_9):
    assert wups.score(wordnet, said, true, 0.0) == pytest.approx(at_0)
    assert wups.score(wordnet, said, true, 0.9) == pytest.approx(at_9)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a dog's toy, red.", ["a", "dog", "'s", "toy", ",", "red", "."]),
        ("isn't it? Yes.", ["is", "n't", "it", "?", "Yes", "."]),
        ("cannot wanna 'tis", ["can", "not", "wan", "na", "'", "tis"]),
        ('(a) "b" c--d', ["(", "a", ")", "``", "b", "''", "c", "--", "d"]),
        ("5:30 and 3,000 $5", ["5:30", "and", "3,000", "$", "5"]),
        ("wait...", ["wait", "..."]),
        ("", []),
    ],
)
def test_words_are_nltks(text, words):
    assert wups.words(text) == words
