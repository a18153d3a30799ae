"""Conversion tables: one per foreign format, used for both import and export.

Import and export cannot drift apart, because they use the same rows. Tensors are converted one at a
time, so a checkpoint never has to fit in memory. A foreign tensor is anything that has a shape and
a dtype and that np.asarray accepts: a files.Tensor or an array. Read next: families.py for the
tables, transfer.py for import and export.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from emu_jax import tree
from emu_jax.config import UserError

# Name -> array, or anything that np.asarray accepts.
Tensors = Mapping[str, Any]


class Row(NamedTuple):
    """The foreign tensor, or its part, that holds one of our leaves."""

    # Name of the foreign tensor. "{l}" stands for a layer; layers are stacked on our first axis L.
    theirs: str
    # Path of our leaf.
    ours: str
    # Einops pattern from their layout to ours; empty if the layouts are the same.
    pattern: str = ""
    # (start, stop) on the first axis of the foreign tensor, if it holds several of our leaves.
    cut: tuple[int, int] | None = None
    # Whether the foreign tensor may have fewer than `stop` rows; missing rows become the mean row.
    grows: bool = False


class Table(NamedTuple):
    """All rows for a foreign format."""

    rows: tuple[Row, ...]
    # Lengths of the named axes in patterns.
    axes: dict[str, int]
    # Regexes of foreign names that we do not need.
    unused: tuple[str, ...]
    # Tower -> number of layers.
    depth: dict[str, int]
    # Rows that only an import uses; an export leaves their leaves out.
    import_only: tuple[Row, ...] = ()


class Use(NamedTuple):
    """One leaf, or one layer of it, inside a foreign tensor."""

    row: Row
    layer: int | None


def uses(table: Table, *, importing: bool) -> dict[str, list[Use]]:
    """The foreign names that the table needs, each with the leaves in that tensor.

    importing: whether to include the leaves that only an import creates.
    """
    found: dict[str, list[Use]] = {}
    for row in (*table.rows, *(table.import_only if importing else ())):
        layers = range(table.depth[_tower(row.ours)]) if "{l}" in row.theirs else [None]
        for layer in layers:
            name = row.theirs.replace("{l}", str(layer))
            found.setdefault(name, []).append(Use(row, layer))
    return found


def stacked(table: Table) -> set[str]:
    """Paths of leaves whose first axis is the layer."""
    return {row.ours for row in table.rows if "{l}" in row.theirs}


def foreign_shapes(table: Table, ours: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes of all foreign tensors, from the shapes of our leaves.

    Raises UserError if a leaf is missing.
    """
    found = {}
    for name, parts in uses(table, importing=False).items():
        if missing := [use.row.ours for use in parts if use.row.ours not in ours]:
            raise UserError(f"it has no parameter {missing[0]!r}, which {name!r} needs")
        pieces = [_foreign_shape(table, use, ours[use.row.ours]) for use in parts]
        found[name] = pieces[0]
        if parts[0].row.cut:
            found[name] = (sum(piece[0] for piece in pieces), *pieces[0][1:])
    return found


