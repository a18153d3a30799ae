"""The words of an answer that NExT-QA's script counts, by hand on the small dictionary."""

import json

import pytest

from emu_jax.config import UserError
from emu_jax.evaluate.__main__ import main
from emu_jax.evaluate.metrics import lemmas
from emu_jax.evaluate.metrics.wordnet import WordNet
from tests.support import dictionary

WEIGHTS = {
    "bias": {"NN": 0.5},
    "i suffix ing": {"VBG": 2.0},
    "i-1 tag VBG": {"JJ": 0.25, "RB": 1.0},
    "i word !YEAR": {"CD": 3.0},
    "i-1 word !HYPHEN": {"JJ": 1.0},
    "i+1 word -END-": {"NN": 0.1},
    "i-2 tag -START2-": {"NNS": 0.3},
    "i pref1 p": {"NN": 1.0},
}


@pytest.fixture(scope="module")
def tagger(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tagger")
    for part, value in (
        ("weights", WEIGHTS),
        ("tagdict", {"the": "DT"}),
        ("classes", ["NN", "NNS", "VBG", "JJ", "RB", "CD", "DT"]),
    ):
        (folder / f"{lemmas.NAME}.{part}.json").write_text(json.dumps(value))
    return folder


def test_tags_by_hand(tagger):
    tags = lemmas.Tagger(str(tagger)).tags
    assert tags(["the", "running", "x"]) == ["DT", "VBG", "RB"] and tags([]) == []
    assert tags(["1999", "co-op", "x", "2"]) == ["CD", "NN", "JJ", "NN"]
    assert tags(["zz"]) == ["NN"] and tags(["zz", "the"]) == ["NN", "DT"]


def test_an_answer_as_lemmas_without_stop_words(tagger, tmp_path):
    wordnet = WordNet(str(dictionary.write(tmp_path)))

    def lemmatize(text):
        return lemmas.lemmatize(wordnet, lemmas.Tagger(str(tagger)), text)

    assert (
        lemmatize("The dogs") == "dog"
        and lemmatize("it is a Puppy") == "puppy"
        and lemmatize("") == ""
    )
    # A word that is not in WordNet stays as it is.
    assert lemmatize("xyzs of the cat") == "xyzs cat"


def test_nextqas_answers_count_as_lemmas_where_there_is_a_tagger(tagger, tmp_path, capsys):
    dictionary.write(tmp_path / "wordnet")
    (tmp_path / "val.csv").write_text(
        "video,qid,question,answer,type\n1,0,what is it,the dogs,DB\n1,1,what is it,a puppy,TN\n"
    )
    (tmp_path / "told.json").write_text(json.dumps({"1": {"0": "dog", "1": "is puppies"}}))
    files = [
        f"--predictions={tmp_path}/told.json",
        f"--references={tmp_path}/val.csv",
        f"--wordnet={tmp_path}/wordnet",
    ]
    scores = []
    for more in ([], [f"--tagger={tagger}"]):
        assert main(["score", "--metric=wups", *files, *more]) == 0
        scores.append(json.loads(capsys.readouterr().out))
    assert [found["wups@0/DB"] for found in scores] == [0, 100] and scores[1]["wups@0.9/TN"] == 100


def test_a_folder_without_its_files_is_one_line(tagger, tmp_path):
    with pytest.raises(UserError, match=r"no file .*weights.json' of the tagger; --tagger=DIR"):
        lemmas.Tagger(str(tmp_path))
    for part in ("weights", "tagdict", "classes"):
        (tmp_path / f"{lemmas.NAME}.{part}.json").write_text("[]")
    with pytest.raises(UserError, match="not NLTK's tagger"):
        lemmas.Tagger(str(tmp_path))
