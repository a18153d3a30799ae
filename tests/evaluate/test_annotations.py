"""Readers of the official layouts, errors for files of another benchmark, and submissions."""

import json

import pytest

from emu_jax.config import UserError
from emu_jax.evaluate import annotations
from tests.support import layouts


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths of the annotation files of each benchmark."""
    root = tmp_path_factory.mktemp("data")
    made = {
        "coco": layouts.karpathy(root / "coco", "coco"),
        "flickr30k": layouts.karpathy(root / "f", "flickr30k"),
        "nocaps": layouts.nocaps(root / "n"),
        "vqav2": layouts.vqa(root / "v", "v2_"),
        "okvqa": layouts.vqa(root / "o", ""),
        "vizwiz": layouts.vizwiz(root / "z"),
        "visdial": layouts.visdial(root / "d")[0],
        "msvd": layouts.video_qa(root / "m", "msvd"),
        "msrvtt": layouts.video_qa(root / "r", "msrvtt"),
        "nextqa": layouts.nextqa(root / "x"),
        "mmvet": layouts.mmvet(root / "mm"),
    }
    return {
        name: tuple(map(str, paths)) if isinstance(paths, tuple) else (str(paths),)
        for name, paths in made.items()
    }


READERS = {
    "coco": lambda path: annotations.karpathy(path, "coco"),
    "flickr30k": lambda path: annotations.karpathy(path, "flickr30k"),
    "nocaps": annotations.nocaps,
    "vqav2": annotations.vqav2,
    "okvqa": annotations.okvqa,
    "vizwiz": annotations.vizwiz,
    "visdial": annotations.visdial,
    "msvd": lambda path: annotations.video_qa(path, "msvd"),
    "msrvtt": lambda path: annotations.video_qa(path, "msrvtt"),
    "nextqa": annotations.nextqa,
    "mmvet": annotations.mmvet,
}


def test_examples(files):
    read = {name: READERS[name](*files[name]) for name in READERS}
    first = {name: examples[0] for name, examples in read.items()}
    assert first["coco"][:2] == ("100", "val2014/coco_000000000000.jpg") and len(read["coco"]) == 3
    assert first["coco"].references == ("A dog runs number 0.", "A dog sits number 0.")
    assert first["flickr30k"][:2] == ("0", "flickr30k_000000000000.jpg")
    assert first["nocaps"] == annotations.Example(
        "0",
        "00.jpg",
        references=("A cat 0 on a mat, 0.", "A cat 1 on a mat, 0."),
        question_type="in-domain",
    )
    for name in ("vqav2", "okvqa"):
        assert first[name] == annotations.Example(
            "1000",
            "COCO_val2014_000000000000.jpg",
            "Is there a dog 0?",
            tuple(layouts.ANSWERS),
            "yes/no",
        )
    assert (
        first["vizwiz"].id == first["vizwiz"].media == "VizWiz_val_00000000.jpg"
        and first["vizwiz"].references == ("unanswerable",) * 10
    )
    second = read["visdial"][1]
    assert (second.id, second.media, second.true_candidate) == (
        "0/2",
        "VisualDialog_val2018_000000000000.jpg",
        2,
    )
    assert (
        second.history == (("is it red", "answer 1"),)
        and second.question == "how many"
        and len(second.candidates) == 5
    )
    assert (
        first["msvd"][:4] == ("0", "vid1.avi", "what runs 0?", ("dog",))
        and first["msrvtt"].media == "video1.mp4"
    )
    assert first["nextqa"] == annotations.Example(
        "400/0", "400.mp4", "why does the dog run 0?", ("to eat",), "CW"
    )
    assert first["mmvet"] == annotations.Example(
        "v1_0", "v1_0.png", "What is x?", ("-1<AND>-5",), "ocr, math"
    )


def test_nextqa_second_references(files, tmp_path):
    more = layouts.put(tmp_path / "more.json", {"400": {"0": "chase cat", "2": "x"}})
    examples = annotations.nextqa(files["nextqa"][0], str(more))
    assert [example.references for example in examples] == [
        ("to eat", "chase cat"),
        ("to eat",),
        ("to eat", "x"),
    ]


def test_a_test_split_has_no_answers(files, tmp_path):
    questions = json.loads(open(files["vqav2"][0]).read()) | {"data_subtype": "test-dev2015"}
    first = annotations.vqav2(str(layouts.put(tmp_path / "q.json", questions)))[0]
    assert first.references == () and first.media == "COCO_test2015_000000000000.jpg"


@pytest.mark.parametrize("name", READERS)
def test_a_file_of_another_benchmark_is_a_one_line_error(files, name):
    for other, paths in files.items():
        if other != name:
            with pytest.raises(UserError, match="not |malformed JSON|no image of split") as caught:
                READERS[name](*paths[:1] if name not in ("vqav2", "okvqa") else paths)
            assert "\n" not in str(caught.value) and paths[0].split("/")[-2] in str(caught.value)


@pytest.mark.parametrize(
    ("read", "value", "message"),
    [
        (
            lambda path: annotations.karpathy(path, "coco", "val"),
            {"dataset": "coco", "images": [{"split": "test"}]},
            "of split 'val'; there are test",
        ),
        (
            lambda path: annotations.karpathy(path, "coco"),
            {"dataset": "coco", "images": [{"split": "test", "filename": "a"}]},
            "a row has no 'cocoid'",
        ),
        (annotations.vizwiz, [{"image": "a"}], "a row has no 'question'"),
        (annotations.mmvet, {}, "not MM-Vet's questions"),
        (
            annotations.visdial,
            {
                "split": "val",
                "data": {
                    "questions": [],
                    "answers": [],
                    "dialogs": [{"image_id": 1, "dialog": [{"question": 3}]}],
                },
            },
            "index out of range",
        ),
    ],
)
def test_a_missing_field_is_a_one_line_error(tmp_path, read, value, message):
    with pytest.raises(UserError, match=message):
        read(str(layouts.put(tmp_path / "a.json", value)))


def test_submissions():
    assert annotations.caption_results({"7": "a dog"}) == [{"image_id": 7, "caption": "a dog"}]
    assert annotations.vqa_results({"7": "dog"}) == [{"question_id": 7, "answer": "dog"}]
    assert annotations.vizwiz_results({"a.jpg": "dog"}) == [{"image": "a.jpg", "answer": "dog"}]
    assert annotations.visdial_results({"5/2": [2, 1]}) == [
        {"image_id": 5, "round_id": 2, "ranks": [2, 1]}
    ]
    assert annotations.video_qa_results({"3": "dog"}) == [{"id": 3, "answer": "dog"}]
    assert annotations.nextqa_results({"9/0": "a", "9/1": "b"}) == {"9": {"0": "a", "1": "b"}}
    assert annotations.mmvet_results({"v1_0": "x"}) == {"v1_0": "x"}
