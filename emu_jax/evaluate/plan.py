"""The plan of a benchmark run: its settings, examples, media files and few-shot pool.

Planning needs no model, so mistakes are found before one is loaded. Read next: predict.py.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from emu_jax import checkpoint
from emu_jax.config import UserError
from emu_jax.evaluate import annotations
from emu_jax.evaluate.annotations import Example
from emu_jax.evaluate.tasks import TASKS, Folder, read_examples

SETTINGS_FILE = "settings.json"


@dataclass(frozen=True)
class BenchmarkSettings:
    """Everything that predictions depend on; a run resumes only with the same settings."""

    task: str
    checkpoint: str
    step: int
    data: str
    split: str
    # Number of few-shot examples before the question.
    shots: int = 0
    # Show few-shot examples without images, the same ones before all questions. The paper's
    # "zero-shot" has two of them.
    text_only: bool = False
    # Number of beams; 0: that of the task.
    beams: int = 0
    # Use the moving average of the weights.
    ema: bool = False
    # Run of the stage decoder, for text to image.
    decoder: str = ""


class BenchmarkPlan(NamedTuple):
    """Examples to predict, and the files they need."""

    # The examples whose images exist.
    examples: list[Example]
    # Example.media -> file, for the images and videos of the examples and of the pool.
    paths: dict[str, Path]
    # Example.media of missing images and videos.
    missing: list[str]
    # The examples from which few-shot examples are chosen.
    pool: list[Example]


def plan_benchmark(
    settings: BenchmarkSettings, *, limit: int | None = None, allow_missing: bool = False
) -> BenchmarkPlan:
    """Plan the first `limit` examples of a benchmark.

    allow_missing: leave out examples whose image is missing. Raises UserError for missing
    annotation files, and for missing images unless they are allowed.
    """
    task = TASKS[settings.task]
    folder = Folder(settings.data)
    examples = read_examples(settings.task, folder, settings.split)[:limit]
    paths = _media_paths(folder, examples)
    count = len({example.media for example in examples})
    missing: list[str] = []
    # In text to image, the model does not read the images.
    if task.kind != "image":
        absent = (example.media for example in examples if example.media not in paths)
        missing = list(dict.fromkeys(absent))
        examples = [example for example in examples if example.media in paths]
    if missing and not allow_missing:
        raise UserError(
            f"{settings.data}: {len(missing)} of {count} images are missing: "
            f"{', '.join(missing[:4])}{', ...' if missing[4:] else ''}; "
            "--allow-missing leaves their questions out"
        )
    if not examples:
        raise UserError(
            f"{settings.data}: all images are missing; they may be at any depth, with the names "
            f"that the annotations give, such as {missing[0]}"
        )
    pool: list[Example] = []
    if settings.shots:
        pool = _few_shot_pool(settings, folder)
        if not settings.text_only:
            paths |= _media_paths(folder, pool)
            pool = [example for example in pool if example.media in paths]
        _check_pool(settings, pool)
    return BenchmarkPlan(examples, paths, missing, pool)


def _media_paths(folder: Folder, examples: Iterable[Example]) -> dict[str, Path]:
    paths = {}
    for example in examples:
        path = folder.media(example)
        if path is not None:
            paths[example.media] = path
    return paths


def _few_shot_pool(settings: BenchmarkSettings, folder: Folder) -> list[Example]:
    """Examples with answers, from the split for few-shot examples."""
    task = TASKS[settings.task]
    if not task.shots_split:
        raise UserError(
            f"--shots={settings.shots}: {settings.task} has no split for few-shot examples"
        )
    pool = read_examples(task.shots_task or settings.task, folder, task.shots_split)
    return [example for example in pool if example.references]


def _check_pool(settings: BenchmarkSettings, pool: list[Example]) -> None:
    """Raise UserError if the pool has fewer examples, or images, than settings.shots."""
    if settings.text_only:
        count = len(pool)
        what = "examples"
    else:
        count = len({example.media for example in pool})
        what = "images of examples in the folder"
    if count < settings.shots:
        split = TASKS[settings.task].shots_split
        raise UserError(f"--shots={settings.shots}: the split {split!r} has {count} {what}")


def check_same_settings(settings: BenchmarkSettings, out: Path) -> None:
    """Raise UserError if the folder `out` holds predictions of different settings."""
    if not (out / SETTINGS_FILE).exists():
        return
    found = annotations.read_json(out / SETTINGS_FILE)
    found = found if isinstance(found, dict) else {}
    for name, value in asdict(settings).items():
        if found.get(name) != value:
            raise UserError(
                f"{out} holds predictions of different settings: {name} was {found.get(name)!r} "
                f"and is {value!r} now; choose another --out"
            )


def default_folder(settings: BenchmarkSettings) -> Path:
    """The folder for predictions if the user gives none, in the workdir of the checkpoint."""
    workdir, _ = checkpoint.split_step(Path(settings.checkpoint).resolve())
    shots = ""
    if settings.shots:
        shots = f"-{settings.shots}{'-text' if settings.text_only else ''}-shot"
    return workdir / "evaluate" / f"{settings.task}-{settings.split}{shots}-step{settings.step}"
