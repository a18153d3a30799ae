"""Scores of predictions against references, both from files: no model, no checkpoint.

Read next: metrics/, annotations.py.
"""
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from emu_jax.config import UserError
from emu_jax.evaluate import annotations
from emu_jax.evaluate.metrics import captions, clip_score, fid, ranking, vqa, wups
from emu_jax.evaluate.metrics.wordnet import WHERE, WordNet

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
  wups: percent, at thresholds 0 and 0.9; of a .csv by type of question too, where DB and DC count exact matches; needs --wordnet=DIR
      predictions {id: answer} or NExT-QA's {video: {qid: answer}}
      references  {id: answer}, {id: [answer, ...]} or NExT-QA's .csv (and after it its add_reference_answer_*.json)
  visdial: ndcg of a dense file, recall@1, @5, @10, mean_rank and mrr of the true answers; give both files for all
      predictions [{"image_id", "round_id", "ranks": [place of candidate 0 from 1, ...]}]
      references  [{"image_id", "round_id", "gt_relevance": [...]}], visdial_1.0_val.json, or rows with "gt_index"
  fid: two .npz with mu and sigma, or .npy with the Inception features [images, 2048] of each set
  clip_score: two .npy with CLIP features [n, C], of the pictures and of their texts"""


class Job(NamedTuple):
    predictions: str
    references: Sequence[str]
    wordnet: str | None


def score(metric: str, job: Job) -> dict[str, Any]:
    """The numbers of one of METRICS. Raises UserError for files that are not what the metric wants."""
    return {"metric": metric} | METRICS[metric](job)


def _captions(*wanted: str) -> Callable[[Job], dict]:
    def run(job: Job) -> dict:
        predictions = _texts(job.predictions, ("image_id",), "caption")
        references = _lists(job.references, ("image_id",), "caption")
        _same_ids(job, predictions, references)
        told, true = captions.tokenize(predictions, references)
        out: dict[str, Any] = {"count": len(told)}
        if "cider" in wanted:
            out["CIDEr"] = float(np.mean(list(captions.cider(told, true).values())))
        if "bleu" in wanted:
            out |= {f"Bleu_{n}": value for n, value in enumerate(captions.bleu(told, true), 1)}
        if "rouge" in wanted:
            out["ROUGE_L"] = float(np.mean(list(captions.rouge(told, true).values())))
        return out
    return run


def _vqa(job: Job) -> dict:
    keys = ("question_id", "image")
    predictions, references = _texts(job.predictions, keys, "answer"), _lists(job.references, keys, "answer")
    _same_ids(job, predictions, references)
    return {"count": len(references), "accuracy": _percent(vqa.accuracy(predictions[key], truths) for key, truths in references.items())}


def _exact_match(job: Job) -> dict:
    predictions, references = _texts(job.predictions, ("id",), "answer"), _lists(job.references, ("id",), "answer")
    _same_ids(job, predictions, references)
    return {"count": len(references), "exact_match": _percent(predictions[key] in truths for key, truths in references.items())}


def _wups(job: Job) -> dict:
    if not job.wordnet:
        raise UserError(f"metric wups needs {WHERE}")
    wordnet = WordNet(job.wordnet)
    kinds: dict[str, str] = {}
    if job.references[0].endswith(".csv"):
        examples = annotations.nextqa(*job.references)
        references = {example.id: list(example.answers) for example in examples}
        kinds = {example.id: "TN" if example.kind == "TP" else example.kind for example in examples}
    else:
        references = _lists(job.references, ("id",), "answer")
    predictions = _texts(job.predictions, ("id",), "answer")
    _same_ids(job, predictions, references)
    out: dict[str, Any] = {"count": len(references)}
    for threshold in (0.0, 0.9):
        values = {key: predictions[key] in truths if kinds.get(key) in ("DB", "DC") else wups.score(wordnet, predictions[key], truths, threshold)
                  for key, truths in references.items()}
        out[f"wups@{threshold:g}"] = _percent(values.values())
        for kind in sorted(set(kinds.values())):
            out[f"wups@{threshold:g}/{kind}"] = _percent(value for key, value in values.items() if kinds[key] == kind)
    return out


def _visdial(job: Job) -> dict:
    what = 'a list of {"image_id", "round_id", "ranks"}'
    ranks = {}
    for row in _rows(job.predictions, annotations.load(job.predictions), what):
        ranks[_round(job.predictions, row, what)] = _field(job.predictions, row, "ranks", what)
    dense, true = {}, {}
    for path in job.references:
        data = annotations.load(path)
        if isinstance(data, dict):
            true |= {example.id: example.truth for example in annotations.visdial(path) if example.truth is not None}
            continue
        for row in _rows(path, data, "VisDial's annotations"):
            relevance = row.get("gt_relevance", row.get("relevance"))
            if relevance is None and "gt_index" not in row:
                raise UserError(f'{path}: not VisDial\'s annotations: a row has neither "gt_relevance" nor "gt_index"')
            key = _round(path, row, "VisDial's annotations")
            dense |= {} if relevance is None else {key: relevance}
            true |= {key: row["gt_index"]} if "gt_index" in row else {}
    known = dense | true
    if len(job.references) == 1:
        _same_ids(job, ranks, known)
    for key, some in ranks.items():
        if key in known and (not isinstance(some, list) or sorted(some) != list(range(1, len(some) + 1))):
            raise UserError(f"{job.predictions}: the ranks of round {key} are not the places 1, 2, ... of its candidates, each once")
        if key in dense and len(dense[key]) != len(some):
            raise UserError(f"{job.predictions}: round {key} has {len(some)} ranks; its relevance is of {len(dense[key])} candidates")
    out: dict[str, Any] = {"count": len(ranks)}
    for name, wanted in (("dense", dense), ("true", true)):
        if missing := [key for key in wanted if key not in ranks]:
            raise UserError(f"{job.predictions}: no ranks of {_listed(missing, 'rounds')}")
        if name == "dense" and dense:
            out["ndcg"] = float(np.mean([ranking.ndcg(ranks[key], relevance) for key, relevance in dense.items()]))
        if name == "true" and true:
            out |= ranking.places([ranks[key][place] for key, place in true.items()])
    return out


def _fid(job: Job) -> dict:
    sets = [_statistics(path) for path in (job.predictions, job.references[0])]
    return {"fid": fid.distance(*sets)}


def _clip_score(job: Job) -> dict:
    pictures, texts = (_array(path) for path in (job.predictions, job.references[0]))
    if pictures.shape != texts.shape or pictures.ndim != 2:
        raise UserError(f"CLIP features of {pictures.shape} pictures and of {texts.shape} texts do not pair up: both must be [n, C]")
    return {"count": len(pictures), "clip_score": clip_score.score(pictures, texts)}


METRICS: dict[str, Callable[[Job], dict]] = {
    "cider": _captions("cider"), "bleu": _captions("bleu"), "rouge": _captions("rouge"), "captions": _captions("cider", "bleu", "rouge"), "vqa": _vqa,
    "exact_match": _exact_match, "wups": _wups, "visdial": _visdial, "fid": _fid, "clip_score": _clip_score}


def _percent(values: Iterable[float]) -> float:
    return 100 * float(np.mean(list(values)))


def _texts(path: str, keys: Sequence[str], field: str) -> dict[str, str]:
    """{id: text} of a file of predictions in any of its layouts."""
    what, data = f"predictions ({{id: {field}}}, or a list of rows with {' or '.join(map(repr, keys))} and {field!r})", annotations.load(path)
    if isinstance(data, list):
        pairs = [(_key(path, row, keys, what), _field(path, row, field, what)) for row in _rows(path, data, what)]
        out = dict(pairs)
        if len(out) < len(pairs):
            raise UserError(f"{path}: {len(pairs) - len(out)} ids come more than once")
    elif isinstance(data, dict) and data and all(isinstance(value, dict) for value in data.values()) and "annotations" not in data:
        out = {f"{video}/{number}": text for video, some in data.items() for number, text in some.items()}
    else:
        out = data
    if not isinstance(out, dict) or not out or not all(isinstance(text, str) for text in out.values()):
        raise UserError(f"{path}: not {what}")
    return out


def _lists(paths: Sequence[str], keys: Sequence[str], field: str) -> dict[str, list[str]]:
    """{id: texts} of a file of references in any of its layouts."""
    path, *others = paths
    what = f"references ({{id: [{field}, ...]}}, or rows with {' or '.join(map(repr, keys))} and their {field}s)"
    if others:
        raise UserError(f"this metric takes one file of references; {len(paths)} were given")
    data = annotations.load(path)
    rows = data["annotations"] if isinstance(data, dict) and isinstance(data.get("annotations"), list) else data
    if isinstance(rows, list):
        out: dict[str, list[str]] = {}
        for row in _rows(path, rows, what):
            texts = row["answers"] if field == "answer" and isinstance(row.get("answers"), list) else [row]
            out.setdefault(_key(path, row, keys, what), []).extend(_field(path, one, field, what) if isinstance(one, dict) else one for one in texts)
    else:
        out = {key: [some] if isinstance(some, str) else some for key, some in rows.items()} if isinstance(rows, dict) else {}
    if not out or not all(isinstance(some, list) and some and all(isinstance(text, str) for text in some) for some in out.values()):
        raise UserError(f"{path}: not {what}")
    return out


def _same_ids(job: Job, predictions: Mapping, references: Mapping) -> None:
    missing, extra = [key for key in references if key not in predictions], [key for key in predictions if key not in references]
    parts = [f"{job.predictions}: nothing for {_listed(missing, 'ids')} of {job.references[0]}"] * bool(missing)
    parts += [f"{job.references[0]}: nothing for {_listed(extra, 'ids')} of {job.predictions}"] * bool(extra)
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


def _array(path: str) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except OSError as error:
        raise UserError(f"cannot read {path!r}: {error.strerror or error}") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a .npy file of numbers") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise UserError(f"{path}: not a .npy file of numbers")
    return array


def _statistics(path: str) -> fid.Statistics:
    if Path(path).is_dir():
        raise UserError(f"{path}: a folder; --metric=fid takes Inception features (.npy) or their statistics (.npz with mu and sigma)")
    if not Path(path).is_file():
        raise UserError(f"cannot read {path!r}: no such file")
    if path.endswith(".npz"):
        return fid.read(Path(path))
    array = _array(path)
    if array.ndim != 2:
        raise UserError(f"{path}: features must be [images, C], not of shape {array.shape}")
    return fid.statistics(array)
