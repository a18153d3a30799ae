"""The loader: batches, exact resume, hosts, evaluation passes, and readers that fail."""

import contextlib
import dataclasses
import json
import logging
import os
import random
import signal
import threading
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import chex
import numpy as np
import pytest
from ml_collections import ConfigDict

from emu_jax.config import UserError
from emu_jax.data import sources
from emu_jax.data.loader import Loader, merge_states
from emu_jax.data.sequence import Document, Pair
from tests.support.memory import Disk

PAD = 256


@pytest.fixture
def loader(letters, memory, picture, monkeypatch):
    """loader(seed, process, processes, eval, extra, **settings) makes a Loader.

    By default it has 4 streams and 8 rows of 24 tokens, and reads a source of texts and one of
    pairs. extra: {path: source} of additional sources. settings: fields of the data config to
    change.
    """
    made = []
    stored = dict(
        texts=memory(40, corrupt=(7,)),
        pairs=memory([Document(f"p{k}", (Pair(picture(k), "x" * (k % 5)),)) for k in range(11)]),
        few=memory(3),
        broken=memory(300, corrupt=range(0, 300, 10)),
    )
    monkeypatch.setattr(sources, "open_source", lambda path, image_size, fit: stored[path])
    # Without a cache, records are read again in every epoch.
    monkeypatch.setattr(sources, "CACHE_BYTES", 0)

    def make(seed=0, process=0, processes=1, eval=False, extra=None, **settings):
        stored.update(extra or {})
        mixture = (("t", 3.0, "texts"), ("p", 1.0, "pairs"))
        data = ConfigDict(
            dict(
                batch=8,
                tokens=24,
                images=2,
                num_streams=4,
                pack_lookahead=3,
                prefetch=2,
                workers=2,
                readers=0,
                max_bad_share=0.2,
                patience=5.0,
                retries=1,
                unreadable="skip",
                fit="squash",
                packing="first_fit",
                conditions="",
                latents="",
                tokenizer="",
                labels=("text", "</s>"),
                image_first=0.5,
                system="release",
                mixture=mixture,
                eval_mixture=mixture,
            )
            | settings
        )
        made.append(
            Loader(
                data,
                seed,
                letters,
                n_visual=2,
                image_size=4,
                process=process,
                processes=processes,
                eval=eval,
            )
        )
        return made[-1]

    yield make
    for each in made:
        each.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("data")]


def arrays(batch):
    return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}


def same(item, other):
    assert item.ids == other.ids
    chex.assert_trees_all_equal(item.batch, other.batch)


def test_rows_of_a_batch_hold_their_documents_and_padding(loader):
    each = loader()
    assert each.source_names == ("t", "p")
    for item in islice(each, 8):
        batch = item.batch
        assert batch.tokens.shape == (8, 24)
        assert batch.images.shape == (8, 2, 4, 4, 3)
        assert len(item.ids) == 8
        assert ((batch.tokens == PAD) == (batch.segments == 0)).all()
        for row, ids in enumerate(item.ids):
            assert batch.segments[row].max() == len(ids)
            for number, name in enumerate(ids, 1):
                inside = batch.segments[row] == number
                tokens = batch.tokens[row][inside]
                assert (tokens[0], tokens[-1]) == (1, 2)
                assert batch.positions[row][inside].tolist() == list(range(inside.sum()))
                assert (batch.sources[row][inside] == "tp".index(name[0])).all()
            pictures = [int(name.partition("/p")[2]) for name in ids if name.startswith("p")]
            slots = batch.image_slots[row][: len(pictures)]
            assert batch.images[row, : len(pictures), 0, 0, 0].tolist() == pictures
            for offset, special in ((-1, PAD + 1), (0, PAD + 3), (1, PAD + 3), (2, PAD + 2)):
                assert (batch.tokens[row][slots + offset] == special).all()
            assert (batch.image_slots[row][len(pictures) :] == 24).all()
            assert batch.image_weights[row].sum() == len(pictures)


def test_the_order_of_a_pair_differs_between_epochs(loader):
    # {id: for each time that the pair was read, whether its image came first}
    first = {}
    for item in islice(loader(mixture=(("p", 1.0, "pairs"),), num_streams=1), 12):
        for row, ids in enumerate(item.ids):
            for number, name in enumerate(ids, 1):
                second = item.batch.tokens[row][item.batch.segments[row] == number][1]
                first.setdefault(name, []).append(bool(second == PAD + 1))
    # Pairs with an empty text have no order.
    del first["p/p0"], first["p/p5"], first["p/p10"]
    assert len(first) == 8
    assert all(len(set(orders)) == 2 for orders in first.values())


