"""Readers of the benchmarks' annotation files, and writers of their submission formats.

A reader takes paths of files as their authors publish them, and returns the examples in file order.
It raises UserError for a file of another benchmark, or with missing fields. Read next: prompts.py,
score.py.
"""

import csv
import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from emu_jax.config import UserError


class Example(NamedTuple):
    """A question, or an image to describe, with its references."""

    # Unique within the benchmark.
    id: str
    # Name of the image or video file, as the benchmark publishes it.
    media: str
    question: str = ""
    # True answers or captions; empty for a test split whose answers are withheld.
    references: tuple[str, ...] = ()
    # The benchmark's own category of the question.
    question_type: str = ""
    # VisDial: the candidate answers, and the index of the true one.
    candidates: tuple[str, ...] = ()
    true_candidate: int | None = None
    # VisDial: earlier questions with their answers.
    history: tuple[tuple[str, str], ...] = ()


def read_json(path: str | Path) -> Any:
    """Parse a JSON file. Raises UserError if it cannot be read or parsed."""
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
    # For example values nested a thousand deep, or a number with thousands of digits.
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path}: unreadable JSON ({str(error).splitlines()[0]})") from error


def rows(path: str, data: Any, what: str, key: str | None = None) -> list[dict]:
    """The rows of a parsed file: the list in its field `key`, or without a key the file.

    Raises UserError unless the rows are a list of objects. what: what the file should be, for the
    message.
    """
    if key is None:
        found = data
        reason = ": not a list of rows"
    else:
        found = data.get(key) if isinstance(data, dict) else None
        reason = f": it has no list of {key!r}"
    if not isinstance(found, list) or not found or not all(isinstance(row, dict) for row in found):
        raise UserError(f"{path}: not {what}{reason}")
    return found


# Readers: captions


def karpathy(path: str, dataset: str, split: str = "test") -> list[Example]:
    """Captions of Karpathy's dataset_coco.json or dataset_flickr30k.json.

    dataset: "coco" or "flickr30k".
    """
    what = f"Karpathy's dataset_{dataset}.json"
    data = read_json(path)
    images = rows(path, data, what, "images")
    if data.get("dataset") != dataset:
        raise UserError(f"{path}: annotations of {data.get('dataset')!r}, not {what}")
    examples = []
    with _fields_of(path, what):
        for image in images:
            if image["split"] != split:
                continue
            id = image["cocoid" if dataset == "coco" else "imgid"]
            names = (image.get("filepath"), image["filename"])
            captions = tuple(sentence["raw"] for sentence in image["sentences"])
            examples.append(Example(str(id), "/".join(filter(None, names)), references=captions))
        if not examples:
            splits = ", ".join(sorted({image["split"] for image in images}))
            raise UserError(f"{path}: no image of split {split!r}; there are {splits}")
    return examples


def nocaps(path: str) -> list[Example]:
    """NoCaps' nocaps_val_4500_captions.json; the question type is the image's domain.

    The annotations of the test split are not published.
    """
    what = "NoCaps' image info and captions"
    data = read_json(path)
    images = rows(path, data, what, "images")
    captions: dict[Any, list[str]] = {}
    examples = []
    with _fields_of(path, what):
        for row in data.get("annotations", []):
            captions.setdefault(row["image_id"], []).append(row["caption"])
        for image in images:
            examples.append(
                Example(
                    str(image["id"]),
                    image["file_name"],
                    references=tuple(captions.get(image["id"], ())),
                    question_type=image["domain"],
                )
            )
    return examples


def coco_prompts(path: str, count: int = 30_000) -> list[Example]:
    """Text-to-image prompts: `count` random captions from COCO's captions_val2014.json.

    They are the same captions in the same order every time.
    """
    what = "COCO's captions"
    data = read_json(path)
    captions = rows(path, data, what, "annotations")
    images = rows(path, data, what, "images")
    examples = []
    with _fields_of(path, what):
        names = {image["id"]: image["file_name"] for image in images}
        for index in np.random.default_rng(0).permutation(len(captions))[:count]:
            row = captions[index]
            caption = row["caption"].strip()
            examples.append(Example(str(row["id"]), names[row["image_id"]], references=(caption,)))
    return examples


# Readers: questions about images


def vqav2(questions: str, annotations: str | None = None) -> list[Example]:
    """VQAv2's questions file, with the answers of its annotations file if there is one."""
    return _vqa(questions, annotations, "VQAv2", raw=False)


