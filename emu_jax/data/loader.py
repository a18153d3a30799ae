"""The loader: threads prefetch packed batches, each with the state of the data after it.

Row b of the global batch belongs to stream b // (B / S), and each host owns consecutive streams, so
the n-th global batch is the same for any number of hosts. A checkpoint saves the state of the last
batch that was consumed; a resumed run makes the prefetched ones again. Read next: ../loop.py.
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
from emu_jax.data.mixture import COUNTS, Mixture, Stream, check_rows
from emu_jax.data.packing import best_fit, empty_batch, first_fit, write_row
from emu_jax.data.precomputed import KINDS, Precomputed, attach
from emu_jax.data.reader_pool import ReaderPool, RetryingSource
from emu_jax.data.sequence import LABELS, SequenceBuilder, SourceRule
from emu_jax.data.sources import CACHE_BYTES, CachedSource, Source
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.types import Batch

log = logging.getLogger(__name__)

# Records to read from a source before the share of corrupt ones is checked; fewer if the source is
# smaller.
MIN_RECORDS_JUDGED = 100
PACKINGS = ("first_fit", "best_fit")
# Choices of data.unreadable, for records that cannot be read.
UNREADABLE_CHOICES = ("skip", "stop")
# Choices of SourceRule.start.
STARTS = ("first", "random")


@dataclass(frozen=True)
class LoadedBatch:
    """One host's rows of a global batch, as NumPy arrays, with the state after the batch."""

    batch: Batch
    # For each row, its documents as "source/document".
    ids: list[list[str]]
    # JSON-serializable state of this host's streams after this batch; {} in an evaluation.
    state: dict
    # `statistics` of this host's streams since the run first started, across resumes.
    stats: dict


