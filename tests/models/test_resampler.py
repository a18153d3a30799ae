"""The causal transformer: causal by zero gradients, T5's buckets, dropout only with a key."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emu_jax.models import emu, module
from emu_jax.models.resampler import relative_buckets
from tests.support import make

P = make.program(make.cfg())
PARAMS = make.random_params(P)
FEATURES = jnp.asarray(np.random.default_rng(1).standard_normal((2, 5, 32)), jnp.float32)


def tokens(
    queries, features=FEATURES, key=None, dropout=0.0, relative=PARAMS["resampler"]["relative"]
):
    config = dataclasses.replace(
        P.model_config, resampler=dataclasses.replace(P.model_config.resampler, dropout=dropout)
    )
    params = PARAMS | {
        "resampler": PARAMS["resampler"] | {"queries": queries, "relative": relative}
    }
    return module.bind(emu.Emu, config, params).resampler(features, key)


QUERIES = PARAMS["resampler"]["queries"]


def test_a_visual_token_sees_no_later_query():
    N = len(QUERIES)
    weights = jnp.asarray(np.random.default_rng(2).standard_normal((2, N, 32)), jnp.float32)
    # The axes are the output's token, the input's query, and C.
    jacobian = jax.jit(jax.jacrev(lambda queries: (tokens(queries) * weights).sum((0, 2))))(QUERIES)
    np.testing.assert_array_equal(np.asarray(jacobian).any(-1), np.tril(np.ones((N, N), bool)))


def test_every_visual_token_sees_every_feature_of_its_own_image():
    # The axes are the output's image and token, then the input's image and feature, and E.
    jacobian = jax.jit(jax.jacrev(lambda features: tokens(QUERIES, features).sum(-1)))(FEATURES)
    np.testing.assert_array_equal(
        np.asarray(jacobian).any(-1),
        np.broadcast_to(np.eye(2, dtype=bool)[:, None, :, None], (2, 4, 2, 5)),
    )


def test_the_relative_bias_tells_distances_apart():
    """N = 4 queries use 4 of the 32 buckets, those of the distances 0 to 3."""
    gradient = jax.jit(jax.grad(lambda relative: (tokens(QUERIES, relative=relative) ** 2).sum()))(
        PARAMS["resampler"]["relative"]
    )
    np.testing.assert_array_equal(np.asarray(gradient).any(-1), np.arange(32) < 4)


@pytest.mark.parametrize(
    ("buckets", "max_distance", "table"),
    [
        (
            32,
            128,
            {
                0: 0,
                1: 1,
                15: 15,
                16: 16,
                17: 16,
                19: 17,
                20: 17,
                31: 21,
                32: 21,
                64: 26,
                127: 31,
                128: 31,
                199: 31,
            },
        ),
        (8, 16, {0: 0, 3: 3, 4: 4, 5: 4, 6: 5, 7: 5, 8: 6, 12: 7, 16: 7, 100: 7}),
    ],
)
def test_buckets_by_hand(buckets, max_distance, table):
    """T5's unidirectional buckets: the first half is exact, the rest logarithmic.

    From half on, distance n has the bucket half + floor(log(n / half) / log(max / half) * half).
    """
    got = relative_buckets(200, buckets, max_distance)
    for distance, bucket in table.items():
        assert got[199, 199 - distance] == bucket, distance
        np.testing.assert_array_equal(np.diagonal(got, -distance), bucket)
    assert not got[np.triu_indices(200)].any()


def test_dropout_needs_a_key_and_follows_it():
    run = jax.jit(lambda key, dropout: tokens(QUERIES, key=key, dropout=dropout), static_argnums=1)
    still = run(None, 0.5)
    a = run(jax.random.key(0), 0.5)
    again = run(jax.random.key(0), 0.5)
    b = run(jax.random.key(1), 0.5)
    np.testing.assert_array_equal(still, run(None, 0.0))
    np.testing.assert_array_equal(a, again)
    assert (
        np.abs(a - still).max() > 0.1
        and np.abs(a - b).max() > 0.1
        and np.abs(a[0] - a[1]).max() > 0.1
    )
