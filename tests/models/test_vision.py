"""Laws of EVA's vision transformer: patches in reading order, images independent.

tests/verify compares its numbers with the release's.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emu_jax.models import emu, module
from emu_jax.models.vision import normalise
from tests.support import make

C = make.cfg()
P = make.program(C)
PARAMS = make.random_params(P)


@pytest.fixture(scope="module")
def features():
    """The features of normalised images [3, 28, 28, 3]."""
    return jax.jit(lambda images: module.bind(emu.Emu, P.model_config, PARAMS).vision(images))


def images(count=3):
    return jnp.asarray(np.random.default_rng(1).standard_normal((count, 28, 28, 3)), jnp.float32)


def test_an_image_does_not_see_another(features):
    x = images()
    y = features(x)
    assert y.shape == (3, 1 + 4, 32)
    np.testing.assert_allclose(
        features(x[jnp.array([2, 0, 1])]), y[jnp.array([2, 0, 1])], atol=1e-5
    )
    np.testing.assert_allclose(features(x.at[0].set(0))[1:], y[1:], atol=1e-6)
    assert np.abs(y[0] - y[1]).max() > 0.1


def test_patches_are_in_reading_order():
    """If all blocks are zero, feature 1 + k depends on the pixels of patch k alone."""
    still = jax.tree.map(jnp.zeros_like, PARAMS["vision"]["blocks"])
    params = PARAMS | {"vision": PARAMS["vision"] | {"blocks": still}}
    jacobian = jax.jit(
        jax.jacfwd(
            lambda scale: (
                module.bind(emu.Emu, P.model_config, params)
                .vision(images(1) * jnp.kron(scale, jnp.ones((14, 14)))[None, :, :, None])
                .sum(-1)[0]
            )
        )
    )(jnp.ones((2, 2)))
    moved = np.abs(jacobian.reshape(5, 4)) > 1e-6
    np.testing.assert_array_equal(moved, np.eye(5, 4, -1, dtype=bool))


def test_every_pixel_reaches_every_feature(features):
    gradient = jax.grad(lambda x: (features(x)[:, 0] ** 2).sum())(images(3))
    assert (np.asarray(gradient) != 0).mean() > 0.99


def test_queries_and_values_have_a_bias_and_keys_have_none():
    assert {name: sorted(part) for name, part in PARAMS["vision"]["blocks"]["attn"].items()} == {
        "q": ["bias", "w"],
        "k": ["w"],
        "v": ["bias", "w"],
        "o": ["bias", "w"],
    }


def test_normalise_by_hand():
    x = np.zeros((1, 28, 28, 3), np.uint8)
    x[0, 0, 0] = [255, 0, 51]
    got = normalise(jnp.asarray(x), P.model_config.vision, "float32")
    np.testing.assert_allclose(
        got[0, 0, 0],
        [(1 - 0.48145466) / 0.26862954, -0.4578275 / 0.26130258, (0.2 - 0.40821073) / 0.27577711],
        rtol=1e-5,
    )
    assert normalise(jnp.asarray(x), P.model_config.vision, "bfloat16").dtype == jnp.bfloat16
