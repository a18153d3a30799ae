"""`score`: every metric in every layout of its files, and one-line errors."""

import copy
import csv
import json
import random

import numpy as np
import pytest

from emu_jax.config import UserError
from emu_jax.evaluate import score_files
from emu_jax.evaluate.__main__ import main
from emu_jax.evaluate.metrics import captions, vqa
from tests.support import dictionary, layouts

CAPTIONS = {"1": "a dog runs", "2": "two cats on a mat"}
TRUE_CAPTIONS = {"1": ["A dog runs!", "the dog is running"], "2": ["Two cats."]}
ANSWERS = {"7": "yes", "8": "2"}
TRUE_ANSWERS = {"7": ["yes"] * 8 + ["no"] * 2, "8": ["two"] * 2 + ["a dog"] * 8}


def run(tmp_path, metric, predictions, references, *more, capsys):
    """(exit status, the printed numbers or the error)"""
    files = [tmp_path / "predictions.json"]
    files[0].write_text(json.dumps(predictions))
    for number, value in enumerate(references):
        files.append(tmp_path / f"references{number}.json")
        files[-1].write_text(json.dumps(value))
    code = main(
        [
            "score",
            f"--metric={metric}",
            f"--predictions={files[0]}",
            "--references",
            *map(str, files[1:]),
            *more,
        ]
    )
    out, err = capsys.readouterr()
    return code, json.loads(out) if code == 0 else err


def test_captions_in_either_layout(tmp_path, capsys):
    rows = [{"image_id": int(key), "caption": text} for key, text in CAPTIONS.items()]
    true = {
        "annotations": [
            {"image_id": int(key), "id": 1, "caption": text}
            for key, some in TRUE_CAPTIONS.items()
            for text in some
        ],
        "images": [],
    }
    code, numbers = run(tmp_path, "captions", CAPTIONS, [TRUE_CAPTIONS], capsys=capsys)
    assert (code, numbers) == run(tmp_path, "captions", rows, [true], capsys=capsys) and code == 0
    tokenized = captions.tokenize(CAPTIONS, TRUE_CAPTIONS)
    assert (
        numbers["CIDEr"] == pytest.approx(np.mean(list(captions.cider(*tokenized).values())))
        and numbers["Bleu_1"] == captions.bleu(*tokenized)[0]
    )
    assert list(run(tmp_path, "bleu", CAPTIONS, [TRUE_CAPTIONS], capsys=capsys)[1]) == [
        "metric",
        "count",
        "Bleu_1",
        "Bleu_2",
        "Bleu_3",
        "Bleu_4",
    ]
    for metric, name in (("cider", "CIDEr"), ("rouge", "ROUGE_L")):
        assert run(tmp_path, metric, CAPTIONS, [TRUE_CAPTIONS], capsys=capsys)[1] == {
            "metric": metric,
            "count": 2,
            name: numbers[name],
        }


def test_vqa_in_every_layout(tmp_path, capsys):
    expected = 100 * np.mean([vqa.accuracy(ANSWERS[key], TRUE_ANSWERS[key]) for key in ANSWERS])
    official = {
        "annotations": [
            {"question_id": int(key), "answers": [{"answer": text} for text in some]}
            for key, some in TRUE_ANSWERS.items()
        ]
    }
    vizwiz = [
        {"image": key, "answers": [{"answer": text} for text in some]}
        for key, some in TRUE_ANSWERS.items()
    ]
    for predictions, references in (
        (ANSWERS, TRUE_ANSWERS),
        ([{"question_id": int(key), "answer": text} for key, text in ANSWERS.items()], official),
        ([{"image": key, "answer": text} for key, text in ANSWERS.items()], vizwiz),
    ):
        code, numbers = run(tmp_path, "vqa", predictions, [references], capsys=capsys)
        assert (
            code == 0
            and numbers == {"metric": "vqa", "count": 2, "accuracy": pytest.approx(expected)}
            and 0 < expected < 100
        )


def test_exact_match_is_case_sensitive(tmp_path, capsys):
    rows = [{"id": 1, "answer": "dog"}, {"id": 2, "answer": "two"}]
    for predictions in (
        {"1": "dog", "2": "Two"},
        [{"id": 1, "answer": "dog"}, {"id": 2, "answer": "Two"}],
    ):
        assert (
            run(tmp_path, "exact_match", predictions, [rows], capsys=capsys)[1]["exact_match"] == 50
        )


