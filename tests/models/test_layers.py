"""The layers that all towers use, compared with their definitions in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emu_jax.models import layers

X = np.random.default_rng(0).standard_normal((3, 5, 8)).astype(np.float32) * 4 + 1


def filled(norm):
    """Give a norm a scale that is not 1 and a bias that is not 0."""
    norm.scale.set_value(jnp.linspace(0.5, 2, 8))
    if hasattr(norm, "bias"):
        norm.bias.set_value(jnp.linspace(-1, 1, 8))
    return norm


def test_layer_norm():
    x = X.astype(np.float64)
    want = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 0.1) * np.linspace(
        0.5, 2, 8
    ) + np.linspace(-1, 1, 8)
    np.testing.assert_allclose(
        filled(layers.LayerNorm(8, eps=0.1))(jnp.asarray(X)), want, atol=1e-5
    )


def test_rms_norm():
    x = X.astype(np.float64)
    want = x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.1) * np.linspace(0.5, 2, 8)
    np.testing.assert_allclose(filled(layers.RMSNorm(8, eps=0.1))(jnp.asarray(X)), want, atol=1e-5)


@pytest.mark.parametrize("norm", [layers.LayerNorm, layers.RMSNorm])
def test_norms_are_float32_inside(norm):
    """The squares of these values lose all precision in bfloat16 and overflow in float16."""
    x = jnp.asarray(X * 1e3, jnp.float16)
    got = norm(8, eps=1e-6)(x)
    assert got.dtype == jnp.float16
    np.testing.assert_allclose(got, norm(8, eps=1e-6)(x.astype(jnp.float32)), atol=2e-3)


def test_einsum_is_in_the_activations_dtype():
    w = jnp.asarray(X[0], jnp.float32)
    for dtype in (jnp.float32, jnp.bfloat16):
        assert layers.einsum("btd,sd->bts", jnp.asarray(X, dtype), w).dtype == dtype


def test_dropout():
    x = jnp.ones((1000, 50))
    key = jax.random.key(0)
    assert layers.dropout(x, 0.3, None) is x and layers.dropout(x, 0.0, key) is x
    y = np.asarray(layers.dropout(x, 0.3, key))
    np.testing.assert_allclose(np.unique(y), [0, 1 / 0.7], rtol=1e-6)
    np.testing.assert_allclose([(y == 0).mean(), y.mean()], [0.3, 1], atol=0.01)


class Add(nnx.Module):
    def __init__(self, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (4,)))


def test_a_stack_runs_its_blocks_in_order_each_with_its_own_key():
    blocks = layers.stack(Add, 3, layers.Rngs(jax.random.key(0)))
    w = np.asarray(blocks.w.get_value())
    assert w.shape == (3, 4) and len(np.unique(w)) == 12

    def call(block, x, key):
        return 2 * x + block.w.get_value() + (0 if key is None else jax.random.uniform(key, (4,)))

    keys = jax.random.split(jax.random.key(1), 3)
    x = np.ones(4)
    got = layers.run(blocks, jnp.ones(4), call, where="llama/blocks", remat="none")
    np.testing.assert_allclose(got, 8 * x + 4 * w[0] + 2 * w[1] + w[2], rtol=1e-5)
    noise = [np.asarray(jax.random.uniform(key, (4,))) for key in keys]
    got = layers.run(
        blocks, jnp.ones(4), call, where="llama/blocks", remat="full", key=jax.random.key(1)
    )
    np.testing.assert_allclose(
        got, 8 * x + 4 * (w[0] + noise[0]) + 2 * (w[1] + noise[1]) + w[2] + noise[2], rtol=1e-5
    )


def test_parameters_are_those_of_nnxs_streams():
    key = jax.random.key(3)
    ours = layers.Rngs(key)
    theirs = nnx.Rngs(params=key)
    for _ in range(3):
        assert ours.params() == theirs.params()
