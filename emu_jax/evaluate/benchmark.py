"""Run a benchmark, from its published files to its scores.

Predictions are appended to a file, so that a stopped run can resume and several hosts can share the
examples. Once all predictions exist, they are scored, and submission.json, scores.json and
report.html are written. Read next: plan.py, predict.py, score.py.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from emu_jax import cli
from emu_jax.config import UserError
from emu_jax.evaluate import gallery, score, score_files, text_to_image
from emu_jax.evaluate.annotations import Example
from emu_jax.evaluate.metrics import fid, lemmas, wordnet
from emu_jax.evaluate.metrics.wordnet import WordNet
from emu_jax.evaluate.plan import (
    BenchmarkPlan,
    BenchmarkSettings,
    check_same_settings,
    plan_benchmark,
)
from emu_jax.evaluate.predict import Prediction, Predictor, predict_to_file, read_predictions
from emu_jax.evaluate.score import Scores
from emu_jax.evaluate.tasks import TASKS, Folder
from emu_jax.evaluate.text_to_image import ImagePredictor
from emu_jax.generate.session import Session

SCORERS = {
    "captions": score.caption_scores,
    "vqa": score.vqa_scores,
    "exact_match": score.exact_match_scores,
}


class Resources(NamedTuple):
    """Folders that some metrics need in addition to predictions and references."""

    # For WUPS.
    wordnet: str | None = None
    tagger: str | None = None
    # For FID.
    inception: str | None = None
    # For the CLIP score.
    clip: str | None = None


NO_RESOURCES = Resources()


class Outcome(NamedTuple):
    """Result of a run."""

    # Contents of scores.json; empty while predictions are missing.
    results: dict[str, Any]
    # Number of predictions that other hosts have yet to make.
    waiting: int
    # Number of all predictions.
    total: int


def run(
    settings: BenchmarkSettings,
    load_session: Callable[[], Session],
    out: Path,
    *,
    limit: int | None = None,
    allow_missing: bool = False,
    resources: Resources = NO_RESOURCES,
    host: int = 0,
    hosts: int = 1,
) -> Outcome:
    """Make the missing predictions of this host in the folder `out`; score if all exist.

    limit: use only so many examples, from the first. allow_missing: leave out examples whose image
    is missing. host, hosts: the share of the examples to predict. `load_session` is called only if
    there is something to predict. Raises UserError for missing or wrong files.
    """
    check_resources(settings, resources)
    plan = plan_benchmark(settings, limit=limit, allow_missing=allow_missing)
    check_same_settings(settings, out)
    predictions = read_predictions(out)
    share = plan.examples[host::hosts]
    todo = [example for example in share if example.id not in predictions]
    if todo:
        session = load_session()
        predict = _make_predict(session, settings, plan, out)
        for prediction in predict_to_file(
            settings, predict, session.batch, out, todo, total=len(share), host=host
        ):
            predictions[prediction.id] = prediction
    waiting = sum(example.id not in predictions for example in plan.examples)
    if waiting:
        return Outcome({}, waiting, len(plan.examples))

    predictions = {example.id: predictions[example.id] for example in plan.examples}
    scores = score_predictions(settings, plan, predictions, resources, out)
    results = _results(settings, plan, predictions, resources, scores)
    _write_outputs(settings, plan, predictions, scores, results, out)
    return Outcome(results, 0, len(plan.examples))


def evaluate_session(
    session: Session, settings: BenchmarkSettings, *, limit: int
) -> dict[str, float]:
    """Score a benchmark's first `limit` examples, for evaluations during training.

    Writes no files. The result has only scores, not counts.
    """
    plan = plan_benchmark(settings, limit=limit)
    predictor = Predictor(session, settings, plan)
    predictions = {}
    for start in range(0, len(plan.examples), session.batch):
        for prediction in predictor.predict(plan.examples[start : start + session.batch]):
            predictions[prediction.id] = prediction
    scores = score_predictions(settings, plan, predictions)
    return {name: value for name, value in scores.numbers.items() if isinstance(value, float)}


def check_resources(settings: BenchmarkSettings, resources: Resources) -> None:
    """Raise UserError if something that the task's metric needs is missing or wrong."""
    task = TASKS[settings.task]
    if task.metric == "wups":
        if not resources.wordnet:
            raise UserError(f"--task={settings.task} needs {wordnet.WHERE}")
        WordNet(resources.wordnet)
        if resources.tagger:
            lemmas.Tagger(resources.tagger)
    if task.metric == "fid":
        if not (settings.decoder and resources.inception):
            raise UserError(
                f"--task={settings.task} needs a trained decoder (--decoder=DIR) and {fid.WHERE}"
            )
        text_to_image.check_models(resources.inception, resources.clip)


