"""What is saved is restored bit for bit on any mesh, and damaged steps are skipped."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from emu_jax import checkpoint, tree
from emu_jax.checkpoint import (
    CheckpointManager,
    fingerprint,
    latest_step,
    param_shapes,
    read_config,
    restore_params,
)
from emu_jax.config import UserError
from tests.support.checkpoints import CONFIG, DATA, State, make_state
from tests.support.trees import assert_bitwise_equal

# When one array cannot be read, Orbax never awaits the coroutines of the others.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore:coroutine .* was never awaited:RuntimeWarning",
)


def abstract(state, sharding_of=None):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of and sharding_of(x)),
        state,
    )


def restore(run, abstract_state, step=None):
    """What `run` restores; fails if there is nothing to restore."""
    restored = run.restore(abstract_state, step=step)
    assert restored is not None
    return restored


def mesh_sharding(shape, *axes):
    """Shard leaves over `axes` if their leading dimension divides; replicate the others."""
    mesh = jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    count = int(np.prod([mesh.shape[axis] for axis in axes]))
    return lambda x: NamedSharding(
        mesh, PartitionSpec(axes) if x.ndim and x.shape[0] % count == 0 else PartitionSpec()
    )


def steps(workdir):
    # A folder whose name is not a number makes int() fail.
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def array_file(folder):
    return max(folder.rglob("d/*"), key=lambda path: path.stat().st_size)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with the steps 1 and 2 (copy it before changing it)."""
    workdir = tmp_path_factory.mktemp("saved")
    run = CheckpointManager(str(workdir), keep=5, keep_every=0)
    for step in (1, 2):
        run.save(step, make_state(step), DATA, {**CONFIG, "seed": step})
    run.close()
    return workdir


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "run"))


# Save and restore


@pytest.mark.parametrize("ema", [True, False])
def test_restored_state_is_the_saved_one_bit_for_bit(tmp_path, ema):
    state = make_state(ema=ema)
    run = CheckpointManager(str(tmp_path / "a" / "b"), keep=1, keep_every=0)
    run.save(1, state, DATA, CONFIG, wait=True)
    step, restored, data, config = restore(run, abstract(state))
    assert (step, data, config) == (1, DATA, CONFIG)
    assert_bitwise_equal(restored, state)


@pytest.mark.parametrize(
    "target", [((2, 4), "fsdp"), ((4, 2), "fsdp", "data"), ((1, 8), "data"), None]
)
def test_restored_onto_another_mesh_is_exactly_equal(tmp_path, target):
    state = make_state()
    target = target and mesh_sharding(*target)
    there = jax.device_put(state, jax.tree.map(mesh_sharding((1, 8), "fsdp"), state))
    CheckpointManager(str(tmp_path), keep=1, keep_every=0).save(1, there, DATA, CONFIG, wait=True)
    run = CheckpointManager(str(tmp_path), keep=1, keep_every=0)
    _, restored, _, _ = restore(run, abstract(state, target))
    assert_bitwise_equal(restored, state)
    for leaf in jax.tree.leaves(restored):
        assert leaf.sharding == target(leaf) if target else len(leaf.sharding.device_set) == 1


@pytest.mark.parametrize("split", [0, checkpoint.format.MIN_REPLICA_BYTES])
def test_copies_write_an_array_together_or_one_of_them_does(tmp_path, monkeypatch, split):
    monkeypatch.setattr(checkpoint.format, "MIN_REPLICA_BYTES", split)
    state = make_state()
    there = jax.device_put(state, jax.tree.map(mesh_sharding((4, 2), "fsdp"), state))
    CheckpointManager(str(tmp_path), keep=1, keep_every=0).save(1, there, DATA, CONFIG, wait=True)
    run = CheckpointManager(str(tmp_path), keep=1, keep_every=0)
    _, restored, _, _ = restore(run, abstract(state))
    assert_bitwise_equal(restored, state)


