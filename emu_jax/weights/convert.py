"""One table per foreign checkpoint, read both ways, so that import and export cannot drift.

A `Row` says where one of our leaves lies in a foreign checkpoint. Tables: emu1.py.
"""
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from einops import rearrange

from emu_jax import tree
from emu_jax.config import UserError


class Row(NamedTuple):
    """Foreign tensor `theirs` (with "{l}" for a layer, stacked into our leading L) laid out as `pattern`, an einops
    expression "theirs -> ours"; `cut` is the (start, stop) of its first axis where the foreign tensor holds several leaves."""
    theirs: str
    ours: str
    pattern: str = ""
    cut: tuple[int, int] | None = None


class Table(NamedTuple):
    rows: tuple[Row, ...]
    axes: dict[str, int]          # lengths of the axes that the patterns split
    unused: tuple[str, ...]       # regexes of foreign names that have no place with us
    depth: dict[str, int]         # our tower -> layers


def names(table: Table) -> list[str]:
    """Every foreign name that the table needs."""
    return list(dict.fromkeys(name for row in table.rows for name in _names(table, row)))


def from_theirs(table: Table, foreign: Mapping[str, np.ndarray]) -> tree.Tree:
    """Our parameters from foreign tensors. Raises UserError that lists names missing and unexpected."""
    missing = [name for name in names(table) if name not in foreign]
    wanted = set(names(table))
    extra = [name for name in foreign if name not in wanted and not any(re.fullmatch(p, name) for p in table.unused)]
    if missing or extra:
        raise UserError("; ".join(f"{len(found)} tensors {what}: {', '.join(found[:8])}{', ...' if len(found) > 8 else ''}"
                                  for what, found in (("missing", missing), ("unexpected", extra)) if found))

    def leaf(row: Row) -> np.ndarray:
        arrays = [_rearrange(table, row, foreign[name] if row.cut is None else foreign[name][slice(*row.cut)], row.pattern)
                  for name in _names(table, row)]
        return np.stack(arrays) if "{l}" in row.theirs else arrays[0]

    return tree.unflatten({row.ours: leaf(row) for row in table.rows})


def to_theirs(table: Table, params: tree.Tree) -> dict[str, np.ndarray]:
    """Foreign tensors from our parameters: the inverse of `from_theirs`."""
    flat = dict(tree.leaves(params))
    parts: dict[str, list[np.ndarray]] = {}
    for row in table.rows:
        back = " -> ".join(reversed(row.pattern.split(" -> ")))
        layers = np.asarray(flat[row.ours]) if "{l}" in row.theirs else [np.asarray(flat[row.ours])]
        for name, array in zip(_names(table, row), layers, strict=True):
            parts.setdefault(name, []).append(_rearrange(table, row, array, back))
    return {name: np.concatenate(arrays) if len(arrays) > 1 else arrays[0] for name, arrays in parts.items()}


def _names(table: Table, row: Row) -> Iterable[str]:
    return [row.theirs.format(l=layer) for layer in range(table.depth[row.ours.split("/")[0]])] if "{l}" in row.theirs else [row.theirs]


def _rearrange(table: Table, row: Row, array: np.ndarray, pattern: str) -> np.ndarray:
    if not pattern:
        return array
    try:
        return rearrange(array, pattern, **{axis: n for axis, n in table.axes.items() if re.search(rf"\b{axis}\b", pattern)})
    except Exception as error:      # einops raises its own kinds
        raise UserError(f"tensor {row.theirs!r} of shape {array.shape} does not fit {row.ours!r} ({pattern})") from error
