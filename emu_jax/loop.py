"""One training loop for every stage: `train_step`, and the loop that feeds it. No stage's name
occurs here.

The loop never waits for the device: the numbers of step n - 1 are fetched after step n is
dispatched. Read next: train.py.
"""

import json
import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jaxtyping import Array, Float, Int

from emu_jax import hardware, processes, profiler, sharding, tree
from emu_jax.checkpoint import CheckpointManager
from emu_jax.config import UserError, to_dict
from emu_jax.data.loader import LoadedBatch, Loader, merge_states
from emu_jax.metric_writer import MetricWriter, means
from emu_jax.models import flops, module
from emu_jax.stages import Stage
from emu_jax.types import Batch, Metrics
from emu_jax.watchdog import Watchdog

log = logging.getLogger(__name__)


@flax.struct.dataclass
class State:
    # batches consumed
    step: Int[Array, ""]
    trainable: tree.Tree
    frozen: tree.Tree
    opt_state: Any
    # average of the trainable leaves
    ema: tree.Tree | None
    # steps left out, non-finite or spiking
    bad: Int[Array, ""]
    # running mean of the gradient's norm, for the spikes
    typical_norm: Float[Array, ""]


@dataclass(frozen=True)
class Program:
    """All that a step needs beside its arrays."""

    stage: Stage
    # of the stage's module
    model_config: Any
    # config.objective and the number of sources
    objective: dict
    optimizer: optax.GradientTransformation
    # trainable leaf -> name under which its gradient's norm is logged
    groups: tree.Tree
    # trainable leaf -> PartitionSpec
    specs: tree.Tree
    # trainable leaf -> True, or (start, stop): only these of its rows train
    rows: tree.Tree
    seed: int
    accumulate: int
    ema: float
    spike: float

    def module(self, params: tree.Tree, key: Array | None = None):
        """`key` turns the dropout of LoRA on."""
        return module.bind(self.stage.module, self.model_config, params, key)


def init_state(program: Program, trainable: tree.Tree, frozen: tree.Tree) -> State:
    """The state at step 0."""
    zero = partial(jnp.zeros, (), jnp.int32)
    return State(
        zero(),
        trainable,
        frozen,
        program.optimizer.init(trainable),
        jax.tree.map(jnp.copy, trainable) if program.ema else None,
        zero(),
        jnp.zeros(()),
    )


def train_step(program: Program, state: State, batch: Batch) -> tuple[State, Metrics]:
    """One step on a global batch. A step whose loss or gradient is not finite (or spikes) leaves
    everything but the counters unchanged.
    """
    key = jax.random.fold_in(jax.random.key(program.seed), state.step)
    totals = program.stage.weights(batch)

    def loss(trainable, micro, key):
        return program.stage.loss(
            program.module(tree.merge(trainable, state.frozen), key),
            micro,
            key,
            totals,
            program.objective,
        )

    def one(micro, number):
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(
            state.trainable, micro, jax.random.fold_in(key, number)
        )
        return value, sharding.constrain(grads, program.specs), metrics

    # Rows a, a + A, a + 2 A ... are micro-batch a: every device keeps the rows it has.
    micros = (
        jax.tree.map(lambda x: rearrange(x, "(b a) ... -> a b ...", a=program.accumulate), batch),
        jnp.arange(program.accumulate),
    )
    zero = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(one, *jax.tree.map(lambda x: x[0], micros)),
    )
    (value, grads, metrics), _ = jax.lax.scan(
        lambda total, inputs: (jax.tree.map(jnp.add, total, one(*inputs)), None), zero, micros
    )

    grads = only(grads, program.rows)
    norm = optax.global_norm(grads)
    ok = jnp.isfinite(value) & jnp.isfinite(norm)
    if program.spike:
        ok &= (state.typical_norm == 0) | (norm < program.spike * state.typical_norm)
    updates, opt_state = program.optimizer.update(grads, state.opt_state, state.trainable)
    trainable = optax.apply_updates(state.trainable, only(updates, program.rows))
    ema = state.ema and jax.tree.map(
        lambda old, new: old + (1 - program.ema) * (new - old), state.ema, trainable
    )
    typical = jnp.where(state.typical_norm == 0, norm, 0.98 * state.typical_norm + 0.02 * norm)
    new = state.replace(trainable=trainable, opt_state=opt_state, ema=ema, typical_norm=typical)
    new = jax.tree.map(lambda new, old: jnp.where(ok, new, old), new, state)
    new = new.replace(step=state.step + 1, bad=state.bad + ~ok)
    one = jnp.ones(())
    norms = {
        f"grad_norm/{name}": (group, one)
        for name, group in _group_norms(grads, program.groups).items()
    }
    return new, metrics | norms | {
        "loss": (value, one),
        "grad_norm": (norm, one),
        "bad_steps": (new.bad.astype(jnp.float32), one),
    }


