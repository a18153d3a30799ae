"""Training runs through the command: metrics, checkpoints, resume bit for bit, and errors.

Every error of the user is one line.
"""

import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emu_jax import checkpoint, checks, config, initial, metric_writer, sharding, train, tree
from emu_jax.config import UserError
from emu_jax.data.loader import LoadedBatch, Loader
from emu_jax.initial import load_weights
from emu_jax.models import emu, module
from emu_jax.plan import make_plan
from emu_jax.workdir import check_same_config
from tests.support import fixtures, make
from tests.support.runs import (
    KILLED,
    STATS_IMAGES,
    arguments,
    assert_same_run,
    lines,
    make_mesh,
    mesh_of_two_devices,
    run,
    saved,
    untimed,
)
from tests.support.trees import assert_bitwise_equal


@pytest.fixture(scope="module", autouse=True)
def small_runs():
    """Use two devices, and few images for the constants that standardise visual tokens.

    Steps and checkpoints of eight fake devices take longer.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", mesh_of_two_devices)
        patch.setattr(initial, "STATS_IMAGES", STATS_IMAGES)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    to = tmp_path_factory.mktemp("data")
    fixtures.write_tiny(to)
    return to


def warm_arguments(data, workdir):
    return arguments(
        data,
        workdir,
        "stage=contrastive",
        "optim.steps=2",
        "objective.shift=2",
        "rules.peak_lr=(('.*', 1e-3),)",
        "rules.groups=(('vision/.*', 'vision'), ('contrast/.*', 'contrast'), ('.*', 'resampler'))",
    )


def emu_arguments(data, workdir, warm, *overrides):
    """Arguments of a run that starts from the warmed-up encoder, whose ViT is frozen.

    It has dropout, an average, evaluations, pictures and saves.
    """
    return arguments(
        data,
        workdir,
        f"init={warm}",
        "model.standardise=true",
        "optim.ema=0.9",
        "rules.train=(('vision/.*', False), ('.*', True))",
        "rules.peak_lr=(('vision/.*', 1.0), ('.*', 1e-3))",
        f"data.eval_mixture={fixtures.mixture(data, 'held_out')!r}",
        "eval.every=3",
        "eval.batches=2",
        "checkpoint.every=2",
        "log.pictures_every=3",
        *overrides,
    )


@pytest.fixture(scope="module")
def warm(data, tmp_path_factory):
    """The workdir of a run of two contrastive steps."""
    workdir = tmp_path_factory.mktemp("runs") / "warm"
    assert run(warm_arguments(data, workdir))[0] == 0
    return workdir


@pytest.fixture(scope="module")
def whole(data, warm, tmp_path_factory):
    """The workdir of an undisturbed run of four steps from `warm`."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    code, out = run(emu_arguments(data, workdir, warm))
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == [
        "llama",
        "ln_visual",
        "regress_head",
        "resampler",
        "vision",
        "visual_stats",
        "total",
    ]
    return workdir


@pytest.fixture(scope="module")
def killed(data, warm, tmp_path_factory):
    """The workdir of the same run, killed in its third step, once the second is saved.

    Copy it before resuming.
    """
    workdir = tmp_path_factory.mktemp("runs") / "killed"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            KILLED,
            "3",
            f"{workdir}/checkpoints/2",
            *emu_arguments(data, workdir, warm),
        ],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [line["step"] for line in lines(workdir)] == [1, 2, 3]
    return workdir


@pytest.fixture
def copy(killed, tmp_path):
    return shutil.copytree(killed, tmp_path / "run")


# What a run leaves behind


