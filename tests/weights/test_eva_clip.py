"""Interpolation of position embeddings: numbers by hand, and laws."""

import numpy as np
import pytest

from emu_jax.weights.eva_clip import bicubic, interpolate


def test_weights_by_hand():
    """Two cells become four, by the cubic kernel with a = -0.75.

    The first new centre lies a quarter cell before the first old one, so the edge is repeated.
    """

    def near(x):
        return 1.25 * x**3 - 2.25 * x**2 + 1

    def far(x):
        return -0.75 * x**3 + 3.75 * x**2 - 6 * x + 3

    np.testing.assert_allclose(
        bicubic(2, 4)[0], [far(1.75) + near(0.75) + near(0.25), far(1.25)], rtol=1e-6
    )
    np.testing.assert_allclose(
        bicubic(2, 4)[1], [far(1.25) + near(0.25), near(0.75) + far(1.75)], rtol=1e-6
    )


@pytest.mark.parametrize(("old", "new"), [(16, 32), (16, 24), (16, 7), (4, 5), (1, 3)])
def test_weights_sum_to_one_and_are_symmetric(old, new):
    weights = bicubic(old, new)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(weights, weights[::-1, ::-1], atol=1e-6)


def test_the_same_size_is_the_identity_and_a_ramp_stays_a_ramp():
    positions = np.random.default_rng(0).standard_normal((1, 17, 3), np.float32)
    np.testing.assert_allclose(interpolate(positions, 4), positions, atol=1e-6)
    cls = np.full((1, 1, 1), 9.0)
    rows = np.arange(64.0).reshape(1, 64, 1) // 8
    got = interpolate(np.concatenate([cls, rows], 1).astype(np.float32), 16)
    assert got[0, 0, 0] == 9
    square = got[0, 1:, 0].reshape(16, 16)
    want = (np.arange(16) + 0.5) / 2 - 0.5
    # Near the edges, which are repeated, the ramp bends.
    np.testing.assert_allclose(square[4:12], np.tile(want[4:12, None], (1, 16)), atol=0.05)
