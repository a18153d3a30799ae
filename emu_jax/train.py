"""python -m emu_jax.train --config=configs/pretrain.py [--config.FIELD=VALUE ...]: trains any
stage.

config -> mesh -> abstract model -> shardings -> parameters (resume, else weights, else scratch) ->
data -> loop. Read next: loop.py.
"""

import dataclasses
import itertools
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from emu_jax import checkpoint, config, loop, optim, processes, profiler, sharding, stages, tree
from emu_jax.config import UserError
from emu_jax.data import precomputed
from emu_jax.data import tokenizer as tokenizers
from emu_jax.data.loader import LoadedBatch, Loader
from emu_jax.evaluate import benchmark
from emu_jax.evaluate.tasks import TASKS
from emu_jax.generate import diffusion_decoder, precompute
from emu_jax.generate.generation_config import GenerationConfig
from emu_jax.generate.session import Session
from emu_jax.initial import initial
from emu_jax.metric_writer import MetricWriter, means
from emu_jax.models import emu, module
from emu_jax.models.contrast import READOUT
from emu_jax.models.decoder import DecoderConfig, resized
from emu_jax.types import Batch
from emu_jax.watchdog import Watchdog

log = logging.getLogger(__name__)

# Fields in which a resumed run may differ from the one that wrote the checkpoint: hosts and
# devices, cadence, logging, what to do about bad data.
MAY_DIFFER = (
    "workdir",
    "mesh.",
    "checkpoint.every",
    "checkpoint.keep",
    "log.",
    "profile.",
    "compile_cache",
    "drawing.",
    "eval.every",
    "eval.batches",
    "eval.tasks",
    "data.prefetch",
    "data.workers",
    "data.readers",
    "data.patience",
    "data.retries",
    "data.max_bad_share",
    "data.unreadable",
)
# images behind the constants that standardise visual tokens
MEASURED = 2048
# images, and what is said of them, a time in TensorBoard
PICTURES = 8


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 trained, or stopped by a signal with everything saved; 2 for what the user can
    put right.
    """
    # as absl does, if Orbax's import has let it
    logging.basicConfig(format="%(levelname)s:%(name)s:%(message)s", stream=sys.stderr)
    logging.getLogger("emu_jax").setLevel(logging.INFO)
    began = time.perf_counter()
    try:
        # a process of its own
        if arguments is None:
            processes.initialize()
        c = config.load(sys.argv[1:] if arguments is None else arguments)
        # JAX_COMPILATION_CACHE_DIR goes before
        if c.compile_cache and not jax.config.jax_compilation_cache_dir:
            jax.config.update("jax_compilation_cache_dir", os.path.expanduser(c.compile_cache))
        train(c, began)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        processes.exit_process(2)
        return 2
    # the loop has its own way to stop: nothing was trained yet, or it is the second Ctrl-C
    except KeyboardInterrupt:
        print("error: stopped by SIGINT; the last checkpoint is as it was", file=sys.stderr)
        processes.exit_process(130)
        return 130
    except Exception:
        traceback.print_exc()
        processes.exit_process(1)
        return 1
    return 0


def train(c: ConfigDict, began: float | None = None) -> loop.State:
    """Trains the run that `c` describes, in c.workdir, from its newest checkpoint if it has one.
    began: as in Watchdog.
    """
    # Model: shapes only.
    if c.stage not in stages.STAGES:
        raise UserError(f"stage={c.stage!r} is not one of {', '.join(stages.STAGES)}")
    stage = stages.STAGES[c.stage]
    model_config = stage.size(c.model.to_dict())
    model = stage.emu(model_config)
    abstract = module.abstract(stage.module, model_config)
    print(parameter_table(abstract), flush=True)

    # Mesh and shardings.
    mesh = sharding.make_mesh(c.mesh.to_dict())
    check(c, mesh, abstract)
    program = make_program(c, stage, model_config, abstract)
    with jax.set_mesh(mesh), ExitStack() as at_end:
        placed = sharding.shardings(mesh, sharding.specs(abstract))
        trains = what_trains(c, abstract)

        # Data.
        tokenizer = tokenizers.load(c.data.tokenizer, model.llama.vocab)
        number, shares = processes.data_shard(mesh, c.data.batch)
        make_loader = partial(
            Loader,
            c.data,
            c.seed,
            tokenizer,
            model.resampler.tokens,
            stage.image(model_config),
            process=number,
            processes=shares,
            chats=model.llama.chats,
        )
        loader = at_end.enter_context(closing(make_loader()))
        evaluations = (
            [held_out(program, mesh, make_loader(eval=True), c)] if c.data.eval_mixture else []
        )
        evaluations += [benchmarks(program, mesh, tokenizer, c)] if c.eval.tasks else []
        evaluate = (
            (
                lambda params: {
                    name: value for one in evaluations for name, value in one(params).items()
                }
            )
            if evaluations
            else None
        )

        # State: resume, else weights, else scratch.
        workdir = Path(c.workdir)
        claim(workdir, c)
        run = config.to_dict(c)
        watchdog = at_end.enter_context(Watchdog(workdir, c.log.hang, began))
        checkpoints = at_end.enter_context(
            closing(
                checkpoint.CheckpointManager(
                    c.checkpoint.to or c.workdir,
                    keep=c.checkpoint.keep,
                    keep_every=c.checkpoint.keep_every,
                )
            )
        )

        def state_of(params):
            return loop.init_state(program, *tree.split(params, trains))

        like = abstract_state(c, program, mesh, abstract, trains)
        if (resumed := checkpoints.restore(like)) is not None:
            step, state, data, saved = resumed
            # it may have been brought here
            same(f"the checkpoint of step {step}", saved | {"checkpoint": run["checkpoint"]}, run)
            loader.restore(data)
            log.info("resumed at step %d of %d in %s", step, c.optim.steps, workdir)
        else:
            step = 0
            for kind in (kind for kind in precomputed.KINDS if c.data[kind]):
                precompute.check_weights(c, kind)
            params = jax.jit(
                lambda key: at_rest(c, trains, module.init(stage.module, model_config, key)),
                out_shardings=placed,
            )(jax.random.key(c.seed))
            params, loaded = initial(c.init, params)
            if model.standardise and "visual_stats" in params and "visual_stats/mean" not in loaded:
                params |= {
                    "visual_stats": measure_visual_stats(
                        program, params, make_loader(process=0, processes=1), placed["visual_stats"]
                    )
                }
            state = jax.jit(
                state_of, out_shardings=jax.tree.map(lambda x: x.sharding, like), donate_argnums=0
            )(params)

        # Train.
        if jax.process_index() == 0:
            # once more: another run may have begun here meanwhile
            claim(workdir, c)
            write_config(workdir, run)
        writer = at_end.enter_context(
            closing(MetricWriter(workdir, start=step, steps=c.optim.steps))
        )
        draws = None
        if c.log.pictures_every and "unet" in abstract:
            draws = drawings(program, mesh, c, make_loader)
        elif c.log.pictures_every and "llama" in abstract:
            draws = pictures(program, mesh, tokenizer, c.data.tokens)
        return loop.run(
            c,
            program,
            state,
            mesh,
            loader,
            checkpoints,
            writer,
            watchdog,
            evaluate,
            pictures=draws,
        )


def parameter_table(abstract: tree.Tree) -> str:
    """Parameters by tower, one line each."""
    counts = {
        tower: sum(leaf.size for leaf in jax.tree.leaves(part)) for tower, part in abstract.items()
    }
    counts["total"] = sum(counts.values())
    return "\n".join(f"{tower:14}{count:>16,} parameters" for tower, count in counts.items())


def make_program(
    c: ConfigDict, stage: stages.Stage, model_config: Any, abstract: tree.Tree
) -> loop.Program:
    """The program of a config; rules cover the whole model, and the trainable part of what they say
    is kept.
    """
    trains = what_trains(c, abstract)

    def trainable(rows, what):
        return tree.split(_rule(rows, abstract, what), trains)[0]

    if c.data.latents:
        stage = stage._replace(work=partial(stage.work, encodes=False))
    return loop.Program(
        stage=stage,
        model_config=model_config,
        objective=c.objective.to_dict() | {"sources": len(c.data.mixture)},
        optimizer=optim.make(
            c.optim,
            trainable(c.rules.peak_lr, "rules.peak_lr"),
            trainable(c.rules.decay, "rules.decay"),
        ),
        groups=trainable(c.rules.groups, "rules.groups"),
        specs=tree.split(sharding.specs(abstract), trains)[0],
        rows=tree.split(trains, trains)[0],
        seed=c.seed,
        accumulate=c.optim.accumulate,
        ema=c.optim.ema,
        spike=c.optim.spike,
    )


def what_trains(c: ConfigDict, abstract: tree.Tree) -> tree.Tree:
    """rules.train over the parameters: True, False, or (start, stop) for some rows of a matrix. The
    measured constants of the visual tokens never train. Raises UserError for what cannot train.
    """
    trains = _rule(c.rules.train, abstract, "rules.train")
    shapes = dict(tree.leaves(abstract))
    for path, chosen in tree.leaves(trains):
        if chosen and path.endswith(sharding.QUANTIZED):
            raise UserError(
                f"rules.train: {sharding.matrix_path(path)} is stored as {path.rpartition('/')[2]} and cannot train; a row before says: "
                "('llama/blocks/.*/(int8|nf4|absmax)', False)"
            )
        if not isinstance(chosen, bool) and not _are_rows(chosen, shapes[path].shape[0]):
            raise UserError(
                f"rules.train: {chosen!r} is neither True, nor False, nor (start, stop) of the rows of {path} {list(shapes[path].shape)}"
            )
    trains |= {
        tower: jax.tree.map(lambda _: False, part)
        for tower, part in trains.items()
        if tower == "visual_stats"
    }
    if not any(chosen for _, chosen in tree.leaves(trains)):
        raise UserError("rules.train: nothing trains; at least one row must say True")
    return trains


def abstract_state(
    c: ConfigDict,
    program: loop.Program,
    mesh: jax.sharding.Mesh,
    abstract: tree.Tree,
    trains: tree.Tree,
) -> loop.State:
    """The state of a run as shapes, each with its sharding."""
    state = jax.eval_shape(
        lambda params: loop.init_state(program, *tree.split(at_rest(c, trains, params), trains)),
        abstract,
    )
    return jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
        state,
        sharding.state_shardings(mesh, abstract, state),
    )


def at_rest(c: ConfigDict, trains: tree.Tree, params: tree.Tree) -> tree.Tree:
    """Parameters in the dtypes in which a run holds them: float32, but the matrices of what does
    not train in `frozen_dtype`.
    """
    keep = dict(tree.leaves(trains))
    return tree.unflatten(
        {
            path: leaf.astype(c.frozen_dtype)
            if sharding.is_matrix(path) and not keep[path]
            else leaf
            for path, leaf in tree.leaves(params)
        }
    )


def _are_rows(chosen: Any, count: int) -> bool:
    return (
        isinstance(chosen, tuple)
        and len(chosen) == 2
        and all(type(row) is int for row in chosen)
        and 0 <= chosen[0] < chosen[1] <= count
    )


def _rule(rows, abstract: tree.Tree, what: str) -> tree.Tree:
    try:
        return tree.by_rule(rows, abstract, what)
    except ValueError as error:
        raise UserError(str(error)) from error


def check(c: ConfigDict, mesh: jax.sharding.Mesh, abstract: tree.Tree) -> None:
    """Raises UserError, in one line, for all that is missing; for a batch that the devices cannot
    share out; for a model that they cannot hold.
    """
    places = [(name, path) for name, _, path, *_ in (*c.data.mixture, *c.data.eval_mixture)]
    missing = [
        what
        for absent, what in (
            (not c.workdir, "a workdir (--config.workdir=DIR)"),
            (
                not Path(c.data.tokenizer).is_file(),
                f"the tokenizer {c.data.tokenizer!r} (--config.data.tokenizer=LLaMA's tokenizer.model or a tokenizer.json)",
            ),
            (
                not places,
                "data (--config.data.mixture=\"(('NAME', WEIGHT, 'FOLDER:SPLIT'), ...)\")",
            ),
            *(
                (not Path(path.rpartition(":")[0]).is_dir(), f"the source {name!r} at {path!r}")
                for name, path in places
            ),
        )
        if absent
    ]
    if missing:
        raise UserError(f"missing: {'; '.join(missing)}")
    if "://" in c.workdir:
        raise UserError(
            f"workdir={c.workdir!r} is a bucket; metrics are written into a folder: --config.workdir=DIR, and "
            f"--config.checkpoint.to={c.workdir} for the checkpoints"
        )
    profiler.parse_steps(c.profile.steps)
    check_rows(c, mesh)
    sharding.check_divides(mesh, abstract)
    if "contrast" in abstract and c.model.vision.image % READOUT:
        raise UserError(
            f"model.vision.image={c.model.vision.image} must be a multiple of {READOUT}: the contrastive stage reads so many a side"
        )
    check_precomputed(c, abstract)
    if "unet" in abstract:
        diffusion_decoder.check_sampling(
            DecoderConfig.of(c.model.to_dict()).diffusion, c.drawing.to_dict()
        )
    device = jax.local_devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit") or os.sysconf(
        "SC_PAGE_SIZE"
    ) * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()

    def size(part):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(part)) / (
            mesh.size // mesh.shape["data"]
        )

    trains = what_trains(c, abstract)
    # a gradient and two moments
    needed = size(jax.eval_shape(partial(at_rest, c, trains), abstract)) + 3 * size(
        tree.split(abstract, trains)[0]
    )
    if needed > memory:
        raise UserError(
            f"the model's state needs {needed / 2**30:.1f} GiB a device and a device has {memory / 2**30:.1f} GiB: "
            f"use more devices (mesh.fsdp), or a smaller model (--config=configs/pretrain.py:emu-1b)"
        )


def check_rows(c: ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """Raises UserError for a batch that the devices cannot share out."""
    rows = int(np.prod([mesh.shape[axis] for axis in sharding.ROWS]))
    if c.optim.accumulate < 1 or c.data.batch % (rows * c.optim.accumulate):
        raise UserError(
            f"data.batch={c.data.batch} is not divisible by {rows} (the mesh's data x fsdp) x {c.optim.accumulate} (optim.accumulate)"
        )


def check_precomputed(c: ConfigDict, abstract: tree.Tree) -> None:
    """Raises UserError for a decoder whose conditions, or whose latents, are missing or not of this
    model; and for those that nothing draws from.
    """
    wanted = "unet" in abstract and c.model.decoder.condition == "generated"
    if wanted != bool(c.data.conditions):
        raise UserError(
            "model.decoder.condition='generated' needs data.conditions=DIR, made by: python -m emu_jax.generate precompute --config=FILE --to=DIR"
            if wanted
            else f"data.conditions={c.data.conditions!r}: nothing draws from them but model.decoder.condition='generated'"
        )
    if wanted:
        made = tuple(precomputed.read_metadata(Path(c.data.conditions), "conditions")["shape"])
        model = (c.model.resampler.tokens, c.model.llama.width)
        if made != model:
            raise UserError(
                f"data.conditions={c.data.conditions!r} are visual tokens {list(made)}, and the model's are {list(model)}"
            )
    if c.data.latents:
        here = precompute.latent_metadata(c)
        there = precomputed.read_metadata(Path(c.data.latents), "latents")
        if differ := [
            f"{name} {there.get(name)}, not {value}"
            for name, value in here.items()
            if there.get(name) != value
        ]:
            raise UserError(
                f"data.latents={c.data.latents!r} are of other images than this config's: {'; '.join(differ)}"
            )


def claim(workdir: Path, c: ConfigDict) -> None:
    """Makes the workdir, where there is none. Raises UserError if it is another config's, naming
    what differs, or cannot be written into.
    """
    path = workdir / "config.json"
    if path.exists():
        try:
            old = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(
                f"{path} is damaged: {error}; every checkpoint in {workdir} holds the config too"
            ) from error
        same(f"workdir {workdir}", old, config.to_dict(c))
    if jax.process_index() == 0:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".part").touch()
            path.with_suffix(".part").unlink()
        except OSError as error:
            raise UserError(f"cannot write into the workdir {workdir}: {error.strerror}") from error


def write_config(workdir: Path, values: dict) -> None:
    """From here on the workdir is this config's own: all that the config names was found."""
    part = workdir / "config.part"
    try:
        part.write_text(json.dumps(values, indent=1) + "\n")
        # whole or not at all
        part.replace(workdir / "config.json")
    except OSError as error:
        raise UserError(f"cannot write into the workdir {workdir}: {error.strerror}") from error


