"""Images that the demo's decoder draws from visual tokens, captions, and pairs of images.

A drawn image is scored by how many images of its group are nearer to it in pixels than its own
original. Read next: report.py.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8
from tqdm import tqdm

from emu_jax.generate.diffusion_decoder import DiffusionDecoder
from emu_jax.generate.session import Session
from emu_jax.models.decoder import resize

# Number of images that are decoded in each group, and among which each original is searched for.
PER_GROUP = 200
# Number of blends of two images.
BLENDS = 8
# Number of images in a batch.
BATCH = 40
# An original counts as found if it is among this many nearest images.
TOP = (1, 5)

Pixels = UInt8[np.ndarray, "h w 3"]
Images = UInt8[np.ndarray, "M h w 3"]


class Decoded(NamedTuple):
    """An image at the decoder's size, and two images that the decoder draws.

    encoded: drawn from the visual tokens that the encoder makes of the image. regressed: drawn from
    those that the model regresses from its caption.
    """

    caption: str
    image: Pixels
    encoded: Pixels
    regressed: Pixels


class Blend(NamedTuple):
    """Two images with their captions, and two blends of them.

    regressed: drawn from the visual tokens that the model regresses after reading both images.
    mean: drawn from the mean of their visual tokens.
    """

    captions: tuple[str, str]
    images: tuple[Pixels, Pixels]
    regressed: Pixels
    mean: Pixels


def decode_images(
    session: Session, decoder: DiffusionDecoder, captions: list[str], images: Images
) -> list[Decoded]:
    """Decode the first PER_GROUP images, from their visual tokens and from their captions."""
    captions = captions[:PER_GROUP]
    images = images[:PER_GROUP]
    encoded = _decode(decoder, session.encode_images(images))
    regressed = _decode(decoder, session.generate_images([[caption] for caption in captions]))
    small = _resize(decoder, images)
    return [Decoded(*row) for row in zip(captions, small, encoded, regressed, strict=True)]


def blend_images(
    session: Session, decoder: DiffusionDecoder, captions: list[str], images: Images
) -> list[Blend]:
    """Blend neighbouring images, in at most BLENDS pairs."""
    images = images[: 2 * BLENDS]
    pairs = [(k, k + 1) for k in range(0, len(images) - 1, 2)]
    regressed = _decode(
        decoder, session.generate_images([[images[a], images[b]] for a, b in pairs])
    )
    visual = session.encode_images(images)
    means = np.stack([visual[list(pair)].mean(0) for pair in pairs])
    decoded_means = _decode(decoder, means)
    small = _resize(decoder, images)
    blends = []
    for number, (a, b) in enumerate(pairs):
        both = (captions[a], captions[b])
        blends.append(Blend(both, (small[a], small[b]), regressed[number], decoded_means[number]))
    return blends


def retrieval_numbers(group: str, decoded: list[Decoded]) -> dict[str, int | float]:
    """Shares of drawn images whose original is the nearest, or among the five nearest."""
    images = np.stack([one.image for one in decoded])
    numbers: dict[str, int | float] = {f"pictures_{group}_count": len(decoded)}
    for source in ("encoded", "regressed"):
        found = pixel_ranks(np.stack([getattr(one, source) for one in decoded]), images)
        for top in TOP:
            numbers[f"pictures_{group}_{source}_top{top}"] = float((found < top).mean())
    return numbers


def pixel_ranks(decoded: Images, images: Images) -> Int[np.ndarray, "M"]:
    """The number of other images that are at least as near to each drawn one as its original."""
    images = images.astype(np.float32)
    distances = np.stack([np.square(images - one).sum((1, 2, 3)) for one in decoded])
    return (distances <= np.diagonal(distances)[:, None]).sum(1) - 1


def _decode(decoder: DiffusionDecoder, visual: Float[np.ndarray, "M N D"]) -> Images:
    starts = tqdm(range(0, len(visual), BATCH), "decoding", unit=f" x {BATCH}", disable=None)
    return np.concatenate([decoder(visual[start : start + BATCH]) for start in starts])


def _resize(
    decoder: DiffusionDecoder, images: UInt8[np.ndarray, "M h w 3"]
) -> UInt8[np.ndarray, "M s s 3"]:
    """Resize images to the size that the decoder draws."""
    return np.asarray(resize(jnp.asarray(images), decoder.model_config.image))
