"""Rows of several documents: first or best fit under two budgets, T tokens and I images.

Rows are dense: only their end is padding. Segments keep the documents apart, because attention is
masked by them and positions restart in them. Read next: mixture.py.
"""

from collections.abc import Sequence as Ordered

import numpy as np

from emu_jax.data.sequence import Sequence
from emu_jax.types import Batch


def first_fit(waiting: Ordered[Sequence], tokens: int, images: int) -> int | None:
    """Index of the first sequence that fits into `tokens` tokens and `images` images, or None."""
    for index, sequence in enumerate(waiting):
        if len(sequence.tokens) <= tokens and len(sequence.image_slots) <= images:
            return index
    return None


def best_fit(
    waiting: Ordered[Sequence], tokens: int, images: int, row_tokens: int, row_images: int
) -> int | None:
    """Index of the sequence that fits and leaves both budgets most evenly used, or None.

    `tokens` and `images` remain of a row of `row_tokens` and `row_images`. An empty row takes the
    first sequence, so that none waits forever. Once one budget is used up, the rest of the other is
    wasted, which is most of the waste of first fit.
    """
    if (tokens, images) == (row_tokens, row_images):
        return first_fit(waiting, tokens, images)
    fitting = [
        index
        for index, sequence in enumerate(waiting)
        if len(sequence.tokens) <= tokens and len(sequence.image_slots) <= images
    ]

    def imbalance(index: int) -> float:
        tokens_left = tokens - len(waiting[index].tokens)
        images_left = images - len(waiting[index].image_slots)
        return abs(tokens_left / row_tokens - images_left / row_images)

    return min(fitting, key=imbalance, default=None)


def empty_batch(rows: int, tokens: int, images: int, image_size: int, pad: int) -> Batch:
    """A Batch of NumPy arrays without documents: [PAD], segments and weights 0, slots T."""

    def zeros(*shape, dtype=np.int32):
        return np.zeros(shape, dtype)

    return Batch(
        tokens=np.full((rows, tokens), pad, np.int32),  # ty: ignore[invalid-argument-type]
        segments=zeros(rows, tokens),
        positions=zeros(rows, tokens),
        text_weights=zeros(rows, tokens, dtype=np.float32),
        images=zeros(rows, images, image_size, image_size, 3, dtype=np.uint8),
        image_slots=np.full((rows, images), tokens, np.int32),  # ty: ignore[invalid-argument-type]
        image_weights=zeros(rows, images, dtype=np.float32),
        sources=zeros(rows, tokens),
    )


def write_row(batch: Batch, row: int, sequences: Ordered[Sequence], sources: Ordered[int]) -> None:
    """Write `sequences` one after another into the empty row `row` of `batch`, in place.

    Sequence k is from the source `sources[k]` of the mixture. They must fit. Threads fill one batch
    this way without a copy.
    """
    if not sequences:
        return
    lengths = np.array([len(sequence.tokens) for sequence in sequences])
    starts = np.cumsum(lengths) - lengths
    used = int(lengths.sum())
    batch.tokens[row, :used] = np.concatenate([sequence.tokens for sequence in sequences])
    batch.segments[row, :used] = np.repeat(np.arange(1, len(sequences) + 1), lengths)
    batch.positions[row, :used] = np.arange(used) - np.repeat(starts, lengths)
    batch.text_weights[row, :used] = np.concatenate(
        [sequence.text_weights for sequence in sequences]
    )
    batch.sources[row, :used] = np.repeat(np.array(sources), lengths)
    image = 0
    for sequence, start in zip(sequences, starts):
        count = len(sequence.image_slots)
        if count:
            batch.images[row, image : image + count] = sequence.images
            batch.image_slots[row, image : image + count] = sequence.image_slots + start
            batch.image_weights[row, image : image + count] = sequence.image_weights
            image += count