@pytest.mark.parametrize("eval", [False, True])
def test_the_global_batches_do_not_depend_on_the_number_of_hosts(loader, eval):
    one = list(islice(loader(eval=eval), 6))
    for processes in (2, 4):
        hosts = [
            list(islice(loader(process=process, processes=processes, eval=eval), 6))
            for process in range(processes)
        ]
        assert {len(items) for items in hosts} == {len(one)}
        for number, item in enumerate(one):
            parts = [items[number] for items in hosts]
            assert item.ids == [row for part in parts for row in part.ids]
            for name, array in arrays(item.batch).items():
                assert len(arrays(parts[0].batch)[name]) == 8 // processes
                np.testing.assert_array_equal(
                    array, np.concatenate([arrays(part.batch)[name] for part in parts])
                )


@pytest.mark.parametrize("prefetch", [0, 3])
def test_restore_continues_exactly_with_prefetch(loader, prefetch):
    items = list(islice(loader(prefetch=prefetch), 12))
    for k in (0, 1, 7):
        again = loader(prefetch=prefetch)
        again.restore(json.loads(json.dumps(items[k].state)))
        for item, other in zip(items[k + 1 : k + 5], again):
            same(item, other)
            assert (item.state, item.stats) == (other.state, other.stats)


def test_restore_on_other_numbers_of_hosts(loader):
    whole = list(islice(loader(), 10))
    two = [list(islice(loader(process=process, processes=2), 6)) for process in range(2)]
    state = merge_states([json.loads(json.dumps(items[5].state)) for items in two])
    assert state == whole[5].state
    for processes in (1, 4):
        hosts = [loader(process=process, processes=processes) for process in range(processes)]
        for host in hosts:
            host.restore(state)
        for item, *parts in zip(whole[6:], *hosts):
            assert item.ids == [row for part in parts for row in part.ids]
            np.testing.assert_array_equal(
                item.batch.tokens, np.concatenate([part.batch.tokens for part in parts])
            )


def test_restore_refuses_another_data_set(loader, memory):
    state = next(iter(loader())).state
    with pytest.raises(UserError, match="data.num_streams=4, but this run has 8"):
        loader(num_streams=8).restore(state)
    with pytest.raises(UserError, match="numbers of documents: .*'t': 40.*'t': 41"):
        loader(extra=dict(texts=memory(41))).restore(state)
    with pytest.raises(UserError, match="lacks stream 2 of 4"):
        loader(process=1, processes=2).restore(next(iter(loader(process=0, processes=2))).state)


def test_iterating_again_continues_after_the_last_item(loader):
    items = list(islice(loader(), 6))
    each = loader()
    for number, item in enumerate(each):
        same(item, items[number])
        if number == 1:
            break
    for item, other in zip(items[2:4], each):
        same(item, other)
    each.close()
    same(next(iter(each)), items[4])


def test_the_seed_changes_the_order(loader):
    assert next(iter(loader())).ids != next(iter(loader(seed=1))).ids


class Slow:
    """A source that takes up to 2 ms per record, and counts its reads and reading threads."""

    def __init__(self, documents):
        self.documents = documents
        self.read = 0
        self.threads = set()

    def __len__(self):
        return len(self.documents)

    def __getitem__(self, index):
        self.read += 1
        self.threads.add(threading.get_ident())
        time.sleep(random.random() * 0.002)
        return self.documents[index]


def test_batches_do_not_depend_on_the_timing_of_threads(loader, memory):
    one = loader(
        workers=1, prefetch=0, mixture=(("t", 1.0, "texts"),), extra=dict(texts=memory(40))
    )
    expected = list(islice(one, 6))
    slow = Slow(memory(40))
    each = loader(workers=5, prefetch=3, mixture=(("t", 1.0, "slow"),), extra=dict(slow=slow))
    for item, other in zip(expected, each):
        same(item, other)
    assert len(slow.threads) > 1


