"""The report on a step: bytes of live arrays, a roofline by hand, searches, messages."""

import json
import subprocess
import sys
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import chex
import jax
import numpy as np
import pytest

from emu_jax import config, hardware, hlo, tree
from emu_jax.config import UserError
from emu_jax.fit import __main__ as command
from emu_jax.fit import compile as compiling
from emu_jax.fit import report, search
from emu_jax.fit.compile import CLOSE, QUICK, Attempt, Memory, compile_step, measure_memory
from emu_jax.plan import bytes_per_device, make_plan
from emu_jax.step import init_state
from tests.support import make

SHARDED = ("mesh.fsdp=4", "mesh.tensor=2")
CHIP = hardware.Accelerator(
    "tpu",
    "TPU none",
    flops=1e12,
    memory=1000,
    bandwidth=1e9,
    link=1e8,
    network=1e7,
    source="nobody",
)


def plan(*overrides, devices=8):
    return make_plan(make.cfg(*SHARDED, *overrides), jax.devices()[:devices])


def live_bytes(values):
    """Bytes of the first device's shards."""
    first = jax.devices()[0]
    return sum(
        shard.data.nbytes
        for x in jax.tree.leaves(values)
        for shard in x.addressable_shards
        if shard.device == first
    )


@pytest.fixture(scope="module")
def compiled():
    p = plan("optim.ema=0.9", "rules.train=(('vision/.*', False), ('.*', True))")
    return p, compile_step(p)


def test_reported_bytes_are_those_of_live_arrays(compiled):
    p, step = compiled
    with jax.set_mesh(p.mesh):
        start = jax.jit(
            partial(init_state, p.program),
            out_shardings=jax.tree.map(lambda x: x.sharding, p.state),
        )
        state = start(make.random_params(p.program))
        batch = jax.device_put(make.batch(p.config), jax.tree.map(lambda x: x.sharding, p.batch))
    held = measure_memory(p, step)
    assert held.parameters == live_bytes(
        (state.trainable, state.frozen)
    ) and held.batch == live_bytes(batch)
    assert held.parameters + held.optimizer == live_bytes(state)
    # The frozen encoder has no gradients.
    assert held.gradients == live_bytes(state.trainable) < held.parameters
    assert (
        held.parameters + held.optimizer + held.batch
        == step.memory_analysis().argument_size_in_bytes
    )
    # The compiled program runs, and keeps the layout.
    new, _ = step(state, batch)
    assert int(new.step) == 1 and jax.tree.map(lambda x: x.sharding, new) == jax.tree.map(
        lambda x: x.sharding, p.state
    )


def test_the_planned_batch_is_the_loaders():
    p = plan()
    chex.assert_trees_all_equal_shapes_and_dtypes(p.batch, make.batch(p.config))


def test_weights_are_gathered_in_the_loop_over_depth(compiled):
    """Weights are gathered in the forward pass, and again where remat recomputes it.

    How gradients are summed depends on the compiler; a test below covers TPUs.
    """
    found = hlo.Module(compiled[1].as_text()).collectives()
    gathers = [c for c in found if c.kind == "all-gather" and c.in_loop]
    assert (
        gathers
        and {c.runs for c in gathers} <= {2, 4, 6, 8}
        and all(len(c.groups[0]) in (2, 4, 8) for c in gathers)
    )


