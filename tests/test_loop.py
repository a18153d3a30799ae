"""Laws of a step and of the loop, on a fake model of two towers.

Laws of the mesh and of accumulation use a small Emu.
"""

import dataclasses
import json
import logging
import os
import signal
from functools import partial
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from jax.sharding import NamedSharding, PartitionSpec

from emu_jax import loop, sharding, stages, throughput, tree
from emu_jax.checkpoint import CheckpointManager
from emu_jax.config import UserError
from emu_jax.data.loader import LoadedBatch
from emu_jax.metric_writer import MetricWriter
from emu_jax.models import emu, flops, layers, module
from emu_jax.plan import RunPlan, abstract_params, make_program
from emu_jax.step import Program, State, init_state, train_step
from emu_jax.watchdog import Watchdog
from tests.support import make
from tests.support.trees import assert_bitwise_equal, assert_close

C = make.cfg()
T = C.data.tokens


class Leaf(nnx.Module):
    def __init__(self, width, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (width,)))


class Line(nnx.Module):
    """A linear model that predicts the weight of the row's first image.

    Its prediction is text_weights [B, T] times `slope`, plus `shift`.
    """

    def __init__(self, model_config, rngs):
        self.slope = Leaf(T, rngs)
        self.shift = Leaf(1, rngs)


# Every trace of a step or an evaluation adds an entry.
TRACES = []


def line_loss(model, batch, key, totals, objective):
    TRACES.append(1)
    x = layers.dropout(batch.text_weights, objective["dropout"], key)
    error = (
        x @ model.slope.w.get_value() + model.shift.w.get_value() - batch.image_weights[:, 0]
    ) ** 2
    return error.sum() / totals["rows"], {"error": (error.sum(), jnp.float32(len(error)))}


LINE = stages.Stage(
    module=Line,
    loss_weights=lambda batch: {"rows": jnp.float32(len(batch.tokens))},
    loss=line_loss,
)
SIZE = emu.EmuConfig.of(C.model.to_dict())
PARAMS = module.init(Line, SIZE, jax.random.key(0))
ADAM = optax.adam(0.1)
# The loop's step, but without donation, because the laws compare states before and after.
STEP = jax.jit(train_step, static_argnums=0)


def program(*, trains=("slope", "shift"), dropout=0.0, accumulate=1, ema=0.0, spike=0.0):
    return Program(
        stage=LINE,
        model_config=SIZE,
        objective=FrozenDict({"dropout": dropout}),
        optimizer=ADAM,
        trains=FrozenDict({tower: {"w": tower in trains} for tower in PARAMS}),
        groups=FrozenDict({tower: {"w": tower} for tower in trains}),
        specs=FrozenDict({tower: {"w": PartitionSpec()} for tower in trains}),
        frozen_dtype="float32",
        seed=3,
        accumulate=accumulate,
        ema=ema,
        spike=spike,
    )


def start(p):
    return init_state(p, PARAMS)