def test_prefetch_is_bounded(loader, memory):
    """Reading b batches takes at most 8 b + 4 documents.

    Each of the 8 rows holds one document, and each of the 4 streams has one waiting.
    """
    slow = Slow(memory([Document(f"d{k}", ("x" * 22,)) for k in range(100)]))
    each = loader(
        mixture=(("s", 1.0, "slow"),), pack_lookahead=1, prefetch=2, extra=dict(slow=slow)
    )
    iterator = iter(each)
    next(iterator)
    time.sleep(0.1)
    assert slow.read <= 3 * 8 + 4


def test_a_source_with_fewer_documents_than_streams(loader):
    counts = Counter()
    for item in islice(loader(mixture=(("f", 1.0, "few"),), num_streams=8), 12):
        counts.update(name for row in item.ids for name in row)
    assert set(counts) == {"f/d0", "f/d1", "f/d2"}
    assert max(counts.values()) < 1.3 * min(counts.values())


def test_long_documents_and_many_images_are_cut(loader, memory, picture):
    # A document of 52 tokens, and one of 14 tokens with 3 images.
    documents = memory([Document("long", ("x" * 50,)), Document("many", (picture(1),) * 3)])
    each = loader(
        mixture=(("d", 1.0, "cut"),),
        num_streams=1,
        batch=4,
        pack_lookahead=1,
        extra=dict(cut=documents),
    )
    item = next(iter(each))
    for row, ids in enumerate(item.ids):
        assert len(ids) == 1
        assert (item.batch.segments[row] > 0).sum() == {"d/long": 24, "d/many": 9}[ids[0]]
        assert item.batch.image_weights[row].sum() == {"d/long": 0, "d/many": 2}[ids[0]]
        assert 2 not in item.batch.tokens[row]
    assert item.stats["cut_documents"] == 4
    assert item.stats["cut_tokens"] == 2 * 28 + 2 * 5


def test_statistics_continue_through_a_resume(loader):
    items = list(islice(loader(), 9))
    documents = tokens = images = 0
    for number, item in enumerate(items, 1):
        documents += sum(map(len, item.ids))
        tokens += (item.batch.segments > 0).sum()
        images += item.batch.image_weights.sum()
        assert [item.stats[name] for name in ("rows", "documents", "tokens", "images")] == [
            8 * number,
            documents,
            tokens,
            images,
        ]
        assert item.stats["padding"] == pytest.approx(1 - tokens / (8 * 24 * number))
        assert item.stats["bad"]["p"] == 0
        # Three documents wait in each stream.
        waiting = 4 * 3
        read = sum(item.stats["read"].values())
        assert read == documents + waiting + item.stats["bad"]["t"]
    assert item.stats["bad"]["t"] > 0
    again = loader()
    again.restore(items[3].state)
    assert next(iter(again)).stats == items[4].stats


def test_corrupt_records_above_the_share_stop_the_run(loader, caplog):
    # One in ten of "broken" is corrupt.
    mixture = (("t", 1.0, "texts"), ("b", 1.0, "broken"))
    with caplog.at_level(logging.WARNING):
        assert len(list(islice(loader(mixture=mixture, max_bad_share=0.15), 20))) == 20
        assert "source b: skipping a corrupt record: d10: not a PNG" in caplog.text
        each = loader(mixture=mixture, max_bad_share=0.05)
        with pytest.raises(
            UserError,
            match=r"source 'b': \d+ of 1\d\d records are corrupt .* data.max_bad_share=0.05",
        ) as error:
            list(islice(each, 20))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("eval", [False, True])
def test_a_small_source_is_judged_when_its_epoch_ends(loader, memory, eval):
    mixture = (("s", 1.0, "small"),)
    each = loader(
        mixture=mixture,
        eval_mixture=mixture,
        eval=eval,
        extra=dict(small=memory(20, corrupt=range(5))),
        max_bad_share=0.2,
    )
    with pytest.raises(UserError, match=r"source 's': \d+ of \d\d records are corrupt"):
        list(islice(each, 50))


def test_errors_of_threads_reach_the_consumer_and_end_them(loader, memory):
    documents = memory(5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(documents), "__getitem__", lambda self, index: 1 // 0)
        each = loader(mixture=(("w", 1.0, "wrong"),), extra=dict(wrong=documents))
        with pytest.raises(ZeroDivisionError):
            next(iter(each))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("data")]