def test_metrics_of_a_run(whole):
    told = lines(whole)
    steps, evaluations = (
        [line for line in told if ("eval/text_loss" in line) == held] for held in (False, True)
    )
    assert [line["step"] for line in steps] == [1, 2, 3, 4] and [
        line["step"] for line in evaluations
    ] == [3, 4]
    sources = [name for name, *_ in fixtures.MIXTURE]
    losses = {"text_loss", "image_loss", "visual_variance"}
    by_source = {f"{name}/{source}" for name in ("text_loss", "image_loss") for source in sources}
    assert by_source < {name for line in steps for name in line}
    for line in steps:
        assert losses | {
            "loss",
            "grad_norm",
            "grad_norm/llama",
            "grad_norm/resampler",
            "padding",
            "input_wait",
            "bad_steps",
        } < set(line)
        assert (
            line["loss"] == pytest.approx(line["text_loss"] + line["image_loss"], rel=1e-5)
            and 0 < line["padding"] < 1
        )
        # The vision tower is frozen.
        assert "grad_norm/vision" not in line
    for line in evaluations:
        assert {f"eval/{name}" for name in losses | by_source} < set(line)
    towers = {f"flops_per_second/{tower}" for tower in ("vision", "resampler", "llama", "heads")}
    assert {
        "step_time",
        "tokens_per_second",
        "images_per_second",
        "flops_per_second",
    } | towers < set(steps[1])
    assert (
        all(math.isfinite(value) for line in told for value in line.values())
        and len({line["loss"] for line in steps}) == 4
    )


def test_files_of_a_run(whole, data, warm):
    assert json.loads((whole / "config.json").read_text()) == config.to_dict(
        config.load(emu_arguments(data, whole, warm))
    )
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["2", "4"]
    assert checkpoint.read_config(str(whole)) == json.loads((whole / "config.json").read_text())
    board = b"".join(path.read_bytes() for path in (whole / "tensorboard").iterdir())
    assert all(
        word in board
        for word in (b"image_loss/scenes", b"eval/text_loss", b"PNG", b"captions", b" (of: ")
    )
    assert {path.name for path in whole.iterdir()} == {
        "config.json",
        "checkpoints",
        "metrics.jsonl",
        "pictures",
        "tensorboard",
    }


def test_a_run_starts_from_the_warm_up_and_frozen_towers_stay(whole, warm):
    before, after, at_2 = (
        checkpoint.restore_params(str(path)) for path in (warm, whole, whole / "checkpoints/2")
    )
    chex.assert_trees_all_equal(after["vision"], before["vision"])
    moved = max(
        np.abs(leaf - started).max()
        for (_, leaf), (_, started) in zip(
            tree.leaves(after["resampler"]), tree.leaves(before["resampler"])
        )
    )
    # The resampler is four steps of 1e-3 away from its start.
    assert 1e-4 < moved < 1e-2
    # The statistics are measured before the first step and stay.
    assert_bitwise_equal(after["visual_stats"], at_2["visual_stats"])
    assert all(leaf.std() > 1e-3 for leaf in after["visual_stats"].values())
    averaged = checkpoint.restore_params(str(whole), ema=True)
    assert np.abs(averaged["llama"]["embed"]["base"] - after["llama"]["embed"]["base"]).max() > 1e-4
    assert set(saved(whole)[1]["ema"]) == {
        path for path, _ in tree.leaves(after) if not path.startswith(("vision/", "visual_stats/"))
    }


def test_metrics_of_the_contrastive_stage(warm):
    for line in lines(warm):
        assert {
            "contrastive_loss",
            "readout_loss",
            "top1",
            "correlation",
            "visual_variance",
            "grad_norm/contrast",
            "grad_norm/vision",
        } < set(line)
        assert line["loss"] > 0 and 0 <= line["top1"] <= 1


# Resuming


def test_resume_after_a_kill_is_bit_exact(data, warm, whole, copy):
    """The same command resumes a killed run to the same results, bit for bit.

    Parameters, average, optimizer, data state and metrics are compared.
    """
    assert run(emu_arguments(data, copy, warm))[0] == 0
    assert_same_run(copy, whole)


def test_resume_after_a_signal_is_bit_exact(
    data, warm, whole, tmp_path, caplog, monkeypatch, small_traces
):
    write = metric_writer.MetricWriter.write

    def told(self, step, values):
        write(self, step, values)
        if step == 1:
            signal.raise_signal(signal.SIGTERM)

    workdir = tmp_path / "run"
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(metric_writer.MetricWriter, "write", told)
        assert run(emu_arguments(data, workdir, warm, "profile.steps=2:3"))[0] == 0
    assert "stopped by SIGTERM at step 2 of 4" in caplog.text
    assert [line["step"] for line in lines(workdir)] == [1, 2] and saved(workdir)[1]["step"] == 2
    assert "loaded ln_visual, resampler, vision; fresh: llama, regress_head" in caplog.text
    assert "visual_stats; not used: contrast" in caplog.text
    assert "visual tokens are standardised by the mean and standard deviation over" in caplog.text
    assert list((workdir / "profile/0").rglob("*.xplane.pb"))
    assert run(emu_arguments(data, workdir, warm))[0] == 0
    assert_same_run(workdir, whole)


