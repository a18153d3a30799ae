"""Comparisons of trees that chex lacks: to the bit, and relative to each leaf's scale."""

import chex
import numpy as np


def assert_bitwise_equal(got, want):
    """The leaves have the same dtypes, shapes and bits: -0.0 is not 0.0, and NaN is itself."""

    def bits(leaf):
        array = np.asarray(leaf)
        return array.dtype, array.shape, array.tobytes()

    chex.assert_trees_all_equal_comparator(
        lambda a, b: bits(a) == bits(b), lambda a, b: f"{a!r} is not {b!r}", got, want
    )


def assert_close(got, want, tolerance, floor=0.0):
    """Each leaf differs by at most `tolerance` times the largest element of `want`'s leaf.

    floor: the smallest value used for that largest element.
    """

    def difference(a, b):
        return np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))

    def allowed(b):
        return tolerance * difference(b, 0).max(initial=floor)

    def close(a, b):
        return np.shape(a) == np.shape(b) and bool((difference(a, b) <= allowed(b)).all())

    def message(a, b):
        if np.shape(a) != np.shape(b):
            return f"shapes {np.shape(a)} and {np.shape(b)}"
        return f"off by {difference(a, b).max():.3g}, more than {allowed(b):.3g}"

    chex.assert_trees_all_equal_comparator(close, message, got, want)