def test_close_does_not_wait_for_what_was_only_planned(loader, memory):
    slow = Slow(memory(40))
    each = loader(prefetch=100, workers=1, mixture=(("s", 1.0, "slow"),), extra=dict(slow=slow))
    next(iter(each))
    each.close()
    # More than 1,600 reads were planned.
    assert slow.read < 200


def test_close_ends_the_threads_and_the_iteration(loader):
    each = loader()
    iterator = iter(each)
    next(iterator)
    assert [thread for thread in threading.enumerate() if thread.name.startswith("data")]
    each.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("data")]
    assert list(iterator) == []
    each.close()


def test_an_evaluation_is_one_pass_in_fixed_order(loader):
    each = loader(eval=True)
    first = list(each)
    second = list(each)
    assert len(first) == len(second)
    for item, other in zip(first, second):
        same(item, other)
        assert item.state == {}
    ids = [name for item in first for row in item.ids for name in row]
    assert sorted(ids) == sorted(
        [f"t/d{k}" for k in range(40) if k != 7] + [f"p/p{k}" for k in range(11)]
    )
    assert all(any(item.ids) for item in first)
    last = first[-1]
    empty = [row for row, names in enumerate(last.ids) if not names]
    assert empty, "the test shows nothing: change a size above"
    for row in empty:
        assert (last.batch.tokens[row] == PAD).all() and (last.batch.image_slots[row] == 24).all()
        assert not any(
            array[row].any()
            for array in (last.batch.segments, last.batch.text_weights, last.batch.image_weights)
        )


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(batch=9), "data.batch=9 must be a multiple of data.num_streams=4"),
        (dict(processes=3), "data.num_streams=4 must be a multiple of the number of hosts, 3"),
        (dict(batch=0), "data.batch is 0; it must be at least 1"),
        (dict(num_streams=0), "data.num_streams is 0"),
        (dict(workers=0), "data.workers is 0"),
        (dict(readers=-1), "data.readers is -1"),
        (dict(prefetch=-1), "data.prefetch is -1"),
        (dict(pack_lookahead=0), "data.pack_lookahead is 0"),
        (dict(images=0), "data.images is 0"),
        (
            dict(tokens=4),
            "data.tokens is 4; it must be at least 5, to hold <s> and an image of 2 visual tokens",
        ),
        (dict(image_first=1.5), "data.image_first is 1.5; it must be between 0 and 1"),
        (dict(max_bad_share=-0.1), "data.max_bad_share is -0.1"),
        (dict(mixture=()), r"data.mixture is empty; add a \(name, weight, path\) row"),
        (dict(eval_mixture=(), eval=True), "data.eval_mixture is empty"),
        (dict(mixture=("texts",)), "'texts' is not a row .name, weight, path."),
        (
            dict(mixture=(("t", 0.0, "texts"),)),
            "the weight of 't' is 0.0; it must be a positive number",
        ),
        (dict(mixture=(("t", float("nan"), "texts"),)), "the weight of 't' is nan"),
        (dict(latents="x"), "data.images=2: .* only for the first image of each document"),
        (
            dict(latents="x", images=1, mixture=(("t", 1.0, "texts", {"start": "random"}),)),
            "the rule of 't' may drop that image",
        ),
        (
            dict(mixture=(("t", 1.0, "texts"), ("t", 1.0, "pairs"))),
            "the names of sources must differ; they are t, t",
        ),
    ],
)
def test_settings_that_do_not_fit(loader, settings, message):
    with pytest.raises(UserError, match=message):
        loader(**settings)


def test_the_rules_of_a_source_apply_to_it_alone(loader, memory, picture):
    parts = []
    for k in range(4):
        parts += ["xy", Pair(picture(k), "z")]
    documents = memory([Document("d", tuple(parts))])
    each = loader(
        mixture=(
            ("whole", 1.0, "same"),
            ("pairs", 1.0, "same", dict(pairs=1, image_first=1.0)),
            ("short", 1.0, "same", dict(tokens=7)),
        ),
        num_streams=1,
        batch=8,
        pack_lookahead=1,
        tokens=24,
        extra=dict(same=documents),
    )
    lengths = {}
    for item in islice(each, 8):
        for row, ids in enumerate(item.ids):
            for number, id in enumerate(ids, 1):
                lengths.setdefault(id.split("/")[0], set()).add(
                    int((item.batch.segments[row] == number).sum())
                )
    # A row is <s>, [IMG], 2 visual tokens, [/IMG], a letter and </s>.
    assert lengths["pairs"] == {7}
    assert max(lengths["short"]) == 7
    assert min(lengths["whole"]) > 7
    assert set(item.stats["epochs"]) == {"whole", "pairs", "short"}
    assert item.stats["epochs"]["pairs"] == item.stats["read"]["pairs"]


