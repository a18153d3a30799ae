"""A document becomes one sequence: `<s>` parts `</s>`, where an image is `[IMG]`, N slots and `[/IMG]`.

The grammar of Emu (arXiv 2307.05222, section 2; the release's ids and labels). Everything that differs between the
data sets of the paper is said by the order of a document's parts; the random order of a Pair is drawn here.
Read next: packing.py.
"""
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt8

from emu_jax.data.documents import Document, Pair, Text
from emu_jax.data.tokenizer import Tokenizer

LABELS = ("text", "</s>", "[IMG]", "[/IMG]")


@dataclass(frozen=True)
class Sequence:
    """One tokenised document; t tokens and i images of it. With no image, `images` has shape [0, 0, 0, 3]."""
    id: str
    tokens: Int[np.ndarray, " t"]           # int32
    text_weights: Float[np.ndarray, " t"]   # float32; weight of tokens[t] as a label
    images: UInt8[np.ndarray, "i h w 3"]
    image_slots: Int[np.ndarray, " i"]      # int32; index in tokens of the first of an image's N slots
    image_weights: Float[np.ndarray, " i"]  # float32; 1 where the image is regressed
    cut: int                                # tokens that truncation dropped


def make_sequence(document: Document, tokenizer: Tokenizer, *, n_visual: int, max_tokens: int, max_images: int,
                  image_first: float, labels: Collection[str], rng: np.random.Generator) -> Sequence:
    """The sequence of `document`, of at most `max_tokens` tokens and `max_images` images.

    `labels` says which of LABELS count as labels; `<s>` and the slots never do. Every part that is text is encoded on its own, so the
    tokenizer's dummy prefix stands between neighbours. What is too long loses its end, `</s>` included, and never a
    part of an image. `image_first` is the probability that a Pair's image comes first; `rng` is asked once a Pair.
    """
    block = [tokenizer.img, *[tokenizer.image] * n_visual, tokenizer.end_img]
    counts = {label: float(label in labels) for label in LABELS}
    block_weights = [counts["[IMG]"], *[0.0] * n_visual, counts["[/IMG]"]]
    tokens, weights, images, slots = [tokenizer.bos], [0.0], [], []
    for part in _ordered(document.parts, image_first, rng):
        if isinstance(part, np.ndarray):
            images.append(part)
            slots.append(len(tokens) + 1)
            tokens += block
            weights += block_weights
        else:
            text, weight = (part.text, part.weight) if isinstance(part, Text) else (part, 1.0)
            ids = tokenizer.encode(text)
            tokens += ids
            weights += [weight * counts["text"]] * len(ids)
    tokens.append(tokenizer.eos)
    weights.append(counts["</s>"])

    keep = min(len(tokens), max_tokens)
    kept = min(max_images, sum(slot + n_visual < keep for slot in slots))      # images whose [/IMG], at slot + N, is still there
    if kept < len(slots):
        keep = min(keep, slots[kept] - 1)                                      # before the [IMG] of the first that is not
    return Sequence(
        id=document.id,
        tokens=np.array(tokens[:keep], np.int32),
        text_weights=np.array(weights[:keep], np.float32),
        images=np.stack(images[:kept]) if kept else np.zeros((0, 0, 0, 3), np.uint8),
        image_slots=np.array(slots[:kept], np.int32),
        image_weights=np.ones(kept, np.float32),
        cut=len(tokens) - keep)


def _ordered(parts, image_first, rng):
    for part in parts:
        if not isinstance(part, Pair):
            yield part
        elif rng.random() < image_first:
            yield from (part.image, part.text)
        else:
            yield from (part.text, part.image)