def same(whose: str, old: dict, new: dict) -> None:
    """Raises UserError, naming the fields, for a config that is another than that of `whose`, but
    for MAY_DIFFER. Fields that are new since then are only said: by their defaults a run goes on as
    it was.
    """
    old = _flat(old)
    new = _flat(new)
    if since := [key for key in sorted(new.keys() - old.keys()) if not key.startswith(MAY_DIFFER)]:
        log.warning(
            "%s has no %s: it is older; they are as this config has them", whose, ", ".join(since)
        )
    differ = [
        key for key in sorted(old) if old[key] != new.get(key) and not key.startswith(MAY_DIFFER)
    ]
    if differ:
        raise UserError(
            f"{whose} is of another config: "
            + ", ".join(f"{key} was {old[key]!r} and is {new.get(key)!r}" for key in differ[:4])
            + (f" and {len(differ) - 4} more" if len(differ) > 4 else "")
            + "; choose another workdir"
        )


def _flat(values: dict, prefix: str = "") -> dict:
    return {
        path: leaf
        for key, value in values.items()
        for path, leaf in (
            _flat(value, f"{prefix}{key}.").items()
            if isinstance(value, dict)
            else [(prefix + key, value)]
        )
    }


def measure_visual_stats(
    program: loop.Program, params: tree.Tree, loader: Loader, layout: tree.Tree
) -> tree.Tree:
    """Mean and deviation of each dimension of each visual token over MEASURED training images, for
    models that standardise them. Several processes all read the same images: `loader` is that of
    one process.
    """
    encode = jax.jit(
        lambda params, images: sharding.constrain(
            program.module(params).encode(images).astype(jnp.float32), PartitionSpec()
        )
    )
    found: list[np.ndarray] = []
    for item in loader:
        images = item.batch.images[item.batch.image_slots < item.batch.tokens.shape[1]]
        # one shape for every batch
        rows = len(item.batch.images) * item.batch.images.shape[1]
        padded = np.concatenate(
            [images, np.zeros((rows - len(images), *images.shape[1:]), np.uint8)]
        )
        found.append(np.asarray(encode(params, padded))[: len(images)])
        if sum(map(len, found)) >= MEASURED:
            break
    loader.close()
    tokens = np.concatenate(found)[:MEASURED].astype(np.float64)
    stats = {"mean": tokens.mean(0), "std": np.maximum(tokens.std(0), 1e-4)}
    log.info(
        "visual tokens standardised by the mean and deviation of %d images; mean deviation %.3g",
        len(tokens),
        stats["std"].mean(),
    )
    return {
        name: jax.device_put(value.astype(np.float32), layout[name])
        for name, value in stats.items()
    }


