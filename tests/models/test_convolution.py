"""The CPU's convolution by matrix products equals XLA's, and so does its gradient."""

import chex
import jax
import jax.numpy as jnp
import pytest

from emu_jax.models import convolution


@pytest.mark.parametrize(
    ("side", "size", "stride", "padding"),
    [(6, 3, 1, (1, 1)), (6, 3, 2, (1, 1)), (7, 3, 2, (0, 1)), (5, 1, 1, (0, 0))],
)
def test_the_product_of_shifted_copies_is_the_convolution(monkeypatch, side, size, stride, padding):
    keys = jax.random.split(jax.random.key(side + stride))
    x = jax.random.normal(keys[0], (2, side, side + 2, 3))
    w = jax.random.normal(keys[1], (size, size, 3, 5))

    def run(x, w):
        return convolution._convolve(x, w, stride, padding, "highest")

    def both():
        return (run(x, w), *jax.grad(lambda x, w: jnp.sin(run(x, w)).sum(), (0, 1))(x, w))

    here = both()
    monkeypatch.setattr(convolution, "platform_in_use", lambda: "gpu")
    chex.assert_trees_all_close(here, both(), rtol=1e-7, atol=1e-4)
