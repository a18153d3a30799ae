"""WordNet on the small dictionary of tests/support, and on the real one if installed."""

from pathlib import Path

import pytest

from emu_jax.config import UserError
from emu_jax.evaluate.metrics.wordnet import WordNet
from tests.support import dictionary

DEBIAN = Path("/usr/share/wordnet")


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory):
    return WordNet(str(dictionary.write(tmp_path_factory.mktemp("wordnet"))))


@pytest.mark.parametrize(
    ("a", "b", "similarity"),
    [
        ("dog", "cat", 0.6),
        ("dog", "puppy", 0.9090909090909091),
        ("puppy", "table", 0.4),
        ("dog", "lassie", 0.9090909090909091),
        ("mouse", "pet", 0.5714285714285714),
        ("entity", "dog", 0.4),
        ("run", "table", 0.6666666666666666),
        ("chase", "walk", 0.2857142857142857),
        ("walk", "eat", 0.4),
        ("happy", "big", 0.5),
        ("dog", "happy", 0.2857142857142857),
        ("dog", "walk", 0.25),
        ("quickly", "eat", 0.5),
        ("walk", "move", 0.4),
    ],
)
def test_similarities_of_first_senses(wordnet, a, b, similarity):
    assert wordnet.similarity(a, b) == pytest.approx(similarity, abs=1e-12)


def test_a_synset_is_like_itself(wordnet):
    assert all(wordnet.similarity(word, word) == 1 for word in ("dog", "table", "entity"))


@pytest.mark.parametrize(
    ("word", "sense"),
    [
        ("dogs", "dog.n.01"),
        ("boxes", "box.n.01"),
        ("children", "child.n.01"),
        ("ran", "run.v.01"),
        ("ate", "eat.v.01"),
        ("mice", "mouse.n.01"),
        ("chasing", "chase.v.01"),
        ("DOG", "dog.n.01"),
        ("runs", "run.n.01"),
        ("quickly", "quickly.r.01"),
        ("men", None),
        ("xyz", None),
        ("", None),
    ],
)
def test_first_senses(wordnet, word, sense):
    found = wordnet.first_sense(word)
    assert (found and found.name()) == sense


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (
            lambda folder: (folder / "data.verb").unlink(),
            r"no WordNet file .*data\.verb.*--wordnet=DIR",
        ),
        (
            lambda folder: (folder / "index.noun").write_text("not an index\n"),
            "not a WordNet dictionary",
        ),
        (
            lambda folder: (folder / "index.noun").write_bytes(b"\xff\xfe\n"),
            "not a WordNet dictionary",
        ),
        (
            lambda folder: (folder / "noun.exc").write_bytes(b"\xff\xfe\n"),
            "not a WordNet dictionary",
        ),
    ],
)
def test_bad_files_are_one_line(tmp_path, spoil, told):
    spoil(dictionary.write(tmp_path / "w"))
    with pytest.raises(UserError, match=told):
        WordNet(str(tmp_path / "w"))


@pytest.mark.skipif(
    not (DEBIAN / "index.noun").exists(), reason="Debian's wordnet-base is not installed"
)
def test_the_real_dictionary():
    whole = WordNet(str(DEBIAN))
    assert whole.similarity("dog", "cats") == pytest.approx(0.8571428571428571)
