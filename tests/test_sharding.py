"""One table places every parameter evenly; helpers change layouts, not values."""

import inspect
import re
from dataclasses import dataclass
from functools import partial
from math import prod

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from emu_jax import sharding, tree
from emu_jax.config import UserError, load
from emu_jax.models import emu, module
from emu_jax.models.contrast import ContrastiveModel
from emu_jax.step import init_state
from tests.support import make


def abstract(size, tower=emu.Emu, *overrides):
    c = load(
        [f"--config=configs/base.py:{size}", *(f"--config.{override}" for override in overrides)]
    )
    return module.abstract(tower, emu.EmuConfig.of(c.model.to_dict()))


def names(axis):
    return (axis,) if isinstance(axis, str) else axis or ()


@pytest.mark.parametrize("shape", [(1, 64, 4), (2, 128, 1)])
@pytest.mark.parametrize("overrides", [(), ("model.standardise=true", "model.llama.added=6")])
def test_the_14b_divides(shape, overrides):
    mesh = dict(zip(sharding.AXES, shape, strict=True))
    params = abstract("emu-14b", emu.Emu, *overrides)
    specs = dict(tree.leaves(sharding.specs(params)))
    whole = 0
    shard = 0
    for path, leaf in tree.leaves(params):
        over = []
        for axis in specs[path]:
            over.append(prod(mesh[name] for name in names(axis)))
        assert len(over) <= leaf.ndim and "data" not in sum(map(names, specs[path]), ()), path
        assert all(n % k == 0 for n, k in zip(leaf.shape, over)), (
            f"{path} {leaf.shape} {specs[path]}"
        )
        whole = whole + leaf.size
        shard = shard + leaf.size // prod(over)
    assert whole > 13e9 and shard <= 1.05 * whole / (mesh["fsdp"] * mesh["tensor"])


@pytest.mark.parametrize("module", [emu.Emu, ContrastiveModel])
@pytest.mark.parametrize("size", ["emu-7b", "emu-1b", "demo"])
def test_every_size_has_its_rows(size, module):
    params = abstract(size, module)
    assert [path for path, _ in tree.leaves(sharding.specs(params))] == [
        path for path, _ in tree.leaves(params)
    ]


def test_a_parameter_without_a_row_and_a_row_without_one_are_errors():
    params = abstract("debug")
    with pytest.raises(
        ValueError, match="sharding table: no row covers the parameter 'llama/new/w'"
    ):
        sharding.specs(params | {"llama": params["llama"] | {"new": {"w": 1}}})
    with pytest.raises(ValueError, match="sharding table: no row covers the parameter 'tower/w'"):
        sharding.specs(params | {"tower": {"w": 1}})
    with pytest.raises(ValueError, match="sharding table: no parameter needs the row 'vision/pos'"):
        sharding.specs(
            params
            | {"vision": {name: part for name, part in params["vision"].items() if name != "pos"}}
        )


def test_rows_do_not_overlap():
    """A leaf matches one row only, so each row of the table can be read alone."""
    for path, _ in tree.leaves(
        abstract("debug", emu.Emu, "model.standardise=true") | abstract("debug", ContrastiveModel)
    ):
        assert (
            sum(
                bool(re.fullmatch(pattern, path))
                for pattern, _ in sharding.PARAMS[path.split("/")[0]]
            )
            == 1
        ), path


# Meshes


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((1, -1, 1), (1, 8, 1)),
        ((2, 2, 2), (2, 2, 2)),
        ((-1, 2, 1), (4, 2, 1)),
        ((8, 1, -1), (8, 1, 1)),
    ],
)
def test_mesh(sizes, shape):
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes)))
    assert mesh.devices.shape == shape and mesh.axis_names == sharding.AXES
    assert sorted(device.id for device in mesh.devices.flat) == list(range(8))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, 3, -1), "does not match 8 devices: the product of its axes must be 8"),
        ((1, 4, 1), "does not match 8 devices"),
        ((2, 2, 4), "does not match 8 devices"),
        ((-1, -1, 1), "at most one is -1"),
        ((0, -1, 1), "sizes are positive"),
        ((1, 8, 0), "sizes are positive"),
        ((-2, 4, 1), "sizes are positive"),
        ((-2, -4, 1), "sizes are positive"),
    ],
)
def test_a_mesh_that_does_not_match_is_one_line(sizes, message):
    with pytest.raises(UserError, match=rf"mesh {{'data': {sizes[0]}, .*{message}"):
        sharding.make_mesh(dict(zip(sharding.AXES, sizes)))


# State


