"""The official annotation files of the benchmarks, in their own layouts, as examples; and
predictions in each benchmark's submission format.

A reader takes paths and returns examples in the file's order. A file of another benchmark is one
clear error. Read next: prompts.py, score.py.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from emu_jax.config import UserError


class Example(NamedTuple):
    # unique within the benchmark; what predictions are keyed by
    id: str
    # file name of the image or video, as the benchmark ships it
    picture: str
    question: str = ""
    # references; none in a test split whose answers are withheld
    answers: tuple[str, ...] = ()
    # the benchmark's own type of question
    kind: str = ""
    # VisDial: candidates
    options: tuple[str, ...] = ()
    # VisDial: the true one among them
    truth: int | None = None
    # VisDial: earlier questions and answers
    history: tuple[tuple[str, str], ...] = ()


def load(path: str | Path) -> Any:
    """The contents of a JSON file. Raises UserError."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file (byte {error.start} is not UTF-8)") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: malformed JSON, line {error.lineno} column {error.colno}: {error.msg}"
        ) from error
    # nested a thousand deep; a number of five thousand digits
    except (RecursionError, ValueError) as error:
        raise UserError(
            f"{path}: no JSON that can be read ({str(error).splitlines()[0]})"
        ) from error


def karpathy(path: str, dataset: str, split: str = "test") -> list[Example]:
    """COCO ("coco") and Flickr30k ("flickr30k") captions: Karpathy's dataset_coco.json,
    dataset_flickr30k.json.
    """
    data = load(path)
    what = f"Karpathy's dataset_{dataset}.json"
    images = _list(path, data, "images", what)
    if data.get("dataset") != dataset:
        raise UserError(f"{path}: annotations of {data.get('dataset')!r}, not {what}")
    with fields_of(path, what):
        kept = [image for image in images if image["split"] == split]
        if not kept:
            raise UserError(
                f"{path}: no image of split {split!r}; there are {', '.join(sorted({image['split'] for image in images}))}"
            )
        return [
            Example(
                str(image["cocoid" if dataset == "coco" else "imgid"]),
                "/".join(filter(None, (image.get("filepath"), image["filename"]))),
                answers=tuple(sentence["raw"] for sentence in image["sentences"]),
            )
            for image in kept
        ]


def coco_prompts(path: str, count: int = 30_000) -> list[Example]:
    """COCO's captions_val2014.json as prompts of text to image: `count` of its captions, always the
    same, in random order.
    """
    data = load(path)
    what = "COCO's captions"
    rows = _list(path, data, "annotations", what)
    images = _list(path, data, "images", what)
    with fields_of(path, what):
        names = {image["id"]: image["file_name"] for image in images}
        chosen = np.random.default_rng(0).permutation(len(rows))[:count]
        return [
            Example(str(row["id"]), names[row["image_id"]], answers=(row["caption"].strip(),))
            for row in (rows[number] for number in chosen)
        ]


def nocaps(path: str) -> list[Example]:
    """NoCaps' nocaps_val_4500_captions.json; its domain is the kind. The test split has no
    annotations.
    """
    data = load(path)
    what = "NoCaps' image info and captions"
    images = _list(path, data, "images", what)
    with fields_of(path, what):
        captions: dict[Any, list[str]] = {}
        for row in data.get("annotations", []):
            captions.setdefault(row["image_id"], []).append(row["caption"])
        return [
            Example(
                str(image["id"]),
                image["file_name"],
                answers=tuple(captions.get(image["id"], ())),
                kind=image["domain"],
            )
            for image in images
        ]


def vqav2(questions: str, annotations: str | None = None) -> list[Example]:
    """VQAv2's questions file, and its annotations file where there is one."""
    return _vqa(questions, annotations, "VQAv2", raw=False)


def okvqa(questions: str, annotations: str | None = None) -> list[Example]:
    """OK-VQA's questions and annotations: VQA's layout, with raw answers beside the stemmed ones
    that count.
    """
    return _vqa(questions, annotations, "OK-VQA", raw=True)


