"""Scores of predictions against references, both from files: no model, no checkpoint.

Read next: metrics/, annotations.py.
"""

import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from emu_jax.config import UserError
from emu_jax.evaluate import annotations
from emu_jax.evaluate.metrics import captions, clip_score, fid, lemmas, ranking, vqa, wups
from emu_jax.evaluate.metrics.wordnet import WHERE, WordNet
from emu_jax.weights.clip import WHERE as WHERE_CLIP

LAYOUTS = """layouts of the files, JSON unless said otherwise (ids are compared as text):
  cider, bleu, rouge, captions (all three): CIDEr-D, BLEU and ROUGE-L as coco-caption prints them
      predictions {id: caption} or COCO's results [{"image_id", "caption"}]
      references  {id: [caption, ...]} or COCO's {"annotations": [{"image_id", "caption"}]}
  vqa: accuracy in percent, normalised as in GT-Vision-Lab/VQA's vqaEval.py
      predictions {id: answer}, VQA's results [{"question_id", "answer"}] or VizWiz's [{"image", "answer"}]
      references  {id: [answer, ...]}, VQA's {"annotations": [{"question_id", "answers": [{"answer"}, ...]}]} or
                  VizWiz's [{"image", "answers": [{"answer"}, ...]}]
  exact_match: percent of answers that equal a reference, letter by letter
      predictions {id: answer} or [{"id", "answer"}]
      references  {id: answer}, {id: [answer, ...]} or MSVD-QA's and MSRVTT-QA's [{"id", "answer"}]
  wups: percent, at thresholds 0 and 0.9; of a .csv by type of question too, where DB and DC count exact matches; needs --wordnet=DIR.
      Texts are compared as they are; with --tagger=DIR as lemmas without stop words, as NExT-QA's official script has them
      predictions {id: answer} or NExT-QA's {video: {qid: answer}}
      references  {id: answer}, {id: [answer, ...]} or NExT-QA's .csv (and after it its add_reference_answer_*.json)
  visdial: ndcg of a dense file, recall@1, @5, @10, mean_rank and mrr of the true answers; give both files for all
      predictions [{"image_id", "round_id", "ranks": [place of candidate 0 from 1, ...]}]
      references  [{"image_id", "round_id", "gt_relevance": [...]}], visdial_1.0_val.json, or rows with "gt_index"
  fid: two .npz with mu and sigma, or .npy with the Inception features [images, 2048] of each set
  clip_score: 100 * the mean of max(cosine, 0) of CLIP's features of a picture and of its caption (of several captions, their mean); needs --clip=DIR
      predictions {id: path of a picture, from this file's folder} (as coco-t2i's submission.json), or a folder of pictures, ID.png, ID.jpg, ...
      references  {id: caption} or {id: [caption, ...]}
      or, without --clip, two .npy with features [n, C], of the pictures and of their captions"""


CAPTION = ("cider", "bleu", "rouge")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Job(NamedTuple):
    predictions: str
    references: Sequence[str]
    wordnet: str | None
    clip: str | None = None
    tagger: str | None = None


class Scores(NamedTuple):
    numbers: dict[str, Any]
    # of each example, by its id; more is better
    each: dict[str, float]


def score(metric: str, job: Job) -> dict[str, Any]:
    """The numbers of one of METRICS. Raises UserError for files that are not what the metric
    wants.
    """
    return {"metric": metric} | METRICS[metric](job)


# --- of predictions and references by id ---


def of_captions(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    wanted: Sequence[str] = CAPTION,
) -> Scores:
    """As coco-caption prints them."""
    told, true = captions.tokenize(predictions, references)
    numbers: dict[str, Any] = {"count": len(told)}
    each: dict[str, float] = {}
    if "rouge" in wanted:
        each = captions.rouge(told, true)
        numbers["ROUGE_L"] = float(np.mean(list(each.values())))
    if "bleu" in wanted:
        numbers |= {f"Bleu_{n}": value for n, value in enumerate(captions.bleu(told, true), 1)}
    if "cider" in wanted:
        each = captions.cider(told, true)
        numbers["CIDEr"] = float(np.mean(list(each.values())))
    return Scores(numbers, each)


