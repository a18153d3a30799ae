"""Packing: the rules that choose a document, and rows by hand."""

from functools import partial

import numpy as np

from emu_jax.data.packing import best_fit, empty_batch, first_fit, write_row
from emu_jax.data.sequence import Sequence


def sequence(length, slots=(), first=10):
    """Tokens first, first + 1, ...; weights 0, 1, 1, ...; the image at slot s is all s."""
    return Sequence(
        "d",
        np.arange(first, first + length, dtype=np.int32),
        np.arange(length).clip(0, 1).astype(np.float32),
        np.array([np.full((2, 2, 3), slot) for slot in slots], np.uint8).reshape(-1, 2, 2, 3),
        np.array(slots, np.int32),
        np.ones(len(slots), np.float32),
        0,
    )


def of(tokens, images):
    return sequence(tokens, slots=range(images))


def test_first_fit_respects_both_budgets():
    waiting = [sequence(6), sequence(4, slots=(1, 2)), sequence(4, slots=(2,)), sequence(3)]
    assert first_fit(waiting, 6, 0) == 0
    assert first_fit(waiting, 5, 2) == 1
    assert first_fit(waiting, 5, 1) == 2
    assert first_fit(waiting, 5, 0) == 3
    assert first_fit(waiting, 2, 9) is None
    assert first_fit([], 9, 9) is None


def test_a_row_by_hand():
    batch = empty_batch(2, tokens=12, images=4, image_size=2, pad=99)
    write_row(
        batch,
        1,
        [
            sequence(5, slots=(2,), first=10),
            sequence(2, first=20),
            sequence(4, slots=(1, 3), first=30),
        ],
        [1, 0, 2],
    )
    assert batch.tokens[1].tolist() == [10, 11, 12, 13, 14, 20, 21, 30, 31, 32, 33, 99]
    assert batch.segments[1].tolist() == [1, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 0]
    assert batch.positions[1].tolist() == [0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 0]
    assert batch.text_weights[1].tolist() == [0, 1, 1, 1, 1, 0, 1, 0, 1, 1, 1, 0]
    assert batch.sources[1].tolist() == [1, 1, 1, 1, 1, 0, 0, 2, 2, 2, 2, 0]
    # The fourth image is missing, so its slot is T = 12.
    assert batch.image_slots[1].tolist() == [2, 8, 10, 12]
    assert batch.image_weights[1].tolist() == [1, 1, 1, 0]
    assert batch.images[1, :, 0, 0, 0].tolist() == [2, 1, 3, 0]


def test_an_empty_row_counts_for_nothing():
    batch = empty_batch(2, tokens=12, images=4, image_size=2, pad=99)
    write_row(batch, 0, [], [])
    write_row(batch, 1, [sequence(12, slots=(1, 2, 3, 4))], [0])
    assert (batch.tokens[0] == 99).all() and (batch.image_slots[0] == 12).all()
    for field in (
        batch.segments,
        batch.positions,
        batch.text_weights,
        batch.images,
        batch.image_weights,
        batch.sources,
    ):
        assert not field[0].any()


def test_dtypes_and_shapes():
    batch = empty_batch(2, tokens=12, images=4, image_size=2, pad=99)
    for field in (batch.tokens, batch.segments, batch.positions, batch.sources):
        assert field.dtype == np.int32 and field.shape == (2, 12)
    assert batch.text_weights.dtype == batch.image_weights.dtype == np.float32
    assert batch.text_weights.shape == (
        2,
        12,
    ) and batch.image_weights.shape == batch.image_slots.shape == (2, 4)
    assert batch.images.dtype == np.uint8 and batch.images.shape == (2, 4, 2, 2, 3)
    assert batch.image_slots.dtype == np.int32


def test_best_fit_by_hand():
    """A row with 50 of 100 tokens and 2 of 10 images left takes the text of 30 tokens.

    After that, 20 % of the tokens and of the images are left. An empty row takes the first
    document, whatever it is.
    """
    waiting = [of(30, 2), of(60, 0), of(20, 0), of(30, 0), of(10, 1)]
    assert best_fit(waiting, 50, 2, 100, 10) == 3
    assert best_fit(waiting, 100, 10, 100, 10) == 0
    assert best_fit(waiting, 15, 9, 100, 10) == 4 and best_fit(waiting, 5, 9, 100, 10) is None


def test_best_fit_leaves_less_empty_than_first_fit_and_places_every_document():
    rng = np.random.default_rng(0)
    documents = [
        of(
            *(
                (50, 1)
                if rng.random() < 0.7
                else (int(rng.integers(200, 900)), int(rng.integers(0, 12)))
            )
        )
        for _ in range(600)
    ]
    used = {}
    for name, fit in (
        ("first", first_fit),
        ("best", partial(best_fit, row_tokens=1000, row_images=12)),
    ):
        unread = list(enumerate(documents))
        waiting = []
        rows = []
        while unread or waiting:
            tokens = 1000
            images = 12
            row = []
            while True:
                while unread and len(waiting) < 16:
                    waiting.append(unread.pop(0))
                index = fit([document for _, document in waiting], tokens, images)
                if index is None:
                    break
                number, document = waiting.pop(index)
                row.append(number)
                tokens = tokens - len(document.tokens)
                images = images - len(document.image_slots)
            rows.append(row)
        assert sorted(number for row in rows for number in row) == list(range(600))
        used[name] = len(rows)
    assert used["best"] < used["first"]
