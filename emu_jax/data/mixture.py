"""The mixture and its logical streams, which decide the order of documents and their rows.

The order of documents is a pure function of (seed, stream, counters), and the random choices within
a document of (seed, id, epoch). So the small JSON-serializable states of the S streams determine
everything that will be read, and hosts only divide the streams among them. Read next: loader.py.
"""

import hashlib
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int

from emu_jax.config import UserError
from emu_jax.data.packing import first_fit
from emu_jax.data.sequence import NO_RULE, Sequence, SourceRule
from emu_jax.data.sources import CorruptRecord, Source

log = logging.getLogger(__name__)

# Number of draws that share a random generator, because creating one takes longer than a draw.
BLOCK = 1024
# A stream gives up after this many unusable records in a row, instead of searching forever.
MAX_BAD_STREAK = 100

COUNTS = ("rows", "documents", "tokens", "images", "cut_documents", "cut_tokens", "cut_turns")


@dataclass(frozen=True)
class PackedSequence:
    """A sequence, and where it comes from."""

    # "source name/document id".
    id: str
    # Index of its source in the mixture.
    source: int
    sequence: Sequence


def stable_hash(*key: Any) -> int:
    """A 64-bit hash of `key`, the same on every host and in every run, unlike Python's hash()."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little")


def check_rows(rows: tuple, field: str) -> None:
    """Raise UserError if config.data[field] is not made of rows (name, weight, path[, rule])."""
    for row in rows:
        if not isinstance(row, (tuple, list)) or len(row) not in (3, 4):
            comma = f"; a single row needs a comma: ({rows!r},)" if isinstance(row, str) else ""
            raise UserError(
                f"data.{field}: {row!r} is not a row (name, weight, path) or "
                f"(name, weight, path, rule){comma}"
            )


def rng_for(*key: Any) -> np.random.Generator:
    """The random generator seeded by `key`."""
    return np.random.default_rng(stable_hash(*key))


def shuffled_index(place: int, size: int, key: int) -> int:
    """The index at `place` of the permutation of range(size) that belongs to the 64-bit `key`.

    It is computed, not looked up, so two billion documents cost no memory. A Feistel network with
    the finaliser of splitmix64 as its round function permutes the range [0, 2^b), where b is even
    and 2^b >= size. It is applied until the result is below `size` (cycle walking, Black and
    Rogaway 2002).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    whole = (1 << 64) - 1
    while True:
        left = place >> half
        right = place & low
        # With 4 rounds, some orders of fewer than 20 documents were visibly likelier than others.
        for number in range(8):
            mixed = (key + (number << 32) + right) & whole
            mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & whole
            mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & whole
            left, right = right, left ^ (mixed ^ mixed >> 31) & low
        place = left << half | right
        if place < size:
            return place


