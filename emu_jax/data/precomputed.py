"""Arrays for training the decoder, precomputed for the first image of each document.

`conditions` are the visual tokens that an LLM regressed from the text before the image; `latents`
are the means and log-variances of the autoencoder's latents. DIR/KIND.json records what they were
made with. DIR/MIXTURE/SOURCE/00000.npy is an array [n, ...] in float16 for the first SHARD
documents of a source, 00001.npy for the next, and so on; each has a .json with the documents' ids.
The .json is written last: a shard without it is incomplete. ../generate/precompute.py writes them.
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

# Kind -> flag of `generate precompute`. Kinds are also field names of config.data and DecoderBatch.
KINDS = {"conditions": "", "latents": " --latents"}
SHARD = 1024
# Number of memory-mapped shards to keep open: the paper's data has more shards than a process may
# have open files.
OPEN = 256


def num_shards(documents: int) -> int:
    return -(-documents // SHARD)


def metadata_path(directory: Path, kind: str) -> Path:
    return directory / f"{kind}.json"


def shard_path(directory: Path, mixture: str, source: str, shard: int) -> Path:
    """Path of a shard's arrays; its ids are next to them in a .json file."""
    return directory / mixture / source / f"{shard:05}.npy"


def read_metadata(directory: Path, kind: str) -> dict:
    """The contents of DIR/KIND.json. Raises UserError if it is missing or damaged."""
    path = metadata_path(directory, kind)
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"no {kind} in '{directory}'; make them with: "
            f"python -m emu_jax.generate precompute{KINDS[kind]} --config=FILE --to=DIR"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error


class Precomputed:
    """The arrays of one kind for the sources of a mixture, by the full ids of documents.

    kind: one of KINDS. mixture: "mixture" or "eval_mixture". documents: the number of documents of
    each source. Raises UserError for arrays that are missing, damaged or incomplete.
    """

    def __init__(self, directory: str, kind: str, mixture: str, documents: dict[str, int]):
        self.directory = Path(directory)
        self.kind = kind
        self.shape = tuple(read_metadata(self.directory, kind)["shape"])
        self._paths: list[Path] = []
        self._opened = lru_cache(OPEN)(partial(np.load, mmap_mode="r"))
        # Full id -> (index in _paths, row).
        self._places: dict[str, tuple[int, int]] = {}
        for source, count in documents.items():
            for shard in range(num_shards(count)):
                self._open(source, shard_path(self.directory, mixture, source, shard))

    def _open(self, source: str, path: Path) -> None:
        rerun = (
            f"run python -m emu_jax.generate precompute{KINDS[self.kind]} again to complete them"
        )
        try:
            ids = json.loads(path.with_suffix(".json").read_text())
            array = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"the {self.kind} of the source {source!r} are incomplete "
                f"({path}: {reason}); {rerun}"
            ) from error
        if array.shape != (len(ids), *self.shape):
            raise UserError(
                f"{path} holds {list(array.shape)}, not {[len(ids), *self.shape]}; "
                f"remove it and {rerun}"
            )
        self._places |= {f"{source}/{id}": (len(self._paths), row) for row, id in enumerate(ids)}
        self._paths.append(path)

    def lookup(self, id: str) -> Float16[np.ndarray, "..."]:
        """The array of a document by its full id. Raises UserError for an unknown document."""
        if id not in self._places:
            raise UserError(
                f"the {self.kind} in '{self.directory}' lack the document {id!r}: "
                "they were made from other data"
            )
        number, row = self._places[id]
        return np.array(self._opened(self._paths[number])[row])

    def lookup_batch(
        self, batch: Batch, ids: Sequence[Sequence[str]]
    ) -> Float16[np.ndarray, "B I ..."]:
        """The array for each image of a batch, zeros for empty slots.

        ids: for each row, the full ids of its documents.
        """
        found = np.zeros((*batch.image_slots.shape, *self.shape), np.float16)
        for row, place in np.argwhere(batch.has_image):
            document = int(batch.segments[row, batch.image_slots[row, place]]) - 1
            found[row, place] = self.lookup(ids[row][document])
        return found


def attach(
    batch: Batch, ids: Sequence[Sequence[str]], precomputed: Mapping[str, Precomputed]
) -> DecoderBatch:
    """The batch with the precomputed arrays of its images, by kind."""
    return DecoderBatch(
        **{field.name: getattr(batch, field.name) for field in fields(Batch)},
        **{kind: arrays.lookup_batch(batch, ids) for kind, arrays in precomputed.items()},
    )