def rows(seed, scale=1.0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    batch = make.pack(C, [[]] * 8)
    return batch.replace(
        text_weights=np.float32(scale) * normal(8, T),
        image_weights=normal(8, 3),
        segments=np.ones((8, T), np.int32),
    )


def jitted(p):
    return partial(STEP, p)


# A step


@pytest.mark.parametrize(
    ("scale", "finite"), [(np.nan, False), (1e17, True), (1e3, True)], ids=["loss", "norm", "spike"]
)
def test_a_bad_step_changes_nothing_but_the_counters(scale, finite):
    """A loss that is not finite; a gradient whose norm is not; and a finite spike."""
    p = program(ema=0.9, spike=5.0)
    bad = rows(1, scale)
    step = jitted(p)
    state, _ = step(start(p), rows(0))
    after, metrics = step(state, bad)
    assert (int(after.step), int(after.bad)) == (2, 1) and [
        float(x) for x in metrics["bad_steps"]
    ] == [1, 1]
    assert np.isfinite(metrics["loss"][0]) == finite and np.isfinite(metrics["grad_norm"][0]) == (
        scale == 1e3
    )
    assert_bitwise_equal(after.replace(step=state.step, bad=state.bad), state)
    again, _ = step(after, rows(1))
    assert (int(again.step), int(again.bad)) == (3, 1) and (
        again.trainable["slope"]["w"] != after.trainable["slope"]["w"]
    ).all()


def test_spikes_are_kept_by_default_and_compared_to_a_running_mean():
    norms = []
    p = program()
    step = jitted(p)
    state = start(p)
    for seed, scale in ((0, 1.0), (1, 1e3), (2, 1.0)):
        before = state
        state, metrics = step(state, rows(seed, scale))
        norms.append(float(metrics["grad_norm"][0]))
        assert (state.trainable["slope"]["w"] != before.trainable["slope"]["w"]).any()
    assert int(state.bad) == 0 and norms[1] > 100 * norms[0]
    np.testing.assert_allclose(
        state.typical_norm, 0.98 * (0.98 * norms[0] + 0.02 * norms[1]) + 0.02 * norms[2], rtol=1e-5
    )


def test_the_average_of_the_parameters_by_hand():
    p = program(ema=0.75)
    step = jitted(p)
    state = start(p)
    want = np.asarray(PARAMS["slope"]["w"], np.float64)
    for seed in range(4):
        state, _ = step(state, rows(seed))
        want = 0.75 * want + 0.25 * np.asarray(state.trainable["slope"]["w"], np.float64)
    np.testing.assert_allclose(state.ema["slope"]["w"], want, rtol=1e-5)
    assert np.abs(want - state.trainable["slope"]["w"]).max() > 0.05
    assert start(program()).ema is None


def test_frozen_leaves_stay_bit_exact_without_optimizer_state():
    p = program(trains=("slope",), ema=0.9)
    step = jitted(p)
    state = start(p)
    for seed in range(3):
        state, metrics = step(state, rows(seed))
    assert_bitwise_equal(state.frozen, {"shift": PARAMS["shift"]})
    assert (state.trainable["slope"]["w"] != PARAMS["slope"]["w"]).all() and set(
        state.trainable
    ) == set(state.ema) == {"slope"}
    assert "grad_norm/slope" in metrics and "grad_norm/shift" not in metrics
    assert [leaf.shape for leaf in jax.tree.leaves(state.opt_state)] == [(), (T,), (T,)]


@pytest.mark.parametrize(
    "rule",
    [
        "(('(vision|ln_visual|resampler)/.*', False), ('.*', True))",
        "(('.*/added', True), ('.*', False))",
        "(('.*', True),)",
    ],
)
def test_the_optimizers_tree_is_the_trainable_tree(rule):
    c = make.cfg(f"rules.train={rule}")
    p = make.program(c)
    params = jax.eval_shape(lambda: make.params(p))
    state = jax.eval_shape(partial(init_state, p), params)

    def shapes(part):
        return {path: leaf.shape for path, leaf in tree.leaves(part)}

    adam = next(part for part in state.opt_state if hasattr(part, "mu"))
    assert 0 < len(shapes(state.trainable)) and shapes(adam.mu) == shapes(adam.nu) == shapes(
        state.trainable
    )
    assert shapes(tree.merge(state.trainable, state.frozen)) == shapes(params)
    assert sum(leaf.ndim > 0 for leaf in jax.tree.leaves(state.opt_state)) == 2 * len(
        shapes(state.trainable)
    )


def test_dropout_differs_by_step_and_by_micro_batch_and_is_reproducible():
    p = program(dropout=0.5)
    step = jitted(p)
    state = start(p)
    batch = rows(0)

    def loss(step, state, batch):
        return float(step(state, batch)[1]["loss"][0])

    assert loss(step, state, batch) == loss(jitted(p), start(p), batch)
    assert loss(step, state, batch) != loss(step, state.replace(step=jnp.int32(1)), batch)
    assert loss(step, state, batch) != loss(jitted(dataclasses.replace(p, seed=4)), state, batch)
    # Micro-batch 0 has rows 0, 2, ..., so both micro-batches have the same four rows.
    two = jax.tree.map(lambda x: np.repeat(x[:4], 2, axis=0), batch)
    half = jax.tree.map(lambda x: x[:4], batch)
    for dropout, equal in ((0.0, True), (0.5, False)):
        once, twice = (
            loss(jitted(program(dropout=dropout, accumulate=count)), state, rows)
            for count, rows in ((1, half), (2, two))
        )
        assert np.isclose(once, twice, rtol=1e-5) == equal


# Steps of a small Emu. With plain gradient descent of rate 1, the change of the parameters is the
# gradient.


# Each unrolled block of these towers is traced. One block has all kinds of parameters.
SHALLOW = ("model.vision.depth=1", "model.resampler.depth=1")


def one_step(accumulate=1, mesh=None, c=None):
    """(state before, state after, metrics) of one step on make.batch."""
    c = c or make.cfg(f"optim.accumulate={accumulate}", *SHALLOW)
    p = dataclasses.replace(make.program(c), optimizer=optax.sgd(1.0))
    params = make.random_params(p)
    before = init_state(p, params)
    batch = make.batch(c)
    if mesh is None:
        return before, *jitted(p)(before, batch)
    with jax.set_mesh(mesh):
        layout = sharding.state_shardings(mesh, tree.merge(before.trainable, before.frozen), before)
        placed = jax.device_put(before, layout)
        batch = jax.device_put(batch, sharding.batch_sharding(mesh))
        after, metrics = jax.jit(train_step, static_argnums=0, out_shardings=(layout, None))(
            p, placed, batch
        )
    assert all(
        leaf.sharding == at
        for leaf, at in zip(jax.tree.leaves(after), jax.tree.leaves(layout), strict=True)
    )
    return before, after, metrics


@pytest.fixture(scope="module")
def whole():
    return one_step()


def assert_same_step(got, want, but=()):
    wanted = {name: metric for name, metric in want[2].items() if name not in but}
    metrics = {name: got[2][name] for name in wanted}
    chex.assert_trees_all_close(metrics, wanted, rtol=2e-4, atol=1e-5)

    def gradient(step):
        return jax.tree.map(
            lambda a, b: np.asarray(a) - np.asarray(b), step[0].trainable, step[1].trainable
        )

    by_leaf = gradient(want)
    assert all(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(by_leaf))
    assert_close(gradient(got), by_leaf, 1e-4, floor=0.1)


def test_squared_norms_of_groups_add_up(whole):
    before, after, metrics = whole
    squares = {
        name: float(metrics[f"grad_norm/{name}"][0]) ** 2
        for name in ("vision", "llama", "resampler")
    }
    change = jax.tree.map(
        lambda a, b: float(((np.asarray(a) - np.asarray(b)) ** 2).sum()),
        before.trainable,
        after.trainable,
    )
    by_tower = {tower: sum(jax.tree.leaves(part)) for tower, part in change.items()}
    np.testing.assert_allclose(squares["vision"], by_tower["vision"], rtol=1e-3)
    np.testing.assert_allclose(squares["llama"], by_tower["llama"], rtol=1e-3)
    np.testing.assert_allclose(
        sum(squares.values()), float(metrics["grad_norm"][0]) ** 2, rtol=1e-5
    )


def test_accumulation_equals_one_big_batch(whole):
    """Four micro-batches of two rows, unevenly filled.

    The variance across images is computed within each micro-batch, so it differs.
    """
    assert_same_step(one_step(accumulate=4), whole, but={"visual_variance"})


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2), (1, 2, 4)])
def test_a_sharded_step_equals_the_single_one(whole, shape):
    assert_same_step(one_step(mesh=sharding.make_mesh(dict(zip(sharding.AXES, shape)))), whole)


