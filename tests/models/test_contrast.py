"""The warm-up's text encoder sees the text of the image's own document only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emu_jax.models import module
from emu_jax.models.contrast import READOUT, ContrastiveModel
from tests.support import make

C = make.warm_cfg("data.batch=2", "data.tokens=16", "data.images=2")
P = make.program(C)
PARAMS = make.random_params(P)
IMG = 513
END = 514
SLOT = 515
PAD = 512


def row(*documents):
    """A packed row of documents, each a list of ids and of "image"."""
    tokens = []
    segments = []
    weights = []
    slots = []
    for number, document in enumerate(documents, 1):
        for part in document:
            if part == "image":
                slots.append(len(tokens) + 1)
                part = [IMG, SLOT, SLOT, SLOT, SLOT, END]
                weight = 0
            else:
                part, weight = [part], float(part > 2)
            tokens = tokens + part
            segments = segments + [number] * len(part)
            weights = weights + [weight] * len(part)
    short = 16 - len(tokens)
    return (
        tokens + [PAD] * short,
        segments + [0] * short,
        weights + [0.0] * short,
        slots + [16] * (2 - len(slots)),
    )


def batch(*rows):
    tokens, segments, weights, slots = map(np.array, zip(*(row(*documents) for documents in rows)))
    return jax.tree.map(
        jnp.asarray,
        make.batch(C).replace(
            tokens=tokens.astype(np.int32),
            segments=segments,
            text_weights=weights.astype(np.float32),
            image_slots=slots,
        ),
    )


@pytest.fixture(scope="module")
def features():
    return jax.jit(
        lambda batch: module.bind(ContrastiveModel, P.model_config, PARAMS).contrast.text(batch)
    )


def test_an_images_text_is_that_of_its_own_document(features):
    both = features(batch(([1, 7, 8, "image", 2], [1, 9, 7]), ([1, 7, 8, "image", 2], [1, 30, 31])))
    other = None
    alone = None
    np.testing.assert_allclose(both[0, 0], both[1, 0], atol=1e-6)
    other, alone = features(batch(([1, 7, 9, "image", 2],), ([1, 3], [1, 7, 8, "image", 2])))
    assert np.abs(other[0] - both[0, 0]).max() > 0.01
    np.testing.assert_allclose(alone[0], both[0, 0], atol=1e-6)


def test_image_first_or_text_first_is_the_same_text(features):
    got = features(batch(([1, "image", 7, 8, 9],), ([1, 7, 8, 9, "image"],)))
    np.testing.assert_allclose(got[0, 0], got[1, 0], atol=1e-6)


def test_the_order_of_words_matters(features):
    got = features(batch(([1, 7, 8, 9, "image"],), ([1, 8, 7, 9, "image"],)))
    assert np.abs(got[0, 0] - got[1, 0]).max() > 0.01


def test_the_readout_is_as_large_as_it_says():
    z = jnp.ones((3, P.model_config.resampler.tokens, P.model_config.llama.width))
    assert module.bind(ContrastiveModel, P.model_config, PARAMS).contrast.pixels(z).shape == (
        3,
        READOUT,
        READOUT,
        3,
    )
