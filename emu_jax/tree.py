"""Nested dicts of parameters, and the one rule language over their paths.

A rule is an ordered list of (regex, value) rows over paths such as "llama/blocks/attn/q/w": the
first row that matches the complete path wins, as in big_vision. Shardings, what trains, learning
rates, weight decay and LoRA's targets are rules. A leaf that no row covers, and a row that no leaf
needs, are errors: a rule that silently does nothing can cost a month of compute.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

Tree = dict[str, Any]


def leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("a/b/c", leaf) pairs of a nested dict, sorted by name at each level as jax.tree does."""
    for name in sorted(tree):
        path = f"{prefix}/{name}" if prefix else name
        if isinstance(tree[name], dict):
            yield from leaves(tree[name], path)
        else:
            yield path, tree[name]


def unflatten(pairs: dict[str, Any]) -> Tree:
    """The nested dict of a flat {"a/b/c": leaf}: the inverse of `dict(leaves(tree))`."""
    tree: Tree = {}
    for path, leaf in pairs.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def by_rule(rules: Sequence[Any], tree: Tree, what: str = "rules") -> Tree:
    """A tree like `tree`, with the value of the first row that matches the path of each leaf.

    Raises ValueError, naming `what`, for a leaf without a row, for a row that no leaf needs, and
    for an entry that is not a (regex, value) row.
    """
    used: set[int] = set()
    for row in rules:
        if not _is_row(row):
            raise ValueError(f"{what}: {row!r} is not a (regular expression, value) row")

    def value_of(path: str) -> Any:
        for number, (pattern, value) in enumerate(rules):
            if re.fullmatch(pattern, path):
                used.add(number)
                return value
        raise ValueError(
            f"{what}: no row covers the parameter {path!r}; add one, or a last row ('.*', ...)"
        )

    values = {path: value_of(path) for path, _ in leaves(tree)}
    idle = [pattern for number, (pattern, _) in enumerate(rules) if number not in used]
    if idle:
        raise ValueError(
            f"{what}: no parameter needs the row {idle[0]!r}; "
            f"the parameters are under {sorted(tree)}"
        )
    return unflatten(values)


def _is_row(row: Any) -> bool:
    """Whether `row` is a pair that begins with a valid regular expression."""
    try:
        pattern, _ = row
        return bool(re.compile(pattern))
    except (TypeError, ValueError, re.error):
        return False


def split(tree: Tree, chosen: Tree) -> tuple[Tree, Tree]:
    """(leaves where `chosen` is true, the others), as two nested dicts."""
    mask = dict(leaves(chosen))
    yes = {path: leaf for path, leaf in leaves(tree) if mask[path]}
    no = {path: leaf for path, leaf in leaves(tree) if not mask[path]}
    return unflatten(yes), unflatten(no)


def merge(*trees: Tree) -> Tree:
    """Join disjoint nested dicts into one: the inverse of `split`."""
    return unflatten({path: leaf for tree in trees for path, leaf in leaves(tree)})
