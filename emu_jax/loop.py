"""One training loop for every stage; it knows neither stages nor towers by name.

The loop never waits for the device: the metrics of step n - 1 are fetched after step n is
dispatched. Read next: train.py.
"""

import json
import logging
import signal
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, contextmanager
from functools import partial

import jax
import numpy as np
from ml_collections import ConfigDict

from emu_jax import processes, profiler, sharding, tree
from emu_jax.checkpoint import CheckpointManager
from emu_jax.config import UserError, to_dict
from emu_jax.data.loader import LoadedBatch, Loader, merge_states
from emu_jax.metric_writer import MetricWriter, means
from emu_jax.plan import RunPlan
from emu_jax.step import State, jit_train_step
from emu_jax.throughput import Throughput
from emu_jax.types import Metrics
from emu_jax.watchdog import Watchdog

log = logging.getLogger(__name__)


def run(
    plan: RunPlan,
    state: State,
    loader: Loader,
    checkpoints: CheckpointManager,
    writer: MetricWriter,
    watchdog: Watchdog,
    evaluators: Sequence[Callable[[tree.Tree], dict[str, float]]] = (),
    sampler: Callable[[tree.Tree, LoadedBatch], tuple[np.ndarray, list[str]]] | None = None,
) -> State:
    """Train from `state.step` to `optim.steps`, or until SIGINT or SIGTERM, and save.

    evaluators: functions from parameters to numbers, called every eval.every steps and at the end.
    sampler: a function from parameters and a batch to images and captions for
    MetricWriter.write_images, called every log.pictures_every steps.
    Raises UserError after log.max_bad_steps bad steps.
    """
    c = plan.config
    first = step = int(state.step)
    place = partial(jax.make_array_from_process_local_data, sharding.batch_sharding(plan.mesh))
    train_step = jit_train_step(state)
    programs = 0
    metric_log = MetricLog(plan, state, writer, loader.source_names)
    should_stop = processes.StopConsensus(plan.mesh)
    profile_dir = writer.path.parent / f"profile/{jax.process_index()}"
    profiled = profiler.trace_steps(profiler.parse_steps(c.profile.steps), profile_dir)
    save = partial(save_checkpoint, c, checkpoints, metric_log, watchdog)

    if step < c.optim.steps:
        log.info("compiling the training step, which may take minutes; later starts reuse it")
    else:
        log.info(
            "the run is complete: step %d of %d. To train its model further, start a run in "
            "another workdir with --config.init=%s",
            step,
            c.optim.steps,
            c.workdir,
        )
    watchdog.enter_phase("steps")
    with closing(loader), stop_signals() as stopped, profiled as profile:
        batches = iter(loader)
        while step < c.optim.steps and not should_stop(bool(stopped)):
            began = time.perf_counter()
            with watchdog.phase("input wait"):
                item = next(batches)
            waited = time.perf_counter() - began

            watchdog.begin_step(step + 1, item.ids)
            profile(step + 1, state)
            with watchdog.phase("steps" if step > first else "compile"):
                batch = jax.tree.map(place, item.batch)
                state, metrics = train_step(plan.program, state, batch)
            step += 1
            programs = programs or count_compiled(train_step)
            metric_log.add(step, item, metrics, waited)
            if metric_log.bad >= c.log.max_bad_steps:
                break

            if evaluators and (_due(c.eval.every, step) or step == c.optim.steps):
                with watchdog.phase("evaluation"):
                    evaluate(evaluators, state, writer, step)
                metric_log.pause()
            if sampler and _due(c.log.pictures_every, step):
                with watchdog.phase("evaluation"):
                    params = _sampled_params(plan, state)
                    writer.write_images(step, *sampler(params, item))
                metric_log.pause()
            # Save after the evaluation, so that a resumed run does not evaluate this step again.
            if _due(c.checkpoint.every, step) and step < c.optim.steps:
                save(step, state, item)
                metric_log.pause()
        if step > first:
            save(step, state, item, wait=True)

    report_end(c, step, metric_log.bad, stopped)
    if programs and (recompiled := count_compiled(train_step) - programs):
        log.warning(
            "train_step was compiled %d times: a shape or a dtype changes from step to step",
            recompiled + 1,
        )
    return state


