"""Predict the examples of a benchmark, and store the predictions in a resumable file.

Read next: retrieval.py, text_to_image.py.
"""

import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from emu_jax import cli
from emu_jax.config import UserError
from emu_jax.evaluate import prompts, retrieval
from emu_jax.evaluate.annotations import Example
from emu_jax.evaluate.plan import SETTINGS_FILE, BenchmarkPlan, BenchmarkSettings
from emu_jax.evaluate.tasks import TASKS
from emu_jax.generate.generation_config import GenerationConfig
from emu_jax.generate.processor import Prompt
from emu_jax.generate.session import Session

# Number of images and videos to keep in memory, because many questions share one.
CACHED_MEDIA = 64
# Random seed that chooses the few-shot examples for --text-only.
FIXED_SHOTS_SEED = 1


class Prediction(NamedTuple):
    """What a model predicts for an example."""

    id: str
    # The text as generated.
    text: str
    # What is submitted: the cleaned text, the rank of each candidate (VisDial), or an image's path.
    value: Any
    # Number of few-shot examples in the prompt.
    shots: int


# Predicts a batch of examples.
Predict = Callable[[Sequence[Example]], list[Prediction]]


class Predictor:
    """Predicts the answers, captions or ranks of a plan's examples."""

    def __init__(
        self,
        session: Session,
        settings: BenchmarkSettings,
        plan: BenchmarkPlan,
        index_file: Path | None = None,
    ):
        """index_file: file for the features of few-shot examples; needed if they have images."""
        self.session = session
        self.settings = settings
        self.plan = plan
        self.task = TASKS[settings.task]
        self.chat = session.model_config.llama.chats
        beams = settings.beams or self.task.generation.beams
        self.generation = replace(self.task.generation, beams=beams)
        self.frames = lru_cache(CACHED_MEDIA)(self._load_frames)

        self.pool: dict[str, list[Example]] = {}
        for example in plan.pool:
            self.pool.setdefault(example.media, []).append(example)
        order = np.random.default_rng(FIXED_SHOTS_SEED).permutation(len(plan.pool))
        self.fixed_shots = [plan.pool[index] for index in order[: settings.shots]]
        self.index = None
        if settings.shots and not settings.text_only:
            assert index_file is not None
            model_id = json.dumps([settings.checkpoint, settings.step])
            self.index = retrieval.load_or_build_index(
                index_file, model_id, list(self.pool), session, self.frames
            )

    def predict(self, examples: Sequence[Example]) -> list[Prediction]:
        """Predict a batch of examples."""
        if self.task.kind == "dialog":
            return [self._rank_candidates(example) for example in examples]
        fitted = []
        for example, shots in zip(examples, self.choose_shots(examples), strict=True):
            fitted.append(self.fit_prompt(example, shots))
        texts = self.session.generate_texts([prompt for prompt, _ in fitted], self.generation)
        values = [self.task.clean(text) for text in texts]
        if self.settings.task == "vizwiz":
            values = self._mark_unanswerable(examples, values)
        predictions = []
        for example, text, value, (_, used) in zip(examples, texts, values, fitted, strict=True):
            predictions.append(Prediction(example.id, text, value, used))
        return predictions

    def choose_shots(self, examples: Sequence[Example]) -> list[list[Example]]:
        """The few-shot examples for each question, with the most similar image last."""
        if self.index is None:
            return [self.fixed_shots] * len(examples)
        frames = (self.frames(example.media) for example in examples)
        features = retrieval.compute_features(self.session, frames)
        chosen = []
        for example, feature in zip(examples, features, strict=True):
            names = self.index.nearest(feature, self.settings.shots, exclude=example.media)
            # An image may have several questions. Always choose the same one for this example.
            number = zlib.crc32(example.id.encode())
            candidates = [self.pool[name] for name in names]
            chosen.append([shots[number % len(shots)] for shots in candidates])
        return chosen

    def fit_prompt(self, example: Example, shots: list[Example]) -> tuple[Prompt, int]:
        """Make the prompt with as many of the last `shots` as fit.

        Returns it and their number.
        """
        room = self.session.context - self.generation.max_new_tokens
        while True:
            prompt = self.prompt(self.task.kind, example, shots)
            if len(prompt) <= room or not shots:
                return prompt, len(shots)
            shots = shots[1:]

    def prompt(self, kind: str, example: Example, shots: list[Example]) -> Prompt:
        """The prompt of an example; kind: a key of prompts.CHAT."""
        with_images = not self.settings.text_only
        turns = []
        for shot in shots:
            answer = shot_answer(shot, self.task.kind)
            turns.append(prompts.Shot(shot.question, answer, with_images))
        text = prompts.question_prompt(
            kind, example.question, turns, chat=self.chat, video=self.task.video
        )
        shown = [*shots, example] if with_images else [example]
        return self.session.processor.template(text, [self.frames(one.media) for one in shown])

    def _load_frames(self, media: str) -> retrieval.Frames:
        return self.session.processor.frames(self.plan.paths[media])

    def _mark_unanswerable(self, examples: Sequence[Example], values: list[str]) -> list[str]:
        """Replace answers by "unanswerable" where the model says that they are not known."""
        known = self.session.generate_texts(
            [self.prompt("known", example, []) for example in examples],
            GenerationConfig(max_new_tokens=self.generation.max_new_tokens),
            choices=prompts.KNOWN_CHOICES,
        )
        yes = prompts.KNOWN_CHOICES[0]
        return [
            value if choice == yes else "unanswerable"
            for value, choice in zip(values, known, strict=True)
        ]

    def _rank_candidates(self, example: Example) -> Prediction:
        """Rank the candidate answers of a dialog by their loss."""
        text = prompts.dialog_prompt(example.history, example.question, chat=self.chat)
        prompt = self.session.processor.template(text, [self.frames(example.media)])
        losses = self.session.losses(prompt, example.candidates)
        order = np.argsort(losses, kind="stable")
        ranks = np.empty(len(order), int)
        ranks[order] = np.arange(1, len(order) + 1)
        return Prediction(example.id, example.candidates[order[0]], ranks.tolist(), 0)


