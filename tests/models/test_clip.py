"""Laws of CLIP: texts are causal and read at their end; rows of a batch are independent."""

from functools import partial

import jax
import numpy as np
import pytest

from emu_jax import tree
from emu_jax.models import module
from emu_jax.models.clip import OLD_EOS, Clip, ClipConfig, ClipText, ClipVision, TowerConfig

TEXT = TowerConfig(16, 2, 2, 24, 1e-5, "quick_gelu")
VISION = TowerConfig(24, 2, 3, 32, 1e-5, "gelu")
SIZE, OLD = (ClipConfig(12, 16, 4, 40, 10, eos, TEXT, VISION) for eos in (37, OLD_EOS))
# 39 is the largest id of the vocabulary.
IDS = np.array([[38, 5, 6, 7, 37, 37, 37, 37, 37, 37], [38, 9, 2, 3, 1, 4, 8, 9, 37, 37]])


@pytest.fixture(scope="module")
def params():
    """Random values for every leaf; the scales of norms are near 1."""
    rng = np.random.default_rng(1)

    def leaf(path, x):
        noise = 0.2 * rng.standard_normal(x.shape, np.float32)
        return noise + path.endswith("scale")

    leaves = tree.leaves(module.abstract(Clip, SIZE))
    return jax.device_put(tree.unflatten({path: leaf(path, x) for path, x in leaves}))


@partial(jax.jit, static_argnames="config")
def features(params, ids, config):
    return module.bind(ClipText, config, params)(ids)


def read(params, ids, config=SIZE):
    return np.asarray(features(params["text"], ids, config))


def test_a_text_does_not_depend_on_its_padding_nor_on_the_batch(params):
    together = read(params, IDS)
    np.testing.assert_allclose(together[0], read(params, IDS[:1, :5])[0], atol=1e-6)
    np.testing.assert_allclose(
        together[0], read(params, np.array([[38, 5, 6, 7, 37, 0, 12, 30, 3, 1]]))[0], atol=1e-6
    )
    np.testing.assert_allclose(together[1], read(params, IDS[1:])[0], atol=1e-6)
    assert np.abs(together[0] - together[1]).max() > 0.01


def test_old_texts_end_at_their_largest_id(params):
    new = np.where(IDS == 37, 39, IDS)
    want = read(params, new, ClipConfig(12, 16, 4, 40, 10, 39, TEXT, VISION))
    np.testing.assert_array_equal(read(params, new, OLD), want)
    # In IDS the largest id is 38, the start, so the old rule reads the text there.
    assert np.abs(read(params, IDS, OLD)[0] - read(params, IDS)[0]).max() > 0.01


def test_text_is_causal_and_reads_all_that_is_before_its_end(params):
    """The gradient of the features by a position's embedding is zero only after the end."""
    positions = params["text"]["positions"]
    ids = jax.device_put(IDS[:1])

    def value(positions):
        return module.bind(ClipText, SIZE, params["text"] | {"positions": positions})(ids)[0, 0]

    slope = np.abs(jax.jit(jax.grad(value))(positions)).max(1)
    assert (slope[:5] > 0).all() and (slope[5:] == 0).all()


def test_a_picture_does_not_depend_on_the_batch_and_all_of_it_counts(params):
    images = np.random.default_rng(2).standard_normal((3, 16, 16, 3), np.float32)

    def see(images):
        seen = module.bind(ClipVision, SIZE, params["vision"])(images)
        return seen[0, 0], seen

    see = jax.jit(jax.value_and_grad(see, has_aux=True))
    (_, seen), slope = see(images)
    (_, alone), _ = see(images[1:2])
    np.testing.assert_allclose(seen[1], alone[0], atol=1e-6)
    assert (np.abs(slope[0]) > 0).mean() > 0.99
