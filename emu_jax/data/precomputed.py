"""Arrays that a decoder's training reads, made once: of each document's first image the
`conditions`, which are the visual tokens that an LLM regressed from what stands before it, or the
`latents`, which are the moments of what the autoencoder's encoder makes of it.

DIR/KIND.json says by what they were made. DIR/MIXTURE/SOURCE/00000.npy holds [n, ...] in float16
for the next SHARD documents of a source, 00000.json their ids; it is written last, so that a shard
without it is not there. Written by ../generate/precompute.py.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from jaxtyping import Float16

from emu_jax.config import UserError
from emu_jax.types import Batch, DecoderBatch

# also fields of config.data and of DecoderBatch; what their making is told
KINDS = {"conditions": "", "latents": " --latents"}
SHARD = 1024
# shards that are mapped at a time, an open file each: a system allows fewer than the paper's data
# has
OPEN = 256


def num_shards(documents: int) -> int:
    return -(-documents // SHARD)


def metadata_path(directory: Path, kind: str) -> Path:
    return directory / f"{kind}.json"


def shard_path(directory: Path, mixture: str, source: str, shard: int) -> Path:
    """Of the shard's arrays; its ids lie beside them in a .json."""
    return directory / mixture / source / f"{shard:05}.npy"


def read_metadata(directory: Path, kind: str) -> dict:
    """What DIR/KIND.json says. Raises UserError where it is missing or damaged."""
    path = metadata_path(directory, kind)
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"no {kind} in '{directory}'; they are made by: "
            f"python -m emu_jax.generate precompute{KINDS[kind]} --config=FILE --to=DIR"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error


class Precomputed:
    """The arrays of a kind, of the sources of a mixture ("mixture" or "eval_mixture" of
    config.data), by the documents' full ids.
    """

    def __init__(self, directory: str, kind: str, mixture: str, documents: dict[str, int]):
        """documents: how many each source has. Raises UserError for arrays that are missing,
        damaged or not complete.
        """
        self.directory = Path(directory)
        self.kind = kind
        self.shape = tuple(read_metadata(self.directory, kind)["shape"])
        self._paths: list[Path] = []
        self._opened = lru_cache(OPEN)(partial(np.load, mmap_mode="r"))
        # full id -> (number of the path, row)
        self._places: dict[str, tuple[int, int]] = {}
        for source, count in documents.items():
            for shard in range(num_shards(count)):
                self._open(source, shard_path(self.directory, mixture, source, shard))

    def _open(self, source: str, path: Path) -> None:
        again = f"run python -m emu_jax.generate precompute{KINDS[self.kind]} again: it makes what is missing"
        try:
            ids = json.loads(path.with_suffix(".json").read_text())
            array = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"the {self.kind} of the source {source!r} are not whole ({path}: {reason}); {again}"
            ) from error
        if array.shape != (len(ids), *self.shape):
            raise UserError(
                f"{path} holds {list(array.shape)}, not {[len(ids), *self.shape]}: remove it and {again}"
            )
        self._places |= {f"{source}/{id}": (len(self._paths), row) for row, id in enumerate(ids)}
        self._paths.append(path)

    def lookup(self, id: str) -> Float16[np.ndarray, "..."]:
        """Of a document by its full id. Raises UserError for one that has none."""
        if id not in self._places:
            raise UserError(
                f"the {self.kind} in '{self.directory}' lack the document {id!r}: they were made of other data"
            )
        number, row = self._places[id]
        return np.array(self._opened(self._paths[number])[row])

    def lookup_batch(
        self, batch: Batch, ids: Sequence[Sequence[str]]
    ) -> Float16[np.ndarray, "B I ..."]:
        """Of the document of each image of a batch; zeros where there is no image. ids: of the
        documents of each row.
        """
        found = np.zeros((*batch.image_slots.shape, *self.shape), np.float16)
        for row, slots in enumerate(batch.image_slots):
            for place, slot in enumerate(slots[slots < batch.tokens.shape[1]]):
                found[row, place] = self.lookup(ids[row][batch.segments[row, slot] - 1])
        return found


def attach(
    batch: Batch, ids: Sequence[Sequence[str]], precomputed: Mapping[str, Precomputed]
) -> DecoderBatch:
    """The batch with what is precomputed for its images, by kind."""
    return DecoderBatch(
        **{field.name: getattr(batch, field.name) for field in fields(Batch)},
        **{kind: arrays.lookup_batch(batch, ids) for kind, arrays in precomputed.items()},
    )
