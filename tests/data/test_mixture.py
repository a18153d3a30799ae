"""Mixtures and streams: orders, weights, packing, and exact resume."""

import json
import logging
from collections import Counter

import numpy as np
import pytest

from emu_jax.config import UserError
from emu_jax.data.documents import Document
from emu_jax.data.mixture import Mixture, Stream, rng_for, shuffled_index, stable_hash
from emu_jax.data.sequence import SequenceBuilder

T = 24
I = 2


@pytest.fixture
def to_sequence(letters):
    return SequenceBuilder(
        tokenizer=letters,
        n_visual=2,
        max_tokens=T,
        max_images=I,
        image_first=0.5,
        labels=("text", "</s>"),
    )


def mixture_of(*sources, weights=None, streams=1, seed=0):
    return Mixture(
        tuple("abc"[: len(sources)]), tuple(weights or [1.0] * len(sources)), sources, streams, seed
    )


def ids_of(rows):
    def ids(row):
        return [packed.id for packed in row]

    return list(map(ids, rows))


@pytest.mark.parametrize("documents, streams", [(1, 1), (1, 4), (3, 8), (7, 2), (8, 4), (50, 5)])
def test_an_epoch_over_all_streams_holds_every_document_once(
    memory, to_sequence, documents, streams
):
    epochs = 4
    mixture = mixture_of(memory(documents), streams=streams)
    # {place in the order of all epochs: id of its document}
    read = {}
    for number in range(streams):
        stream = Stream(mixture, number, to_sequence, lookahead=1)
        # The left side is the place that the stream reads next.
        while number + streams * stream.read[0] < epochs * documents + streams:
            place = number + streams * stream.read[0]
            read[place] = stream._read(*stream._next_place()).id
    for epoch in range(epochs):
        order = [read[place] for place in range(epoch * documents, (epoch + 1) * documents)]
        assert sorted(order) == sorted(f"a/d{k}" for k in range(documents))


def test_epochs_sources_and_seeds_have_orders_of_their_own(memory):
    def order(mixture, source, epoch):
        return [mixture.index(source, place) for place in range(40 * epoch, 40 * epoch + 40)]

    one = mixture_of(memory(40), memory(40))
    two = mixture_of(memory(40), memory(40), seed=1)
    orders = [
        order(one, 0, 0),
        order(one, 0, 1),
        order(one, 1, 0),
        order(two, 0, 0),
        list(range(40)),
    ]
    assert all(a != b for k, a in enumerate(orders) for b in orders[:k])
    # The number of streams does not change the order.
    assert order(one, 0, 1) == order(mixture_of(memory(40), streams=7), 0, 1)


def test_weights_hold_over_many_draws(memory):
    mixture = mixture_of(memory(1), memory(1), memory(1), weights=(7.0, 2.0, 1.0), streams=8)
    draws = np.concatenate(
        [mixture.draws(stream, block) for stream in range(8) for block in range(5)]
    )
    # The standard deviation is 0.002.
    assert np.allclose(np.bincount(draws) / len(draws), (0.7, 0.2, 0.1), atol=0.01)
    assert (mixture.draws(0, 0) != mixture.draws(1, 0)).any() and (
        mixture.draws(0, 0) != mixture.draws(0, 1)
    ).any()


def test_what_is_read_has_the_weights(memory, to_sequence):
    stream = Stream(
        mixture_of(memory(5), memory(500), weights=(3.0, 1.0)), 0, to_sequence, lookahead=4
    )
    names = Counter(packed.id[0] for _ in range(800) for packed in stream.row(T, I))
    # The standard deviation is 0.008.
    assert abs(names["a"] / names.total() - 0.75) < 0.03


def test_a_row_takes_the_first_that_fits_by_hand(memory, to_sequence):
    """Rows of 24 tokens hold documents of 20, 8, 4, 15 and 3 tokens, of which three wait.

    The documents come in this order. <s> and </s> are two of their tokens.
    """
    documents = [Document(f"{length}", ("x" * (length - 2),)) for length in (20, 8, 4, 15, 3)]
    stream = Stream(mixture_of(memory(documents)), 0, to_sequence, lookahead=3, once=True)
    assert ids_of(stream.row(T, I) for _ in range(4)) == [
        ["a/20", "a/4"],
        ["a/8", "a/15"],
        ["a/3"],
        [],
    ]


def test_a_row_respects_the_budget_of_images(memory, to_sequence, picture):
    one = (picture(0),)
    two = (picture(0), picture(0))
    documents = [
        Document("one", one),
        Document("two", two),
        Document("text", ("x",)),
        Document("uno", one),
        Document("eins", one),
    ]
    stream = Stream(mixture_of(memory(documents)), 0, to_sequence, lookahead=9, once=True)
    assert ids_of(stream.row(100, 2) for _ in range(3)) == [
        ["a/one", "a/text", "a/uno"],
        ["a/two"],
        ["a/eins"],
    ]


def test_too_long_documents_are_cut_to_a_row_and_counted(memory, to_sequence, picture):
    # A document of 102 tokens, and one of 18 tokens with 4 images.
    documents = [Document("long", ("x" * 100,)), Document("pictures", (picture(1),) * 4)]
    stream = Stream(mixture_of(memory(documents)), 0, to_sequence, lookahead=2, once=True)
    (long,) = stream.row(T, I)
    (pictures,) = stream.row(T, I)
    assert (
        len(long.sequence.tokens) == 24
        and len(pictures.sequence.images) == 2
        and len(pictures.sequence.tokens) == 9
    )
    assert stream.state()["counts"] == {
        "rows": 2,
        "documents": 2,
        "tokens": 33,
        "images": 2,
        "cut_documents": 2,
        "cut_tokens": 78 + 9,
        "cut_turns": 0,
    }