def problems(table: Table, foreign: Tensors, ours: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Describe each tensor that is missing, misshapen, not floating point, or unexpected."""
    expected = foreign_shapes(table, ours)
    found = []
    for name, parts in uses(table, importing=False).items():
        want = expected[name]
        if name not in foreign:
            found.append(f"missing     {name} {list(want)}")
            continue
        dtype = foreign[name].dtype
        got = tuple(foreign[name].shape)
        if not jnp.issubdtype(dtype, jnp.floating):
            found.append(f"not a float {name} {dtype}{list(got)}")
        elif got != want and not _can_grow(parts, got, want):
            found.append(f"misshapen   {name} {list(got)}, expected {list(want)}")
    for name in unexpected(table, foreign):
        found.append(f"unexpected  {name} {list(foreign[name].shape)}")
    return found


def _can_grow(parts: list[Use], got: tuple[int, ...], want: tuple[int, ...]) -> bool:
    """Whether a tensor lacks only rows that an import fills with the mean of the others."""
    starts = [use.row.cut[0] for use in parts if use.row.grows and use.row.cut]
    least = max(starts, default=0)
    return least > 0 and got[1:] == want[1:] and least <= got[0] < want[0]


def unexpected(table: Table, foreign: Tensors) -> list[str]:
    """Names of foreign tensors that the table neither needs nor lists as unused."""
    needed = uses(table, importing=False)

    def known(name: str) -> bool:
        return name in needed or any(re.fullmatch(unused, name) for unused in table.unused)

    return [name for name in foreign if not known(name)]


def dtypes(table: Table, foreign: Tensors) -> dict[str, np.dtype]:
    """Dtype of each of our leaves: the widest of its foreign tensors, float32 at most."""
    float32 = np.dtype(np.float32)
    found: dict[str, np.dtype] = {}
    for name, parts in uses(table, importing=True).items():
        dtype = np.dtype(foreign[name].dtype)
        for use in parts:
            widest = np.promote_types(found.get(use.row.ours, dtype), dtype)
            found[use.row.ours] = widest if widest.itemsize <= float32.itemsize else float32
    return found


def pieces(table: Table, foreign: Tensors) -> Iterator[tuple[str, int | None, np.ndarray]]:
    """Yield (leaf, layer or None, array) for everything that the table needs.

    Foreign tensors are read once each, in the order of `foreign`.
    """
    needed = uses(table, importing=True)
    for name in foreign:
        if name not in needed:
            continue
        array = np.asarray(foreign[name])
        for row, layer in needed[name]:
            yield row.ours, layer, _rearrange(table, row, _cut(array, row), row.pattern)
        # Free the tensor before the next one is read.
        del array


def from_theirs(
    table: Table, foreign: Tensors, shardings: Mapping[str, NamedSharding] | None = None
) -> tree.Tree:
    """Convert foreign tensors to our parameters, and place each on devices as it is read.

    shardings: by path of the leaf; None: everything on one device. The host's memory holds one
    foreign tensor at a time. Raises UserError, which lists missing and unexpected names.
    """
    missing = [name for name in uses(table, importing=False) if name not in foreign]
    lines = [
        f"{len(names)} tensors {kind}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected(table, foreign)))
        if names
    ]
    if lines:
        raise UserError("; ".join(lines))
    leaves: dict[str, jax.Array] = {}
    types = dtypes(table, foreign)
    one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    for path, layer, piece in pieces(table, foreign):
        sharding = shardings[path] if shardings else one_device
        piece = piece.astype(types[path], copy=False)
        if layer is None:
            leaves[path] = _placed(piece, sharding)
            continue
        if path not in leaves:
            shape = (table.depth[_tower(path)], *piece.shape)
            leaves[path] = _zeros(sharding)(shape, piece.dtype)
        layer_sharding = sharding
        if isinstance(sharding, NamedSharding):
            layer_sharding = NamedSharding(sharding.mesh, P(*sharding.spec[1:]))
        leaves[path] = _set_layer(sharding)(leaves[path], _placed(piece, layer_sharding), layer)
        # Free the piece before the next one is read.
        del piece
    return tree.unflatten(leaves)


def to_theirs(
    table: Table, read: Callable[[str, int | None], Any], prefix: str = ""
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (foreign name, tensor) for all names in the table that start with `prefix`.

    This is the inverse of `pieces`. read: (leaf, layer or None) -> our array.
    """
    for name, parts in uses(table, importing=False).items():
        if not name.startswith(prefix):
            continue
        arrays = [
            _rearrange(table, row, np.asarray(read(row.ours, layer)), _inverse(row.pattern))
            for row, layer in parts
        ]
        yield name, np.concatenate(arrays) if len(arrays) > 1 else arrays[0]


def reader(params: tree.Tree) -> Callable[[str, int | None], Any]:
    """Make the argument `read` of `to_theirs` for parameters in memory."""
    flat = dict(tree.leaves(params))

    def read(path: str, layer: int | None) -> Any:
        return flat[path] if layer is None else flat[path][layer]

    return read


def _tower(path: str) -> str:
    return path.split("/")[0]


def _foreign_shape(table: Table, use: Use, shape: tuple[int, ...]) -> tuple[int, ...]:
    # This array stands for our leaf: it is one byte, broadcast, so rearranging it takes no memory.
    array = np.broadcast_to(np.zeros((), np.int8), shape if use.layer is None else shape[1:])
    return _rearrange(table, use.row, array, _inverse(use.row.pattern)).shape


def _inverse(pattern: str) -> str:
    return " -> ".join(reversed(pattern.split(" -> ")))


def _cut(array: np.ndarray, row: Row) -> np.ndarray:
    if row.cut is None:
        return array
    start, stop = row.cut
    part = array[start:stop]
    lacking = stop - start - len(part) if row.grows else 0
    if not lacking:
        return part
    return np.concatenate([part, np.tile(mean_row(array), (lacking, 1))])


def mean_row(array: np.ndarray) -> np.ndarray:
    """Mean of the rows, [1, D], summed in float64 over blocks of rows to save memory."""
    total = np.zeros((1, *array.shape[1:]), np.float64)
    for start in range(0, len(array), 4096):
        total += array[start : start + 4096].astype(np.float64).sum(0, keepdims=True)
    return (total / len(array)).astype(array.dtype)


def _rearrange(table: Table, row: Row, array: np.ndarray, pattern: str) -> np.ndarray:
    if not pattern:
        return array
    axes = {axis: n for axis, n in table.axes.items() if re.search(rf"\b{axis}\b", pattern)}
    try:
        return rearrange(array, pattern, **axes)
    # einops raises error classes of its own.
    except Exception as error:
        raise UserError(
            f"tensor {row.theirs!r} of shape {array.shape} does not fit {row.ours!r} ({pattern})"
        ) from error


def _placed(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Place an array, which every process has in full, on the devices: each copies its shard."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


@cache
def _zeros(sharding: jax.sharding.Sharding) -> Callable[[tuple[int, ...], Any], jax.Array]:
    return jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=sharding)


@cache
def _set_layer(sharding: jax.sharding.Sharding) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    def update(leaf, piece, layer):
        return jax.lax.dynamic_update_index_in_dim(leaf, piece, layer, 0)

    return jax.jit(update, donate_argnums=0, out_shardings=sharding)