class Loader:
    """Endless batches of `data.mixture`, or with `eval` one pass over `data.eval_mixture`.

    `data` is the config group of that name. Process `process` of `processes` gets B / processes
    rows of each batch. Iterating continues after the last batch that was yielded, or from
    `restore`; only one iteration may run at a time. An evaluation always has the same order and
    ends with empty rows (segments and weights 0). In it every process reads all streams, so that
    all processes stop at the same batch.

    With data.conditions or data.latents the batches are DecoderBatches. chats: whether the model
    has tokens for conversations. Raises UserError for inconsistent settings, and while iterating if
    a source has a larger share of corrupt records than `data.max_bad_share`.
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
        field = "eval_mixture" if eval else "mixture"
        rows = data[field]
        check_config(data, field, n_visual, processes)
        self.data = data
        self.eval = eval
        self.image_size = image_size
        self.pad = tokenizer.pad
        self.source_names = tuple(name for name, *_ in rows)
        self.readers = ReaderPool(
            [sources.open_source(path, image_size, data.fit) for _, _, path, *_ in rows],
            count=data.readers or data.workers,
            seconds=data.patience,
            processes=data.readers > 0,
        )
        self.mixture = Mixture(
            names=self.source_names,
            weights=tuple(float(weight) for _, weight, *_ in rows),
            sources=tuple(self._source(number) for number in range(len(rows))),
            streams=data.num_streams,
            seed=seed,
            rules=tuple(SourceRule(**(rule[0] if rule else {})) for _, _, _, *rule in rows),
        )
        first = process * data.num_streams // processes
        last = (process + 1) * data.num_streams // processes
        self.owned = range(first, last)
        self.to_sequence = SequenceBuilder(
            tokenizer=tokenizer,
            n_visual=n_visual,
            max_tokens=data.tokens,
            max_images=data.images,
            image_first=data.image_first,
            labels=data.labels,
            chats=chats,
            system=data.system,
        )
        if data.packing == "best_fit":
            self.fit = partial(best_fit, row_tokens=data.tokens, row_images=data.images)
        else:
            self.fit = first_fit
        self.precomputed = {
            kind: Precomputed(data[kind], kind, field, self._documents)
            for kind in KINDS
            if data[kind]
        }
        self.state: dict = {}
        self.warned_of_cuts = False
        self.pool: ThreadPoolExecutor | None = None
        self._log_sizes()

    def _log_sizes(self) -> None:
        for name, documents in self._documents.items():
            log.info("source %s: %d documents", name, documents)
        if self.eval:
            return
        images = (2 + self.data.prefetch) * len(self.owned) * self._rows * self.data.images
        log.info(
            "memory: %d MiB of prefetched batches, at most %d MiB of cached documents, "
            "%d documents waiting to be packed, %d reader processes with one document each",
            3 * images * self.image_size**2 >> 20,
            len(self.source_names) * CACHE_BYTES >> 20,
            len(self.owned) * self.data.pack_lookahead,
            self.data.readers,
        )

    def __iter__(self) -> Iterator[LoadedBatch]:
        self.close()
        pool = ThreadPoolExecutor(max(self.data.workers, self.data.readers), "data")
        self.pool = pool
        streams = self._streams()
        # The last task submitted for each stream.
        tasks: list[Future | None] = [None] * len(streams)
        ahead: deque[tuple[Batch, list[Future]]] = deque()
        try:
            while True:
                while len(ahead) <= self.data.prefetch:
                    batch = self._empty_batch()
                    # Tasks of different streams run in any order; each waits for the previous task
                    # of its own stream.
                    submitted = [
                        pool.submit(self._fill, stream, batch, previous)
                        for stream, previous in zip(streams, tasks)
                    ]
                    ahead.append((batch, submitted))
                    tasks = [*submitted]
                batch, submitted = ahead.popleft()
                loaded = self._loaded_batch(batch, streams, [task.result() for task in submitted])
                if loaded is None:
                    return
                if not self.eval:
                    self.state = loaded.state
                yield loaded
                # The consumer may have closed the loader or started another iteration.
                if self.pool is not pool:
                    return
        finally:
            if self.pool is pool:
                self.close()

    def _streams(self) -> list[Stream]:
        states = self.state.get("streams", {})
        numbers = range(self.data.num_streams) if self.eval else self.owned
        return [
            Stream(
                self.mixture,
                number,
                self.to_sequence,
                self.data.pack_lookahead,
                states.get(str(number)),
                self.eval,
                self.fit,
            )
            for number in numbers
        ]

    def _empty_batch(self) -> Batch:
        rows = len(self.owned) * self._rows
        return empty_batch(rows, self.data.tokens, self.data.images, self.image_size, self.pad)

    def restore(self, state: dict) -> None:
        """Continue after the batch that had this `state`.

        It must contain this process's streams. Raises UserError if the sources or the number of
        streams have changed.
        """
        self.close()
        if state["num_streams"] != self.data.num_streams:
            raise UserError(
                f"the saved data state has data.num_streams={state['num_streams']}, "
                f"but this run has {self.data.num_streams}"
            )
        if state["documents"] != self._documents:
            raise UserError(
                f"the sources of the saved data state have these numbers of documents: "
                f"{state['documents']}, but this run has {self._documents}"
            )
        missing = [number for number in self.owned if str(number) not in state["streams"]]
        if missing:
            raise UserError(
                f"the saved data state lacks stream {missing[0]} of {self.data.num_streams}; "
                "merge the states of all processes that saved it"
            )
        self.state = state

    def close(self) -> None:
        """Stop the current iteration and wait for its threads and processes.

        The loader can be iterated again.
        """
        pool = self.pool
        self.pool = None
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)
            self.readers.close()

    def _source(self, number: int) -> Source:
        name = self.source_names[number]
        retrying = RetryingSource(
            self.readers, number, name, self.data.retries, self.data.unreadable
        )
        return CachedSource(retrying)

    @property
    def _rows(self) -> int:
        """Number of rows of a batch that come from one stream."""
        return self.data.batch // self.data.num_streams

    @property
    def _documents(self) -> dict[str, int]:
        return {name: len(source) for name, source in zip(self.source_names, self.mixture.sources)}

    def _fill(
        self, stream: Stream, batch: Batch, previous: Future | None
    ) -> tuple[list[list[str]], dict]:
        """Write a stream's rows into the batch, in a worker thread.

        Returns the ids of each row, and the stream's state after them.
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
        ids = []
        for row in rows:
            ids.append([packed.id for packed in row])
        return ids, stream.state()

    def _loaded_batch(
        self, batch: Batch, streams: list[Stream], results: list[tuple[list[list[str]], dict]]
    ) -> LoadedBatch | None:
        states = {str(stream.number): state for stream, (_, state) in zip(streams, results)}
        stats = statistics(states, self.data.tokens, self._documents, self.data.num_streams)
        self._check_corrupt(stats)
        self._warn_of_cuts(stats["cut_turns"])
        if not any(row for rows, _ in results for row in rows):
            return None
        ids = [
            row
            for stream, (rows, _) in zip(streams, results)
            if stream.number in self.owned
            for row in rows
        ]
        state = {
            "num_streams": self.data.num_streams,
            "documents": self._documents,
            "streams": states,
        }
        if self.precomputed:
            batch = attach(batch, ids, self.precomputed)
        return LoadedBatch(batch, ids, {} if self.eval else state, stats)

    def _check_corrupt(self, stats: dict) -> None:
        for name, documents in self._documents.items():
            read = stats["read"][name]
            bad = stats["bad"][name]
            if read < min(MIN_RECORDS_JUDGED, documents):
                continue
            if bad > self.data.max_bad_share * read:
                raise UserError(
                    f"source {name!r}: {bad} of {read} records are corrupt (the log names each), "
                    f"more than data.max_bad_share={self.data.max_bad_share} allows; "
                    "repair the data or raise the share"
                )

    def _warn_of_cuts(self, cut_turns: int) -> None:
        if cut_turns and not self.warned_of_cuts:
            self.warned_of_cuts = True
            log.warning(
                "some conversations are longer than data.tokens=%d and data.images=%d allow; "
                "their last turns are left out, %d so far (metrics cut_turns, cut_documents)",
                self.data.tokens,
                self.data.images,
                cut_turns,
            )