def test_a_report_is_json_and_counts_by_hand(compiled, monkeypatch):
    p, step = compiled
    monkeypatch.setattr(compiling, "compile_step", lambda *_: step)
    found = json.loads(json.dumps(report.make_report(p, CHIP)))
    assert found["devices"] == 8 and found["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2}
    assert found["parameters"]["llama"] == sum(
        leaf.size for leaf in jax.tree.leaves(p.params["llama"])
    )
    assert (
        not found["fits"]
        and found["peak"] == found["memory"]["peak"] > CHIP.memory == found["limit"]
    )
    c = p.config.data
    # 4 visual tokens and [/IMG] are regressed; [IMG] and [/IMG] surround them.
    head = 3 * 2 * 32 * (516 * c.batch * (c.tokens - 6 * c.images) + 32 * c.batch * c.images * 5)
    assert found["flops"]["heads"] == head and set(found["flops"]) == {
        "vision",
        "resampler",
        "llama",
        "heads",
    }
    # Remat repeats the LLM's forward pass; no other tower has remat.
    assert found["recomputed_flops"] == {"llama": pytest.approx(found["flops"]["llama"] / 3)}
    assert found["mfu"] == pytest.approx(
        sum(found["flops"].values()) / (found["step_seconds"] * 8e12)
    )
    assert found["roofline"]["bound"] in ("compute", "memory", "links", "network")
    text = report.format_report(found, CHIP)
    assert "does not fit" in text and "nobody" in text


def test_a_roofline_by_hand():
    p = plan()

    def one(kind, size, groups, times):
        return hlo.Collective(kind, "c", size, groups, times, False, True, "")

    held = Memory(
        parameters=300, optimizer=700, batch=0, gradients=0, temporaries=0, code=0, peak=1000
    )
    line = report.roofline(
        p,
        CHIP,
        held,
        [
            one("all-gather", 400, ((0, 1, 2, 3), (4, 5, 6, 7)), 3),
            one("all-reduce", 100, ((0, 4),), 1),
        ],
        work=16e12,
    )
    assert line.compute == 2.0 and line.memory == pytest.approx((2000 + 2400) / 1e9)
    assert line.links == pytest.approx((3 * 300 + 100) / 1e8) and line.network == 0
    assert line.bound == "compute" and line.seconds == 2.0


def test_recomputation_is_counted_apart_from_the_model():
    with_remat = plan("model.llama.remat=full", "model.vision.remat=dots")
    work, again = report.step_flops(with_remat)
    assert set(again) == {"llama"} and again["llama"] == work["llama"] / 3
    assert work == report.step_flops(plan())[0]


def decoder_plan(*overrides, vae=False):
    return make_plan(
        make.decoder_cfg("mesh.fsdp=4", "mesh.data=2", *overrides, vae=vae), jax.devices()
    )


def test_the_decoder_stage_is_planned_with_its_frozen_towers():
    p = decoder_plan("optim.ema=0.9")
    assert p.batch.images.shape == (8, 1, 28, 28, 3) and not hasattr(p.batch, "conditions")
    assert {path.split("/")[0] for path, _ in tree.leaves(p.state.trainable)} == {"unet"}
    assert all(
        leaf.dtype == "bfloat16"
        for path, leaf in tree.leaves(p.state.frozen)
        if path.endswith("/w")
    )
    unet = bytes_per_device(p.state.trainable)
    # Each parameter has a copy for itself, two moments and the average.
    assert bytes_per_device(p.state) == pytest.approx(
        4 * unet + bytes_per_device(p.state.frozen), rel=0.01
    )
    work, again = report.step_flops(p)
    assert set(work) == {"vision", "resampler", "llama", "heads", "unet"} and again == {}
    remat = decoder_plan("model.decoder.unet.remat=full", "model.llama.remat=full")
    # The frozen LLM has no backward pass.
    assert report.step_flops(remat) == (work, {"unet": work["unet"] / 3})
    assert report.remat_policies(p.config) == {
        f"model.{name}.remat": "none" for name in ("vision", "resampler", "llama", "decoder.unet")
    }
    assert next(search.changes(p.config, p.mesh)) == {
        f"model.{name}.remat": "full" for name in ("vision", "resampler", "llama", "decoder.unet")
    }


def test_precomputed_inputs_are_in_the_batch_and_cost_no_flops():
    p = decoder_plan("model.decoder.condition=generated", "data.latents=DIR", vae=True)
    assert (
        p.batch.conditions.shape == (8, 1, 4, 32)
        and p.batch.latents.shape == (8, 1, 4, 4, 8)
        and set(report.step_flops(p)[0]) == {"unet"}
    )


@pytest.mark.parametrize("slope", [1, 7, 30, 90, 200])
def test_a_search_finds_the_most_rows_in_few_steps(slope):
    """Peaks are 100 + slope x rows; "dots" and "none" have 3 and 9 times the slope."""
    asked = []
    cost = {"full": slope, "dots": 3 * slope, "none": 9 * slope}

    def measure(policy, rows):
        asked.append((policy, rows))
        peak = 100 + cost[policy] * rows
        return peak if peak <= 1000 else None

    best = search.largest_batches(measure, 1000, search.COMPILATIONS)
    assert len(asked) == len(set(asked)) <= search.COMPILATIONS
    assert best["full"] == 900 // slope
    for policy, rows in best.items():
        assert rows == 0 or 100 + cost[policy] * rows <= 1000
    assert best.get("dots", 0) in (900 // cost["dots"], 1, 2)


def test_a_search_copes_with_peaks_that_are_not_linear():
    peaks = {1: 300, 2: 400, 3: 900, 4: 1300}

    def measure(policy, rows):
        return peaks.get(rows) if peaks.get(rows, 9999) <= 1000 else None

    assert search.largest_batches(measure, 1000, 8, ("full",)) == {"full": 3}


def test_changes_grow_and_stay_runnable(monkeypatch):
    p = plan("data.batch=16", "data.images=4", "model.llama.remat=none")
    monkeypatch.setattr(search, "TRIES", 9)
    found = list(search.changes(p.config, p.mesh))
    assert found[0] == {
        f"model.{tower}.remat": "full" for tower in ("vision", "resampler", "llama")
    }
    assert [change.get("optim.accumulate") for change in found] == [None, 2, 4, 4, 2]
    assert found[-1]["data.batch"] == 8 and found[-1]["data.images"] == 2
    for before, after in pairwise(found):
        assert before.keys() <= after.keys() and before != after
    for change in found:
        assert make_plan(search.with_change(p.config, change), jax.devices()).config != p.config
    assert p.config == make.cfg(
        *SHARDED, "data.batch=16", "data.images=4", "model.llama.remat=none"
    )


def test_a_step_that_does_not_fit_reports_changes_that_do(monkeypatch, capsys):
    peaks = iter([1500, 1200, 900])
    monkeypatch.setattr(command, "_check_state", lambda *_: None)
    monkeypatch.setattr(compiling, "attempt", lambda p, chip: outcome(next(peaks), chip.memory))
    found = command.fit(make.cfg(*SHARDED, "data.batch=16"), CHIP, jax.devices())
    assert not found["fits"] and [change["fits"] for change in found["changes"]] == [False, True]
    assert "with --config.model.vision.remat=full" in capsys.readouterr().out


def outcome(peak, limit, effort=0.0):
    return Attempt(peak is not None and peak <= limit, effort, peak, limit)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm.",
            Attempt(False, -1.0, peak=int(17.5 * 2**30), limit=int(15.75 * 2**30)),
        ),
        ("RESOURCE_EXHAUSTED: out of memory", Attempt(False, -1.0, limit=CHIP.memory)),
    ],
)
def test_a_compiler_that_refuses(words, found, monkeypatch):
    def refuse(*_):
        raise jax.errors.JaxRuntimeError(words)

    monkeypatch.setattr(compiling, "compile_step", refuse)
    assert compiling.attempt(plan(), CHIP, -1.0) == found