def report_end(c: ConfigDict, step: int, bad_steps: int, signals: list[str]) -> None:
    """Log why a run ended before its last step. Raises UserError after too many bad steps."""
    if bad_steps >= c.log.max_bad_steps:
        raise UserError(
            f"stopped at step {step}: {bad_steps} steps were not finite or spiked "
            f"(log.max_bad_steps={c.log.max_bad_steps}); their documents are named in the log; the "
            "checkpoint holds the last good weights"
        )
    if step < c.optim.steps:
        log.warning(
            "stopped by %s at step %d of %d; the checkpoint is saved, the same command resumes",
            signals[0] if signals else "another process",
            step,
            c.optim.steps,
        )


def count_compiled(jitted: jax.stages.Wrapped) -> int:
    """Number of programs that this process has compiled for a jitted function."""
    return jitted._cache_size()  # ty: ignore[missing-attribute]


def evaluate(
    evaluators: Sequence[Callable[[tree.Tree], dict[str, float]]],
    state: State,
    writer: MetricWriter,
    step: int,
) -> None:
    """Write the numbers of all evaluators as one line of metrics.jsonl."""
    params = tree.merge(state.trainable, state.frozen)
    values = {}
    for evaluator in evaluators:
        values |= evaluator(params)
    writer.write(step, {f"eval/{name}": value for name, value in values.items()})


def _sampled_params(plan: RunPlan, state: State) -> tree.Tree:
    """The parameters that `generate` would use: a decoder uses the average of its weights."""
    averaged = state.ema if plan.program.stage.draws else None
    return tree.merge(averaged or state.trainable, state.frozen)


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


class MetricLog:
    """Writes the metrics of each step one step late, while the device is busy with the next."""

    def __init__(
        self, plan: RunPlan, state: State, writer: MetricWriter, source_names: tuple[str, ...]
    ):
        self.writer = writer
        self.source_names = source_names
        self.every = plan.config.log.every
        self.throughput = Throughput(plan.program, state, plan.config.data.batch)
        self.bad_at_start = self.bad_in_all = int(state.bad)
        self.pending: tuple[int, LoadedBatch, Metrics, float] | None = None

    @property
    def bad(self) -> int:
        """Bad steps since the run started or resumed."""
        return self.bad_in_all - self.bad_at_start

    def add(self, step: int, item: LoadedBatch, metrics: Metrics, waited: float) -> None:
        """Add a step that was dispatched, and write the metrics of the previous step."""
        self._write_pending()
        self.pending = step, item, metrics, waited

    def flush(self) -> None:
        """Write the pending metrics, and wait until they are on disk."""
        self._write_pending()
        self.writer.flush()

    def pause(self) -> None:
        """Exclude the time since the last step from the time of the next step."""
        self.throughput.pause()

    def _write_pending(self) -> None:
        if self.pending is None:
            return
        step, item, metrics, waited = self.pending
        self.pending = None
        values = means(jax.device_get(metrics), self.source_names)
        values |= self.throughput.measure(item, waited)
        bad = int(values["bad_steps"])
        was_bad = bad > self.bad_in_all
        self.bad_in_all = bad
        if was_bad:
            log.warning(
                "step %d left the weights as they were: loss %s, gradient norm %s; documents: %s",
                step,
                values.get("loss"),
                values.get("grad_norm"),
                ", ".join(document for row in item.ids for document in row),
            )
        if step % self.every == 0 or was_bad:
            self.writer.write(step, values)


def save_checkpoint(
    c: ConfigDict,
    checkpoints: CheckpointManager,
    metric_log: MetricLog,
    watchdog: Watchdog,
    step: int,
    state: State,
    item: LoadedBatch,
    *,
    wait: bool = False,
) -> None:
    """Save the state after `step`, whose batch was `item`, and the metrics up to it.

    wait: return only once everything is on disk. Raises UserError if a disk is full. If the metrics
    cannot be written, the checkpoint is saved before the error is raised.
    """
    error = None
    try:
        # A run that resumes from this checkpoint will not log this step again.
        metric_log.flush()
    except UserError as disk_full:
        # Still save the checkpoint, which may be on another disk; raise the error afterwards.
        error = disk_full
    # Finish the step first, so that its time does not count as the checkpoint's.
    jax.block_until_ready(state)
    with watchdog.phase("checkpoint"):
        data = merge_states(processes.allgather_json(item.state))
        checkpoints.save(step, state, data, to_dict(c), wait=wait or bool(error))
    if error:
        raise error
    size = len(json.dumps(data))
    log.info("saving step %d, %d bytes of data state; %s", step, size, watchdog.goodput())


@contextmanager
def stop_signals() -> Generator[list[str]]:
    """Yield a list to which SIGINT and SIGTERM append their names, instead of exiting.

    A second signal of the same kind has its usual effect.
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