def held_out(
    program: loop.Program, mesh: jax.sharding.Mesh, loader: Loader, c: ConfigDict
) -> Callable[[tree.Tree], dict[str, float]]:
    """evaluate(params): the stage's metrics on `eval.batches` global batches of the held-out
    mixture.
    """
    program = dataclasses.replace(
        program, objective=program.objective | {"sources": len(c.data.eval_mixture)}
    )
    step = jax.jit(partial(loop.eval_step, program))
    place = partial(jax.make_array_from_process_local_data, sharding.batch_sharding(mesh))

    def evaluate(params: tree.Tree) -> dict[str, float]:
        total = None
        for item in itertools.islice(loader, c.eval.batches):
            metrics = step(params, jax.tree.map(place, item.batch))
            total = metrics if total is None else jax.tree.map(jnp.add, total, metrics)
        loader.close()
        return means(jax.device_get(total), loader.source_names)

    return evaluate


def benchmarks(
    program: loop.Program, mesh: jax.sharding.Mesh, tokenizer: tokenizers.Tokenizer, c: ConfigDict
) -> Callable[[tree.Tree], dict[str, float]]:
    """evaluate(params): the numbers of `eval.tasks`, each "task/number". Raises UserError, before
    anything is trained, for what it cannot ask.
    """
    if program.stage.module is not emu.Emu:
        raise UserError(f"eval.tasks: a model of the stage {c.stage!r} answers nothing")
    asked = []
    for row in c.eval.tasks:
        if (
            not isinstance(row, (tuple, list))
            or list(map(type, row)) != [str, str, int]
            or row[2] < 1
        ):
            raise UserError(f'eval.tasks: {row!r} is no (task, "FOLDER", number of examples)')
        task, folder, count = row
        if task not in TASKS or TASKS[task].metric in ("wups", "judge", "fid"):
            able = ", ".join(
                name for name, its in TASKS.items() if its.metric not in ("wups", "judge", "fid")
            )
            raise UserError(f"eval.tasks: {task!r} is none of {able}")
        asked.append((benchmark.Settings(task, c.workdir, 0, folder, TASKS[task].split), count))
        benchmark.plan(asked[-1][0], limit=count)

    def evaluate(params: tree.Tree) -> dict[str, float]:
        session = Session(program.model_config, params, tokenizer, context=c.data.tokens, mesh=mesh)
        return {
            f"{settings.task}/{name}": value
            for settings, count in asked
            for name, value in benchmark.numbers(session, settings, limit=count).items()
        }

    return evaluate