def test_arrays_may_be_donated_once_save_returns(tmp_path):
    run = CheckpointManager(str(tmp_path), keep=1, keep_every=0)
    state = {"w": jax.random.normal(jax.random.key(0), (1024, 2048))}
    expected = np.array(state["w"])
    run.save(1, State(jnp.int32(1), state, {}, (), None, jnp.int32(0)), DATA, CONFIG)
    spoil = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    for _ in range(5):
        state = spoil(state)
    run.wait()
    np.testing.assert_array_equal(restore_params(str(tmp_path))["w"], expected)


def test_parameters_are_found_whatever_their_split(saved):
    state = make_state(2)
    everything = {
        **state.frozen,
        **state.trainable,
        "llama": state.frozen["llama"] | state.trainable["llama"],
    }
    assert_bitwise_equal(restore_params(str(saved)), jax.tree.map(np.asarray, everything))
    assert_bitwise_equal(
        restore_params(str(saved), abstract(everything, mesh_sharding((2, 4), "fsdp"))), everything
    )


def test_one_tower_is_restored_and_cast_without_the_rest(saved):
    tower = restore_params(
        str(saved), {"vision": {"w": jax.ShapeDtypeStruct((64, 8), jnp.bfloat16)}}
    )
    assert_bitwise_equal(
        tower, {"vision": {"w": make_state(2).frozen["vision"]["w"].astype(jnp.bfloat16)}}
    )


def test_param_shapes_lists_every_parameter(saved):
    assert param_shapes(str(saved)) == {
        "head": (8,),
        "llama/ids": (6,),
        "llama/norm": (4,),
        "llama/w": (64, 64),
        "vision/w": (64, 8),
    }


def test_the_fingerprint_of_a_tower_depends_on_its_bits(saved):
    def step_fingerprint(tower, step=2):
        return fingerprint(f"{saved}/checkpoints/{step}", tower)

    llama = fingerprint(str(saved), "llama")
    assert llama == step_fingerprint("llama")
    assert llama not in (step_fingerprint("vision"), step_fingerprint("llama", 1))


def test_ema_replaces_the_parameters_that_have_an_average(saved):
    params = restore_params(str(saved), ema=True)
    state = make_state(2)
    np.testing.assert_array_equal(params["llama"]["w"], state.ema["llama"]["w"])
    np.testing.assert_array_equal(params["vision"]["w"], state.frozen["vision"]["w"])


def test_parameters_are_read_without_the_optimizer(copy):
    shutil.rmtree(copy / "checkpoints/2/optimizer")
    np.testing.assert_array_equal(
        restore_params(str(copy))["llama"]["w"], make_state(2).trainable["llama"]["w"]
    )


def test_a_path_is_enough_to_read_the_config(saved, monkeypatch):
    monkeypatch.chdir(saved)
    assert read_config(".")["seed"] == 2 and read_config(str(saved), step=1)["seed"] == 1
    assert read_config("checkpoints/1") == {**CONFIG, "seed": 1}
    np.testing.assert_array_equal(
        restore_params("checkpoints/1")["llama"]["w"], make_state(1).trainable["llama"]["w"]
    )


def test_a_given_step_is_restored(saved):
    run = CheckpointManager(str(saved), keep=5, keep_every=0)
    step, restored, _, config = restore(run, abstract(make_state()), step=1)
    assert step == config["seed"] == 1
    assert_bitwise_equal(restored, make_state(1))


def test_a_new_workdir_has_no_checkpoints(tmp_path):
    run = CheckpointManager(str(tmp_path / "new"), keep=1, keep_every=0)
    assert run.restore(abstract(make_state())) is None
    assert not (tmp_path / "new").exists()


# Slices


def sliced(workdir, params, config=CONFIG):
    flat = dict(tree.leaves(params))
    shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in flat.items()}
    with checkpoint.param_writer(str(workdir), shapes, {"llama/w"}, config) as write:
        for path, x in flat.items():
            if path == "llama/w":
                for layer in reversed(range(len(x))):
                    write(path, layer, np.asarray(x[layer]))
            else:
                write(path, None, np.asarray(x))