# test_checkpoint.py restores onto any mesh, and test_torture.py resumes on other processes.
@pytest.mark.long
def test_resume_on_a_different_mesh(data, warm, whole, copy, caplog, monkeypatch):
    monkeypatch.setattr(sharding, "make_mesh", make_mesh)
    with caplog.at_level(logging.INFO):
        assert (
            run(emu_arguments(data, copy, warm, "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"))[0]
            == 0
        )
    assert "resumed at step 2 of 4" in caplog.text and "was compiled" not in caplog.text
    for line, want in zip(untimed(copy), untimed(whole), strict=True):
        assert line == pytest.approx(want, rel=1e-4)
    (params, _, state) = saved(copy)
    (want, _, state_wanted) = saved(whole)
    assert state == state_wanted
    chex.assert_trees_all_close(params, want, rtol=0, atol=1e-4)


def test_a_finished_run_has_nothing_to_do(data, warm, whole, tmp_path, caplog):
    workdir = shutil.copytree(whole, tmp_path / "run")
    with caplog.at_level(logging.INFO):
        assert run(emu_arguments(data, workdir, warm))[0] == 0
    assert "the run is complete: step 4 of 4. To train its model further, start" in caplog.text
    assert_same_run(workdir, whole)


# Weights to start from


def test_shared_towers_are_loaded(warm, data, caplog):
    c = config.load(emu_arguments(data, "nowhere", warm))
    fresh = jax.jit(partial(module.init, emu.Emu, emu.EmuConfig.of(c.model.to_dict())))(
        jax.random.key(5)
    )
    with caplog.at_level(logging.INFO):
        loaded = load_weights(str(warm), fresh)
    assert "loaded ln_visual, resampler, vision; fresh: llama, regress_head" in caplog.text
    assert "visual_stats; not used: contrast" in caplog.text
    there = checkpoint.restore_params(str(warm))
    assert set(loaded) == {"vision", "ln_visual", "resampler"}
    chex.assert_trees_all_equal(loaded, {tower: there[tower] for tower in loaded})
    with pytest.raises(
        UserError,
        match=r"has no parameter of this model; it holds contrast, ln_visual, resampler, vision",
    ):
        load_weights(str(warm), {"llama": fresh["llama"]})
    with pytest.raises(
        UserError, match=r"params 'vision/cls' is float32\[32\] in .*, but float32\[64\]"
    ):
        load_weights(str(warm), {"vision": {"cls": jnp.zeros(64)}})


def test_visual_stats_ignore_empty_image_slots():
    c = make.cfg("model.standardise=true")
    p = make.program(c)
    params = make.random_params(p)
    params["visual_stats"] = {
        "mean": np.zeros((4, 32), np.float32),
        "std": np.ones((4, 32), np.float32),
    }
    batches = [make.batch(c, seed) for seed in range(2)]

    class Feed(Loader):
        def __init__(self):
            self.pool = None

        def __iter__(self):
            return (LoadedBatch(batch, [], {}, {}) for batch in batches)

    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    stats = initial.measure_visual_stats(p, params, Feed(), {"mean": where, "std": where})
    images = np.concatenate([batch.images[batch.has_image] for batch in batches])
    tokens = np.asarray(jax.jit(lambda images: p.bind(params).encode(images))(images), np.float64)
    np.testing.assert_allclose(stats["mean"], tokens.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stats["std"], tokens.std(0), rtol=1e-4)