def merge_states(states: list[dict]) -> dict:
    """Merge the states of all processes after one batch into one for `Loader.restore`."""
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
    """Sum the counts of all streams; the keys are COUNTS and those below.

    "read" and "bad" count records by source, including documents that wait to be packed. "epochs"
    is how often each source has been read, extrapolated from the given streams to all
    `num_streams`; a value below 1 is the share of the source seen so far. "padding" is the share of
    empty positions in rows of `tokens` tokens. documents: number of documents of each source.
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


def check_config(data: ConfigDict, field: str, n_visual: int, processes: int) -> None:
    """Raise UserError for settings that are invalid or contradict each other.

    field: "mixture" or "eval_mixture", whichever is read.
    """
    minimum = {
        "batch": 1,
        "num_streams": 1,
        "images": 1,
        "pack_lookahead": 1,
        "workers": 1,
        "readers": 0,
        "prefetch": 0,
        "patience": 0,
        "retries": 0,
    }
    choices = {
        "fit": FITS,
        "packing": PACKINGS,
        "unreadable": UNREADABLE_CHOICES,
        "system": SYSTEM_CHOICES,
    }
    for name, least in minimum.items():
        if data[name] < least:
            raise UserError(f"data.{name} is {data[name]}; it must be at least {least}")
    if data.tokens < _min_tokens(n_visual):
        raise UserError(
            f"data.tokens is {data.tokens}; it must be at least {_min_tokens(n_visual)}, "
            f"to hold <s> and an image of {n_visual} visual tokens"
        )
    for name in ("image_first", "max_bad_share"):
        if not 0 <= data[name] <= 1:
            raise UserError(f"data.{name} is {data[name]}; it must be between 0 and 1")
    for name, known in choices.items():
        if data[name] not in known:
            raise UserError(f"data.{name} is {data[name]!r}; choose from {', '.join(known)}")
    if unknown := set(data.labels) - set(LABELS):
        raise UserError(f"data.labels holds {min(unknown)!r}; choose from {', '.join(LABELS)}")
    if data.batch % data.num_streams:
        raise UserError(
            f"data.batch={data.batch} must be a multiple of data.num_streams={data.num_streams}"
        )
    if data.num_streams % processes:
        raise UserError(
            f"data.num_streams={data.num_streams} must be a multiple of the number of hosts, "
            f"{processes}"
        )
    _check_mixture(data[field], field, n_visual)
    if data.conditions or data.latents:
        _check_first_images(data, field)


def _check_mixture(mixture: tuple, field: str, n_visual: int) -> None:
    if not mixture:
        raise UserError(f"data.{field} is empty; add a (name, weight, path) row for each source")
    check_rows(mixture, field)
    for name, weight, _, *rule in mixture:
        if rule:
            _check_rule(rule[0], f"data.{field}: the rule of {name!r}", n_visual)
        if not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
            raise UserError(
                f"data.{field}: the weight of {name!r} is {weight!r}; it must be a positive number"
            )
    names = [row[0] for row in mixture]
    if len(set(names)) < len(names):
        raise UserError(
            f"data.{field}: the names of sources must differ; they are {', '.join(map(str, names))}"
        )


def _check_first_images(data: ConfigDict, field: str) -> None:
    """Raise UserError if a row may hold an image other than the first of its document."""
    only = "data.conditions and data.latents exist only for the first image of each document"
    if data.images != 1:
        raise UserError(f"data.images={data.images}: {only}; set data.images=1")
    for name, _, _, *rule in data[field]:
        if rule and (rule[0].get("start") == "random" or rule[0].get("pairs")):
            raise UserError(
                f"data.{field}: {only}, and the rule of {name!r} may drop that image; "
                "remove `start` and `pairs` from the rule"
            )


def _check_rule(rule: Any, where: str, n_visual: int) -> None:
    defaults = {field.name: field.default for field in fields(SourceRule)}
    if not isinstance(rule, dict) or set(rule) - set(defaults):
        raise UserError(f"{where} is {rule!r}; it must be a dict of {', '.join(defaults)}")
    for name, value in rule.items():
        default = defaults[name]
        is_int_for_float = isinstance(default, float) and type(value) is int
        if type(value) is not type(default) and not is_int_for_float:
            kind = type(default).__name__
            raise UserError(f"{where}: {name} is {value!r}; it must be of type {kind}")
    checked = SourceRule(**rule)
    if checked.start not in STARTS:
        raise UserError(f"{where}: start is {checked.start!r}; choose from {', '.join(STARTS)}")
    for name in ("tokens", "images", "pairs"):
        if getattr(checked, name) < 0:
            raise UserError(f"{where}: {name} is {getattr(checked, name)}; it must be at least 0")
    if 0 < checked.tokens < _min_tokens(n_visual):
        raise UserError(
            f"{where}: tokens is {checked.tokens}; it must be 0 or at least {_min_tokens(n_visual)}"
        )
    if checked.image_first > 1:
        raise UserError(f"{where}: image_first is {checked.image_first}; it must be at most 1")


def _min_tokens(n_visual: int) -> int:
    """Tokens of `<s>` and one image between [IMG] and [/IMG]."""
    return n_visual + 3