def pictures(
    program: loop.Program, mesh: jax.sharding.Mesh, tokenizer: tokenizers.Tokenizer, context: int
) -> Callable[[tree.Tree, LoadedBatch], tuple[np.ndarray, list[str]]]:
    """pictures(params, item): some images of a batch (of several processes, of the first one's),
    what the model says of them, and the text of the document that each is from.
    """

    def show(params: tree.Tree, item: LoadedBatch) -> tuple[np.ndarray, list[str]]:
        batch = multihost_utils.broadcast_one_to_all(
            jax.tree.map(lambda x: x[:PICTURES], item.batch)
        )
        rows, places = (
            index[:PICTURES] for index in np.nonzero(batch.image_slots < batch.tokens.shape[1])
        )
        images = batch.images[rows, places]
        slots = batch.image_slots[rows, places]
        own = [
            batch.segments[row] == batch.segments[row, slot]
            for row, slot in zip(rows, slots, strict=True)
        ]
        true = [
            tokenizer.decode(batch.tokens[row, held].tolist())
            for row, held in zip(rows, own, strict=True)
        ]
        session = Session(program.model_config, params, tokenizer, context=context, mesh=mesh)
        said = session.generate_texts(
            [[image] for image in images], GenerationConfig(max_new_tokens=24)
        )
        return images, [
            f"{one} (of: {shorten(other, 200)})" for one, other in zip(said, true, strict=True)
        ]

    return show