def test_wups_by_type_of_question(tmp_path, capsys):
    wordnet = f"--wordnet={dictionary.write(tmp_path / 'wordnet')}"
    code, numbers = run(
        tmp_path,
        "wups",
        {"a": "dog", "b": "mat"},
        [{"a": "cat", "b": ["mat", "x"]}],
        wordnet,
        capsys=capsys,
    )
    assert code == 0 and numbers == {
        "metric": "wups",
        "count": 2,
        "wups@0.9": pytest.approx(53),
        "wups@0": pytest.approx(80),
    }
    path = tmp_path / "val.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(
            [
                ["video", "question", "answer", "qid", "type"],
                ["9", "why", "dog", "0", "CW"],
                ["9", "how many", "cat", "1", "DC"],
                ["9", "then", "cat", "2", "TP"],
            ]
        )
    (tmp_path / "predictions.json").write_text(
        json.dumps({"9": {"0": "cat", "1": "dog", "2": "cat"}})
    )
    assert (
        main(
            [
                "score",
                "--metric=wups",
                f"--predictions={tmp_path}/predictions.json",
                f"--references={path}",
                wordnet,
            ]
        )
        == 0
    )
    numbers = json.loads(capsys.readouterr().out)
    assert {name: numbers[name] for name in ("wups@0/CW", "wups@0/DC", "wups@0/TN")} == {
        "wups@0/CW": pytest.approx(60),
        "wups@0/DC": 0.0,
        "wups@0/TN": 100.0,
    }


def test_visdial_takes_both_files(tmp_path, capsys):
    dialogs, dense = layouts.visdial(tmp_path)
    ranks = [
        {"image_id": image, "round_id": number, "ranks": [5, 1, 2, 3, 4]}
        for image in (0, 1)
        for number in (1, 2)
    ]
    code, numbers = run(
        tmp_path,
        "visdial",
        ranks,
        [json.loads(dialogs.read_text()), json.loads(dense.read_text())],
        capsys=capsys,
    )
    assert code == 0 and numbers == {
        "metric": "visdial",
        "count": 4,
        "recall@1": 0.5,
        "recall@5": 1.0,
        "recall@10": 1.0,
        "mean_rank": 1.5,
        "mrr": 0.75,
        "ndcg": 1.0,
    }
    rows = [{"image_id": 0, "round_id": 1, "gt_index": 0}]
    assert run(tmp_path, "visdial", ranks[:1], [rows], capsys=capsys)[1]["mean_rank"] == 5