def okvqa(questions: str, annotations: str | None = None) -> list[Example]:
    """OK-VQA's questions file, with the answers of its annotations file if there is one.

    The layout is VQA's, with a raw_answer next to each stemmed answer. References are the stemmed
    answers, as in the official evaluation.
    """
    return _vqa(questions, annotations, "OK-VQA", raw=True)


def _vqa(questions: str, annotations: str | None, benchmark: str, *, raw: bool) -> list[Example]:
    what = f"{benchmark}'s questions"
    data = read_json(questions)
    question_rows = rows(questions, data, what, "questions")
    answers: dict[Any, dict] = {}
    if annotations:
        answers = _vqa_answers(annotations, benchmark, raw=raw)
        unanswered = []
        for row in question_rows:
            if row["question_id"] not in answers:
                unanswered.append(str(row["question_id"]))
        if unanswered:
            raise UserError(
                f"{annotations}: no answers to {len(unanswered)} questions of {questions}: "
                f"{', '.join(unanswered[:8])}{', ...' if unanswered[8:] else ''}"
            )
    examples = []
    with _fields_of(questions, what):
        # The questions of test-dev2015 are about images whose names contain test2015.
        split = data["data_subtype"].replace("-dev", "")
        for row in question_rows:
            annotation = answers.get(row["question_id"], {})
            examples.append(
                Example(
                    str(row["question_id"]),
                    f"COCO_{split}_{row['image_id']:012}.jpg",
                    row["question"],
                    tuple(answer["answer"] for answer in annotation.get("answers", ())),
                    annotation.get("answer_type", ""),
                )
            )
    return examples


def _vqa_answers(path: str, benchmark: str, *, raw: bool) -> dict[Any, dict]:
    """Annotations by question_id. raw: whether this benchmark's answers have a raw_answer."""
    what = f"{benchmark}'s annotations"
    by_question = {}
    with _fields_of(path, what):
        for row in rows(path, read_json(path), what, "annotations"):
            if any(("raw_answer" in answer) != raw for answer in row["answers"]):
                verb = "lack" if raw else "have"
                raise UserError(f"{path}: not {what}: its answers {verb} a raw_answer")
            by_question[row["question_id"]] = row
    return by_question


def vizwiz(path: str) -> list[Example]:
    """VizWiz-VQA's train.json, val.json or test.json; ids are the names of the images."""
    what = "VizWiz-VQA's annotations"
    examples = []
    with _fields_of(path, what):
        for row in rows(path, read_json(path), what):
            answers = tuple(answer["answer"] for answer in row.get("answers", ()))
            image = row["image"]
            type = row.get("answer_type", "")
            examples.append(Example(image, image, row["question"], answers, type))
    return examples


def mmvet(path: str) -> list[Example]:
    """MM-Vet's mm-vet.json.

    References are meant for its judge: they have parts separated by <AND> and <OR>.
    """
    what = "MM-Vet's questions"
    data = read_json(path)
    if not isinstance(data, dict) or not data:
        raise UserError(f"{path}: not {what}")
    examples = []
    with _fields_of(path, what):
        for id, row in data.items():
            capabilities = ", ".join(row["capability"])
            answers = (row["answer"],)
            examples.append(Example(id, row["imagename"], row["question"], answers, capabilities))
    return examples


def visdial(path: str) -> list[Example]:
    """VisDial 1.0's dialogs: one example per round, with the id "IMAGE_ID/ROUND".

    Rounds count from 1. In the test split, only the last round of a dialog is an example.
    """
    what = "VisDial 1.0's dialogs"
    data = read_json(path)
    if not isinstance(data, dict) or not isinstance(data.get("data"), dict):
        raise UserError(f"{path}: not {what}")
    examples = []
    with _fields_of(path, what):
        for dialog in data["data"]["dialogs"]:
            image = f"VisualDialog_{data['split']}2018_{dialog['image_id']:012}.jpg"
            examples += _visdial_rounds(dialog, image, data["data"])
    return examples


def _visdial_rounds(dialog: dict, image: str, texts: dict) -> list[Example]:
    """The rounds of a dialog that have candidates. texts: the file's questions and answers."""
    examples = []
    history: list[tuple[str, str]] = []
    for number, turn in enumerate(dialog["dialog"], 1):
        question = texts["questions"][turn["question"]]
        candidates = tuple(texts["answers"][index] for index in turn.get("answer_options", ()))
        true = turn.get("gt_index")
        answer = None
        if "answer" in turn:
            answer = texts["answers"][turn["answer"]]
        elif "gt_index" in turn:
            answer = candidates[turn["gt_index"]]
        if candidates:
            if true is not None and true not in range(len(candidates)):
                raise ValueError(f"gt_index={true!r} is not one of {len(candidates)} candidates")
            examples.append(
                Example(
                    f"{dialog['image_id']}/{number}",
                    image,
                    question,
                    () if answer is None else (answer,),
                    candidates=candidates,
                    true_candidate=true,
                    history=tuple(history),
                )
            )
        # Only the last round of a test dialog has no answer.
        if answer is not None:
            history.append((question, answer))
    return examples


