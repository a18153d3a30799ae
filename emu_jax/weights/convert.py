"""One table per foreign checkpoint, read both ways, so that import and export cannot drift; and one
tensor at a time, so that no checkpoint is ever held whole.

A `Row` says where one of our leaves lies in a foreign checkpoint. A foreign tensor is anything with
a shape and a dtype that np.asarray reads: files.Tensor, or an array. Read next: families.py for the
tables, transfer.py for what uses them.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from emu_jax import tree
from emu_jax.config import UserError

# of arrays, or of what np.asarray reads
Tensors = Mapping[str, Any]


class Row(NamedTuple):
    """Foreign tensor `theirs` (with "{l}" for a layer, stacked into our leading L) laid out as
    `pattern`, an einops expression "theirs -> ours"; `cut` is the (start, stop) of its first axis
    where the foreign tensor holds several leaves. `grows`: the foreign tensor may end before
    `stop`; the rows that it lacks are made as the mean of those that it has.
    """

    theirs: str
    ours: str
    pattern: str = ""
    cut: tuple[int, int] | None = None
    grows: bool = False


class Table(NamedTuple):
    rows: tuple[Row, ...]
    # lengths of the axes that the patterns split
    axes: dict[str, int]
    # regexes of foreign names that have no place with us
    unused: tuple[str, ...]
    # our tower -> layers
    depth: dict[str, int]
    # leaves that an import makes and an export leaves out
    import_only: tuple[Row, ...] = ()


class Use(NamedTuple):
    """One leaf, or one layer of it, in a foreign tensor."""

    row: Row
    layer: int | None


def uses(table: Table, *, importing: bool) -> dict[str, list[Use]]:
    """Every foreign name that the table needs, with what of ours is in it; `importing`: with what an
    import makes of it.
    """
    found: dict[str, list[Use]] = {}
    for row in (*table.rows, *(table.import_only if importing else ())):
        for layer in range(table.depth[row.ours.split("/")[0]]) if "{l}" in row.theirs else [None]:
            found.setdefault(row.theirs.replace("{l}", str(layer)), []).append(Use(row, layer))
    return found


def stacked(table: Table) -> set[str]:
    """The leaves whose first axis is layers."""
    return {row.ours for row in table.rows if "{l}" in row.theirs}


def shapes(table: Table, ours: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shape of every foreign tensor, from the shapes of our leaves. Raises UserError for a leaf
    that is not there.
    """
    found = {}
    for name, parts in uses(table, importing=False).items():
        if absent := [use.row.ours for use in parts if use.row.ours not in ours]:
            raise UserError(f"there is no {absent[0]!r}, which {name!r} is made of")
        pieces = [_shape(table, use, ours[use.row.ours]) for use in parts]
        found[name] = (
            (sum(piece[0] for piece in pieces), *pieces[0][1:]) if parts[0].row.cut else pieces[0]
        )
    return found


def problems(table: Table, foreign: Tensors, ours: Mapping[str, tuple[int, ...]]) -> list[str]:
    """A line for each tensor that is missing, misshapen, no floating-point number, or
    unexpected.
    """
    expected = shapes(table, ours)
    found = []
    for name, parts in uses(table, importing=False).items():
        want = expected[name]
        least = max((use.row.cut[0] for use in parts if use.row.grows), default=None)
        if name not in foreign:
            found.append(f"missing     {name} {list(want)}")
        elif not jnp.issubdtype(foreign[name].dtype, jnp.floating):
            found.append(f"not a float {name} {foreign[name].dtype}{list(foreign[name].shape)}")
        elif (got := tuple(foreign[name].shape)) != want and not (
            least and got[1:] == want[1:] and least <= got[0] < want[0]
        ):
            found.append(f"misshapen   {name} {list(got)}, {list(want)} is needed")
    return found + [
        f"unexpected  {name} {list(foreign[name].shape)}" for name in unexpected(table, foreign)
    ]


def unexpected(table: Table, foreign: Tensors) -> list[str]:
    """Foreign names that the table neither needs nor knows as unused."""
    needed = uses(table, importing=False)
    return [
        name
        for name in foreign
        if name not in needed and not any(re.fullmatch(unused, name) for unused in table.unused)
    ]


def dtypes(table: Table, foreign: Tensors) -> dict[str, np.dtype]:
    """The dtype of each of our leaves: that of the tensors it lies in, the widest if they differ;
    float64 becomes float32.
    """
    found: dict[str, np.dtype] = {}
    for name, parts in uses(table, importing=True).items():
        for use in parts:
            dtype = np.dtype(foreign[name].dtype)
            found[use.row.ours] = min(
                np.promote_types(found.get(use.row.ours, dtype), dtype),
                np.dtype(np.float32),
                key=lambda d: d.itemsize,
            )
    return found