def test_fid_and_clip_score_take_arrays(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", rng.standard_normal((20, 6)))
    files = [f"--predictions={tmp_path}/a.npy", f"--references={tmp_path}/b.npy"]
    assert (
        main(["score", "--metric=fid", *files]) == 0
        and json.loads(capsys.readouterr().out)["fid"] > 0
    )
    assert (
        main(["score", "--metric=clip_score", *files]) == 0
        and json.loads(capsys.readouterr().out)["count"] == 20
    )
    np.save(tmp_path / "b.npy", np.full((20, 6), np.nan))
    assert (
        main(["score", "--metric=fid", *files]) == 2 and "finite numbers" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("metric", "predictions", "references", "message"),
    [
        ("vqa", {"7": "yes"}, [TRUE_ANSWERS], "predictions.json: nothing for 1 ids (8) of "),
        (
            "vqa",
            ANSWERS | {"9": "no"},
            [TRUE_ANSWERS],
            "references0.json: nothing for 1 ids (9) of ",
        ),
        (
            "vqa",
            [{"question_id": 7, "answer": "a"}] * 2,
            [TRUE_ANSWERS],
            "1 ids occur more than once",
        ),
        ("vqa", [{"caption": "a"}], [TRUE_ANSWERS], "a row has no 'question_id' or 'image'"),
        ("cider", {"1": ["a dog"]}, [TRUE_CAPTIONS], "not predictions"),
        ("cider", [], [TRUE_CAPTIONS], "not predictions"),
        ("cider", CAPTIONS, [TRUE_CAPTIONS] * 2, "takes one file of references; 2 were given"),
        ("wups", {"a": "x"}, [{"a": "x"}], "metric wups needs --wordnet=DIR"),
        (
            "visdial",
            [{"image_id": 1, "round_id": 1, "ranks": [1, 1]}],
            [[{"image_id": 1, "round_id": 1, "gt_index": 0}]],
            "must be 1, 2, ... of its candidates",
        ),
        (
            "visdial",
            [{"image_id": 1, "round_id": 1, "ranks": [1, 2]}],
            [[{"image_id": 1, "round_id": 1, "gt_index": 5}]],
            "is 5, but there are 2",
        ),
        (
            "visdial",
            [{"image_id": 1, "round_id": 1, "ranks": [1, 2]}],
            [[{"image_id": 1, "round_id": 1, "gt_relevance": [1]}]],
            "the relevance of 1 candidates",
        ),
        (
            "visdial",
            [{"image_id": 1, "round_id": 1, "ranks": [1, 2]}],
            [[{"image_id": 1, "round_id": 2, "gt_index": 0}]],
            "nothing for 1 ids (1/2)",
        ),
    ],
)
def test_bad_files_are_one_line_errors(tmp_path, capsys, metric, predictions, references, message):
    code, error = run(tmp_path, metric, predictions, references, capsys=capsys)
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and message in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "malformed JSON, line 1 column 1"),
        ('{"a": ', "malformed JSON, line 1 column 7"),
        ("[" * 100_000, "unreadable JSON"),
        ("[" + "9" * 10_000 + "]", "unreadable JSON"),
        ("\ufeff{}", "malformed JSON"),
    ],
)
def test_malformed_json_is_a_one_line_error(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        score_files.score_files(
            "vqa", score_files.Inputs(str(tmp_path / "a.json"), [str(tmp_path / "a.json")], None)
        )


def test_a_binary_file_and_a_wrong_flag_are_one_line_errors(tmp_path, capsys):
    (tmp_path / "a").write_bytes(b"\xff\x00")
    for flags in (
        ["--metric=vqa", f"--predictions={tmp_path}/a", f"--references={tmp_path}/a"],
        ["--metric=meteor"],
        [],
        ["--metric=vqa", f"--predictions={tmp_path}/none", f"--references={tmp_path}"],
    ):
        assert main(["score", *flags]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1


ODD = (
    None,
    True,
    0,
    -1,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    [],
    {},
    [[]],
    [{}],
    {"a": {}},
    [None],
    10**400,
    {"annotations": 3},
    ["a", 1],
)


def mutated(value, rng):
    """A copy of `value` in which a random part is replaced or deleted."""
    value = copy.deepcopy(value)
    where = None
    at = None
    place = value
    while isinstance(place, (dict, list)) and place and (where is None or rng.random() < 0.7):
        where = place
        at = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        place = where[at]
    if where is None or rng.random() < 0.1:
        return copy.deepcopy(rng.choice(ODD))
    if rng.random() < 0.2:
        del where[at]
    else:
        where[at] = copy.deepcopy(rng.choice(ODD))
    return value


def test_odd_json_is_scored_or_a_one_line_error(tmp_path):
    """Mutated files of every metric give numbers or a UserError of one line."""
    rng = random.Random(0)
    wordnet = str(dictionary.write(tmp_path / "wordnet"))
    ranks = [{"image_id": 1, "round_id": 1, "ranks": [1, 2]}]
    dialogs = {
        "split": "val",
        "data": {
            "questions": ["a"],
            "answers": ["b", "c"],
            "dialogs": [
                {
                    "image_id": 1,
                    "dialog": [
                        {"question": 0, "answer": 1, "answer_options": [0, 1], "gt_index": 1}
                    ],
                }
            ],
        },
    }
    rows = {
        "annotations": [
            {"question_id": int(key), "answers": [{"answer": text} for text in some]}
            for key, some in TRUE_ANSWERS.items()
        ]
    }
    sound = [
        ("captions", CAPTIONS, [TRUE_CAPTIONS]),
        ("vqa", ANSWERS, [rows]),
        ("exact_match", [{"id": 1, "answer": "a"}], [{"1": "a"}]),
        ("wups", {"v": {"0": "dog"}}, [{"v/0": "cat"}]),
        ("visdial", ranks, [dialogs]),
        ("visdial", ranks, [[{"image_id": 1, "round_id": 1, "gt_relevance": [0.5, 0]}]]),
    ]
    scored = 0
    for number in range(600):
        metric, predictions, references = sound[number % len(sound)]
        changed = [predictions, *references]
        which = rng.randrange(len(changed))
        changed[which] = mutated(changed[which], rng)
        for name, value in zip("abc", changed, strict=False):
            (tmp_path / f"{name}.json").write_text(json.dumps(value))
        try:
            score_files.score_files(
                metric,
                score_files.Inputs(
                    str(tmp_path / "a.json"),
                    [str(tmp_path / f"{name}.json") for name in "bc"[: len(changed) - 1]],
                    wordnet,
                ),
            )
            scored += 1
        except UserError as error:
            assert "\n" not in str(error)
    assert 0 < scored < 300
