"""Decoded images find their originals, whatever batch they were decoded in."""

from types import SimpleNamespace

import numpy as np
import pytest

from emu_jax.demo import decoding
from emu_jax.generate.diffusion_decoder import DiffusionDecoder
from emu_jax.generate.session import Session

IMAGES = np.random.default_rng(0).integers(0, 256, (60, 4, 4, 3), np.uint8)


class Colours(Session):
    """Encodes an image as its mean colour, and a caption as what it says."""

    def __init__(self):
        pass

    def encode_images(self, images, progress=""):
        return np.stack([image.mean((0, 1))[None] for image in images])

    def generate_images(self, prompts, **_):
        def told(part):
            return (
                np.full((1, 3), float(part))
                if isinstance(part, str)
                else self.encode_images([part])[0]
            )

        return np.stack([sum(map(told, parts)) / 2 for parts in prompts])


class Paint(DiffusionDecoder):
    """Draws the colour that the tokens are; counts what it is asked for."""

    def __init__(self):
        self.asked = []
        self.model_config = SimpleNamespace(image=2)

    def __call__(self, visual):
        self.asked.append(len(visual))
        return np.broadcast_to(np.round(visual)[:, :, None], (len(visual), 2, 2, 3)).astype(
            np.uint8
        )


def test_a_picture_finds_its_own():
    assert not decoding.pixel_ranks(IMAGES, IMAGES).any()
    noisy = np.clip(
        IMAGES.astype(int) + np.random.default_rng(1).integers(-30, 31, IMAGES.shape), 0, 255
    ).astype(np.uint8)
    assert not decoding.pixel_ranks(noisy, IMAGES).any()
    assert (decoding.pixel_ranks(IMAGES[::-1].copy(), IMAGES) > 0).all()


def test_places_count_what_is_nearer():
    grey = np.stack([np.full((4, 4, 3), value, np.uint8) for value in (0, 100, 200)])
    # 0 and 200 are as far from 100
    np.testing.assert_array_equal(
        decoding.pixel_ranks(np.stack([grey[1], grey[1], grey[0]]), grey), [1 + 1, 0, 2]
    )


def test_pictures_that_are_all_the_same_find_nothing():
    same = np.zeros((60, 4, 4, 3), np.uint8)
    assert decoding.pixel_ranks(same, same).min() == 59
    found = decoding.retrieval_numbers(
        "x", [decoding.Decoded("", image, image, same[0]) for image in IMAGES]
    )
    assert found == {
        "pictures_x_count": 60,
        "pictures_x_encoded_top1": 1,
        "pictures_x_encoded_top5": 1,
        "pictures_x_regressed_top1": pytest.approx(1 / 60),
        "pictures_x_regressed_top5": pytest.approx(5 / 60),
    }


def test_each_image_is_drawn_of_its_tokens_and_of_its_caption():
    paint = Paint()
    captions = [str(k) for k in range(60)]
    drawn = decoding.decode_images(Colours(), paint, captions, IMAGES)
    assert paint.asked == 2 * [40, 20] and [picture.caption for picture in drawn] == captions
    for k, picture in enumerate(drawn):
        assert picture.image.shape == (2, 2, 3) and (picture.regressed == np.round(k / 2)).all()
        assert (picture.encoded == np.round(IMAGES[k].mean((0, 1)))).all()


def test_blends_are_of_both():
    blends = decoding.blend_images(Colours(), Paint(), [str(k) for k in range(5)], IMAGES[:5])
    assert [blend.captions for blend in blends] == [("0", "1"), ("2", "3")]
    for k, blend in enumerate(blends):
        mean = IMAGES[2 * k : 2 * k + 2].mean((0, 1, 2))
        assert (blend.mean == np.round(mean)).all() and (blend.regressed == np.round(mean)).all()