# Bad input


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["optim.step=3"], "the config has no field 'optim.step'; did you mean 'optim.steps'?"),
        (["optim.steps=many"], "'optim.steps' must be of type int, like 4; it was given 'many'"),
        (["stage=emus"], "stage='emus' is not one of emu, contrastive"),
        (
            ["stage=contrastive", "model.vision.image=28", "model.vision.patch=14"],
            "model.vision.image=28 must be a multiple of 16",
        ),
        (
            ["data.batch=9", "data.num_streams=1"],
            "data.batch=9 is not divisible by 2 (the mesh's data x fsdp) x 1 (optim.accumulate)",
        ),
        (
            ["model.llama.kv_heads=1", "mesh.tensor=2"],
            "llama/blocks/attn/k/w [2, 32, 1, 8] does not divide by tensor = 2; 1 would do",
        ),
        (
            ["optim.accumulate=3"],
            "data.batch=8 is not divisible by 2 (the mesh's data x fsdp) x 3 (optim.accumulate)",
        ),
        (["optim.accumulate=0"], "x 0 (optim.accumulate)"),
        (["data.num_streams=3"], "data.batch=8 must be a multiple of data.num_streams=3"),
        (["mesh.fsdp=3"], "does not match 2 devices: the product of its axes must be 2"),
        (["seed=9223372036854775808"], "seed=9223372036854775808 must be at least -92"),
        (["data.mixture=()"], "missing: data (--config.data.mixture="),
        (
            ["data.mixture=('a', 1.0, 'b:train')"],
            "data.mixture: 'a' is not a row (name, weight, path) or (name, weight, path, rule); "
            "a single row needs a comma: (('a', 1.0, 'b:train'),)",
        ),
        (["init=runs/demo/emu"], "missing: the checkpoint init='runs/demo/emu' (`make demo`"),
        (
            ["data.mixture=(('a', 1.0, 'nowhere/a:train'),)"],
            "missing: the source 'a' at 'nowhere/a:train'\n",
        ),
        (
            ["data.mixture=(('a', 1.0, '{data}/names:validation'),)"],
            "no records in split 'validation' of",
        ),
        (
            ["data.eval_mixture=(('a', 1.0, '{data}/names:validation'),)"],
            "no records in split 'validation' of",
        ),
        (["data.mixture=(('a', 1.0, '{data}:train'),)"], "no dataset in '{data}'"),
        (
            ["data.tokenizer=nowhere/tokenizer.json"],
            "missing: the tokenizer 'nowhere/tokenizer.json'",
        ),
        (
            ["model.llama.vocab=500"],
            "has 512 pieces, but model.llama.vocab is 500; they must be equal",
        ),
        (["optim.schedule=cosin"], "optim.schedule='cosin' is not one of"),
        (["rules.train=(('.*', False),)"], "rules.train: nothing trains"),
        (
            ["rules.peak_lr=(('lama/.*', 1.0), ('.*', 1.0))"],
            "rules.peak_lr: no parameter needs the row 'lama/.*'",
        ),
        (
            ["rules.decay=(('llama/.*', 1.0),)"],
            "rules.decay: no row covers the parameter 'ln_visual/bias'",
        ),
        (["model.llama.depth=100000000"], "the model's state needs "),
        (["profile.steps=10"], "profile.steps='10' is not FIRST:END, like 10:13"),
        (["workdir=gs://bucket/run"], "--config.checkpoint.to=gs://bucket/run for the checkpoints"),
        (["workdir="], "missing: a workdir (--config.workdir=DIR)"),
        (
            ["workdir={data}/tokenizer.json/run"],
            "cannot write into the workdir {data}/tokenizer.json/run: Not a directory",
        ),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(overrides, told, data, tmp_path, capsys):
    assert (
        train.main(
            arguments(
                data, tmp_path / "run", *(override.format(data=data) for override in overrides)
            )
        )
        == 2
    )
    error = capsys.readouterr().err
    assert (
        error.startswith("error: ") and error.count("\n") == 1 and told.format(data=data) in error
    )
    assert not list(tmp_path.iterdir())


def test_a_workdir_of_a_different_config_is_refused(whole, data, warm, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    # A different mesh alone would not be refused.
    assert (
        train.main(emu_arguments(data, whole, warm, "optim.b1=0.5", "mesh.tensor=2", "seed=1")) == 2
    )
    error = capsys.readouterr().err
    assert error == (
        f"error: workdir {whole} has a different config: optim.b1 was 0.9 and is 0.5, "
        "seed was 0 and is 1; choose another workdir\n"
    )
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*")}


def test_a_checkpoint_of_a_different_config_is_refused(whole, data, warm, capsys, tmp_path):
    """The checkpoints are in another place, as in a bucket, and the workdir is new."""
    place = f"checkpoint.to={whole}"
    assert train.main(emu_arguments(data, tmp_path, warm, place, "optim.b1=0.5")) == 2
    assert capsys.readouterr().err.endswith(
        "the checkpoint of step 4 has a different config: optim.b1 was 0.9 and is 0.5; "
        "choose another workdir\n"
    )
    assert not (tmp_path / "config.json").exists()
    assert train.main(emu_arguments(data, tmp_path, warm, place)) == 0


def test_a_different_place_of_checkpoints_is_refused(whole, data, warm, capsys, tmp_path):
    """A run with another place would start again and remove the metrics of the old one."""
    assert train.main(emu_arguments(data, whole, warm, f"checkpoint.to={tmp_path}")) == 2
    assert (
        f"has a different config: checkpoint.to was '' and is '{tmp_path}'"
        in capsys.readouterr().err
    )


def test_a_wrong_init_leaves_no_workdir(data, tmp_path, capsys):
    assert train.main(arguments(data, tmp_path / "run", f"init={data}")) == 2
    assert f"no checkpoint in {data}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_settings_that_error_messages_advise_may_change(whole, data, warm, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    assert (
        run(emu_arguments(data, workdir, warm, "data.max_bad_share=0.5", "data.unreadable=skip"))[0]
        == 0
    )


