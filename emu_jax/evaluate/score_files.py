"""`python -m emu_jax.evaluate score`: read the files of each metric, and score them.

This needs no model, except for the CLIP score of image files. Read next: score.py.
"""

import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from emu_jax.config import UserError
from emu_jax.evaluate import annotations, score
from emu_jax.evaluate.annotations import read_json, rows
from emu_jax.evaluate.metrics import clip_score, fid, wordnet
from emu_jax.evaluate.metrics.wordnet import WordNet

LAYOUTS = """\
metrics, and the layouts of their files (JSON unless another format is given; ids are compared as
text):

  cider, bleu, rouge, captions (all three)   CIDEr-D, BLEU and ROUGE-L as coco-caption prints them
    predictions  {id: caption}
                 or COCO's results [{"image_id", "caption"}]
    references   {id: [caption, ...]}
                 or COCO's {"annotations": [{"image_id", "caption"}]}

  vqa   accuracy in percent, normalised as in GT-Vision-Lab/VQA's vqaEval.py
    predictions  {id: answer}
                 or VQA's results [{"question_id", "answer"}]
                 or VizWiz's [{"image", "answer"}]
    references   {id: [answer, ...]}
                 or VQA's {"annotations": [{"question_id", "answers": [{"answer"}, ...]}]}
                 or VizWiz's [{"image", "answers": [{"answer"}, ...]}]

  exact_match   percentage of answers that equal a reference, character by character
    predictions  {id: answer} or [{"id", "answer"}]
    references   {id: answer}, {id: [answer, ...]}
                 or MSVD-QA's and MSRVTT-QA's [{"id", "answer"}]

  wups   percent, at thresholds 0 and 0.9; needs --wordnet=DIR. Texts are compared as they are, or
         with --tagger=DIR as lemmas without stop words, like NExT-QA's official script. References
         in a .csv also give scores by question type, where DB and DC are scored by exact match.
    predictions  {id: answer} or NExT-QA's {video: {qid: answer}}
    references   {id: answer}, {id: [answer, ...]}
                 or NExT-QA's .csv, optionally followed by its add_reference_answer_*.json

  visdial   ndcg from a file of graded relevance; recall@1, @5, @10, mean_rank and mrr from a file
            of true answers; give both files to get all of them
    predictions  [{"image_id", "round_id", "ranks": [rank of candidate 0, from 1, ...]}]
    references   [{"image_id", "round_id", "gt_relevance": [...]}], visdial_1.0_val.json,
                 or rows with "gt_index"

  fid   Frechet distance of two sets of images
    each         .npz with mu and sigma, or .npy with Inception features [images, 2048]

  clip_score   100 * mean of max(cosine, 0) of CLIP's features of an image and its caption (the
               mean over several captions of an image); needs --clip=DIR
    predictions  {id: path of an image, relative to this file} (such as coco-t2i's submission.json)
                 or a folder of images ID.png, ID.jpg, ...
    references   {id: caption} or {id: [caption, ...]}
    without --clip: two .npy files with features [n, C], of the images and of their captions"""

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Inputs(NamedTuple):
    """Files of predictions and references, and the folders that some metrics need."""

    predictions: str
    references: Sequence[str]
    wordnet: str | None = None
    clip: str | None = None
    tagger: str | None = None


def score_files(metric: str, inputs: Inputs) -> dict[str, Any]:
    """The numbers of `metric`, a key of METRICS. Raises UserError for files in another layout."""
    return {"metric": metric} | METRICS[metric](inputs)


def read_relevance(path: str) -> tuple[dict[str, list[float]], dict[str, int]]:
    """(graded relevance of the candidates, index of the true candidate) by round of VisDial.

    Rows of the file have gt_relevance, gt_index or both. Raises UserError for other files.
    """
    what = "VisDial's annotations"
    relevance: dict[str, list[float]] = {}
    true: dict[str, int] = {}
    for row in rows(path, read_json(path), what):
        id = _round_id(path, row, what)
        graded = row.get("gt_relevance", row.get("relevance"))
        if graded is None and "gt_index" not in row:
            raise UserError(f'{path}: not {what}: a row has neither "gt_relevance" nor "gt_index"')
        if graded is not None:
            if not isinstance(graded, list) or not graded or not all(map(_is_relevance, graded)):
                raise UserError(
                    f"{path}: not {what}: the relevance of round {id} is not a list of numbers"
                )
            relevance[id] = [float(value) for value in graded]
        if "gt_index" in row:
            if not _is_int(row["gt_index"]):
                raise UserError(
                    f"{path}: not {what}: the gt_index of round {id} is {row['gt_index']!r}"
                )
            true[id] = row["gt_index"]
    return relevance, true