@pytest.mark.parametrize(
    ("condition", "vae"),
    [("encoded", False), pytest.param("teacher_forced", True, marks=pytest.mark.long)],
)
def test_a_sharded_decoder_step_equals_the_single_one(condition, vae):
    """The U-Net's gradients pass through convolutions and attention to the condition."""
    c = make.decoder_cfg("optim.ema=0.0", f"model.decoder.condition={condition}", *SHALLOW, vae=vae)
    assert_same_step(
        one_step(mesh=sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}), c=c), one_step(c=c)
    )


# The loop


class Feed:
    """A loader of the given batches; `before(n)` is called when the n-th is asked for."""

    source_names = ("a", "b")

    def __init__(self, batches, before):
        self.batches = batches
        self.before = before
        self.closed = False

    def __iter__(self):
        for number, batch in enumerate(self.batches, 1):
            self.before(number)
            yield LoadedBatch(
                batch,
                [[f"a/first{number}", f"b/second{number}"], [f"b/third{number}"]],
                {"number": number},
                {"epochs": {"a": number / 4}},
            )

    def close(self):
        self.closed = True


def run(
    workdir, batches, *overrides, p=None, before=lambda number: None, evaluators=(), sampler=None
):
    """Run the loop on a Line; returns (state, CheckpointManager)."""
    c = make.cfg(f"workdir={workdir}", f"optim.steps={len(batches)}", *overrides)
    p = p or program()
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    checkpoints = CheckpointManager(str(workdir), keep=9, keep_every=0)
    writer = MetricWriter(workdir, start=0, steps=c.optim.steps)
    feed = Feed(batches, before)
    try:
        with jax.set_mesh(mesh), Watchdog(workdir, c.log.hang) as watchdog:
            # The loop donates its state, so it gets a copy.
            state = jax.device_put(
                jax.tree.map(jnp.copy, start(p)), NamedSharding(mesh, PartitionSpec())
            )
            plan = RunPlan(c, p, mesh, PARAMS, state)
            end = loop.run(plan, state, feed, checkpoints, writer, watchdog, evaluators, sampler)
            return end, checkpoints
    finally:
        assert feed.closed
        writer.close()


