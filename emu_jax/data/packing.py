"""Rows of several documents: first or best fit under two budgets, T tokens and I images.

A row is dense: nothing but its end is padding, and segments keep its documents apart (attention is
masked by them, positions restart in them). Read next: mixture.py, which says what waits to be
packed.
"""

from collections.abc import Sequence as Ordered

import numpy as np

from emu_jax.data.sequence import Sequence
from emu_jax.types import Batch


def first_fit(waiting: Ordered[Sequence], tokens: int, images: int) -> int | None:
    """Index of the first of `waiting` that needs at most `tokens` tokens and `images` images; None
    if none does.
    """
    for index, sequence in enumerate(waiting):
        if len(sequence.tokens) <= tokens and len(sequence.image_slots) <= images:
            return index
    return None


def best_fit(
    waiting: Ordered[Sequence], tokens: int, images: int, row_tokens: int, row_images: int
) -> int | None:
    """Index of the one of `waiting` that fits into what is left of a row of `row_tokens` and
    `row_images`, and that leaves both budgets most evenly used; None if none fits. An empty row
    takes the first, so that none waits for ever.

    With one budget used up the rest of the other is lost, and that is most of what first fit loses.
    """
    if (tokens, images) == (row_tokens, row_images):
        return first_fit(waiting, tokens, images)
    fitting = [
        index
        for index, sequence in enumerate(waiting)
        if len(sequence.tokens) <= tokens and len(sequence.image_slots) <= images
    ]

    def uneven(index: int) -> float:
        return abs(
            (tokens - len(waiting[index].tokens)) / row_tokens
            - (images - len(waiting[index].image_slots)) / row_images
        )

    return min(fitting, key=uneven, default=None)


def empty_batch(rows: int, tokens: int, images: int, image_size: int, pad: int) -> Batch:
    """A Batch of NumPy arrays that holds nothing: [PAD] everywhere, segments and weights 0, slots
    T.
    """

    def zeros(*shape, dtype=np.int32):
        return np.zeros(shape, dtype)

    return Batch(
        tokens=np.full((rows, tokens), pad, np.int32),
        segments=zeros(rows, tokens),
        positions=zeros(rows, tokens),
        text_weights=zeros(rows, tokens, dtype=np.float32),
        images=zeros(rows, images, image_size, image_size, 3, dtype=np.uint8),
        image_slots=np.full((rows, images), tokens, np.int32),
        image_weights=zeros(rows, images, dtype=np.float32),
        sources=zeros(rows, tokens),
    )


def write_row(batch: Batch, row: int, sequences: Ordered[Sequence], sources: Ordered[int]) -> None:
    """Writes `sequences`, each of the source `sources[k]` of the mixture, one after another into
    the empty row `row` of `batch`.

    In place, so that threads fill one batch without a copy. The sequences must fit (`first_fit`).
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