@pytest.mark.parametrize(
    "row, message",
    [
        (("t", 1.0), "is not a row (name, weight, path) or"),
        (
            ("t", 1.0, "texts", {"token": 3}),
            "it must be a dict of tokens, images, start, pairs, image_first",
        ),
        (("t", 1.0, "texts", {"start": "last"}), "choose from first, random"),
        (("t", 1.0, "texts", {"tokens": 2}), "tokens is 2; it must be 0 or at least 5"),
        (("t", 1.0, "texts", {"pairs": 1.5}), "pairs is 1.5; it must be of type int"),
    ],
)
def test_a_wrong_row_is_one_line(loader, row, message):
    with pytest.raises(UserError) as caught:
        loader(mixture=(row,))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_best_fit_is_deterministic_and_resumes(loader):
    items = list(islice(loader(packing="best_fit"), 8))
    again = loader(packing="best_fit")
    again.restore(items[3].state)
    for item, other in zip(items[4:], again):
        same(item, other)


def test_a_hung_file_system_is_survived(loader, memory):
    """Reads that hang are skipped as corrupt, and every other document is still read."""

    class Hung(type(memory(1))):
        def __getitem__(self, index):
            if index in (3, 9, 20):
                released.wait()
            return super().__getitem__(index)

    released = threading.Event()
    each = loader(
        mixture=(("h", 1.0, "hung"),),
        patience=0.05,
        retries=0,
        max_bad_share=0.5,
        extra=dict(hung=Hung(memory(40).documents)),
    )
    seen = {id for item in islice(each, 8) for row in item.ids for id in row}
    released.set()
    assert seen == {f"h/d{k}" for k in range(40)} - {"h/d3", "h/d9", "h/d20"}
    released.clear()
    stopping = loader(
        mixture=(("h", 1.0, "hung"),),
        patience=0.05,
        retries=0,
        unreadable="stop",
        max_bad_share=0.5,
    )
    with pytest.raises(UserError, match="cannot be read: no answer within 0.05 seconds"):
        list(islice(stopping, 8))
    released.set()


def test_batches_do_not_depend_on_who_reads(loader):
    """Compare threads, two processes of which one is killed, and one process that resumes."""
    expected = list(islice(loader(), 6))
    dying = loader(readers=2, retries=5)
    for number, (item, other) in enumerate(zip(expected, dying)):
        same(item, other)
        if number == 0:
            assert (item.state, item.stats) == (other.state, other.stats)
        if number == 1:
            os.kill(reader_processes()[0], signal.SIGKILL)
    dying.close()
    single = loader(readers=1)
    single.restore(json.loads(json.dumps(expected[2].state)))
    for item, other in zip(expected[3:], single):
        same(item, other)
        assert (item.state, item.stats) == (other.state, other.stats)
    single.close()
    assert not reader_processes()


def reader_processes():
    """Process ids of the readers that this process has started."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        # Threads and processes may end during this loop.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for pid in map(int, (task / "children").read_text().split()):
                if b"emu_jax.data" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
    return found


@pytest.mark.long
def test_hung_and_deadly_records_are_survived_in_processes(loader, tmp_path):
    """Records that hang or kill their reader are skipped as corrupt; every other one is read."""
    disk = Disk(tmp_path, {3: "hang", 9: "hang", 20: "die"}, size=30)
    each = loader(
        mixture=(("h", 1.0, "disk"),),
        readers=2,
        patience=1.5,
        retries=1,
        max_bad_share=0.5,
        extra=dict(disk=disk),
    )
    seen = {id for item in islice(each, 6) for row in item.ids for id in row}
    assert seen == {f"h/d{k}" for k in range(30)} - {"h/d3", "h/d9", "h/d20"}
    stopping = loader(
        mixture=(("h", 1.0, "disk"),),
        readers=2,
        patience=0.5,
        retries=0,
        unreadable="stop",
        max_bad_share=0.5,
    )
    with pytest.raises(
        UserError, match="cannot be read: (no answer within 0.5 seconds|its process died)"
    ):
        list(islice(stopping, 6))
