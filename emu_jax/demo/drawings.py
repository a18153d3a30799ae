"""What the demo's decoder draws: images from their own visual tokens and from their captions, and
two images as one.

A picture is found where few images of its group are nearer to it in pixels than the one that it was
to be. Read next: report.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8
from tqdm import tqdm

from emu_jax.generate.diffusion_decoder import DiffusionDecoder
from emu_jax.generate.session import Session
from emu_jax.models.decoder import resized

# images of a group that are drawn, and among which each picture looks for its own
AMONG = 200
BLENDS = 8
# pictures
AT_ONCE = 40
TOP = (1, 5)

Pixels = UInt8[np.ndarray, "h w 3"]


class Picture(NamedTuple):
    """An image, as large as pictures are, and two pictures: of the visual tokens that the encoder
    makes of it, and of those regressed from its caption.
    """

    caption: str
    image: Pixels
    encoded: Pixels
    regressed: Pixels


class Blend(NamedTuple):
    """Two images with their captions, and pictures: of what the model regresses after both, and of
    the mean of their visual tokens.
    """

    captions: tuple[str, str]
    images: tuple[Pixels, Pixels]
    regressed: Pixels
    mean: Pixels


def pictures(
    session: Session,
    paint: DiffusionDecoder,
    captions: list[str],
    images: UInt8[np.ndarray, "M h w 3"],
) -> list[Picture]:
    """The first AMONG images, drawn twice."""
    captions = captions[:AMONG]
    images = images[:AMONG]
    encoded = _painted(paint, session.encode_images(images))
    regressed = _painted(paint, session.generate_images([[caption] for caption in captions]))
    return [
        Picture(*row)
        for row in zip(captions, _small(paint, images), encoded, regressed, strict=True)
    ]


def blends(
    session: Session,
    paint: DiffusionDecoder,
    captions: list[str],
    images: UInt8[np.ndarray, "M h w 3"],
) -> list[Blend]:
    """The first images by twos."""
    pairs = [(k, k + 1) for k in range(0, min(len(images), 2 * BLENDS) - 1, 2)]
    regressed = _painted(paint, session.generate_images([[images[a], images[b]] for a, b in pairs]))
    visual = session.encode_images(images[: 2 * BLENDS])
    small = _small(paint, images[: 2 * BLENDS])
    mean = _painted(paint, np.stack([visual[list(pair)].mean(0) for pair in pairs]))
    return [
        Blend((captions[a], captions[b]), (small[a], small[b]), *drawn)
        for (a, b), *drawn in zip(pairs, regressed, mean, strict=True)
    ]


def numbers(group: str, drawn: list[Picture]) -> dict[str, int | float]:
    """How many pictures of a group there are, and the shares that find their own image first, and
    among the first five.
    """
    images = np.stack([picture.image for picture in drawn])
    found: dict[str, int | float] = {f"pictures_{group}_count": len(drawn)}
    for source in ("encoded", "regressed"):
        place = places(np.stack([getattr(picture, source) for picture in drawn]), images)
        found |= {f"pictures_{group}_{source}_top{top}": float((place < top).mean()) for top in TOP}
    return found


def places(
    drawn: UInt8[np.ndarray, "M h w 3"], images: UInt8[np.ndarray, "M h w 3"]
) -> Int[np.ndarray, "M"]:
    """For each picture how many other images are as near to it as its own, or nearer, by the
    squared difference of the pixels.
    """
    images = images.astype(np.float32)
    distances = np.stack([np.square(images - picture).sum((1, 2, 3)) for picture in drawn])
    return (distances <= np.diagonal(distances)[:, None]).sum(1) - 1


def _painted(paint: Callable, visual: Float[np.ndarray, "M N D"]) -> UInt8[np.ndarray, "M h w 3"]:
    return np.concatenate(
        [
            paint(visual[start : start + AT_ONCE])
            for start in tqdm(
                range(0, len(visual), AT_ONCE), "pictures", unit=f" x {AT_ONCE}", disable=None
            )
        ]
    )


def _small(
    paint: DiffusionDecoder, images: UInt8[np.ndarray, "M h w 3"]
) -> UInt8[np.ndarray, "M s s 3"]:
    return np.asarray(resized(jnp.asarray(images), paint.model_config.image))