def only(values: tree.Tree, rows: tree.Tree) -> tree.Tree:
    """`values` with zeros in the rows that do not train."""

    def one(x, rows):
        if rows is True:
            return x
        at = jnp.arange(len(x)).reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where((rows[0] <= at) & (at < rows[1]), x, 0)

    return jax.tree.map(one, values, rows)


def jitted(program: Program, state: State) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """`train_step` as it runs: `state`, arrays or their shapes with their shardings, is given up
    and comes back laid out as it was.
    """
    shards = jax.tree.map(lambda x: x.sharding, state)
    device = next(iter(jax.tree.leaves(shards)[0].device_set))
    return jax.jit(
        partial(train_step, program),
        donate_argnums=0,
        out_shardings=(shards, None),
        compiler_options=hardware.compiler_options(device),
    )


def eval_step(program: Program, params: tree.Tree, batch: Batch) -> Metrics:
    """Metrics of a batch without dropout or gradient."""
    return program.stage.loss(
        program.module(params), batch, None, program.stage.weights(batch), program.objective
    )[1]


def _group_norms(grads: tree.Tree, groups: tree.Tree) -> dict[str, Array]:
    squares: dict[str, Array] = {}
    for (_, grad), (_, name) in zip(tree.leaves(grads), tree.leaves(groups), strict=True):
        squares[name] = squares.get(name, 0.0) + jnp.sum(jnp.square(grad.astype(jnp.float32)))
    return {name: jnp.sqrt(square) for name, square in squares.items()}


def run(
    c,
    program: Program,
    state: State,
    mesh: jax.sharding.Mesh,
    loader: Loader,
    checkpoints: CheckpointManager,
    writer: MetricWriter,
    watchdog: Watchdog,
    evaluate: Callable[[tree.Tree], dict[str, float]] | None = None,
    pictures: Callable[[tree.Tree, LoadedBatch], list] | None = None,
) -> State:
    """Trains from `state.step` to `optim.steps`, or until SIGINT or SIGTERM, and saves.
    `evaluate(params)` gives held-out numbers, `pictures(params, item)` the arguments of
    MetricWriter.write_images. Raises UserError after `log.max_bad_steps` bad steps.
    """
    place = partial(jax.make_array_from_process_local_data, sharding.batch_sharding(mesh))
    step_fn = jitted(program, state)
    counts = Counts(program, c, state)
    pending: tuple[int, LoadedBatch, Metrics, float] | None = None
    first = step = int(state.step)
    batches: Iterator[LoadedBatch] = iter(loader)
    item = None

    def finish(pending) -> None:
        """Fetches and tells the numbers of a step that was dispatched; the device is busy with the
        next one meanwhile.
        """
        number, item, metrics, waited = pending
        values = means(jax.device_get(metrics), loader.source_names)
        values |= counts.of(item, waited)
        bad = int(values["bad_steps"])
        before = counts.bad
        if bad > before:
            log.warning(
                "step %d left the weights as they were: loss %s, gradient norm %s; documents: %s",
                number,
                values.get("loss"),
                values.get("grad_norm"),
                ", ".join(document for row in item.ids for document in row),
            )
        counts.bad = bad
        if number % c.log.every == 0 or bad > before:
            writer.write(number, values)

    def save(wait: bool = False) -> None:
        nonlocal pending
        full = None
        try:
            # a run that goes on from here does not tell this step again
            if pending:
                finish(pending)
            writer.flush()
        # the disk of the metrics is full; that of the checkpoints may be another
        except UserError as error:
            full = error
        pending = None
        # so that the time is the save's
        jax.block_until_ready(state)
        with watchdog.phase("checkpoint"):
            data = merge_states(processes.allgather_json(item.state))
            checkpoints.save(step, state, data, to_dict(c), wait=wait or bool(full))
        if full:
            loader.close()
            raise full
        log.info(
            "step %d is being saved, the data's state in %d bytes; %s",
            step,
            len(json.dumps(data)),
            watchdog.goodput(),
        )

    should_stop = processes.StopConsensus(mesh)
    watchdog.enter_phase("steps")
    with (
        stop_signals() as stopped,
        profiler.trace_steps(
            profiler.parse_steps(c.profile.steps),
            writer.path.parent / f"profile/{jax.process_index()}",
        ) as before,
    ):
        while step < c.optim.steps and not should_stop(bool(stopped)):
            began = time.perf_counter()
            with watchdog.phase("input wait"):
                item = next(batches)
            waited = time.perf_counter() - began
            watchdog.begin_step(step + 1, item.ids)
            before(step + 1, state)
            with watchdog.phase("steps" if step > first else "compile"):
                state, metrics = step_fn(state, jax.tree.map(place, item.batch))
            step += 1
            if pending:
                finish(pending)
            pending = step, item, metrics, waited
            if counts.bad - counts.bad_at_start >= c.log.max_bad_steps:
                break

            def params():
                return tree.merge(state.trainable, state.frozen)

            # what `generate` takes
            draws = state.ema if state.ema and "unet" in state.trainable else state.trainable

            def due(every):
                return every and step % every == 0

            if evaluate and (due(c.eval.every) or step == c.optim.steps):
                with watchdog.phase("evaluation"):
                    values = evaluate(params())
                writer.write(step, {f"eval/{name}": value for name, value in values.items()})
                counts.pause()
            if pictures and due(c.log.pictures_every):
                with watchdog.phase("evaluation"):
                    writer.write_images(step, *pictures(tree.merge(draws, state.frozen), item))
                counts.pause()
            # last: a run that goes on from here does not evaluate again
            if due(c.checkpoint.every) and step < c.optim.steps:
                save()
                counts.pause()
        if step > first:
            save(wait=True)
    loader.close()
    if counts.bad - counts.bad_at_start >= c.log.max_bad_steps:
        raise UserError(
            f"stopped at step {step}: {counts.bad} steps were not finite or spiked (log.max_bad_steps={c.log.max_bad_steps}); "
            "their documents are named in the log; the checkpoint holds the last good weights"
        )
    if step < c.optim.steps:
        log.warning(
            "stopped by %s at step %d of %d; the checkpoint is saved, the same command goes on",
            *(stopped[:1] or ["another process"]),
            step,
            c.optim.steps,
        )
    if step > first and step_fn._cache_size() > 1:
        log.warning(
            "train_step was compiled %d times: a shape or a dtype changes from step to step",
            step_fn._cache_size(),
        )
    return state