def shot_answer(example: Example, kind: str) -> str:
    """The answer of a few-shot example: its first caption, or the most frequent answer."""
    if kind == "caption":
        return example.references[0].strip().removesuffix(".").lower()
    return Counter(example.references).most_common(1)[0][0]


def predict_to_file(
    settings: BenchmarkSettings,
    predict: Predict,
    batch: int,
    out: Path,
    examples: list[Example],
    *,
    total: int,
    host: int,
) -> Iterator[Prediction]:
    """Predict examples in batches, and append the predictions to this host's file.

    total: number of this host's examples, including those that are predicted already.
    """
    with cli.output_file(out / SETTINGS_FILE) as file:
        file.write(json.dumps(asdict(settings), indent=1) + "\n")
    done = total - len(examples)
    with (
        (out / f"predictions-{host}.jsonl").open("ab+") as file,
        tqdm(desc=settings.task, initial=done, total=total, disable=None) as progress,
    ):
        _drop_partial_line(file)
        for start in range(0, len(examples), batch):
            predictions = predict(examples[start : start + batch])
            file.write("".join(map(_to_line, predictions)).encode())
            file.flush()
            progress.update(len(predictions))
            yield from predictions


def read_predictions(out: Path) -> dict[str, Prediction]:
    """The predictions of all hosts in the folder `out`, by example id.

    A killed run may leave an incomplete last line in its file, which is ignored. Raises UserError
    for any other line that is not a prediction.
    """
    predictions: dict[str, Prediction] = {}
    for path in sorted(out.glob("predictions-*.jsonl")):
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break
            try:
                prediction = _from_line(line)
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"{path}: line {number} is not a prediction; remove it, and run the command "
                    "again"
                ) from error
            predictions[prediction.id] = prediction
    return predictions


def _to_line(prediction: Prediction) -> str:
    row = {
        "id": prediction.id,
        "said": prediction.text,
        "prediction": prediction.value,
        "shots": prediction.shots,
    }
    return json.dumps(row, ensure_ascii=False) + "\n"


def _from_line(line: bytes) -> Prediction:
    row = json.loads(line)
    return Prediction(row["id"], row["said"], row["prediction"], row["shots"])


def _drop_partial_line(file: IO[bytes]) -> None:
    """Truncate a file after its last complete line."""
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
