"""Pack documents into rows: first or best fit under two budgets, T tokens and I images.

Only the end of a row is padding. Documents in a row do not see each other: attention is masked by
segments, and positions restart in each segment. Read next: mixture.py.
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
    """Index of the sequence that fits and uses both budgets most evenly, or None.

    `tokens` and `images` are what is left of a row of `row_tokens` and `row_images`. An empty row
    takes the first sequence, so that no sequence waits forever. Most of the waste of first fit is
    that one budget runs out while much of the other is left.
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
    """A Batch of NumPy arrays that is all padding.

    Its tokens are [PAD], its slots T, the length of a row, and all else is 0.
    """

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

    They must fit. Sequence k comes from source number `sources[k]` of the mixture. Threads fill the
    rows of one batch this way without copying it.
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
