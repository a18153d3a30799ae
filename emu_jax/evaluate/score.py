"""Score predictions against references, both by example id.

Each function returns the numbers of its benchmark's official script, and a score for each example.
Read next: score_files.py, metrics/.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from emu_jax.evaluate.metrics import captions, clip_score, lemmas, ranking, vqa, wups
from emu_jax.evaluate.metrics.wordnet import WordNet

CAPTION_METRICS = ("cider", "bleu", "rouge")


class Scores(NamedTuple):
    """The scores of a benchmark: over all examples by name, and of each example by id."""

    numbers: dict[str, Any]
    # Higher is better.
    each: dict[str, float]


def caption_scores(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    metrics: Sequence[str] = CAPTION_METRICS,
) -> Scores:
    """CIDEr-D, BLEU and ROUGE-L, under the names that coco-caption prints."""
    tokenized = captions.tokenize(predictions, references)
    numbers: dict[str, Any] = {"count": len(references)}
    each: dict[str, float] = {}
    if "rouge" in metrics:
        each = captions.rouge(*tokenized)
        numbers["ROUGE_L"] = _mean(each.values())
    if "bleu" in metrics:
        for n, value in enumerate(captions.bleu(*tokenized), 1):
            numbers[f"Bleu_{n}"] = value
    if "cider" in metrics:
        each = captions.cider(*tokenized)
        numbers["CIDEr"] = _mean(each.values())
    return Scores(numbers, each)


def vqa_scores(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> Scores:
    """VQA accuracy in percent."""
    each = {id: vqa.accuracy(predictions[id], answers) for id, answers in references.items()}
    return Scores({"count": len(each), "accuracy": 100 * _mean(each.values())}, each)


def exact_match_scores(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> Scores:
    """Percentage of answers that equal a reference, character by character."""
    each = {id: float(predictions[id] in answers) for id, answers in references.items()}
    return Scores({"count": len(each), "exact_match": 100 * _mean(each.values())}, each)


def wups_scores(
    wordnet: WordNet,
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    types: Mapping[str, str],
) -> Scores:
    """WUPS in percent at both thresholds, for all questions and by type.

    types: NExT-QA's question types by id, or {}. Questions of the types DB and DC are scored by
    exact match; the type TP is counted as TN.
    """
    types = {id: "TN" if type == "TP" else type for id, type in types.items()}
    numbers: dict[str, Any] = {"count": len(references)}
    each: dict[str, float] = {}
    for threshold in (0.9, 0.0):
        for id, answers in references.items():
            if types.get(id) in ("DB", "DC"):
                each[id] = float(predictions[id] in answers)
            else:
                each[id] = wups.score(wordnet, predictions[id], answers, threshold)
        numbers[f"wups@{threshold:g}"] = 100 * _mean(each.values())
        for type in sorted(set(types.values())):
            values = [value for id, value in each.items() if types[id] == type]
            numbers[f"wups@{threshold:g}/{type}"] = 100 * _mean(values)
    return Scores(numbers, each)


def lemmatize_answers(
    wordnet: WordNet,
    tagger_dir: str,
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Reduce predictions and references to lemmas without stop words, like NExT-QA's script.

    tagger_dir: the folder of NLTK's tagger.
    """
    lemmatize = cache(partial(lemmas.lemmatize, wordnet, lemmas.Tagger(tagger_dir)))
    predicted = {id: lemmatize(text) for id, text in predictions.items()}
    return predicted, {id: list(map(lemmatize, texts)) for id, texts in references.items()}


def rank_scores(
    ranks: Mapping[str, Sequence[int]],
    relevance: Mapping[str, Sequence[float]],
    true: Mapping[str, int],
) -> Scores:
    """VisDial's scores: NDCG, and recall and mean rank of the true candidates.

    All arguments are by round. ranks: the rank of each candidate, from 1. relevance: the graded
    relevance of each candidate, for rounds that have it. true: the index of the true candidate, for
    rounds that have one.
    """
    numbers: dict[str, Any] = {"count": len(ranks)}
    each: dict[str, float] = {}
    if true:
        true_ranks = {id: ranks[id][candidate] for id, candidate in true.items()}
        numbers |= ranking.true_rank_metrics(list(true_ranks.values()))
        each = {id: 1 / rank for id, rank in true_ranks.items()}
    if relevance:
        gains = {id: ranking.ndcg(ranks[id], graded) for id, graded in relevance.items()}
        numbers["ndcg"] = _mean(gains.values())
        each |= gains
    return Scores(numbers, each)


def clip_scores(
    model: clip_score.Clip, images: Mapping[str, Path], captions: Mapping[str, Sequence[str]]
) -> Scores:
    """The CLIP score of image files with their captions."""
    each = clip_score.score_images(model, images, captions)
    return Scores({"count": len(each), "clip_score": _mean(each.values())}, each)


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