def test_parameters_written_by_slices_are_restored_on_any_mesh_and_read_by_slices(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(checkpoint.slices, "MAX_CHUNK_BYTES", 64)
    # An array of zeros must be written too.
    params = make_state().trainable | {
        "vision": {"pos": jnp.ones((3, 5), jnp.float16), "bias": jnp.zeros((70,))}
    }
    sliced(tmp_path, params)
    assert_bitwise_equal(restore_params(str(tmp_path)), jax.tree.map(np.asarray, params))
    assert_bitwise_equal(
        restore_params(str(tmp_path), abstract(params, mesh_sharding((2, 4), "fsdp"))), params
    )
    assert read_config(str(tmp_path)) == CONFIG
    reader = checkpoint.ParamReader(str(tmp_path))
    assert reader.shapes["llama/w"] == (np.float32, (64, 64))
    np.testing.assert_array_equal(reader.read("llama/w", 3), params["llama"]["w"][3])
    np.testing.assert_array_equal(reader.read("head", None), params["head"])
    with pytest.raises(UserError, match="'llama/w' has changed"):
        # check() needs all slices, and most of them have not been read.
        reader.check()
    for layer in set(range(64)) - {3}:
        reader.read("llama/w", layer)
    reader.check()


def test_an_unfinished_write_leaves_nothing(tmp_path, small_disk):
    with pytest.raises(UserError, match=r"could not be written: .*\S.*; nothing is left of it"):
        sliced(tmp_path / "run", {"llama": {"w": make_state(rows=4096).trainable["llama"]["w"]}})
    assert not (tmp_path / "run").exists()
    small_disk()
    sliced(tmp_path / "run", make_state().trainable)
    with pytest.raises(UserError, match="holds a checkpoint already"):
        sliced(tmp_path / "run", make_state(2).trainable)
    assert_bitwise_equal(
        restore_params(str(tmp_path / "run")), jax.tree.map(np.asarray, make_state().trainable)
    )


# Which steps are kept


def test_the_last_ones_and_every_fourth_are_kept(tmp_path):
    run = CheckpointManager(str(tmp_path), keep=2, keep_every=4)
    for step in range(1, 11):
        run.save(step, make_state(step), DATA, CONFIG)
    run.close()
    assert steps(tmp_path) == [4, 8, 9, 10] and latest_step(str(tmp_path)) == 10


def test_saving_a_step_again_does_nothing(copy):
    run = CheckpointManager(str(copy), keep=5, keep_every=0)
    run.restore(abstract(make_state()))
    for step in (2, 3, 3):
        before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
        run.save(step, make_state(step), DATA, CONFIG, wait=True)
    assert before == {path: path.stat().st_mtime_ns for path in copy.rglob("*")} and steps(
        copy
    ) == [1, 2, 3]


def test_a_damaged_step_does_not_displace_intact_ones_and_is_replaced(copy):
    CheckpointManager(str(copy), keep=5, keep_every=0).save(
        4, make_state(4), DATA, CONFIG, wait=True
    )
    array_file(copy / "checkpoints/4/params").unlink()
    run = CheckpointManager(str(copy), keep=2, keep_every=0)
    assert restore(run, abstract(make_state()))[0] == 2
    run.save(3, make_state(3), DATA, CONFIG, wait=True)
    assert steps(copy) == [2, 3, 4]
    run.save(5, make_state(5), DATA, CONFIG, wait=True)
    assert steps(copy) == [3, 4, 5]
    shutil.rmtree(copy / "checkpoints/5")
    run = CheckpointManager(str(copy), keep=2, keep_every=0)
    assert restore(run, abstract(make_state()))[0] == 3
    run.save(4, make_state(4), DATA, CONFIG, wait=True)
    assert steps(copy) == [3, 4]
    assert_bitwise_equal(restore(run, abstract(make_state()))[1], make_state(4))


# Damage


def delete(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def change_a_digit(path):
    changed = path.read_text().replace("7", "8", 1)
    json.loads(changed)
    path.write_text(changed)


@pytest.mark.parametrize(
    ("damage", "part", "file"),
    [
        (delete, "params", None),
        (truncate, "params", None),
        (flip_a_bit, "params", None),
        (flip_a_bit, "optimizer", None),
        (flip_a_bit, "ema", None),
        (delete, "optimizer", "manifest.ocdbt"),
        (truncate, "params", "_METADATA"),
        (change_a_digit, "data", "data.json"),
        (delete, "config", "data.json"),
        (truncate, "manifest", "data.json"),
        (delete, ".", "_CHECKPOINT_METADATA"),
        (shutil.rmtree, ".", "ema"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_a_warning_that_names_it(
    copy, caplog, damage, part, file
):
    folder = copy / "checkpoints/2" / part
    damage(folder / file if file else array_file(folder))
    run = CheckpointManager(str(copy), keep=5, keep_every=0)
    with caplog.at_level(logging.WARNING):
        step, restored, _, _ = restore(run, abstract(make_state()))
    assert step == 1 and str(copy / "checkpoints/2") in caplog.text and "skipping" in caplog.text
    assert_bitwise_equal(restored, make_state(1))
    with pytest.raises(UserError, match=r"checkpoints; 2 is damaged: \w+"):
        run.restore(abstract(make_state()), step=2)


def test_no_intact_checkpoint_is_an_error_and_not_a_new_start(copy):
    for step in (1, 2):
        truncate(copy / f"checkpoints/{step}/manifest/data.json")
    run = CheckpointManager(str(copy), keep=5, keep_every=0)
    path = str(copy)
    for read in (
        lambda: latest_step(path),
        lambda: run.restore(abstract(make_state())),
        lambda: read_config(path),
        lambda: restore_params(path),
    ):
        with pytest.raises(UserError, match="no intact checkpoint in .*1 is damaged"):
            read()
    assert steps(copy) == [1, 2]


def test_the_arrays_of_a_damaged_step_are_freed_before_the_next_is_read(copy, monkeypatch):
    flip_a_bit(array_file(copy / "checkpoints/2/params"))
    load = checkpoint.manager.load_arrays
    held = []

    def measured(*arguments):
        held.append(sum(array.nbytes for array in jax.live_arrays()))
        return load(*arguments)

    monkeypatch.setattr(checkpoint.manager, "load_arrays", measured)
    CheckpointManager(str(copy), keep=5, keep_every=0).restore(abstract(make_state()))
    assert len(held) == 2 and held[0] == held[1]


def test_a_killed_save_is_ignored_and_removed(copy, caplog):
    killed = subprocess.run(
        [sys.executable, "-m", "tests.support.checkpoints", copy],
        cwd=Path(__file__).parent.parent,
        check=False,
    )
    assert killed.returncode == -9
    # The kill may have come before Orbax created this folder.
    (copy / "checkpoints/3.orbax-checkpoint-tmp/params").mkdir(parents=True, exist_ok=True)
    run = CheckpointManager(str(copy), keep=5, keep_every=0)
    assert latest_step(str(copy)) == 2 and not caplog.records
    assert_bitwise_equal(restore(run, abstract(make_state()))[1], make_state(2))
    run.save(4, make_state(4), DATA, CONFIG, wait=True)
    assert steps(copy) == [1, 2, 4]


def test_a_full_disk_is_one_line_and_harms_nothing(copy, small_disk):
    big = make_state(3, rows=4096)
    run = CheckpointManager(str(copy), keep=5, keep_every=0)
    with pytest.raises(
        UserError,
        match=r"checkpoints/3 could not be saved: .*\S.*; the earlier ones are unchanged",
    ) as error:
        run.save(3, big, DATA, CONFIG)
        # If the first save does not raise the error, this one does.
        run.save(4, big, DATA, CONFIG)
    assert "\n" not in str(error.value) and steps(copy) == [1, 2]
    assert_bitwise_equal(restore(run, abstract(make_state()))[1], make_state(2))
    small_disk()
    run.save(3, big, DATA, CONFIG, wait=True)
    assert steps(copy) == [1, 2, 3]
    assert_bitwise_equal(restore(run, abstract(big))[1], make_state(3, rows=4096))


# Bad input


def test_another_shape_names_the_leaf_and_both_shapes(saved):
    with pytest.raises(
        UserError,
        match=r"params 'llama/w' is float32\[64, 64\] in .*checkpoints/2, but float32\[32, 64\]",
    ):
        CheckpointManager(str(saved), keep=5, keep_every=0).restore(abstract(make_state(rows=32)))
    with pytest.raises(
        UserError,
        match=r"params 'vision/w' is float32\[64, 8\] in .*checkpoints/2, but float32\[8\]",
    ):
        restore_params(str(saved), {"vision": {"w": jax.ShapeDtypeStruct((8,), jnp.float32)}})


def test_another_tree_or_dtype_names_the_leaf(saved):
    run = CheckpointManager(str(saved), keep=5, keep_every=0)
    state = abstract(make_state())
    for other, message in [
        (state.replace(frozen={**state.frozen, "new": state.step}), "has no params 'new'"),
        (
            state.replace(trainable={"head": state.trainable["head"]}),
            "has params 'llama/norm', which",
        ),
        (state.replace(opt_state=()), "has optimizer 'opt_state/"),
        (
            state.replace(step=jax.ShapeDtypeStruct((), jnp.float32)),
            r"optimizer 'step' is int32\[\] in .* but float32\[\]",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            run.restore(other)
    with pytest.raises(UserError, match="has no params 'vision/other'"):
        restore_params(str(saved), {"vision": {"other": jax.ShapeDtypeStruct((8,), jnp.float32)}})


def test_a_missing_average_is_an_error(tmp_path):
    run = CheckpointManager(str(tmp_path), keep=1, keep_every=0)
    run.save(1, make_state(ema=False), DATA, CONFIG, wait=True)
    with pytest.raises(UserError, match="no moving average"):
        restore_params(str(tmp_path), ema=True)
    with pytest.raises(UserError, match="has no ema 'head'"):
        run.restore(abstract(make_state()))


def test_the_folder_of_the_checkpoints_is_as_good_as_the_workdir(saved):
    assert read_config(str(saved / "checkpoints")) == read_config(str(saved))


def test_a_missing_directory_or_step_is_an_error(saved, tmp_path):
    for read in (read_config, restore_params):
        with pytest.raises(UserError, match="no directory '.*nowhere'"):
            read(str(tmp_path / "nowhere"))
        with pytest.raises(UserError, match="checkpoints/1000 \\(`make demo` makes what is in"):
            read("./runs/demo/nowhere")
        with pytest.raises(UserError, match="no checkpoint in "):
            read(str(tmp_path))
        with pytest.raises(UserError, match="no checkpoint of step 7 in .*; there are 1, 2"):
            read(str(saved), step=7)
    with pytest.raises(UserError, match="no checkpoint of step 7 in .*; there are 1, 2"):
        CheckpointManager(str(saved), keep=1, keep_every=0).restore(abstract(make_state()), step=7)


def test_a_workdir_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    run = CheckpointManager(str(tmp_path), keep=1, keep_every=0)
    with pytest.raises(UserError, match="could not be saved"):
        run.save(1, make_state(), DATA, CONFIG, wait=True)


@pytest.mark.parametrize("place", ["s3://bucket/run", "az://bucket/run"])
def test_other_buckets_than_googles_are_refused(place):
    """Orbax marks finished saves differently there, so they would be taken for unfinished."""
    with pytest.raises(UserError, match=f"cannot keep checkpoints in '{place}': .* gs://NAME"):
        CheckpointManager(place, keep=1, keep_every=0)


def test_keeping_nothing_is_an_error(tmp_path):
    with pytest.raises(UserError, match="checkpoint.keep=0 must be at least 1"):
        CheckpointManager(str(tmp_path), keep=0, keep_every=0)