def test_moments_lie_with_their_parameters_and_counters_are_replicated():
    c = make.cfg("optim.ema=0.9", "rules.train=(('(vision|ln_visual)/.*', False), ('.*', True))")
    p = make.program(c)
    params = make.abstract(p)
    state = jax.eval_shape(partial(init_state, p), params)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    table = dict(tree.leaves(sharding.specs(params)))
    found = []
    for path, (leaf, at) in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda *both: both, state, sharding.state_shardings(mesh, params, state)),
        is_leaf=lambda x: isinstance(x, tuple) and len(x) == 2 and hasattr(x[0], "dtype"),
    ):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        own = next((own for own in table if name.endswith("/" + own)), None)
        assert at.spec == (table[own] if own else P()) and (own or leaf.shape == ()), name
        found.append(own)
    trained, frozen = (
        sum(value == yes for _, value in tree.leaves(p.trains.unfreeze())) for yes in (True, False)
    )
    # Each trained parameter has a copy for itself, two moments and the average.
    assert len([own for own in found if own]) == 4 * trained + frozen


# Helpers


def test_helpers_do_nothing_without_a_mesh():
    x = jnp.ones((3, 2))
    assert (
        sharding.constrain_rows(x) is x
        and sharding.constrain_images(x) is x
        and sharding.constrain({"a": x}, {"a": P("fsdp")})["a"] is x
    )


@pytest.mark.parametrize("count", [16, 8, 4, 3, 1])
def test_helpers_take_any_number_of_rows(count):
    """Few images, as sampled during training, must run on a large mesh too."""
    with jax.set_mesh(sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        x = jnp.arange(2.0 * count).reshape(count, 2)
        for helper in (sharding.constrain_rows, sharding.constrain_images):
            np.testing.assert_array_equal(jax.jit(helper)(x), x)


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 2, 4), (8, 1, 1)])
@pytest.mark.parametrize("B", [8, 3, 1])
def test_lookup_is_a_row_of_the_tables(shape, B):
    V = 16
    n = 3
    D = 8
    base, added = (
        jnp.asarray(np.random.default_rng(k).standard_normal((size, D)), jnp.float32)
        for k, size in enumerate((V, n))
    )
    tokens = (
        jnp.asarray(np.random.default_rng(2).integers(0, V + n, (B, 5)), jnp.int32)
        .at[0, :3]
        .set(jnp.array([0, V - 1, V + n - 1]))
    )
    weights = jnp.cos(jnp.arange(B * 5 * D, dtype=jnp.float32)).reshape(B, 5, D)

    def ours(base, added):
        x = sharding.embedding_lookup(base, added, tokens, jnp.float32)
        return (x * weights).sum(), x

    def plain(base, added):
        x = jnp.concatenate([base, added])[tokens]
        return (x * weights).sum(), x

    want = jax.value_and_grad(plain, argnums=(0, 1), has_aux=True)(base, added)
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, shape)))
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(w, sharding.shardings(mesh, spec))
            for w, spec in ((base, P("tensor", "fsdp")), (added, P(None, "fsdp")))
        ]
        got = jax.jit(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))(*placed)
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6)


def test_a_block_is_gathered_in_the_compute_dtype_and_its_gradient_scattered():
    mesh = sharding.make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    w = jnp.asarray(np.random.default_rng(0).standard_normal((16, 8)), jnp.float32)

    def value(w):
        ready = sharding.gather_weights(
            "llama/blocks", {"ffn": {"up": {"w": w}}}, jnp.bfloat16, sliced=1
        )["ffn"]["up"]["w"]
        return (ready.astype(jnp.float32) ** 2).sum(), ready

    with jax.set_mesh(mesh):
        placed = jax.device_put(w, sharding.shardings(mesh, P("fsdp", "tensor")))
        grad, ready = jax.jit(jax.grad(value, has_aux=True))(placed)
    assert ready.dtype == jnp.bfloat16 and ready.sharding.spec == P(None, "tensor")
    assert grad.sharding.is_equivalent_to(placed.sharding, 2)
    np.testing.assert_array_equal(ready, w.astype(jnp.bfloat16))
    np.testing.assert_allclose(grad, 2 * w.astype(jnp.bfloat16).astype(jnp.float32), rtol=0.01)


@dataclass(frozen=True)
class Chip:
    """A fake chip of a v5e:4x4."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    process_index: int
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


def test_slices_are_neighbours_along_data_alone():
    chips = [
        Chip(16 * part + 4 * y + x, part, (x, y, 0), 4 * part + 2 * (y // 2) + x // 2)
        for part in range(2)
        for y in range(4)
        for x in range(4)
    ]
    # Remove the type checks, which the fake chips would fail.
    make_mesh = inspect.unwrap(sharding.make_mesh)
    placed = make_mesh({"data": 4, "fsdp": 4, "tensor": 2}, chips).devices
    slices = np.vectorize(lambda chip: chip.slice_index)(placed)
    assert [set(row.flat) for row in slices] == [{0}, {0}, {1}, {1}]
    assert len(set(placed.flat)) == 32
    with pytest.raises(UserError, match="lies on 2 slices: data must be a multiple of 2"):
        make_mesh({"data": 1, "fsdp": 32, "tensor": 1}, chips)