# Readers: questions about videos


def video_qa(path: str, benchmark: str) -> list[Example]:
    """MSVD-QA's or MSRVTT-QA's questions; benchmark: "msvd" or "msrvtt"."""
    what = {"msvd": "MSVD-QA's", "msrvtt": "MSRVTT-QA's"}[benchmark] + " questions"
    name = {"msvd": "vid{}.avi", "msrvtt": "video{}.mp4"}[benchmark]
    question_rows = rows(path, read_json(path), what)
    examples = []
    with _fields_of(path, what):
        if any(("category_id" in row) != (benchmark == "msrvtt") for row in question_rows):
            verb = "have a" if benchmark == "msvd" else "lack the"
            raise UserError(f"{path}: not {what}: rows {verb} category_id")
        for row in question_rows:
            video = name.format(row["video_id"])
            examples.append(Example(str(row["id"]), video, row["question"], (row["answer"],)))
    return examples


def nextqa(path: str, more: str | None = None) -> list[Example]:
    """NExT-QA's open-ended val.csv or test.csv; ids are "VIDEO/QID".

    more: add_reference_answer_*.json of the benchmark, which has second answers to some questions.
    """
    what = "NExT-QA's open-ended questions (a .csv with video, qid, question, answer and type)"
    question_rows = _csv_rows(path, what)
    added = read_json(more) if more else {}
    examples = []
    with _fields_of(more or path, what):
        for row in question_rows:
            video = row["video"]
            answers = [row["answer"]]
            if video in added:
                answers.append(added[video][row["qid"]])
            id = f"{video}/{row['qid']}"
            question = row["question"]
            examples.append(Example(id, f"{video}.mp4", question, tuple(answers), row["type"]))
    return examples


def _csv_rows(path: str, what: str) -> list[dict]:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            found = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"cannot read {path!r}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not {what}") from error
    if found and "a0" in found[0]:
        raise UserError(f"{path}: not {what}; these are multiple-choice questions")
    if not found or not {"video", "qid", "question", "answer", "type"} <= set(found[0]):
        raise UserError(f"{path}: not {what}")
    return found


# Submissions: predictions by example id, converted to the format of each benchmark's server


def caption_results(captions: Mapping[str, str]) -> list[dict]:
    """Results of COCO, NoCaps and Flickr30k."""
    return [{"image_id": int(id), "caption": caption} for id, caption in captions.items()]


def vqa_results(answers: Mapping[str, str]) -> list[dict]:
    """Results of VQAv2 and OK-VQA."""
    return [{"question_id": int(id), "answer": answer} for id, answer in answers.items()]


def vizwiz_results(answers: Mapping[str, str]) -> list[dict]:
    """Results of VizWiz, whose ids are image names."""
    return [{"image": id, "answer": answer} for id, answer in answers.items()]


def visdial_results(ranks: Mapping[str, Sequence[int]]) -> list[dict]:
    """Results of VisDial; `ranks[id][k]` is the rank of candidate k, from 1."""
    results = []
    for id, round_ranks in ranks.items():
        image, number = map(int, id.split("/")[:2])
        ints = [int(rank) for rank in round_ranks]
        results.append({"image_id": image, "round_id": number, "ranks": ints})
    return results


def video_qa_results(answers: Mapping[str, str]) -> list[dict]:
    """Rows of MSVD-QA and MSRVTT-QA with the predicted answer."""
    return [{"id": int(id), "answer": answer} for id, answer in answers.items()]


def nextqa_results(answers: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Results of NExT-QA: {video: {qid: answer}}."""
    results: dict[str, dict[str, str]] = {}
    for id, answer in answers.items():
        video, _, qid = id.rpartition("/")
        results.setdefault(video, {})[qid] = answer
    return results


def mmvet_results(answers: Mapping[str, str]) -> dict[str, str]:
    """Answers in the format that MM-Vet's judge reads."""
    return dict(answers)


@contextmanager
def _fields_of(path: str, what: str) -> Generator[None]:
    """Turn the errors of missing fields and fields of wrong types into a UserError."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"{path}: not {what}: a row has no {error}") from error
    except (TypeError, AttributeError, IndexError, ValueError, OverflowError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not {what}: {reason}") from error
