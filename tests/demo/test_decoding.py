"""Decoded images find their originals, whatever batch they were decoded in."""

from types import SimpleNamespace

import numpy as np
import pytest

from emu_jax.demo import decoding
from emu_jax.generate.diffusion_decoder import DiffusionDecoder
from emu_jax.generate.session import Session

IMAGES = np.random.default_rng(0).integers(0, 256, (60, 4, 4, 3), np.uint8)


class Colours(Session):
    """A fake Session whose captions are numbers.

    It encodes an image as its mean colour, and a caption as the grey of its number.
    """

    def __init__(self):
        pass

    def encode_images(self, images, progress=""):
        return np.stack([image.mean((0, 1))[None] for image in images])

    def generate_images(self, prompts, **_):
        def colour(part):
            if isinstance(part, str):
                return np.full((1, 3), float(part))
            return self.encode_images([part])[0]

        return np.stack([sum(map(colour, parts)) / 2 for parts in prompts])


class PlainDecoder(DiffusionDecoder):
    """A fake decoder to plain images, whose visual tokens are colours.

    It records the sizes of its batches.
    """

    def __init__(self):
        self.batch_sizes = []
        self.model_config = SimpleNamespace(image=2)

    def __call__(self, visual, seeds=None):
        self.batch_sizes.append(len(visual))
        colours = np.round(visual)[:, :, None]
        return np.broadcast_to(colours, (len(visual), 2, 2, 3)).astype(np.uint8)


def test_a_decoded_image_ranks_its_original_first():
    assert not decoding.pixel_ranks(IMAGES, IMAGES).any()
    noise = np.random.default_rng(1).integers(-30, 31, IMAGES.shape)
    noisy = np.clip(IMAGES + noise, 0, 255).astype(np.uint8)
    assert not decoding.pixel_ranks(noisy, IMAGES).any()
    assert (decoding.pixel_ranks(IMAGES[::-1].copy(), IMAGES) > 0).all()


def test_the_rank_counts_nearer_images_and_ties():
    grey = np.stack([np.full((4, 4, 3), value, np.uint8) for value in (0, 100, 200)])
    # The second image, of value 100, is as far from 0 as from 200.
    decoded = np.stack([grey[1], grey[1], grey[0]])
    np.testing.assert_array_equal(decoding.pixel_ranks(decoded, grey), [1 + 1, 0, 2])


def test_equal_decoded_images_retrieve_nothing():
    same = np.zeros((60, 4, 4, 3), np.uint8)
    assert decoding.pixel_ranks(same, same).min() == 59
    decoded = [decoding.Decoded("", image, image, same[0]) for image in IMAGES]
    assert decoding.retrieval_numbers("x", decoded) == {
        "pictures_x_count": 60,
        "pictures_x_encoded_top1": 1,
        "pictures_x_encoded_top5": 1,
        "pictures_x_regressed_top1": pytest.approx(1 / 60),
        "pictures_x_regressed_top5": pytest.approx(5 / 60),
    }


def test_each_image_is_decoded_from_its_tokens_and_from_its_caption():
    decoder = PlainDecoder()
    captions = [str(k) for k in range(60)]
    decoded = decoding.decode_images(Colours(), decoder, captions, IMAGES)
    assert decoder.batch_sizes == 2 * [40, 20]
    assert [image.caption for image in decoded] == captions
    for k, image in enumerate(decoded):
        assert image.image.shape == (2, 2, 3)
        assert (image.encoded == np.round(IMAGES[k].mean((0, 1)))).all()
        assert (image.regressed == np.round(k / 2)).all()


def test_a_blend_is_decoded_from_both_drawings():
    captions = [str(k) for k in range(5)]
    blends = decoding.blend_images(Colours(), PlainDecoder(), captions, IMAGES[:5])
    assert [blend.captions for blend in blends] == [("0", "1"), ("2", "3")]
    for k, blend in enumerate(blends):
        mean = IMAGES[2 * k : 2 * k + 2].mean((0, 1, 2))
        assert (blend.mean == np.round(mean)).all() and (blend.regressed == np.round(mean)).all()