def drawings(
    program: loop.Program, mesh: jax.sharding.Mesh, c: ConfigDict, make_loader: Callable[[], Loader]
) -> Callable[[tree.Tree, LoadedBatch], tuple[np.ndarray, list[str]]]:
    """drawings(params, item): the first images of the data, each beside what the decoder makes of
    it, always the same ones with the same seeds, and led away from zeros: nothing is generated
    here.
    """
    side = program.model_config.image
    how = {name: c.drawing[name] for name in diffusion_decoder.SAMPLING_OPTIONS}
    first = make_loader()
    batch = multihost_utils.broadcast_one_to_all(
        jax.tree.map(lambda x: x[:PICTURES], next(iter(first)).batch)
    )
    first.close()
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    count = len(batch.tokens)
    # filled up, so that every device has as many
    rows = jax.tree.map(lambda x: x[np.arange(-(-count // shards) * shards) % count], batch)

    def both(params: tree.Tree, batch: Batch) -> tuple[jax.Array, jax.Array]:
        condition = program.module(params).conditions(batch)
        images = resized(batch.images.reshape(-1, *batch.images.shape[2:]), side)
        return images, diffusion_decoder.sample(
            program.model_config, params, condition, jnp.arange(len(condition)), **how
        )

    both = jax.jit(both)
    held = (batch.image_slots < batch.tokens.shape[1]).ravel()

    def show(params: tree.Tree, _: LoadedBatch) -> tuple[np.ndarray, list[str]]:
        images = np.concatenate(
            [processes.to_host(part)[: len(held)] for part in both(params, rows)], 2
        )
        return images[held], ["left the image, right as it is drawn"]

    return show


if __name__ == "__main__":
    sys.exit(main())
