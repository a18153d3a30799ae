"""Padding of batches and lengths to a few shapes, so that few programs are compiled.

Read next: generate/session.py, which compiles for powers of two.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


def pad_batch(items: Sequence[Any] | np.ndarray, rows: int) -> list[Any]:
    """List `items`, then copies of the last one until there are `rows`.

    Gives the last batch of a data set the shape of the others, so that one compiled program serves
    them all: run it on `np.stack(pad_batch(images, rows))` and keep `[: len(images)]` of the
    results. items: 1 to `rows` items of any type; an array counts as the list of its rows.
    """
    return [*items, *[items[-1]] * (rows - len(items))]


def power_of_two(count: int, least: int = 1) -> int:
    """Round `count` up to `least` times a power of two."""
    while least < count:
        least *= 2
    return least