# Metrics: each function reads its files, checks that they belong together, and scores them


def _captions(metrics: Sequence[str], inputs: Inputs) -> dict:
    predictions = _read_texts(inputs.predictions, ("image_id",), "caption")
    references = _read_references(inputs.references, ("image_id",), "caption")
    _check_same_ids(inputs, predictions, references)
    return score.caption_scores(predictions, references, metrics).numbers


def _vqa(inputs: Inputs) -> dict:
    keys = ("question_id", "image")
    predictions = _read_texts(inputs.predictions, keys, "answer")
    references = _read_references(inputs.references, keys, "answer")
    _check_same_ids(inputs, predictions, references)
    return score.vqa_scores(predictions, references).numbers


def _exact_match(inputs: Inputs) -> dict:
    predictions = _read_texts(inputs.predictions, ("id",), "answer")
    references = _read_references(inputs.references, ("id",), "answer")
    _check_same_ids(inputs, predictions, references)
    return score.exact_match_scores(predictions, references).numbers


def _wups(inputs: Inputs) -> dict:
    if not inputs.wordnet:
        raise UserError(f"metric wups needs {wordnet.WHERE}")
    dictionary = WordNet(inputs.wordnet)
    types: dict[str, str] = {}
    if inputs.references[0].endswith(".csv"):
        if len(inputs.references) > 2:
            raise UserError(
                "NExT-QA's references are a .csv and its add_reference_answer_*.json; "
                f"{len(inputs.references)} files were given"
            )
        examples = annotations.nextqa(*inputs.references)
        references = {example.id: list(example.references) for example in examples}
        types = {example.id: example.question_type for example in examples}
    else:
        references = _read_references(inputs.references, ("id",), "answer")
    predictions = _read_texts(inputs.predictions, ("id",), "answer")
    _check_same_ids(inputs, predictions, references)
    if inputs.tagger:
        predictions, references = score.lemmatize_answers(
            dictionary, inputs.tagger, predictions, references
        )
    return score.wups_scores(dictionary, predictions, references, types).numbers


def _visdial(inputs: Inputs) -> dict:
    path = inputs.predictions
    what = 'a list of {"image_id", "round_id", "ranks"}'
    ranks = {}
    for row in rows(path, read_json(path), what):
        id = _round_id(path, row, what)
        ranks[id] = _field(path, row, "ranks", what)
    relevance, true = _read_visdial_references(inputs.references)
    if len(inputs.references) == 1:
        _check_same_ids(inputs, ranks, relevance | true)
    missing = [id for id in relevance | true if id not in ranks]
    if missing:
        raise UserError(f"{path}: no ranks of {_shortened(missing, 'rounds')}")
    for id, round_ranks in ranks.items():
        if not _is_ranking(round_ranks):
            raise UserError(
                f"{path}: the ranks of round {id} must be 1, 2, ... of its candidates, each once"
            )
        count = len(round_ranks)
        if id in relevance and len(relevance[id]) != count:
            raise UserError(
                f"{path}: round {id} has {count} ranks, but the relevance of "
                f"{len(relevance[id])} candidates is given"
            )
        if id in true and not (_is_int(true[id]) and 0 <= true[id] < count):
            raise UserError(
                f"{inputs.references[0]}: the true candidate of round {id} is {true[id]!r}, "
                f"but there are {count} candidates"
            )
    return score.rank_scores(ranks, relevance, true).numbers


