"""Conditions of a decoder, made once: for each document's first image the visual tokens that an LLM regressed from what stands before it.

DIR/conditions.json says by what they were made. DIR/MIXTURE/SOURCE/00000.npy holds [n, N, D] in float16 for the next SHARD documents
of a source, 00000.json their ids; it is written last, so that a shard without it is not there. Written by ../generate/precompute.py.
"""
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
from jaxtyping import Float

from emu_jax.config import UserError
from emu_jax.types import Batch, DecoderBatch

SHARD = 1024
NOTES = "conditions.json"


def shards(documents: int) -> int:
    return -(-documents // SHARD)


def path_of(directory: Path, mixture: str, source: str, shard: int) -> Path:
    """Of the shard's arrays; its ids lie beside them in a .json."""
    return directory / mixture / source / f"{shard:05}.npy"


def notes(directory: Path) -> dict:
    """What DIR/conditions.json says. Raises UserError where it is missing or damaged."""
    try:
        return json.loads((directory / NOTES).read_text())
    except FileNotFoundError:
        raise UserError(f"no conditions in '{directory}'; they are made by: python -m emu_jax.generate precompute --config=FILE --to=DIR") from None
    except ValueError as error:
        raise UserError(f"{directory / NOTES} is damaged: {error}") from error


class Conditions:
    """The conditions of the sources of a mixture ("mixture" or "eval_mixture" of config.data), by the documents' full ids."""

    def __init__(self, directory: str, mixture: str, documents: dict[str, int]):
        """documents: how many each source has. Raises UserError for conditions that are missing, damaged or not complete."""
        self.directory = Path(directory)
        self.shape = tuple(notes(self.directory)["shape"])
        self._arrays: list[np.ndarray] = []
        self._places: dict[str, tuple[int, int]] = {}       # full id -> (array, row)
        for source, count in documents.items():
            for shard in range(shards(count)):
                self._open(source, path_of(self.directory, mixture, source, shard))

    def _open(self, source: str, path: Path) -> None:
        again = "run python -m emu_jax.generate precompute again: it makes what is missing"
        try:
            ids, array = json.loads(path.with_suffix(".json").read_text()), np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"the conditions of the source {source!r} are not whole ({path}: {getattr(error, 'strerror', None) or error}); {again}") from error
        if array.shape != (len(ids), *self.shape):
            raise UserError(f"{path} holds {list(array.shape)}, not {[len(ids), *self.shape]}: remove it and {again}")
        self._places |= {f"{source}/{id}": (len(self._arrays), row) for row, id in enumerate(ids)}
        self._arrays.append(array)

    def of(self, id: str) -> Float[np.ndarray, "N D"]:
        """Of a document by its full id. Raises UserError for one that has none."""
        if id not in self._places:
            raise UserError(f"the conditions in '{self.directory}' lack the document {id!r}: they were made of other data")
        array, row = self._places[id]
        return np.asarray(self._arrays[array][row], np.float32)

    def attached(self, batch: Batch, ids: Sequence[Sequence[str]]) -> DecoderBatch:
        """The batch with the condition of each of its images; zeros where there is none. ids: of the documents of each row."""
        found = np.zeros((*batch.image_slots.shape, *self.shape), np.float32)
        for row, slots in enumerate(batch.image_slots):
            for place, slot in enumerate(slots[slots < batch.tokens.shape[1]]):
                found[row, place] = self.of(ids[row][batch.segments[row, slot] - 1])
        return DecoderBatch(**{field.name: getattr(batch, field.name) for field in fields(Batch)}, conditions=found)