def of_vqa(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> Scores:
    each = {key: vqa.accuracy(predictions[key], truths) for key, truths in references.items()}
    return Scores({"count": len(each), "accuracy": _percent(each.values())}, each)


def of_exact_match(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> Scores:
    each = {key: float(predictions[key] in truths) for key, truths in references.items()}
    return Scores({"count": len(each), "exact_match": _percent(each.values())}, each)


def of_wups(
    wordnet: WordNet,
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    kinds: Mapping[str, str],
) -> Scores:
    """`kinds`: NExT-QA's types of question by id ({} for none), of which DB and DC count exact
    matches, and TP is TN.
    """
    kinds = {key: "TN" if kind == "TP" else kind for key, kind in kinds.items()}
    numbers: dict[str, Any] = {"count": len(references)}
    each: dict[str, float] = {}
    for threshold in (0.9, 0.0):
        each = {
            key: float(predictions[key] in truths)
            if kinds.get(key) in ("DB", "DC")
            else wups.score(wordnet, predictions[key], truths, threshold)
            for key, truths in references.items()
        }
        numbers[f"wups@{threshold:g}"] = _percent(each.values())
        for kind in sorted(set(kinds.values())):
            numbers[f"wups@{threshold:g}/{kind}"] = _percent(
                value for key, value in each.items() if kinds[key] == kind
            )
    return Scores(numbers, each)


def lemmatised(
    wordnet: WordNet,
    tagger: str,
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Both sides as NExT-QA's official script reduces them; `tagger`: the folder of NLTK's."""
    reduced = cache(partial(lemmas.reduced, wordnet, lemmas.Tagger(tagger)))
    return {key: reduced(text) for key, text in predictions.items()}, {
        key: list(map(reduced, some)) for key, some in references.items()
    }


def of_ranks(
    ranks: Mapping[str, Sequence[int]],
    dense: Mapping[str, Sequence[float]],
    true: Mapping[str, int],
) -> Scores:
    """Of VisDial's rounds: ndcg against the `dense` relevances, and the places of the `true`
    candidates.
    """
    numbers: dict[str, Any] = {"count": len(ranks)}
    each: dict[str, float] = {}
    if true:
        found = {key: ranks[key][place] for key, place in true.items()}
        numbers = numbers | ranking.places(list(found.values()))
        each = {key: 1 / place for key, place in found.items()}
    if dense:
        gains = {key: ranking.ndcg(ranks[key], relevance) for key, relevance in dense.items()}
        numbers["ndcg"] = float(np.mean(list(gains.values())))
        each = each | gains
    return Scores(numbers, each)


def of_clip(
    model: clip_score.Clip, pictures: Mapping[str, Path], captions: Mapping[str, Sequence[str]]
) -> Scores:
    each = clip_score.of_pictures(model, pictures, captions)
    return Scores({"count": len(each), "clip_score": float(np.mean(list(each.values())))}, each)


def dense_of(path: str) -> tuple[dict[str, list[float]], dict[str, int]]:
    """({round: relevance of each candidate}, {round: the true candidate}) of VisDial's dense
    annotations, or of rows with gt_index.
    """
    what = "VisDial's annotations"
    dense: dict[str, list[float]] = {}
    true: dict[str, int] = {}
    for row in _rows(path, annotations.load(path), what):
        key = _round(path, row, what)
        relevance = row.get("gt_relevance", row.get("relevance"))
        if relevance is None and "gt_index" not in row:
            raise UserError(f'{path}: not {what}: a row has neither "gt_relevance" nor "gt_index"')
        if relevance is not None:
            if (
                not isinstance(relevance, list)
                or not relevance
                or not all(_number(value) and value >= 0 for value in relevance)
            ):
                raise UserError(
                    f"{path}: not {what}: the relevance of round {key} is no list of numbers"
                )
            dense[key] = list(map(float, relevance))
        if "gt_index" in row:
            if not _whole(row["gt_index"]):
                raise UserError(
                    f"{path}: not {what}: the gt_index of round {key} is {row['gt_index']!r}"
                )
            true[key] = row["gt_index"]
    return dense, true


# --- of files ---


def _captions(*wanted: str) -> Callable[[Job], dict]:
    def run(job: Job) -> dict:
        predictions = _texts(job.predictions, ("image_id",), "caption")
        references = _lists(job.references, ("image_id",), "caption")
        _same_ids(job, predictions, references)
        return of_captions(predictions, references, wanted).numbers

    return run


def _vqa(job: Job) -> dict:
    keys = ("question_id", "image")
    predictions = _texts(job.predictions, keys, "answer")
    references = _lists(job.references, keys, "answer")
    _same_ids(job, predictions, references)
    return of_vqa(predictions, references).numbers


def _exact_match(job: Job) -> dict:
    predictions = _texts(job.predictions, ("id",), "answer")
    references = _lists(job.references, ("id",), "answer")
    _same_ids(job, predictions, references)
    return of_exact_match(predictions, references).numbers


def _wups(job: Job) -> dict:
    if not job.wordnet:
        raise UserError(f"metric wups needs {WHERE}")
    wordnet = WordNet(job.wordnet)
    kinds = {}
    if job.references[0].endswith(".csv"):
        if len(job.references) > 2:
            raise UserError(
                f"NExT-QA's references are a .csv and its add_reference_answer_*.json; {len(job.references)} files were given"
            )
        examples = annotations.nextqa(*job.references)
        references = {example.id: list(example.answers) for example in examples}
        kinds = {example.id: example.kind for example in examples}
    else:
        references = _lists(job.references, ("id",), "answer")
    predictions = _texts(job.predictions, ("id",), "answer")
    _same_ids(job, predictions, references)
    if job.tagger:
        predictions, references = lemmatised(wordnet, job.tagger, predictions, references)
    return of_wups(wordnet, predictions, references, kinds).numbers


def _visdial(job: Job) -> dict:
    what = 'a list of {"image_id", "round_id", "ranks"}'
    rows = _rows(job.predictions, annotations.load(job.predictions), what)
    ranks = {
        _round(job.predictions, row, what): _field(job.predictions, row, "ranks", what)
        for row in rows
    }
    dense: dict[str, list[float]] = {}
    true: dict[str, int] = {}
    for path in job.references:
        if isinstance(annotations.load(path), dict):
            true |= {
                example.id: example.truth
                for example in annotations.visdial(path)
                if example.truth is not None
            }
        else:
            dense, true = (
                before | new for before, new in zip((dense, true), dense_of(path), strict=True)
            )
    if len(job.references) == 1:
        _same_ids(job, ranks, dense | true)
    if missing := [key for key in dense | true if key not in ranks]:
        raise UserError(f"{job.predictions}: no ranks of {_listed(missing, 'rounds')}")
    for key, some in ranks.items():
        if (
            not isinstance(some, list)
            or not all(_whole(place) for place in some)
            or sorted(some) != list(range(1, len(some) + 1))
        ):
            raise UserError(
                f"{job.predictions}: the ranks of round {key} are not the places 1, 2, ... of its candidates, each once"
            )
        if key in dense and len(dense[key]) != len(some):
            raise UserError(
                f"{job.predictions}: round {key} has {len(some)} ranks; its relevance is of {len(dense[key])} candidates"
            )
        if key in true and not (_whole(true[key]) and 0 <= true[key] < len(some)):
            raise UserError(
                f"{job.references[0]}: the true candidate of round {key} is {true[key]!r}, and there are {len(some)}"
            )
    return of_ranks(ranks, dense, true).numbers


def _fid(job: Job) -> dict:
    return {
        "fid": fid.distance(
            *(_statistics(path) for path in (job.predictions, _only(job.references)))
        )
    }


def _clip_score(job: Job) -> dict:
    if not job.predictions.endswith(".npy"):
        if not job.clip:
            raise UserError(f"metric clip_score of pictures needs {WHERE_CLIP}")
        pictures = _pictures(job.predictions)
        captions = _lists(job.references, ("id",), "caption")
        _same_ids(job, pictures, captions)
        return of_clip(clip_score.load(job.clip), pictures, captions).numbers
    pictures, texts = (_array(path) for path in (job.predictions, _only(job.references)))
    if pictures.shape != texts.shape or pictures.ndim != 2 or not pictures.size:
        raise UserError(
            f"CLIP features of {pictures.shape} pictures and of {texts.shape} texts do not pair up: both must be [n, C]"
        )
    if not (np.abs(pictures).sum(1).all() and np.abs(texts).sum(1).all()):
        raise UserError(
            f"{job.predictions}, {job.references[0]}: a feature of zeros has no direction"
        )
    return {"count": len(pictures), "clip_score": clip_score.score(pictures, texts)}


METRICS: dict[str, Callable[[Job], dict]] = {
    "cider": _captions("cider"),
    "bleu": _captions("bleu"),
    "rouge": _captions("rouge"),
    "captions": _captions(*CAPTION),
    "vqa": _vqa,
    "exact_match": _exact_match,
    "wups": _wups,
    "visdial": _visdial,
    "fid": _fid,
    "clip_score": _clip_score,
}


def _percent(values: Iterable[float]) -> float:
    return 100 * float(np.mean(list(values)))


def _texts(path: str, keys: Sequence[str], field: str) -> dict[str, str]:
    """{id: text} of a file of predictions in any of its layouts."""
    what = f"predictions ({{id: {field}}}, or a list of rows with {' or '.join(map(repr, keys))} and {field!r})"
    data = annotations.load(path)
    if isinstance(data, list):
        pairs = [
            (_key(path, row, keys, what), _field(path, row, field, what))
            for row in _rows(path, data, what)
        ]
        out = dict(pairs)
        if len(out) < len(pairs):
            raise UserError(f"{path}: {len(pairs) - len(out)} ids come more than once")
    elif (
        isinstance(data, dict) and data and all(isinstance(value, dict) for value in data.values())
    ):
        out = {
            f"{video}/{number}": text
            for video, some in data.items()
            for number, text in some.items()
        }
    else:
        out = data
    if (
        not isinstance(out, dict)
        or not out
        or not all(isinstance(text, str) for text in out.values())
    ):
        raise UserError(f"{path}: not {what}")
    return out


def _lists(paths: Sequence[str], keys: Sequence[str], field: str) -> dict[str, list[str]]:
    """{id: texts} of a file of references in any of its layouts."""
    path = _only(paths)
    what = f"references ({{id: [{field}, ...]}}, or rows with {' or '.join(map(repr, keys))} and their {field}s)"
    data = annotations.load(path)
    rows = (
        data["annotations"]
        if isinstance(data, dict) and isinstance(data.get("annotations"), list)
        else data
    )
    if isinstance(rows, list):
        out: dict[str, list[str]] = {}
        for row in _rows(path, rows, what):
            texts = (
                row["answers"]
                if field == "answer" and isinstance(row.get("answers"), list)
                else [row]
            )
            out.setdefault(_key(path, row, keys, what), []).extend(
                _field(path, one, field, what) if isinstance(one, dict) else one for one in texts
            )
    else:
        out = (
            {key: [some] if isinstance(some, str) else some for key, some in rows.items()}
            if isinstance(rows, dict)
            else {}
        )
    if not out or not all(
        isinstance(some, list) and some and all(isinstance(text, str) for text in some)
        for some in out.values()
    ):
        raise UserError(f"{path}: not {what}")
    return out


def _pictures(path: str) -> dict[str, Path]:
    """{id: file} of a folder, or of a file of paths."""
    if not Path(path).is_dir():
        return {
            key: Path(path).parent / picture
            for key, picture in _texts(path, ("id",), "picture").items()
        }
    files = [file for file in sorted(Path(path).iterdir()) if file.suffix.lower() in SUFFIXES]
    found = {file.stem: file for file in files}
    if not files or len(found) < len(files):
        raise UserError(
            f"{path}: "
            + (
                "two pictures have one name but for its suffix"
                if files
                else f"no pictures ({', '.join(SUFFIXES)}) in it"
            )
        )
    return found


def _only(paths: Sequence[str]) -> str:
    if len(paths) > 1:
        raise UserError(f"this metric takes one file of references; {len(paths)} were given")
    return paths[0]


def _same_ids(job: Job, predictions: Mapping, references: Mapping) -> None:
    missing = [key for key in references if key not in predictions]
    extra = [key for key in predictions if key not in references]
    parts = [
        f"{job.predictions}: nothing for {_listed(missing, 'ids')} of {job.references[0]}"
    ] * bool(missing)
    parts += [
        f"{job.references[0]}: nothing for {_listed(extra, 'ids')} of {job.predictions}"
    ] * bool(extra)
    if parts:
        raise UserError("; ".join(parts))


def _listed(keys: Sequence[str], noun: str) -> str:
    return f"{len(keys)} {noun} ({', '.join(keys[:8])}{', ...' if keys[8:] else ''})"


def _rows(path: str, data: Any, what: str) -> list[dict]:
    if not isinstance(data, list) or not data or not all(isinstance(row, dict) for row in data):
        raise UserError(f"{path}: not {what}")
    return data


def _field(path: str, row: dict, name: str, what: str) -> Any:
    if name not in row:
        raise UserError(f"{path}: not {what}: a row has no {name!r}")
    return row[name]


def _key(path: str, row: dict, keys: Sequence[str], what: str) -> str:
    found = next((key for key in keys if key in row), None)
    if found is None:
        raise UserError(f"{path}: not {what}: a row has no {' or '.join(map(repr, keys))}")
    return str(row[found])


def _round(path: str, row: dict, what: str) -> str:
    return f"{_field(path, row, 'image_id', what)}/{_field(path, row, 'round_id', what)}"


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _array(path: str) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except OSError as error:
        raise UserError(f"cannot read {path!r}: {error.strerror or error}") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a .npy file of finite numbers") from error
    if (
        not isinstance(array, np.ndarray)
        or array.dtype.kind not in "fiu"
        or not np.isfinite(array).all()
    ):
        raise UserError(f"{path}: not a .npy file of finite numbers")
    return array


def _statistics(path: str) -> fid.Statistics:
    if Path(path).is_dir():
        raise UserError(
            f"{path}: a folder; --metric=fid takes Inception features (.npy) or their statistics (.npz with mu and sigma)"
        )
    if not Path(path).is_file():
        raise UserError(f"cannot read {path!r}: no such file")
    if path.endswith(".npz"):
        return fid.read(Path(path))
    array = _array(path)
    if array.ndim != 2:
        raise UserError(f"{path}: features must be [images, C], not of shape {array.shape}")
    return fid.statistics(array)