def score_predictions(
    settings: BenchmarkSettings,
    plan: BenchmarkPlan,
    predictions: Mapping[str, Prediction],
    resources: Resources = NO_RESOURCES,
    out: Path = Path(),
) -> Scores:
    """Scores of all predictions; only their number if references are withheld.

    out: the folder with generated images.
    """
    task = TASKS[settings.task]
    if task.metric == "fid":
        assert resources.inception
        return text_to_image.score_images(plan, out, resources.inception, resources.clip)
    values = {id: prediction.value for id, prediction in predictions.items()}
    references = {example.id: list(example.references) for example in plan.examples}
    types = {example.id: example.question_type for example in plan.examples}
    if task.metric == "judge" or not all(references.values()):
        return Scores({"count": len(values)}, {})
    if task.metric == "wups":
        assert resources.wordnet
        dictionary = WordNet(resources.wordnet)
        if resources.tagger:
            values, references = score.lemmatize_answers(
                dictionary, resources.tagger, values, references
            )
        return score.wups_scores(dictionary, values, references, types)
    if task.metric == "visdial":
        return _visdial_scores(settings, plan.examples, values)
    scores = SCORERS[task.metric](values, references)
    for type in sorted(filter(None, set(types.values()))):
        ids = [id for id in references if types[id] == type]
        part = SCORERS[task.metric](
            {id: values[id] for id in ids}, {id: references[id] for id in ids}
        )
        scores.numbers.update({f"{name}/{type}": value for name, value in part.numbers.items()})
    return scores


def _visdial_scores(
    settings: BenchmarkSettings, examples: Sequence[Example], ranks: Mapping[str, Sequence[int]]
) -> Scores:
    """Rank metrics, and NDCG if the file of graded relevance exists."""
    task = TASKS[settings.task]
    path = Folder(settings.data).find(task.relevance_file.format(split=settings.split))
    relevance = {}
    if path is not None:
        found, _ = score_files.read_relevance(str(path))
        relevance = {id: found[id] for id in ranks if id in found}
    true = {}
    for example in examples:
        if example.true_candidate is not None:
            true[example.id] = example.true_candidate
    return score.rank_scores(ranks, relevance, true)


def _make_predict(
    session: Session, settings: BenchmarkSettings, plan: BenchmarkPlan, out: Path
) -> Callable[[Sequence[Example]], list[Prediction]]:
    if TASKS[settings.task].kind == "image":
        return ImagePredictor(session, settings, out).predict
    return Predictor(session, settings, plan, out / "examples.npz").predict


def _results(
    settings: BenchmarkSettings,
    plan: BenchmarkPlan,
    predictions: Mapping[str, Prediction],
    resources: Resources,
    scores: Scores,
) -> dict[str, Any]:
    """Contents of scores.json."""
    results = asdict(settings) | scores.numbers | {"missing_pictures": len(plan.missing)}
    if settings.shots:
        fewer = sum(prediction.shots < settings.shots for prediction in predictions.values())
        results["fewer_shots"] = fewer
        if fewer:
            print(
                f"{fewer} of {len(predictions)} prompts had room for fewer than "
                f"{settings.shots} few-shot examples"
            )
    if TASKS[settings.task].metric == "wups":
        results["lemmatised"] = bool(resources.tagger)
    return results


def _write_outputs(
    settings: BenchmarkSettings,
    plan: BenchmarkPlan,
    predictions: dict[str, Prediction],
    scores: Scores,
    results: dict[str, Any],
    out: Path,
) -> None:
    values = {id: prediction.value for id, prediction in predictions.items()}
    submission = TASKS[settings.task].results(values)
    texts = {
        "submission.json": json.dumps(submission, ensure_ascii=False) + "\n",
        "scores.json": json.dumps(results, indent=1, ensure_ascii=False) + "\n",
        "report.html": gallery.benchmark_page(
            settings, plan, predictions, scores.each, results, out
        ),
    }
    if plan.missing:
        texts["missing.txt"] = "".join(f"{name}\n" for name in plan.missing)
    for name, text in texts.items():
        with cli.output_file(out / name) as file:
            file.write(text)
