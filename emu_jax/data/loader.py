"""The loader: streams are filled by threads, for which processes may read, into batches ahead of
the step, and a batch travels with its state.

Rows b of the global batch belong to stream b // (B / S), and a host owns neighbouring streams: so
the n-th global batch is the same for any number of hosts. The state of a batch is the one *after*
it: save that of the last batch you consumed, and what was made ahead is simply made again. Read
next: ../loop.py.
"""

import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from ml_collections import ConfigDict

from emu_jax.config import UserError
from emu_jax.data import sources
from emu_jax.data.chat_format import SYSTEM_CHOICES
from emu_jax.data.images import FITS
from emu_jax.data.mixture import COUNTS, Mixture, Stream
from emu_jax.data.packing import best_fit, empty_batch, first_fit, write_row
from emu_jax.data.precomputed import KINDS, Precomputed, attach
from emu_jax.data.reader_pool import ReaderPool, RetryingSource
from emu_jax.data.sequence import LABELS, SourceRule, make_sequence
from emu_jax.data.sources import CACHE_BYTES, CachedSource, Source
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.types import Batch

log = logging.getLogger(__name__)

# records of a source (or all, if it has fewer) that are read before its share of corrupt ones is
# judged
JUDGED = 100


@dataclass(frozen=True)
class LoadedBatch:
    """A host's rows of a global batch, as NumPy arrays, and what travels with them."""

    batch: Batch
    # "source/document" of each row
    ids: list[list[str]]
    # JSON-able: of this host's streams after this batch; {} in an evaluation
    state: dict
    # of this host's streams since the run began, resumed runs included: `statistics`
    stats: dict


