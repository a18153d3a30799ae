"""Evaluations and TensorBoard samples, made at intervals during a run.

An evaluator maps parameters to numbers. A sampler maps parameters and a batch to images with
captions. The loop calls both. Read next: train.py.
"""

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from textwrap import shorten
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from emu_jax import processes, sharding, tree
from emu_jax.config import UserError
from emu_jax.data.loader import LoadedBatch, Loader
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.evaluate.benchmark import evaluate_session
from emu_jax.evaluate.plan import BenchmarkSettings, plan_benchmark
from emu_jax.evaluate.tasks import TASKS
from emu_jax.generate import diffusion_decoder
from emu_jax.generate.generation_config import GenerationConfig
from emu_jax.generate.session import Session
from emu_jax.metric_writer import means
from emu_jax.models.decoder import resize
from emu_jax.plan import RunPlan, batch_shards
from emu_jax.step import Program, jit_eval_step
from emu_jax.types import Batch

Evaluator = Callable[[tree.Tree], dict[str, float]]
Sampler = Callable[[tree.Tree, LoadedBatch], tuple[np.ndarray, list[str]]]

# Number of images, each with its caption, in a sample.
SAMPLES = 8
# Metrics that cannot be computed during training, because they need word lists, a judge or the
# Inception network besides the model and the examples.
OFFLINE_METRICS = ("wups", "judge", "fid")


def held_out_evaluator(plan: RunPlan, loader: Loader) -> Evaluator:
    """The stage's metrics on `eval.batches` global batches of the held-out mixture."""
    c = plan.config
    objective = plan.program.objective.copy({"sources": len(c.data.eval_mixture)})
    program = dataclasses.replace(plan.program, objective=objective)
    place = partial(jax.make_array_from_process_local_data, sharding.batch_sharding(plan.mesh))

    def evaluate(params: tree.Tree) -> dict[str, float]:
        total = None
        for item in itertools.islice(loader, c.eval.batches):
            metrics = jit_eval_step(program, params, jax.tree.map(place, item.batch))
            total = metrics if total is None else jax.tree.map(jnp.add, total, metrics)
        loader.close()
        return means(jax.device_get(total), loader.source_names)

    return evaluate


def benchmark_evaluator(plan: RunPlan, tokenizer: Tokenizer) -> Evaluator:
    """The scores of `eval.tasks`, each named "task/score".

    Raises UserError, before anything is trained, for a task that cannot be evaluated.
    """
    c = plan.config
    if not plan.program.stage.answers:
        raise UserError(f"eval.tasks: stage {c.stage!r} has no language model to evaluate")
    tasks = []
    for row in c.eval.tasks:
        settings, count = _parse_task(row, c.workdir)
        plan_benchmark(settings, limit=count)
        tasks.append((settings, count))

    def evaluate(params: tree.Tree) -> dict[str, float]:
        session = _session(plan, params, tokenizer)
        values = {}
        for settings, count in tasks:
            numbers = evaluate_session(session, settings, limit=count)
            values |= {f"{settings.task}/{name}": value for name, value in numbers.items()}
        return values

    return evaluate


def _parse_task(row: tuple, workdir: str) -> tuple[BenchmarkSettings, int]:
    """(settings, number of examples) of a row of eval.tasks."""
    if not isinstance(row, (tuple, list)) or [type(value) for value in row] != [str, str, int]:
        raise _not_a_task(row)
    task, folder, count = row
    if count < 1:
        raise _not_a_task(row)
    known = [name for name, spec in TASKS.items() if spec.metric not in OFFLINE_METRICS]
    if task not in known:
        raise UserError(f"eval.tasks: {task!r} is not one of {', '.join(known)}")
    return BenchmarkSettings(task, workdir, 0, folder, TASKS[task].split), count


def _not_a_task(row: tuple) -> UserError:
    return UserError(f'eval.tasks: {row!r} is not a (task, "FOLDER", number of examples)')


def caption_sampler(plan: RunPlan, tokenizer: Tokenizer) -> Sampler:
    """Images of a batch, with the model's caption and the text of the image's document.

    The images come from the rows of process 0.
    """

    def sample(params: tree.Tree, item: LoadedBatch) -> tuple[np.ndarray, list[str]]:
        batch = _first_rows(item.batch)
        rows, indices = np.nonzero(batch.has_image)
        rows = rows[:SAMPLES]
        indices = indices[:SAMPLES]
        images = batch.images[rows, indices]

        session = _session(plan, params, tokenizer)
        captions = session.generate_texts(
            [[image] for image in images], GenerationConfig(max_new_tokens=24)
        )
        labels = []
        for row, slot, caption in zip(
            rows, batch.image_slots[rows, indices], captions, strict=True
        ):
            document = batch.segments[row] == batch.segments[row, slot]
            text = tokenizer.decode(batch.tokens[row, document].tolist())
            labels.append(f"{caption} (of: {shorten(text, 200)})")
        return images, labels

    return sample


def image_sampler(plan: RunPlan, make_loader: Callable[[], Loader]) -> Sampler:
    """The first images of the data, each next to what the decoder draws for it.

    Every call uses the same images and seeds. The negative condition of guidance is zeros, because
    the visual tokens of the empty prompt are not available during training.
    """
    program = plan.program
    options = {name: plan.config.drawing[name] for name in diffusion_decoder.SAMPLING_OPTIONS}
    loader = make_loader()
    batch = _first_rows(next(iter(loader)).batch)
    loader.close()

    # Repeat rows until every device has the same number.
    shards = batch_shards(plan.mesh)
    count = len(batch.tokens)
    padded = np.arange(-(-count // shards) * shards) % count
    rows = jax.tree.map(lambda x: x[padded], batch)
    has_image = batch.has_image.ravel()

    def sample(params: tree.Tree, _: LoadedBatch) -> tuple[np.ndarray, list[str]]:
        pair = _images_and_drawings(program, tuple(options.items()), params, rows)
        columns = [processes.to_host(images)[: len(has_image)] for images in pair]
        side_by_side = np.concatenate(columns, axis=2)
        return side_by_side[has_image], ["left: the image; right: the decoder's drawing of it"]

    return sample


@partial(jax.jit, static_argnums=(0, 1))
def _images_and_drawings(
    program: Program, options: tuple, params: tree.Tree, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    config = program.model_config
    images = resize(batch.images.reshape(-1, *batch.images.shape[2:]), config.image)
    condition = program.bind(params).conditions(batch)
    seeds = jnp.arange(len(condition))
    return images, diffusion_decoder.sample(config, params, condition, seeds, **dict(options))


def _first_rows(batch: Batch) -> Any:
    """The first SAMPLES rows of process 0, in every process."""
    return multihost_utils.broadcast_one_to_all(jax.tree.map(lambda x: x[:SAMPLES], batch))


def _session(plan: RunPlan, params: tree.Tree, tokenizer: Tokenizer) -> Session:
    context = plan.config.data.tokens
    return Session(plan.program.model_config, params, tokenizer, context=context, mesh=plan.mesh)