class Counts:
    """The speed of a run: what each step's batch held, over the time from one step's end to the
    next's.
    """

    def __init__(self, program: Program, c, state: State):
        self.work = partial(program.stage.work, program.model_config)
        self.slots = program.stage.emu(program.model_config).resampler.tokens
        params = tree.merge(state.trainable, state.frozen)
        self.trained = flops.trained(path for path, _ in tree.leaves(state.trainable))
        self.towers = set(params) | ({"heads"} if "llama" in params else set())
        self.peak = hardware.peak_flops(jax.devices()[0].device_kind)
        self.bad = self.bad_at_start = int(state.bad)
        self.ended: float | None = None
        self.rows = c.data.batch

    def pause(self) -> None:
        """What was done since the last step is not part of the next one's time."""
        self.ended = None

    def of(self, item: LoadedBatch, waited: float) -> dict[str, float]:
        now = time.perf_counter()
        seconds = None if self.ended is None else now - self.ended
        self.ended = now
        held = item.batch.segments > 0
        # this process's rows stand for all processes' rows
        share = self.rows / len(held)
        tokens = share * int(held.sum())
        images = share * int((item.batch.image_slots < held.shape[1]).sum())
        values = {"padding": 1 - float(held.mean()), "input_wait": waited}
        values |= {
            name: item.stats[name] for name in ("cut_documents", "cut_turns") if name in item.stats
        }
        values |= {f"epochs/{name}": value for name, value in item.stats["epochs"].items()}
        # the first step, which compiles, and those after a pause
        if not seconds:
            return values
        pairs = share * int((item.batch.positions + 1)[held].sum())
        work = self.work(
            self.trained,
            images=images,
            tokens=tokens,
            pairs=pairs,
            labels=share * float(item.batch.text_weights.sum()),
            regressed=share * float(item.batch.image_weights.sum()) * self.slots,
        )
        work = {tower: value for tower, value in work.items() if tower in self.towers}
        values |= {
            "step_time": seconds,
            "tokens_per_second": tokens / seconds,
            "images_per_second": images / seconds,
            "flops_per_second": sum(work.values()) / seconds,
        }
        values |= {f"flops_per_second/{tower}": value / seconds for tower, value in work.items()}
        return values | (
            {"mfu": sum(work.values()) / seconds / (self.peak * jax.device_count())}
            if self.peak
            else {}
        )


@contextmanager
def stop_signals() -> Iterator[list[str]]:
    """A list that SIGINT and SIGTERM put their name into instead of ending the process; a second
    one ends it.
    """
    received: list[str] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number, _frame):
        received.append(signal.Signals(number).name)
        signal.signal(number, before[number])

    try:
        for number in before:
            signal.signal(number, note)
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