class Loader:
    """Batches of `data.mixture` for ever; or, with `eval`, of `data.eval_mixture` once, in a fixed
    order, each time it is iterated.

    `data` is the config's group of that name. This is process `process` of `processes`; the batch's
    rows are B / processes. Iterating continues after the last item that was handed out (or from
    `restore`). One iteration at a time. The rows after an evaluation's last document are empty:
    segments and weights 0. In an evaluation every process reads all streams, for none may end
    before the others.

    With data.conditions or data.latents batches are DecoderBatches. chats: has the model tokens for
    conversations? Raises UserError for settings that do not fit one another and for more corrupt
    records than `data.max_bad_share`.
    """

    def __init__(
        self,
        data: ConfigDict,
        seed: int,
        tokenizer: Tokenizer,
        n_visual: int,
        image_size: int,
        process: int = 0,
        processes: int = 1,
        eval: bool = False,
        chats: bool = True,
    ):
        rows = data.eval_mixture if eval else data.mixture
        _check(data, rows, "eval_mixture" if eval else "mixture", n_visual, processes)
        self.data = data
        self.eval = eval
        self.image_size = image_size
        self.pad = tokenizer.pad
        self.source_names = tuple(row[0] for row in rows)
        opened = [sources.open_source(row[2], image_size, data.fit) for row in rows]
        self.readers = ReaderPool(
            opened, data.readers or data.workers, data.patience, data.readers > 0
        )
        self.mixture = Mixture(
            self.source_names,
            tuple(float(row[1]) for row in rows),
            tuple(map(self._retrying, range(len(rows)))),
            data.num_streams,
            seed,
            tuple(SourceRule(**(row[3] if len(row) > 3 else {})) for row in rows),
        )
        self.owned = range(
            process * data.num_streams // processes, (process + 1) * data.num_streams // processes
        )
        self.to_sequence = partial(
            make_sequence,
            tokenizer=tokenizer,
            n_visual=n_visual,
            max_tokens=data.tokens,
            max_images=data.images,
            image_first=data.image_first,
            labels=data.labels,
            chats=chats,
            system=data.system,
        )
        self.fit = {
            "first_fit": first_fit,
            "best_fit": partial(best_fit, row_tokens=data.tokens, row_images=data.images),
        }[data.packing]
        self.precomputed = {
            kind: Precomputed(
                data[kind], kind, "eval_mixture" if eval else "mixture", self._documents
            )
            for kind in KINDS
            if data[kind]
        }
        self.state: dict = {}
        self.warned_of_cuts = False
        self.pool: ThreadPoolExecutor | None = None
        for name, source in zip(self.source_names, self.mixture.sources):
            log.info("source %s: %d documents", name, len(source))
        ahead = (2 + data.prefetch) * len(self.owned) * self._rows * data.images * 3 * image_size**2
        log.info(
            "memory: %d MiB of batches made ahead, at most %d MiB of documents in the caches of the sources, %d documents that wait, "
            "%d processes that hold one each",
            ahead >> 20,
            len(rows) * CACHE_BYTES >> 20,
            len(self.owned) * data.pack_lookahead,
            data.readers,
        )

    def __iter__(self) -> Iterator[LoadedBatch]:
        self.close()
        pool = self.pool = ThreadPoolExecutor(max(self.data.workers, self.data.readers), "data")
        states = self.state.get("streams", {})
        streams = [
            Stream(
                self.mixture,
                number,
                self.to_sequence,
                self.data.pack_lookahead,
                states.get(str(number)),
                self.eval,
                self.fit,
            )
            for number in (range(self.data.num_streams) if self.eval else self.owned)
        ]
        tasks: list[Future | None] = [None] * len(streams)
        ahead: deque[tuple[Batch, list[Future]]] = deque()
        try:
            while True:
                while len(ahead) <= self.data.prefetch:
                    batch = empty_batch(
                        len(self.owned) * self._rows,
                        self.data.tokens,
                        self.data.images,
                        self.image_size,
                        self.pad,
                    )
                    # A stream's task starts after its task of the batch before: the only order that
                    # threads have to keep.
                    tasks = [
                        pool.submit(self._fill, stream, batch, task)
                        for stream, task in zip(streams, tasks)
                    ]
                    ahead.append((batch, tasks))
                batch, done = ahead.popleft()
                item = self._loaded_batch(batch, streams, [task.result() for task in done])
                if item is None:
                    return
                if not self.eval:
                    self.state = item.state
                yield item
                # closed meanwhile
                if self.pool is not pool:
                    return
        finally:
            if self.pool is pool:
                self.close()

    def restore(self, state: dict) -> None:
        """Continues after the batch whose state this is; one of several processes needs only its
        own streams in it (`merge_states`).
        """
        self.close()
        for what, saved, here in (
            ("data.num_streams", state["num_streams"], self.data.num_streams),
            ("sources with their numbers of documents", state["documents"], self._documents),
        ):
            if saved != here:
                raise UserError(
                    f"the saved state of the data is of other {what}: {saved}, and this run has {here}"
                )
        missing = [number for number in self.owned if str(number) not in state["streams"]]
        if missing:
            raise UserError(
                f"the saved state of the data lacks stream {missing[0]} of {self.data.num_streams}; "
                "the states of all processes that saved it are needed"
            )
        self.state = state

    def close(self) -> None:
        """Ends an iteration that is under way and waits for its threads and processes; the loader
        can be iterated again.
        """
        pool = self.pool
        self.pool = None
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)
            self.readers.close()

    def _retrying(self, number: int) -> Source:
        return CachedSource(
            RetryingSource(
                self.readers,
                number,
                self.source_names[number],
                self.data.retries,
                self.data.unreadable,
            )
        )

    @property
    # of a stream in a batch
    def _rows(self) -> int:
        return self.data.batch // self.data.num_streams

    @property
    def _documents(self) -> dict[str, int]:
        return {name: len(source) for name, source in zip(self.source_names, self.mixture.sources)}

    def _fill(
        self, stream: Stream, batch: Batch, previous: Future | None
    ) -> tuple[list[list[str]], dict]:
        """A thread's task: the stream's rows of the batch, written in place -> (ids by row, the
        stream's state).
        """
        if previous is not None:
            previous.result()
        rows = [stream.row(self.data.tokens, self.data.images) for _ in range(self._rows)]
        if stream.number in self.owned:
            first = (stream.number - self.owned.start) * self._rows
            for number, row in enumerate(rows, first):
                write_row(
                    batch,
                    number,
                    [packed.sequence for packed in row],
                    [packed.source for packed in row],
                )
        return [[packed.id for packed in row] for row in rows], stream.state()

    def _loaded_batch(
        self, batch: Batch, streams: list[Stream], results: list[tuple[list[list[str]], dict]]
    ) -> LoadedBatch | None:
        states = {str(stream.number): state for stream, (_, state) in zip(streams, results)}
        stats = statistics(states, self.data.tokens, self._documents, self.data.num_streams)
        for name, documents in self._documents.items():
            read = stats["read"][name]
            bad = stats["bad"][name]
            if read >= min(JUDGED, documents) and bad > self.data.max_bad_share * read:
                raise UserError(
                    f"source {name!r}: {bad} of {read} records are corrupt (each is named in the log), more than "
                    f"data.max_bad_share={self.data.max_bad_share} allows; mend the data or raise the share"
                )
        if stats["cut_turns"] and not self.warned_of_cuts:
            self.warned_of_cuts = True
            log.warning(
                "conversations are longer than data.tokens=%d and data.images=%d allow: their last turns are left out, %d so far; "
                "metrics.jsonl goes on counting (cut_turns, cut_documents)",
                self.data.tokens,
                self.data.images,
                stats["cut_turns"],
            )
        if not any(row for rows, _ in results for row in rows):
            return None
        ids = [
            row
            for stream, (rows, _) in zip(streams, results)
            if stream.number in self.owned
            for row in rows
        ]
        state = (
            {}
            if self.eval
            else {
                "num_streams": self.data.num_streams,
                "documents": self._documents,
                "streams": states,
            }
        )
        return LoadedBatch(
            attach(batch, ids, self.precomputed) if self.precomputed else batch, ids, state, stats
        )