@dataclass(frozen=True)
class Mixture:
    """Named, weighted sources over `streams` logical streams.

    A *place* in a source counts its records over all epochs: places [e n, (e + 1) n) are epoch e of
    a source of n documents, and each epoch has its own order. Stream s of S reads the places s,
    s + S, s + 2 S, ..., so that together the streams read every document once per epoch, even if
    there are fewer documents than streams.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    sources: tuple[Source, ...]
    streams: int
    seed: int
    # The rule of each source, or () if no source has one.
    rules: tuple[SourceRule, ...] = ()

    def rule(self, source: int) -> SourceRule:
        return self.rules[source] if self.rules else NO_RULE

    def index(self, source: int, place: int) -> int:
        """Index of the record at a place of a source."""
        epoch, within = divmod(place, len(self.sources[source]))
        return shuffled_index(
            within, len(self.sources[source]), stable_hash(self.seed, self.names[source], epoch)
        )

    def draws(self, stream: int, block: int) -> Int[np.ndarray, " n"]:
        """Source indices for draws [block * BLOCK, (block + 1) * BLOCK) of a stream."""
        edges = np.cumsum(self.weights)
        return np.searchsorted(
            edges / edges[-1],
            rng_for(self.seed, "draws", stream, block).random(BLOCK),
            side="right",
        )

    @cached_property
    def eval_order(self) -> Int[np.ndarray, "n 2"]:
        """(source, index) rows in the fixed order of an evaluation.

        Sources take turns, one document at a time, until each document has been read once; weights
        are ignored.
        """
        sizes = [len(source) for source in self.sources]
        source = np.repeat(np.arange(len(sizes)), sizes)
        index = np.concatenate([np.arange(size) for size in sizes])
        return np.stack([source, index], axis=1)[np.lexsort((source, index))]


class Stream:
    """Logical stream `number` of a mixture: draws documents and packs them into rows.

    `lookahead` documents wait at a time for `fit` to choose from; it is `packing.first_fit`, or
    `best_fit` with the budgets of a row. `to_sequence(document, rng=..., rule=...)` is a
    SequenceBuilder. `state` continues a stream from a value of `state()`. With `once`, the stream
    reads its share of one pass in fixed order, and its rows are empty after the end. Not
    thread-safe.
    """

    def __init__(
        self,
        mixture: Mixture,
        number: int,
        to_sequence: Callable[..., Sequence],
        lookahead: int,
        state: dict | None = None,
        once: bool = False,
        fit: Callable[..., int | None] = first_fit,
    ):
        self.mixture = mixture
        self.number = number
        self.to_sequence = to_sequence
        self.lookahead = lookahead
        self.fit = fit
        state = state or {
            "draws": 0,
            "sources": {name: {"read": 0, "bad": 0} for name in mixture.names},
            "pending": [],
            "counts": dict.fromkeys(COUNTS, 0),
        }
        self.draws = state["draws"]
        self.read = [state["sources"][name]["read"] for name in mixture.names]
        self.bad = [state["sources"][name]["bad"] for name in mixture.names]
        self.counts = dict.fromkeys(COUNTS, 0) | state["counts"]
        # ((source, place), its sequence) of each document that waits to be packed.
        self.waiting: list[tuple[tuple[int, int], PackedSequence]] = []
        # (source, place) of each document that waited in the restored state, to be read again.
        self.unread = deque((mixture.names.index(name), place) for name, place in state["pending"])
        self.once = (
            map(tuple, mixture.eval_order[number :: mixture.streams].tolist()) if once else None
        )
        # (number of a block, its draws); -1 before the first.
        self.block: tuple[int, np.ndarray] = (-1, np.zeros(0))
        # Number of unusable records in a row.
        self.streak = 0

    def state(self) -> dict:
        """The counters of the stream and the places of waiting documents, JSON-serializable."""
        names = self.mixture.names
        pending = [place for place, _ in self.waiting] + list(self.unread)
        return {
            "draws": self.draws,
            "sources": {
                name: {"read": read, "bad": bad}
                for name, read, bad in zip(names, self.read, self.bad)
            },
            "pending": [[names[source], place] for source, place in pending],
            "counts": dict(self.counts),
        }

    def row(self, tokens: int, images: int) -> list[PackedSequence]:
        """The next row of at most `tokens` tokens and `images` images, filled by `fit`."""
        row: list[PackedSequence] = []
        while True:
            self._refill()
            index = self.fit([packed.sequence for _, packed in self.waiting], tokens, images)
            if index is None:
                break
            row.append(self.waiting.pop(index)[1])
            sequence = row[-1].sequence
            tokens -= len(sequence.tokens)
            images -= len(sequence.image_slots)
            self._count(documents=1, tokens=len(sequence.tokens), images=len(sequence.image_slots))
            self._count_cut(sequence)
        self._count(rows=1)
        return row

    def _refill(self):
        while len(self.waiting) < self.lookahead:
            place = self.unread.popleft() if self.unread else self._next_place()
            if place is None:
                return
            packed = self._read(*place)
            if packed is not None:
                self.waiting.append((place, packed))

    def _next_place(self) -> tuple[int, int] | None:
        if self.once is not None:
            place = next(self.once, None)
            if place is not None:
                self.read[place[0]] += 1
            return place
        block, offset = divmod(self.draws, BLOCK)
        if self.block[0] != block:
            self.block = block, self.mixture.draws(self.number, block)
        source = int(self.block[1][offset])
        place = self.number + self.mixture.streams * self.read[source]
        self.draws += 1
        self.read[source] += 1
        return source, place

    def _read(self, source: int, place: int) -> PackedSequence | None:
        name = self.mixture.names[source]
        documents = self.mixture.sources[source]
        index = place if self.once is not None else self.mixture.index(source, place)
        try:
            document = documents[index]
            full_id = f"{name}/{document.id}"
            rng = rng_for(self.mixture.seed, full_id, place // len(documents))
            sequence = self.to_sequence(document, rng=rng, rule=self.mixture.rule(source))
        except CorruptRecord as error:
            log.warning("source %s: skipping a corrupt record: %s", name, error)
            self.bad[source] += 1
            self.streak += 1
            if self.streak == MAX_BAD_STREAK:
                raise UserError(
                    f"source {name!r}: {MAX_BAD_STREAK} corrupt records in a row in stream "
                    f"{self.number}, the last {error}; "
                    "repair the data or remove the source from the mixture"
                ) from error
            return None
        if not len(sequence.tokens):
            self._count_cut(sequence)
            self.streak += 1
            if self.streak == MAX_BAD_STREAK:
                raise UserError(
                    f"source {name!r}: {MAX_BAD_STREAK} conversations in a row in stream "
                    f"{self.number} have a first turn that is too long, the last {full_id}; "
                    "raise data.tokens or data.images"
                )
            return None
        self.streak = 0
        return PackedSequence(full_id, source, sequence)

    def _count_cut(self, sequence: Sequence):
        self._count(
            cut_documents=int(sequence.cut > 0),
            cut_tokens=sequence.cut,
            cut_turns=sequence.cut_turns,
        )

    def _count(self, **more: int):
        for name, value in more.items():
            self.counts[name] += value