@pytest.mark.parametrize(
    ("platform", "peak", "efforts"),
    [
        ("tpu", 840, [QUICK]),
        ("tpu", 860, [QUICK, 0.0]),
        ("tpu", 1140, [QUICK, 0.0]),
        ("tpu", 1160, [QUICK]),
        ("gpu", 500, [0.0]),
        ("tpu", None, [QUICK, 0.0]),
    ],
)
def test_a_close_result_is_compiled_with_a_runs_effort(platform, peak, efforts, monkeypatch):
    tried = []

    def attempt(p, chip, effort=0.0):
        tried.append(effort)
        return outcome(peak, chip.memory, effort)

    monkeypatch.setattr(compiling, "attempt", attempt)
    devices = np.array([SimpleNamespace(platform=platform)])
    p = SimpleNamespace(mesh=SimpleNamespace(devices=devices))
    assert compiling.quick_attempt(p, CHIP).effort == efforts[-1]  # ty: ignore[invalid-argument-type]
    assert tried == efforts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v5q:4x4"], "topology 'v5q:4x4' is not KIND:SHAPE"),
        (["--topology=cpu:99"], "there are 8 CPU devices"),
        ([], "--topology"),
        (["--topology=cpu:8", "--serch"], "--serch"),
        (["--topology=cpu:8", "--config.mesh.fsdp=3"], "does not match 8 devices"),
        (["--topology=cpu:8", "--config.data.batch=12"], "data.batch=12 is not divisible by 8"),
        (["--topology=cpu:8", "--config.stage=x"], "stage='x' is not one of"),
        (
            ["--topology=cpu:8", "--search"],
            "a search needs a topology whose devices have a known memory",
        ),
        (
            ["--topology=cpu:8", "--config.model.llama.width=36", "--config.model.llama.heads=2"],
            "does not divide by fsdp = 8; 4 would do, with the rest in data (mesh.data=2)",
        ),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(command, "_use_no_devices", lambda: None)
    assert command.main(["--config=configs/base.py:debug", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_state_that_cannot_fit_is_an_error_before_compiling():
    with pytest.raises(
        UserError,
        match=r"the parameters and the optimizer alone need 0.0 GiB per device .* "
        r"take at least \d+ devices",
    ):
        command.fit(make.cfg(*SHARDED), CHIP, jax.devices())


def test_tpus_gather_and_scatter_in_the_loop_and_use_attention_kernels():
    """An LLM block's weights are gathered and its gradients reduce-scattered (needs libtpu).

    None of these gradients is all-reduced; the smaller matrices of other towers are. Splash
    attention runs forward and backward.
    """
    pytest.importorskip("libtpu")
    sizes = (
        "llama.width=2048",
        "llama.heads=16",
        "llama.ffn=4096",
        "vision.width=1024",
        "vision.heads=8",
        "vision.ffn=2048",
        "resampler.width=1024",
        "resampler.heads=8",
        "resampler.head_width=128",
        "resampler.ffn=2048",
        "compute=bfloat16",
        "vision.remat=full",
        "resampler.remat=full",
        "llama.remat=full",
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("TPU_SKIP_MDS_QUERY", "1"),
            ("TPU_WORKER_HOSTNAMES", "localhost"),
            ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ):
            patch.setenv(name, value)
        _, devices = hardware.topology_devices("v5e:4x4")
        p = make_plan(
            make.cfg(
                "mesh.data=2",
                "mesh.fsdp=8",
                "data.batch=16",
                "data.tokens=256",
                *(f"model.{size}" for size in sizes),
            ),
            devices,
        )
        done = compile_step(p)
        quick = compile_step(p, QUICK)
    text = done.as_text()
    quick_text = quick.as_text()
    assert text and quick_text
    found = hlo.Module(text).collectives()
    quickly = hlo.Module(quick_text).collectives()

    def received(some, kind):
        return sum(c.runs * c.bytes_received for c in some if c.kind == kind)

    # A compilation with little effort predicts the memory and the traffic of a run.
    assert measure_memory(p, quick).peak == pytest.approx(measure_memory(p, done).peak, rel=CLOSE)
    for kind in ("all-gather", "reduce-scatter"):
        assert received(quickly, kind) == pytest.approx(received(found, kind), rel=0.05)
    looped = {
        kind: sum(c.bytes for c in found if c.kind == kind and c.in_loop)
        for kind in ("all-gather", "reduce-scatter")
    }
    a_block = sum(
        2 * leaf.size // leaf.shape[0]
        for path, leaf in tree.leaves(p.params)
        if path.startswith("llama/blocks") and path.endswith("/w")
    )
    # Weights are gathered in the forward pass and again in the backward pass.
    assert looped["all-gather"] >= 2 * a_block and looped["reduce-scatter"] >= a_block
    # A matrix of this LLM has 2^23 bytes.
    assert not [
        c
        for c in report.padded_gathers(p, found)
        if "hdD->btD" in c["source"] or c["bytes"] > 2**23
    ]
    assert text.count('custom_call_target="tpu_custom_call"') >= 3


def test_gpus_use_attention_kernels(tmp_path):
    """cuDNN runs images, even of 257 positions; Pallas runs text (needs the CUDA plugin)."""
    pytest.importorskip("jax_cuda12_plugin")
    small = (
        "mesh.data=1",
        "data.batch=8",
        "data.tokens=256",
        "data.num_streams=4",
        "model.vision.image=224",
        "model.vision.patch=14",
        "model.compute=bfloat16",
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "emu_jax.fit",
            "--config=configs/base.py:debug",
            *(f"--config.{override}" for override in small),
            "--topology=h100:1x2",
            f"--json={tmp_path}/found.json",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["kernels"] >= 5 and found["fits"]


def test_the_14b_is_planned_without_allocating_it():
    c = config.load(["--config=configs/pretrain.py", "--config.mesh.data=1"])
    p = make_plan(c, jax.devices())
    assert bytes_per_device(p.state) == pytest.approx(
        12 * 14.2e9 / 8, rel=0.02
    ) and p.batch.images.shape == (256, 32, 224, 224, 3)
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(make.abstract(p.program))) > 14e9