def merge_states(states: list[dict]) -> dict:
    """One state of those that the processes have after one and the same batch, for `restore` on any
    number of processes.
    """
    if len(states) == 1:
        return states[0]
    return {
        **states[0],
        "streams": {
            number: stream for state in states for number, stream in state["streams"].items()
        },
    }


def statistics(
    streams: dict[str, dict], tokens: int, documents: dict[str, int], num_streams: int
) -> dict[str, Any]:
    """Sums over streams' states, rows being `tokens` long: packed rows, documents, tokens, images,
    cut_documents, cut_tokens and cut_turns; records `read` and `bad` by source (those that wait
    included); `epochs` by source: how often its `documents` were read, by all of the `num_streams`
    streams if these are not all (below 1 it is the share of the source that was seen, for an epoch
    repeats nothing); `padding`, the share of positions that hold nothing.
    """
    stats: dict[str, Any] = {
        name: sum(stream["counts"][name] for stream in streams.values()) for name in COUNTS
    }
    names = next(iter(streams.values()))["sources"]
    for what in ("read", "bad"):
        stats[what] = {
            name: sum(stream["sources"][name][what] for stream in streams.values())
            for name in names
        }
    stats["epochs"] = {
        name: read * num_streams / (len(streams) * documents[name])
        for name, read in stats["read"].items()
    }
    stats["padding"] = 1 - stats["tokens"] / (stats["rows"] * tokens)
    return stats


