"""Foreign checkpoints on disk: names and shapes at once, each tensor's bytes when it is asked for,
and never by mapping a file into memory. Reads safetensors and PyTorch's .bin and .pt, one file or
many with an index; writes safetensors.

Our own parser of safetensors: the library's maps whole files, has no bfloat16 in NumPy, and writes
only what it holds in memory. Read next: pickles.py, convert.py.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from emu_jax.config import UserError
from emu_jax.weights import pickles

DTYPES = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F64": np.float64,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "U16": np.uint16,
    "U32": np.uint32,
    "U64": np.uint64,
    "BOOL": np.bool_,
}
DTYPES = {name: np.dtype(dtype) for name, dtype in DTYPES.items()}
# as the format has it
LONGEST_HEADER = 100_000_000
# names of a checkpoint in one file
WHOLE = ("model", "pytorch_model", "diffusion_pytorch_model")
# of such a name, the better first
VARIANTS = ("", ".fp16")
# bytes of one file of an export, as Hugging Face's
SHARD = 5_000_000_000


@dataclass(frozen=True)
class Tensor:
    """A tensor that is read when NumPy asks for it: np.asarray(tensor)."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self.read() if dtype is None else self.read().astype(dtype)


@dataclass(frozen=True)
class Foreign:
    """Tensors by name, in the order in which they lie in their files, and the config.json beside
    them ({} for none), in `folder`.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    where: str
    folder: Path


def read(sources: list[str]) -> Foreign:
    """One checkpoint: a folder, a file, an index, or several files. Raises UserError for what is
    missing, damaged or no checkpoint.
    """
    files: list[Path] = []
    # tensor -> the file in which the index has it
    promised: dict[str, str] = {}
    for source in map(Path, sources):
        if not source.exists():
            raise UserError(f"no file or folder {str(source)!r}")
        found, index = _files(source)
        files += found
        promised |= index
    tensors: dict[str, Tensor] = {}
    homes: dict[str, Path] = {}
    for path in files:
        for name, tensor in (
            _safetensors(path) if path.suffix == ".safetensors" else _pytorch(path)
        ).items():
            if name in homes:
                raise UserError(
                    f"{name} is in {homes[name]} and in {path}: name the files that belong together"
                )
            tensors[name] = tensor
            homes[name] = path
    if lacking := [f"{name} ({file})" for name, file in promised.items() if name not in tensors]:
        raise UserError(
            f"{sources[0]}: its index promises {len(lacking)} tensors that are not there: {', '.join(lacking[:4])}"
        )
    folder = Path(sources[0]) if Path(sources[0]).is_dir() else Path(sources[0]).parent
    config = next(
        (
            path
            for name in ("config.json", "adapter_config.json")
            if (path := folder / name).is_file()
        ),
        None,
    )
    return Foreign(tensors, _json(config) if config else {}, " ".join(sources), folder)


def read_components(folder: str, names: tuple[str, ...]) -> Foreign:
    """The checkpoints in subfolders of a folder, as one: tensors under "name....", configs by name,
    and that of the scheduler ({} for none).
    """
    parts = {name: read([str(Path(folder) / name)]) for name in names}
    tensors = {
        f"{name}.{tensor}": lazy
        for name, part in parts.items()
        for tensor, lazy in part.tensors.items()
    }
    scheduler = Path(folder) / "scheduler" / "scheduler_config.json"
    configs = {name: part.config for name, part in parts.items()} | {
        "scheduler": _json(scheduler) if scheduler.is_file() else {}
    }
    return Foreign(tensors, configs, folder, Path(folder))


def write(
    folder: Path,
    stem: str,
    layout: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    arrays: Iterator[tuple[str, np.ndarray]],
    shard: int = SHARD,
    *,
    bare: bool = False,
) -> None:
    """{stem}-0000n-of-0000m.safetensors of at most `shard` bytes (or one tensor) each, and their
    index; `bare`: {stem}.safetensors without an index where that holds all. `layout` says what is
    to come; `arrays` brings it, in that order, and is held one tensor at a time.
    """
    shards: list[list[str]] = [[]]
    sizes = {name: prod(shape) * dtype.itemsize for name, (shape, dtype) in layout.items()}
    for name, size in sizes.items():
        if shard and shards[-1] and sum(sizes[other] for other in shards[-1]) + size > shard:
            shards.append([])
        shards[-1].append(name)
    bare = bare and len(shards) == 1
    files = {
        f"{stem}{'' if bare else f'-{number:05}-of-{len(shards):05}'}.safetensors": names
        for number, names in enumerate(shards, 1)
    }
    for file, names in files.items():
        with (folder / file).open("wb") as out:
            out.write(_header({name: layout[name] for name in names}))
            for name, (got, array) in zip(names, arrays):
                assert got == name and (array.shape, array.dtype) == layout[name], (
                    name,
                    got,
                    array.shape,
                    array.dtype,
                )
                np.ascontiguousarray(array).reshape(-1).view(np.uint8).tofile(out)
    if not bare:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _files(source: Path) -> tuple[list[Path], dict[str, str]]:
    """The files of a source, and the promises of its index."""
    # diffusers puts a variant's name before ".json"
    of_index = re.compile(r".*\.index(\.\w+)?\.json")
    indices = (
        [path for path in source.iterdir() if of_index.fullmatch(path.name)]
        if source.is_dir()
        else []
    )
    indices.sort(
        key=lambda path: (
            "safetensors" not in path.name,
            not path.name.endswith(".index.json"),
            path.name,
        )
    )
    if of_index.fullmatch(source.name) or indices:
        index = indices[0] if indices else source
        promised = _json(index).get("weight_map")
        if not isinstance(promised, dict) or not all(
            isinstance(file, str) and file == os.path.basename(file) for file in promised.values()
        ):
            raise UserError(f"{index} has no weight_map of tensors to files")
        files = [index.parent / file for file in dict.fromkeys(promised.values())]
        if absent := [path.name for path in files if not path.is_file()]:
            raise UserError(f"{index} names files that are not there: {', '.join(absent)}")
        return files, promised
    if not source.is_dir():
        return [source], {}
    for kinds in ((".safetensors",), (".bin", ".pt", ".pth")):
        if files := sorted(path for path in source.iterdir() if path.suffix in kinds):
            chosen = [
                [path for path in files if path.stem.removesuffix(variant) in WHOLE]
                for variant in VARIANTS
            ]
            # model.safetensors, not its model.fp16.safetensors too
            return next(filter(None, chosen), files), {}
    raise UserError(f"{source} holds no .safetensors, .bin, .pt or .pth file")


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value


def _safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file. Raises UserError for a header that does not describe exactly the bytes
    that follow it.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise UserError(
                f"{path}: wrong header: it claims {length} bytes, and the file has {size}; no safetensors file, or truncated"
            )
        header = file.read(length)
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        found = {
            name: (
                DTYPES[entry["dtype"]],
                tuple(map(int, entry["shape"])),
                *map(int, entry["data_offsets"]),
            )
            for name, entry in entries.items()
        }
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise UserError(
            f"{path}: wrong header: {type(error).__name__} {str(error).splitlines()[0]}"
        ) from error
    end = 0
    for name, (dtype, shape, start, stop) in sorted(found.items(), key=lambda item: item[1][2:]):
        if (
            start != end
            or min(shape, default=0) < 0
            or stop - start != prod(shape) * dtype.itemsize
        ):
            raise UserError(
                f"{path}: wrong header: {name} is {dtype}{list(shape)} at bytes {start} to {stop}, after {end}"
            )
        end = stop
    if 8 + length + end != size:
        raise UserError(
            f"{path}: its header describes {end} bytes of tensors and {size - 8 - length} follow: truncated or damaged"
        )
    return {
        name: Tensor(shape, dtype, partial(_bytes, path, 8 + length + start, shape, dtype))
        for name, (dtype, shape, start, _) in sorted(found.items(), key=lambda item: item[1][2:])
    }


def _bytes(path: Path, start: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = prod(shape) * dtype.itemsize
    flat = np.fromfile(path, np.uint8, size, offset=start)
    if flat.size < size:
        raise UserError(f"{path} ends within a tensor")
    return flat.view(dtype).reshape(shape)


def _pytorch(path: Path) -> dict[str, Tensor]:
    places = pickles.places(path)
    return {
        name: Tensor(place.shape, place.dtype, partial(pickles.read, path, place))
        for name, place in sorted(places.items(), key=lambda item: item[1].start)
    }


def _header(layout: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> bytes:
    names = {dtype: name for name, dtype in DTYPES.items()}
    start = 0
    entries = {"__metadata__": {"format": "pt"}}
    for name, (shape, dtype) in layout.items():
        size = prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": names[dtype],
            "shape": list(shape),
            "data_offsets": [start, start + size],
        }
        start += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