def vizwiz(path: str) -> list[Example]:
    """VizWiz-VQA's train.json, val.json or test.json; an example's id is its image's name."""
    what = "VizWiz-VQA's annotations"
    with fields_of(path, what):
        return [
            Example(
                row["image"],
                row["image"],
                row["question"],
                tuple(answer["answer"] for answer in row.get("answers", ())),
                row.get("answer_type", ""),
            )
            for row in _list(path, load(path), None, what)
        ]


def visdial(path: str) -> list[Example]:
    """VisDial 1.0's dialogs, a round an example, "IMAGE_ID/ROUND" from round 1; a test dialog has
    its last round alone.
    """
    data = load(path)
    what = "VisDial 1.0's dialogs"
    if not isinstance(data, dict) or not isinstance(data.get("data"), dict):
        raise UserError(f"{path}: not {what}")
    with fields_of(path, what):
        questions = data["data"]["questions"]
        answers = data["data"]["answers"]
        out = []
        for dialog in data["data"]["dialogs"]:
            history: list[tuple[str, str]] = []
            for number, turn in enumerate(dialog["dialog"], 1):
                question = questions[turn["question"]]
                options = tuple(answers[k] for k in turn.get("answer_options", ()))
                answer = (
                    answers[turn["answer"]]
                    if "answer" in turn
                    else options[turn["gt_index"]]
                    if "gt_index" in turn
                    else None
                )
                if options:
                    if (truth := turn.get("gt_index")) is not None and truth not in range(
                        len(options)
                    ):
                        raise ValueError(
                            f"gt_index={truth!r} is none of the {len(options)} candidates"
                        )
                    picture = f"VisualDialog_{data['split']}2018_{dialog['image_id']:012}.jpg"
                    out.append(
                        Example(
                            f"{dialog['image_id']}/{number}",
                            picture,
                            question,
                            () if answer is None else (answer,),
                            options=options,
                            truth=truth,
                            history=tuple(history),
                        )
                    )
                history.append((question, answer))
        return out


def video_qa(path: str, benchmark: str) -> list[Example]:
    """MSVD-QA ("msvd") and MSRVTT-QA ("msrvtt"), whose rows have a category too."""
    what = {"msvd": "MSVD-QA's", "msrvtt": "MSRVTT-QA's"}[benchmark] + " questions"
    rows = _list(path, load(path), None, what)
    with fields_of(path, what):
        if any(("category_id" in row) != (benchmark == "msrvtt") for row in rows):
            raise UserError(
                f"{path}: not {what}: rows {'have a' if benchmark == 'msvd' else 'lack the'} category_id"
            )
        name = "video{}.mp4" if benchmark == "msrvtt" else "vid{}.avi"
        return [
            Example(str(row["id"]), name.format(row["video_id"]), row["question"], (row["answer"],))
            for row in rows
        ]


def nextqa(path: str, more: str | None = None) -> list[Example]:
    """NExT-QA's open-ended val.csv or test.csv, "VIDEO/QID", and its
    add_reference_answer_*.json.
    """
    what = "NExT-QA's open-ended questions (a .csv with video, qid, question, answer and type)"
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"cannot read {path!r}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not {what}") from error
    if (
        not rows
        or not {"video", "qid", "question", "answer", "type"} <= set(rows[0])
        or "a0" in rows[0]
    ):
        raise UserError(
            f"{path}: not {what}"
            + ("; these are multiple-choice questions" if rows and "a0" in rows[0] else "")
        )
    added = load(more) if more else {}
    with fields_of(more or path, what):
        return [
            Example(
                f"{row['video']}/{row['qid']}",
                f"{row['video']}.mp4",
                row["question"],
                (
                    row["answer"],
                    *([added[row["video"]][row["qid"]]] if row["video"] in added else []),
                ),
                row["type"],
            )
            for row in rows
        ]


def mmvet(path: str) -> list[Example]:
    """MM-Vet's mm-vet.json. Answers are for its judge: parts separated by <AND> and <OR>."""
    data = load(path)
    what = "MM-Vet's questions"
    if not isinstance(data, dict) or not data:
        raise UserError(f"{path}: not {what}")
    with fields_of(path, what):
        return [
            Example(
                key,
                row["imagename"],
                row["question"],
                (row["answer"],),
                ", ".join(row["capability"]),
            )
            for key, row in data.items()
        ]