def plain(batches, p=None):
    """[(state, metrics)] after each batch, computed without the loop."""
    p = p or program()
    step = jitted(p)
    state = start(p)
    found = []
    for batch in batches:
        state, metrics = step(state, batch)
        found.append((state, metrics))
    return found


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def saved(checkpoints, p, step):
    return checkpoints.restore(jax.eval_shape(lambda: start(p)), step)


def test_metrics_are_written_one_step_late(tmp_path, monkeypatch):
    batches = [rows(seed) for seed in range(4)]
    events = []
    write = MetricWriter.write
    monkeypatch.setattr(
        MetricWriter,
        "write",
        lambda self, step, values: (events.append(f"tell {step}"), write(self, step, values)),
    )
    state, _ = run(tmp_path, batches, before=lambda number: events.append(f"read {number}"))
    assert events == [
        "read 1",
        "read 2",
        "tell 1",
        "read 3",
        "tell 2",
        "read 4",
        "tell 3",
        "tell 4",
    ]
    want = plain(batches)
    for line, (_, metrics) in zip(lines(tmp_path), want, strict=True):
        for name in ("loss", "grad_norm", "error"):
            np.testing.assert_allclose(
                line[name], float(metrics[name][0]) / float(metrics[name][1]), rtol=1e-6
            )
        assert ("step_time" in line) == (line["step"] > 1)
    assert_bitwise_equal(state, want[-1][0])


def test_a_save_comes_after_the_metrics_of_its_step(tmp_path, monkeypatch):
    """If the save came first, a run killed right after it would never log these metrics."""
    events = []
    write = MetricWriter.write
    save = CheckpointManager.save
    monkeypatch.setattr(
        MetricWriter,
        "write",
        lambda self, step, values: (
            events.append(f"{sorted(values)[0]} {step}"),
            write(self, step, values),
        ),
    )

    def saving(self, step, *args, **kwargs):
        # A signal waits until the save is done, even at the end of the run.
        assert "note" in signal.getsignal(signal.SIGTERM).__name__
        events.append(f"save {step}")
        save(self, step, *args, **kwargs)

    monkeypatch.setattr(CheckpointManager, "save", saving)
    run(
        tmp_path,
        [rows(seed) for seed in range(3)],
        "checkpoint.every=2",
        "eval.every=2",
        evaluators=[lambda params: {"a": 0.0}],
    )
    told = [event.replace("bad_steps", "tell") for event in events]
    assert told == ["tell 1", "eval/a 2", "tell 2", "save 2", "eval/a 3", "tell 3", "save 3"]