def _read_visdial_references(
    paths: Sequence[str],
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Relevance and true candidates by round, from files in either of VisDial's layouts."""
    relevance: dict[str, list[float]] = {}
    true: dict[str, int] = {}
    for path in paths:
        if isinstance(read_json(path), dict):
            for example in annotations.visdial(path):
                if example.true_candidate is not None:
                    true[example.id] = example.true_candidate
        else:
            more_relevance, more_true = read_relevance(path)
            relevance |= more_relevance
            true |= more_true
    return relevance, true


def _fid(inputs: Inputs) -> dict:
    predicted = _read_statistics(inputs.predictions)
    real = _read_statistics(_only_file(inputs.references))
    return {"fid": fid.distance(predicted, real)}


def _clip_score(inputs: Inputs) -> dict:
    if inputs.predictions.endswith(".npy"):
        return _clip_score_of_features(inputs.predictions, _only_file(inputs.references))
    if not inputs.clip:
        raise UserError(f"metric clip_score of images needs {clip_score.WHERE}")
    images = _read_image_paths(inputs.predictions)
    captions = _read_references(inputs.references, ("id",), "caption")
    _check_same_ids(inputs, images, captions)
    return score.clip_scores(clip_score.load(inputs.clip), images, captions).numbers


def _clip_score_of_features(images_file: str, texts_file: str) -> dict:
    images = _read_array(images_file)
    texts = _read_array(texts_file)
    if images.shape != texts.shape or images.ndim != 2 or not images.size:
        raise UserError(
            f"CLIP features of {images.shape} images and of {texts.shape} texts do not pair up: "
            "both must be [n, C]"
        )
    if not (np.abs(images).sum(1).all() and np.abs(texts).sum(1).all()):
        raise UserError(
            f"{images_file}, {texts_file}: a feature vector is zero, so it has no cosine similarity"
        )
    return {"count": len(images), "clip_score": clip_score.score(images, texts)}


METRICS: dict[str, Callable[[Inputs], dict]] = {
    "cider": partial(_captions, ("cider",)),
    "bleu": partial(_captions, ("bleu",)),
    "rouge": partial(_captions, ("rouge",)),
    "captions": partial(_captions, score.CAPTION_METRICS),
    "vqa": _vqa,
    "exact_match": _exact_match,
    "wups": _wups,
    "visdial": _visdial,
    "fid": _fid,
    "clip_score": _clip_score,
}


# Readers


def _read_texts(path: str, keys: Sequence[str], field: str) -> dict[str, str]:
    """Texts by id, from predictions in any layout.

    keys: possible names of the id's field. field: name of the text's field.
    """
    what = f"predictions ({{id: {field}}}, or a list of rows with {_either(keys)} and {field!r})"
    data = read_json(path)
    if isinstance(data, list):
        texts = {}
        for row in rows(path, data, what):
            id = _id(path, row, keys, what)
            texts[id] = _field(path, row, field, what)
        if len(texts) < len(data):
            raise UserError(f"{path}: {len(data) - len(texts)} ids occur more than once")
    elif _is_dict_of(dict, data):
        # NExT-QA's {video: {qid: answer}}
        texts = {}
        for video, answers in data.items():
            texts |= {f"{video}/{qid}": answer for qid, answer in answers.items()}
    else:
        texts = data
    if not _is_dict_of(str, texts):
        raise UserError(f"{path}: not {what}")
    return texts


def _read_references(paths: Sequence[str], keys: Sequence[str], field: str) -> dict[str, list[str]]:
    """Lists of texts by id, from references in any layout; `keys` and `field` as above."""
    path = _only_file(paths)
    what = f"references ({{id: [{field}, ...]}}, or rows with {_either(keys)} and their {field}s)"
    data = read_json(path)
    if isinstance(data, dict) and isinstance(data.get("annotations"), list):
        data = data["annotations"]
    references: dict[str, list[str]] = {}
    if isinstance(data, list):
        for row in rows(path, data, what):
            texts = references.setdefault(_id(path, row, keys, what), [])
            texts.extend(_row_texts(path, row, field, what))
    elif isinstance(data, dict):
        for id, texts in data.items():
            references[id] = [texts] if isinstance(texts, str) else texts
    if not references or not all(map(_is_list_of_texts, references.values())):
        raise UserError(f"{path}: not {what}")
    return references


def _row_texts(path: str, row: dict, field: str, what: str) -> list:
    """The texts of a row: its `answers`, which are texts or rows with texts, or its one text."""
    if field != "answer" or not isinstance(row.get("answers"), list):
        return [_field(path, row, field, what)]
    texts = []
    for answer in row["answers"]:
        texts.append(_field(path, answer, field, what) if isinstance(answer, dict) else answer)
    return texts


def _read_image_paths(path: str) -> dict[str, Path]:
    """Paths of images by id, from a folder of images or a file that lists paths."""
    if not Path(path).is_dir():
        names = _read_texts(path, ("id",), "picture")
        return {id: Path(path).parent / name for id, name in names.items()}
    files = [file for file in sorted(Path(path).iterdir()) if file.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise UserError(f"{path}: no images ({', '.join(IMAGE_SUFFIXES)}) in it")
    images = {file.stem: file for file in files}
    if len(images) < len(files):
        raise UserError(f"{path}: the names of two images differ only in their suffix")
    return images


def _read_array(path: str) -> np.ndarray:
    wrong = UserError(f"{path}: not a .npy file of finite numbers")
    try:
        array = np.load(path, allow_pickle=False)
    except OSError as error:
        raise UserError(f"cannot read {path!r}: {error.strerror or error}") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise wrong from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise wrong
    if not np.isfinite(array).all():
        raise wrong
    return array


def _read_statistics(path: str) -> fid.Statistics:
    if Path(path).is_dir():
        raise UserError(
            f"{path} is a folder; --metric=fid takes Inception features (.npy) or their statistics "
            "(.npz with mu and sigma)"
        )
    if not Path(path).is_file():
        raise UserError(f"cannot read {path!r}: no such file")
    if path.endswith(".npz"):
        return fid.read_statistics(Path(path))
    features = _read_array(path)
    if features.ndim != 2:
        raise UserError(f"{path}: features must be [images, C], not of shape {features.shape}")
    return fid.statistics(features)


# Checks


def _only_file(paths: Sequence[str]) -> str:
    if len(paths) > 1:
        raise UserError(f"this metric takes one file of references; {len(paths)} were given")
    return paths[0]


def _check_same_ids(inputs: Inputs, predictions: Mapping, references: Mapping) -> None:
    """Raise UserError for ids that only one side has; the message lists them."""
    file = inputs.references[0]
    missing = [id for id in references if id not in predictions]
    extra = [id for id in predictions if id not in references]
    parts = []
    if missing:
        parts.append(f"{inputs.predictions}: nothing for {_shortened(missing, 'ids')} of {file}")
    if extra:
        parts.append(f"{file}: nothing for {_shortened(extra, 'ids')} of {inputs.predictions}")
    if parts:
        raise UserError("; ".join(parts))


def _shortened(ids: Sequence[str], noun: str) -> str:
    return f"{len(ids)} {noun} ({', '.join(ids[:8])}{', ...' if ids[8:] else ''})"


def _either(names: Sequence[str]) -> str:
    return " or ".join(map(repr, names))


def _field(path: str, row: dict, name: str, what: str) -> Any:
    if name not in row:
        raise UserError(f"{path}: not {what}: a row has no {name!r}")
    return row[name]


def _id(path: str, row: dict, keys: Sequence[str], what: str) -> str:
    for key in keys:
        if key in row:
            return str(row[key])
    raise UserError(f"{path}: not {what}: a row has no {_either(keys)}")


def _round_id(path: str, row: dict, what: str) -> str:
    return f"{_field(path, row, 'image_id', what)}/{_field(path, row, 'round_id', what)}"


def _is_dict_of(kind: type, value: Any) -> bool:
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(one, kind) for one in value.values())


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_relevance(value: Any) -> bool:
    """Whether a value is a number, not negative and small enough for a float."""
    return (_is_int(value) or isinstance(value, float)) and 0 <= value < 1e300


def _is_ranking(value: Any) -> bool:
    """Whether a value is a list of the ranks 1, 2, ... in any order."""
    if not isinstance(value, list) or not all(map(_is_int, value)):
        return False
    return sorted(value) == list(range(1, len(value) + 1))