def caption_results(predictions: Mapping[str, str]) -> list[dict]:
    """COCO's, NoCaps' and Flickr30k's results."""
    return [{"image_id": int(key), "caption": text} for key, text in predictions.items()]


def vqa_results(predictions: Mapping[str, str]) -> list[dict]:
    """VQAv2's and OK-VQA's results."""
    return [{"question_id": int(key), "answer": text} for key, text in predictions.items()]


def vizwiz_results(predictions: Mapping[str, str]) -> list[dict]:
    return [{"image": key, "answer": text} for key, text in predictions.items()]


def visdial_results(ranks: Mapping[str, Sequence[int]]) -> list[dict]:
    """`ranks[id][k]` is the place, from 1, of candidate k."""
    return [
        {
            "image_id": int(key.split("/")[0]),
            "round_id": int(key.split("/")[1]),
            "ranks": list(map(int, some)),
        }
        for key, some in ranks.items()
    ]


def video_qa_results(predictions: Mapping[str, str]) -> list[dict]:
    """MSVD-QA's and MSRVTT-QA's rows with the answer given."""
    return [{"id": int(key), "answer": text} for key, text in predictions.items()]


def nextqa_results(predictions: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """NExT-QA's {video: {qid: answer}}."""
    out: dict[str, dict[str, str]] = {}
    for key, text in predictions.items():
        video, _, number = key.rpartition("/")
        out.setdefault(video, {})[number] = text
    return out


def mmvet_results(predictions: Mapping[str, str]) -> dict[str, str]:
    """What MM-Vet's judge reads."""
    return dict(predictions)


def _vqa(questions: str, annotations: str | None, benchmark: str, *, raw: bool) -> list[Example]:
    what = f"{benchmark}'s questions"
    data = load(questions)
    rows = _list(questions, data, "questions", what)
    marked: dict[Any, dict] = {}
    if annotations:
        with fields_of(annotations, f"{benchmark}'s annotations"):
            for row in _list(
                annotations, load(annotations), "annotations", f"{benchmark}'s annotations"
            ):
                if any(("raw_answer" in answer) != raw for answer in row["answers"]):
                    raise UserError(
                        f"{annotations}: not {benchmark}'s annotations: its answers {'have' if not raw else 'lack'} a raw_answer"
                    )
                marked[row["question_id"]] = row
        if missing := [str(row["question_id"]) for row in rows if row["question_id"] not in marked]:
            raise UserError(
                f"{annotations}: no answers to {len(missing)} questions of {questions}: "
                f"{', '.join(missing[:8])}{', ...' if missing[8:] else ''}"
            )
    with fields_of(questions, what):

        def of(row):
            return marked.get(row["question_id"], {})

        # test-dev2015 is a part of test2015
        pictures = data["data_subtype"].replace("-dev", "")
        return [
            Example(
                str(row["question_id"]),
                f"COCO_{pictures}_{row['image_id']:012}.jpg",
                row["question"],
                tuple(answer["answer"] for answer in of(row).get("answers", ())),
                of(row).get("answer_type", ""),
            )
            for row in rows
        ]


def _list(path: str, data: Any, key: str | None, what: str) -> list[dict]:
    rows = data if key is None else data.get(key) if isinstance(data, dict) else None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(
            f"{path}: not {what}"
            + (f": it has no list of {key!r}" if key else ": not a list of rows")
        )
    return rows


class fields_of:
    """A field that is missing or of another type, as one error that names the file."""

    def __init__(self, path: str, what: str):
        self.path = path
        self.what = what

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, KeyError):
            raise UserError(f"{self.path}: not {self.what}: a row has no {error}") from error
        if isinstance(error, (TypeError, AttributeError, IndexError, ValueError, OverflowError)):
            raise UserError(
                f"{self.path}: not {self.what}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            ) from error