def test_a_checkpoint_is_saved_though_the_metrics_disk_is_full(tmp_path, monkeypatch):
    def full(self):
        raise UserError("no room")

    monkeypatch.setattr(MetricWriter, "flush", full)
    with pytest.raises(UserError, match="no room"):
        run(tmp_path, [rows(seed) for seed in range(3)], "checkpoint.every=2")
    assert steps(tmp_path) == [2]


def test_saves_evaluations_and_pictures_come_when_due(tmp_path):
    batches = [rows(seed) for seed in range(5)]
    shown = []

    def shift(params):
        return float(params["shift"]["w"][0])

    state, checkpoints = run(
        tmp_path,
        batches,
        "checkpoint.every=2",
        "eval.every=3",
        "log.every=2",
        "log.pictures_every=4",
        evaluators=[lambda params: {"shift": shift(params)}],
        sampler=lambda params, item: (
            shown.append((shift(params), item.state)),
            (np.zeros((1, 8, 8, 3), np.uint8), ["a"]),
        )[1],
    )
    want = [state for state, _ in plain(batches)]
    assert {
        line["step"]: line["eval/shift"] for line in lines(tmp_path) if "eval/shift" in line
    } == {n: shift(want[n - 1].trainable) for n in (3, 5)}
    assert [line["step"] for line in lines(tmp_path) if "loss" in line] == [2, 4]
    assert shown == [(shift(want[3].trainable), {"number": 4})]
    assert steps(tmp_path) == [2, 4, 5]
    for number in steps(tmp_path):
        step, restored, data, config = saved(checkpoints, program(), number)
        assert (step, data, config["optim"]["steps"]) == (number, {"number": number}, 5)
        assert_bitwise_equal(restored, want[number - 1])
    assert_bitwise_equal(state, want[-1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(tmp_path, caplog, number):
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    batches = [rows(seed) for seed in range(9)]
    state, checkpoints = run(
        tmp_path, batches, before=lambda n: n == 3 and os.kill(os.getpid(), number)
    )
    assert (
        int(state.step) == 3
        and steps(tmp_path) == [3]
        and [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    )
    assert saved(checkpoints, program(), 3)[2] == {"number": 3}
    assert f"stopped by {number.name} at step 3 of 9" in caplog.text
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_second_signal_has_its_usual_effect():
    seen = []
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: seen.append("ended"))
    try:
        with loop.stop_signals() as stopped:
            os.kill(os.getpid(), signal.SIGTERM)
            assert (stopped, seen) == (["SIGTERM"], [])
            os.kill(os.getpid(), signal.SIGTERM)
            assert (stopped, seen) == (["SIGTERM"], ["ended"])
    finally:
        signal.signal(signal.SIGTERM, before)


def test_bad_steps_are_named_with_their_documents(tmp_path, caplog):
    state, _ = run(tmp_path, [rows(0), rows(1, np.nan), rows(2), rows(3)], "log.every=4")
    assert int(state.bad) == 1 and "step 2 left the weights as they were" in caplog.text
    assert (
        "a/first2, b/second2, b/third2" in caplog.text
        and "first1" not in caplog.text
        and "first3" not in caplog.text
    )
    told = [(line["step"], line["loss"] is None, line["bad_steps"]) for line in lines(tmp_path)]
    # Step 2 is logged because it is bad; step 4 is due.
    assert told == [(2, True, 1), (4, False, 1)]
    assert_bitwise_equal(state.trainable, plain([rows(0), rows(2), rows(3)])[-1][0].trainable)


def test_too_many_bad_steps_stop_the_run_with_the_last_good_weights(tmp_path):
    batches = [rows(0), *[rows(seed, np.nan) for seed in range(1, 9)]]
    with pytest.raises(
        UserError,
        match=r"stopped at step 4: 3 steps were not finite or spiked \(log.max_bad_steps=2\); "
        "their documents",
    ) as error:
        run(tmp_path, batches, "log.max_bad_steps=2", "checkpoint.every=100")
    assert "\n" not in str(error.value) and steps(tmp_path) == [4]
    _, restored, data, _ = saved(
        CheckpointManager(str(tmp_path), keep=1, keep_every=0), program(), 4
    )
    assert_bitwise_equal(restored.trainable, plain(batches[:1])[0][0].trainable)
    assert int(restored.bad) == 3 and data == {"number": 4}


@pytest.mark.parametrize("images", [28, 14])
def test_a_second_compilation_is_warned_about(tmp_path, caplog, images):
    batches = [rows(seed) for seed in range(3)]
    batches[2] = batches[2].replace(images=batches[2].images[:, :, :images])
    with caplog.at_level(logging.WARNING):
        run(tmp_path, batches)
    assert ("train_step was compiled 2 times" in caplog.text) == (images == 14)


def test_a_second_run_of_an_equal_program_traces_nothing(tmp_path):
    """Programs are compared by value: a config read twice gives the same compiled step."""
    traces = []
    for number in range(2):
        before = len(TRACES)
        p = dataclasses.replace(program(ema=0.5), seed=77)
        workdir = tmp_path / str(number)
        workdir.mkdir()
        run(workdir, [rows(seed) for seed in range(2)], p=p)
        traces.append(len(TRACES) - before)
    assert traces[0] > 0 and traces[1] == 0


@pytest.mark.parametrize("make_config", [make.cfg, make.decoder_cfg])
def test_programs_of_equal_configs_are_equal(make_config):
    shapes = abstract_params(make_config())
    one = make_program(make_config(), shapes)
    two = make_program(make_config(), shapes)
    assert one == two and hash(one) == hash(two)
    for override in ("optim.b1=0.5", "seed=1", "rules.decay=(('.*', 0.5),)", "objective.chunk=8"):
        assert make_program(make_config(override), shapes) != one, override


# Speed


def test_speed_by_hand(monkeypatch):
    p = make.program(C)
    batch = make.batch(C)
    abstract = jax.eval_shape(lambda: make.params(p))
    trainable = {tower: part for tower, part in abstract.items() if tower != "vision"}
    frozen = {"vision": abstract["vision"]}
    clock = iter([10.0, 12.0, 15.0, 16.0])
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    lengths = [
        (batch.segments[row] == number).sum()
        for row in range(8)
        for number in range(1, batch.segments[row].max() + 1)
    ]
    tokens, images, pairs = (
        float(x)
        for x in (
            sum(lengths),
            batch.has_image.sum(),
            sum(n * (n + 1) // 2 for n in lengths),
        )
    )
    trained = {"vision": False, "resampler": True, "llama": True, "heads": True}
    work = flops.train(
        p.model_config,
        trained,
        images=images,
        tokens=tokens,
        pairs=pairs,
        labels=float(batch.text_weights.sum()),
        regressed=4 * images,
    )

    item = LoadedBatch(batch, [], {}, {"epochs": {"pairs": 0.25}})
    speed = throughput.Throughput(p, State(0, trainable, frozen, None, None, 0, 0.0), C.data.batch)
    still = {"padding": 1 - tokens / (8 * T), "input_wait": 0.5, "epochs/pairs": 0.25}
    # The first step compiles, so it has no speed.
    assert speed.measure(item, 0.5) == pytest.approx(still)
    want = still | {
        "step_time": 2.0,
        "tokens_per_second": tokens / 2,
        "images_per_second": images / 2,
        "flops_per_second": sum(work.values()) / 2,
    }
    want |= {f"flops_per_second/{tower}": value / 2 for tower, value in work.items()}
    assert speed.measure(item, 0.5) == pytest.approx(want, rel=1e-6)
    speed.pause()
    # The time of an evaluation must not count as time of the next step.
    assert speed.measure(item, 0.5) == pytest.approx(still)
    # The peak of each of the eight devices.
    speed.peak = 1e9
    # One of two processes has half of the rows.
    half = speed.measure(
        dataclasses.replace(item, batch=jax.tree.map(lambda x: x[::2], batch)), 0.5
    )
    assert (
        half["mfu"] == pytest.approx(half["flops_per_second"] / 8e9)
        and half["tokens_per_second"] == 2 * (batch.segments[::2] > 0).sum()
    )