def test_fields_added_since_a_run_are_only_warned_about(caplog):
    check_same_config(
        "it", {"seed": 0, "data": {"batch": 8}}, {"seed": 0, "data": {"batch": 8, "new": 1}}
    )
    assert (
        "it was written before these fields existed; this config's values are used: data.new"
        in caplog.text
    )
    with pytest.raises(UserError, match="it has a different config: data.old was 1 and is None"):
        check_same_config("it", {"data": {"old": 1}}, {"data": {}})


def test_the_compilation_cache_is_on_by_default():
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        train.main(["--config=configs/pretrain.py"])
        assert (
            jax.config.jax_compilation_cache_dir
            == os.path.expanduser(config.load(["--config=configs/pretrain.py"]).compile_cache)
            != ""
        )
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_damaged_config_is_one_line(data, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"stage": "em')
    assert train.main(arguments(data, tmp_path)) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/config.json is damaged: ")


def test_corrupt_records_above_the_share_stop_the_run(data, tmp_path, capsys, caplog):
    broken = shutil.copytree(data, tmp_path / "data")
    file = fixtures.shard(broken / "names")
    content = bytearray(file.read_bytes())
    content[content.index(b"\x89PNG") + 40] ^= 255
    file.write_bytes(content)
    assert train.main(arguments(broken, tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("error: source 'names': ")
        and error.count("\n") == 1
        and "more than data.max_bad_share=0.01 allows" in error
    )
    assert "source names: skipping a corrupt record: names:train[" in caplog.text
    assert not (tmp_path / "run/checkpoints").exists() and lines(tmp_path / "run") == []


def test_a_full_disk_is_one_line_and_earlier_checkpoints_survive(
    data, warm, whole, copy, capsys, small_disk
):
    assert train.main(emu_arguments(data, copy, warm)) == 2
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1
        and "checkpoints/4 could not be saved: " in error
        and "; the earlier ones are unchanged" in error
    )
    small_disk()
    assert saved(copy)[1]["step"] == 2 and run(emu_arguments(data, copy, warm))[0] == 0
    assert_same_run(copy, whole)


def test_the_memory_check_counts_the_average_of_the_weights(monkeypatch):
    one_device = jax.devices()[:1]
    plain = make_plan(make.cfg("optim.ema=0.0"), one_device)
    averaged = make_plan(make.cfg("optim.ema=0.9"), one_device)
    assert averaged.state_bytes == plain.state_bytes + plain.gradient_bytes
    needed = plain.state_bytes + plain.gradient_bytes
    monkeypatch.setattr(checks, "device_memory", lambda: needed)
    checks.check_memory(plain)
    with pytest.raises(UserError, match=r"the model's state needs .* GiB per device"):
        checks.check_memory(averaged)


# The paper's model


def test_the_papers_recipe_lists_missing_files_in_one_line(capsys):
    assert train.main(["--config=configs/pretrain.py"]) == 2
    out, error = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == [
        "llama",
        "ln_visual",
        "regress_head",
        "resampler",
        "vision",
        "total",
    ]
    assert error.count("\n") == 1 and error.startswith(
        "error: missing: a workdir (--config.workdir=DIR); the tokenizer ''"
    )
    assert all(
        f"the source '{name}'" in error
        for name in ("laion-2b", "laion-coco", "mmc4", "webvid", "yt-storyboard")
    )