def _check(data: ConfigDict, mixture: tuple, field: str, n_visual: int, processes: int) -> None:
    for name, least in (
        ("batch", 1),
        ("num_streams", 1),
        ("images", 1),
        ("pack_lookahead", 1),
        ("workers", 1),
        ("readers", 0),
        ("prefetch", 0),
        ("patience", 0),
        ("retries", 0),
        # <s> and one image
        ("tokens", n_visual + 3),
    ):
        if data[name] < least:
            raise UserError(
                f"data.{name} is {data[name]}; it must be at least {least}"
                + (
                    f", to hold <s> and an image of {n_visual} visual tokens"
                    if name == "tokens"
                    else ""
                )
            )
    for name in ("image_first", "max_bad_share"):
        if not 0 <= data[name] <= 1:
            raise UserError(f"data.{name} is {data[name]}; it must lie between 0 and 1")
    if strange := set(data.labels) - set(LABELS):
        raise UserError(f"data.labels holds {min(strange)!r}; there are {', '.join(LABELS)}")
    if data.batch % data.num_streams:
        raise UserError(
            f"data.batch={data.batch} must be a multiple of data.num_streams={data.num_streams}"
        )
    if data.num_streams % processes:
        raise UserError(
            f"data.num_streams={data.num_streams} must be a multiple of the number of hosts, {processes}"
        )
    if not mixture:
        raise UserError(
            f"data.{field} is empty; give it a (name, weight, path) row for every source"
        )
    for name, known in (
        ("fit", FITS),
        ("packing", ("first_fit", "best_fit")),
        ("unreadable", ("skip", "stop")),
        ("system", SYSTEM_CHOICES),
    ):
        if data[name] not in known:
            raise UserError(f"data.{name} is {data[name]!r}; there are {', '.join(known)}")
    for row in mixture:
        if not isinstance(row, (tuple, list)) or len(row) not in (3, 4):
            raise UserError(
                f"data.{field}: {row!r} is not a (name, weight, path) row, nor a (name, weight, path, rule) row"
            )
        _check_rule(
            row[3] if len(row) > 3 else {}, f"data.{field}: the rule of {row[0]!r}", n_visual
        )
        if not isinstance(row[1], (int, float)) or not 0 < row[1] < float("inf"):
            raise UserError(
                f"data.{field}: the weight of {row[0]!r} is {row[1]!r}; it must be a positive number"
            )
    names = [row[0] for row in mixture]
    if len(set(names)) < len(names):
        raise UserError(
            f"data.{field}: the names of the sources must differ; they are {', '.join(map(str, names))}"
        )
    if data.conditions or data.latents:
        _check_first_images(data, mixture, field)


def _check_first_images(data: ConfigDict, mixture: tuple, field: str) -> None:
    """Raises UserError where a row may hold another image than a document's first."""
    only = "data.conditions and data.latents are made for the first image of a document only"
    if data.images != 1:
        raise UserError(f"data.images={data.images}: {only}; set data.images=1")
    for name, _, _, *rule in mixture:
        if rule and (rule[0].get("start") == "random" or rule[0].get("pairs")):
            raise UserError(
                f"data.{field}: the rule of {name!r} may leave that out: {only}; set neither start nor pairs"
            )


def _check_rule(rule: Any, what: str, n_visual: int) -> None:
    known = {field.name: field for field in fields(SourceRule)}
    if not isinstance(rule, dict) or set(rule) - set(known):
        raise UserError(f"{what} is {rule!r}; it is a dict of {', '.join(known)}")
    for name, value in rule.items():
        default = known[name].default
        if type(value) is not type(default) and not (
            isinstance(default, float) and type(value) is int
        ):
            raise UserError(f"{what}: {name} is {value!r}; it must be like {default!r}")
    rule = SourceRule(**rule)
    if rule.start not in ("first", "random"):
        raise UserError(f"{what}: start is {rule.start!r}; there are first and random")
    if (
        0 < rule.tokens < n_visual + 3
        or min(rule.tokens, rule.images, rule.pairs) < 0
        or rule.image_first > 1
    ):
        raise UserError(
            f"{what}: tokens is 0 or at least {n_visual + 3}, images and pairs are not negative, image_first is at most 1"
        )