def pieces(table: Table, foreign: Tensors) -> Iterator[tuple[str, int | None, np.ndarray]]:
    """(leaf, layer or None, array) of everything that the table needs, each foreign tensor read
    once, in the order of `foreign`.
    """
    needed = uses(table, importing=True)
    for name in foreign:
        if name in needed:
            array = np.asarray(foreign[name])
            for row, layer in needed[name]:
                yield row.ours, layer, _rearrange(table, row, _cut(array, row), row.pattern)
            del array


def from_theirs(
    table: Table, foreign: Tensors, shardings: Mapping[str, NamedSharding] | None = None
) -> tree.Tree:
    """Our parameters from foreign tensors, straight onto the devices, each leaf where `shardings`
    has it (all on one without): the host holds one foreign tensor at a time. Raises UserError that
    lists names missing and unexpected.
    """
    missing = [name for name in uses(table, importing=False) if name not in foreign]
    extra = unexpected(table, foreign)
    if missing or extra:
        raise UserError(
            "; ".join(
                f"{len(found)} tensors {what}: {', '.join(found[:8])}{', ...' if len(found) > 8 else ''}"
                for what, found in (("missing", missing), ("unexpected", extra))
                if found
            )
        )
    leaves: dict[str, jax.Array] = {}
    types = dtypes(table, foreign)
    for path, layer, piece in pieces(table, foreign):
        whole = (
            shardings[path]
            if shardings
            else jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        )
        piece = piece.astype(types[path], copy=False)
        if layer is None:
            leaves[path] = _placed(piece, whole)
        else:
            if path not in leaves:
                shape = (table.depth[path.split("/")[0]], *piece.shape)
                leaves[path] = jax.jit(
                    partial(jnp.zeros, shape, piece.dtype), out_shardings=whole
                )()
            one = NamedSharding(whole.mesh, P(*whole.spec[1:])) if shardings else whole
            leaves[path] = _set_layer(whole)(leaves[path], _placed(piece, one), layer)
        # before the next is read
        del piece
    return tree.unflatten(leaves)


def to_theirs(
    table: Table, read: Callable[[str, int | None], Any], prefix: str = ""
) -> Iterator[tuple[str, np.ndarray]]:
    """(foreign name, tensor) of everything in the table whose name starts with `prefix`: the
    inverse of `pieces`; `read(leaf, layer or None)` gives our arrays.
    """
    for name, parts in uses(table, importing=False).items():
        if not name.startswith(prefix):
            continue
        arrays = [
            _rearrange(
                table,
                row,
                np.asarray(read(row.ours, layer)),
                " -> ".join(reversed(row.pattern.split(" -> "))),
            )
            for row, layer in parts
        ]
        yield name, np.concatenate(arrays) if len(arrays) > 1 else arrays[0]


def reader(params: tree.Tree) -> Callable[[str, int | None], Any]:
    """What `to_theirs` reads, of parameters in memory."""
    flat = dict(tree.leaves(params))
    return lambda path, layer: flat[path] if layer is None else flat[path][layer]


def _shape(table: Table, use: Use, shape: tuple[int, ...]) -> tuple[int, ...]:
    # of any shape, in one byte
    nothing = np.broadcast_to(np.zeros((), np.int8), shape if use.layer is None else shape[1:])
    return _rearrange(
        table, use.row, nothing, " -> ".join(reversed(use.row.pattern.split(" -> ")))
    ).shape


def _cut(array: np.ndarray, row: Row) -> np.ndarray:
    if row.cut is None:
        return array
    part = array[slice(*row.cut)]
    lacking = row.cut[1] - row.cut[0] - len(part) if row.grows else 0
    return np.concatenate([part, np.tile(mean_row(array), (lacking, 1))]) if lacking else part


def mean_row(array: np.ndarray) -> np.ndarray:
    """The mean over the first axis [1, D], summed in float64, a block of rows at a time."""
    total = sum(
        array[start : start + 4096].astype(np.float64).sum(0, keepdims=True)
        for start in range(0, len(array), 4096)
    )
    return (total / len(array)).astype(array.dtype)


def _rearrange(table: Table, row: Row, array: np.ndarray, pattern: str) -> np.ndarray:
    if not pattern:
        return array
    try:
        return rearrange(
            array,
            pattern,
            **{axis: n for axis, n in table.axes.items() if re.search(rf"\b{axis}\b", pattern)},
        )
    # einops raises its own kinds
    except Exception as error:
        raise UserError(
            f"tensor {row.theirs!r} of shape {array.shape} does not fit {row.ours!r} ({pattern})"
        ) from error


def _placed(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """On every process the same array; each device takes its own part of it."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


@cache
def _set_layer(sharding: jax.sharding.Sharding) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    return jax.jit(
        lambda leaf, piece, layer: jax.lax.dynamic_update_index_in_dim(leaf, piece, layer, 0),
        donate_argnums=0,
        out_shardings=sharding,
    )