def test_randomness_of_a_document_is_of_its_id_and_the_epoch(memory, to_sequence):
    def drawing(document, rng, rule):
        drawn.append(rng.random())
        return to_sequence(document, rng=rng, rule=rule)

    # {(streams, seed): {(id, epoch): random number}}
    seen = {}
    for streams, seed in ((1, 0), (3, 0), (1, 1)):
        mixture = mixture_of(memory(10), streams=streams, seed=seed)
        values = seen[streams, seed] = {}
        for place in range(20):
            drawn = []
            packed = Stream(mixture, place % streams, drawing, lookahead=1)._read(0, place)
            (values[packed.id, place // 10],) = drawn
    assert seen[1, 0] == seen[3, 0] and len(seen[1, 0]) == 20
    # Every epoch draws other numbers.
    assert len(set(seen[1, 0].values())) == 20
    # Another seed draws other numbers, too.
    assert not set(seen[1, 0].values()) & set(seen[1, 1].values())


def test_randomness_is_the_same_everywhere():
    assert rng_for(0, "a", 1).bit_generator.random_raw() == 1197278973197159232
    assert [shuffled_index(place, 6, stable_hash(0)) for place in range(6)] == [3, 4, 2, 0, 1, 5]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000])
def test_shuffled_is_a_permutation(size):
    assert sorted(shuffled_index(place, size, stable_hash("key")) for place in range(size)) == list(
        range(size)
    )


def test_shuffled_is_even():
    """Every index is equally likely at each place, and so is the step to the next index.

    The sizes are hard for a Feistel network.
    """
    for size in (5, 7, 12):
        orders = np.array(
            [
                [shuffled_index(place, size, stable_hash(key)) for place in range(size)]
                for key in range(2000)
            ]
        )
        table = np.array([np.bincount(column, minlength=size) for column in orders.T])
        steps = np.bincount((orders[:, 1] - orders[:, 0]) % size, minlength=size)[1:]
        for counts, freedom in ((table, (size - 1) ** 2), (steps, size - 2)):
            expected = counts.sum() / counts.size
            # Chi-squared per degree of freedom is about 1 by chance, and 10 with only 4 rounds of
            # the network.
            assert ((counts - expected) ** 2 / expected).sum() / freedom < 3


def test_a_state_continues_exactly(memory, to_sequence):
    def stream(state=None, lookahead=5):
        return Stream(
            mixture_of(memory(9), memory(40, corrupt=(3, 4)), streams=2),
            1,
            to_sequence,
            lookahead,
            state,
        )

    whole = stream()
    for _ in range(30):
        state = json.loads(json.dumps(whole.state()))
        again = stream(state)
        # The states are equal even before `again` reads anything.
        assert again.state() == state
        assert ids_of([whole.row(T, I)]) == ids_of([again.row(T, I)])
        assert whole.state() == again.state()
    # A smaller lookahead loses no waiting document.
    fewer = stream(state, lookahead=2)
    read = [packed.id for _ in range(30) for packed in fewer.row(T, I)]
    assert {name for name, _ in state["pending"]} <= {id[0] for id in read}
    assert fewer.counts["documents"] + len(fewer.state()["pending"]) == sum(fewer.read) - sum(
        fewer.bad
    )


def test_corrupt_records_are_skipped_counted_and_named(memory, to_sequence, caplog):
    stream = Stream(mixture_of(memory(6, corrupt=(1, 4))), 0, to_sequence, lookahead=1, once=True)
    with caplog.at_level(logging.WARNING):
        ids = [packed.id for _ in range(6) for packed in stream.row(T, I)]
    assert sorted(ids) == ["a/d0", "a/d2", "a/d3", "a/d5"]
    assert stream.state()["sources"] == {"a": {"read": 6, "bad": 2}}
    assert [record.getMessage() for record in caplog.records] == [
        f"source a: skipping a corrupt record: d{k}: not a PNG" for k in (1, 4)
    ]


def test_a_source_with_nothing_to_read_ends_the_stream(memory, to_sequence):
    stream = Stream(mixture_of(memory(3, corrupt=(0, 1, 2))), 0, to_sequence, lookahead=1)
    with pytest.raises(UserError, match="source 'a': 100 corrupt records in a row"):
        stream.row(T, I)


def test_scattered_corrupt_records_do_not_end_it(memory, to_sequence):
    stream = Stream(
        mixture_of(memory(300, corrupt=range(0, 300, 2))), 0, to_sequence, lookahead=1, once=True
    )
    assert sum(len(stream.row(T, I)) for _ in range(150)) == 150 and stream.bad == [150]


def test_other_errors_of_a_source_are_not_swallowed(memory, to_sequence):
    stream = Stream(mixture_of(memory([None])), 0, to_sequence, lookahead=1)
    with pytest.raises(AttributeError):
        stream.row(T, I)


def test_one_pass_takes_the_sources_in_turn(memory):
    mixture = mixture_of(memory(2), memory(4), weights=(1.0, 100.0))
    assert mixture.eval_order.tolist() == [[0, 0], [1, 0], [0, 1], [1, 1], [1, 2], [1, 3]]


@pytest.mark.parametrize("streams", [1, 3, 4, 9])
def test_one_pass_is_shared_out_to_the_streams(memory, to_sequence, streams):
    mixture = mixture_of(memory(2), memory(4), streams=streams)
    shares = [
        Stream(mixture, number, to_sequence, lookahead=6, once=True).row(100, 2)
        for number in range(streams)
    ]
    order = ["a/d0", "b/d0", "a/d1", "b/d1", "b/d2", "b/d3"]
    assert ids_of(shares) == [order[number::streams] for number in range(streams)]
