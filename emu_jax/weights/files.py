"""Files of foreign checkpoints: names and shapes are read first, tensor data on demand.

Reads safetensors and PyTorch's .bin and .pt, one file or many with an index; writes safetensors.
Files are never memory-mapped. We have our own safetensors parser because the library memory-maps
files, does not support bfloat16 with NumPy, and can write only tensors that are all in memory. Read
next: pickles.py, convert.py.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from emu_jax.config import UserError
from emu_jax.files import one_line
from emu_jax.weights import pickles

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32),
    "U64": np.dtype(np.uint64),
    "BOOL": np.dtype(np.bool_),
}
# Size limit of a header in the safetensors format, in bytes.
LONGEST_HEADER = 100_000_000
# Stems of the files of single-file checkpoints.
SINGLE_FILE = ("model", "pytorch_model", "diffusion_pytorch_model")
# Endings of such a stem for the variants of a checkpoint, the preferred one first.
VARIANTS = ("", ".fp16")
# Diffusers writes the name of a variant in front of ".json".
INDEX = re.compile(r".*\.index(\.\w+)?\.json")
# Size of one file of an export in bytes, as Hugging Face's default.
SHARD = 5_000_000_000

# Name -> (shape, dtype).
Layout = Mapping[str, tuple[tuple[int, ...], np.dtype]]


@dataclass(frozen=True)
class Tensor:
    """A tensor on disk, read by np.asarray(tensor)."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self.read() if dtype is None else self.read().astype(dtype)


@dataclass(frozen=True)
class Foreign:
    """A foreign checkpoint."""

    # By name, in the order of the files.
    tensors: dict[str, Tensor]
    # Its config.json, or {}; for a model in components, one entry per component.
    config: dict[str, Any]
    # What the user named, for messages.
    where: str
    folder: Path


class Entry(NamedTuple):
    """A tensor in a safetensors header; `start` and `stop` count bytes after the header."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def read(sources: list[str]) -> Foreign:
    """Open one checkpoint: a folder, a file, an index, or several files.

    Raises UserError for files that are missing, damaged or not checkpoints.
    """
    files: list[Path] = []
    # Tensor -> file, according to the indices.
    indexed: dict[str, str] = {}
    for source in map(Path, sources):
        if not source.exists():
            raise UserError(f"no file or folder {str(source)!r}")
        found, index = _files(source)
        files += found
        indexed |= index
    tensors: dict[str, Tensor] = {}
    homes: dict[str, Path] = {}
    for path in files:
        part = _safetensors(path) if path.suffix == ".safetensors" else _pytorch(path)
        if twice := [name for name in part if name in homes]:
            raise UserError(
                f"{twice[0]} is in {homes[twice[0]]} and in {path}: "
                "name only files of one checkpoint"
            )
        tensors |= part
        homes |= dict.fromkeys(part, path)
    if missing := [f"{name} ({file})" for name, file in indexed.items() if name not in tensors]:
        raise UserError(
            f"{sources[0]}: its index lists {len(missing)} tensors that its files lack: "
            f"{', '.join(missing[:4])}"
        )
    first = Path(sources[0])
    folder = first if first.is_dir() else first.parent
    configs = (folder / "config.json", folder / "adapter_config.json")
    config = next((_json(path) for path in configs if path.is_file()), {})
    return Foreign(tensors, config, " ".join(sources), folder)


def read_components(folder: str, names: tuple[str, ...]) -> Foreign:
    """Open the checkpoints in the subfolders `names` of a folder as one.

    Tensor names get the prefix "component.". The config has each component's config.json by name,
    and under "scheduler" the scheduler's config, or {} if there is none.
    """
    tensors: dict[str, Tensor] = {}
    configs: dict[str, Any] = {}
    for name in names:
        part = read([str(Path(folder) / name)])
        tensors |= {f"{name}.{tensor}": lazy for tensor, lazy in part.tensors.items()}
        configs[name] = part.config
    scheduler = Path(folder) / "scheduler" / "scheduler_config.json"
    configs["scheduler"] = _json(scheduler) if scheduler.is_file() else {}
    return Foreign(tensors, configs, folder, Path(folder))


def write(
    folder: Path,
    stem: str,
    layout: Layout,
    arrays: Iterable[tuple[str, np.ndarray]],
    shard: int = SHARD,
    *,
    bare: bool = False,
) -> None:
    """Write {stem}-0000n-of-0000m.safetensors and their index into `folder`.

    layout: the tensors that `arrays` yields, in that order; only one of them is in memory at a
    time. shard: maximum bytes of a file, except that it has at least one tensor; 0: no limit. bare:
    if one file is enough, write {stem}.safetensors without an index.
    """
    sizes = {name: prod(shape) * dtype.itemsize for name, (shape, dtype) in layout.items()}
    shards = _shards(sizes, shard)
    bare = bare and len(shards) == 1
    files = {}
    for number, names in enumerate(shards, 1):
        suffix = "" if bare else f"-{number:05}-of-{len(shards):05}"
        files[f"{stem}{suffix}.safetensors"] = names
    arrays = iter(arrays)
    for file, names in files.items():
        with (folder / file).open("wb") as out:
            out.write(_header({name: layout[name] for name in names}))
            for name, (got, array) in zip(names, arrays):
                assert got == name and (array.shape, array.dtype) == layout[name], (name, got)
                np.ascontiguousarray(array).reshape(-1).view(np.uint8).tofile(out)
    if not bare:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _shards(sizes: dict[str, int], shard: int) -> list[list[str]]:
    """Divide the names among files of at most `shard` bytes or one tensor; 0: one file."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shard and shards[-1] and filled + size > shard:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _files(source: Path) -> tuple[list[Path], dict[str, str]]:
    """Files of a source, and {tensor: file} from its index, or {} if it has none."""
    if not source.is_dir():
        return _indexed(source) if INDEX.fullmatch(source.name) else ([source], {})
    indices = [path for path in source.iterdir() if INDEX.fullmatch(path.name)]
    if indices:
        return _indexed(min(indices, key=_index_order))
    for suffixes in ((".safetensors",), (".bin", ".pt", ".pth")):
        files = sorted(path for path in source.iterdir() if path.suffix in suffixes)
        if files:
            return _one_variant(files), {}
    raise UserError(f"{source} holds no .safetensors, .bin, .pt or .pth file")


def _index_order(path: Path) -> tuple[bool, bool, str]:
    """Sort key of indices: safetensors before pickles, then those without a variant."""
    return "safetensors" not in path.name, not path.name.endswith(".index.json"), path.name


def _indexed(index: Path) -> tuple[list[Path], dict[str, str]]:
    weight_map = _json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(map(_is_file_name, weight_map.values())):
        raise UserError(f"{index} has no weight_map of tensors to files")
    files = [index.parent / file for file in dict.fromkeys(weight_map.values())]
    if missing := [path.name for path in files if not path.is_file()]:
        raise UserError(f"{index} lists files that do not exist: {', '.join(missing)}")
    return files, weight_map


def _is_file_name(file: Any) -> bool:
    return isinstance(file, str) and file == os.path.basename(file)


def _one_variant(files: list[Path]) -> list[Path]:
    """Choose the files of one variant: model.safetensors, not model.fp16.safetensors."""
    for variant in VARIANTS:
        chosen = [path for path in files if path.stem.removesuffix(variant) in SINGLE_FILE]
        if chosen:
            return chosen
    return files


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return value


def _safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, in the order of their bytes.

    Raises UserError unless the header describes exactly the bytes that follow it.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise UserError(
                f"{path}: wrong header: it claims {length} bytes, and the file has {size}; "
                "not a safetensors file, or truncated"
            )
        header = file.read(length)
    entries = _entries(path, header)
    end = 0
    for name, (dtype, shape, start, stop) in entries.items():
        right_size = stop - start == prod(shape) * dtype.itemsize
        if start != end or min(shape, default=0) < 0 or not right_size:
            raise UserError(
                f"{path}: wrong header: {name} is {dtype}{list(shape)} "
                f"at bytes {start} to {stop}, after {end}"
            )
        end = stop
    first = 8 + length
    if first + end != size:
        raise UserError(
            f"{path}: its header describes {end} bytes of tensors and {size - first} follow: "
            "truncated or damaged"
        )
    return {
        name: Tensor(shape, dtype, partial(_bytes, path, first + start, shape, dtype))
        for name, (dtype, shape, start, _) in entries.items()
    }


def _entries(path: Path, header: bytes) -> dict[str, Entry]:
    """Entries of a safetensors header, sorted by position. Raises UserError if malformed."""
    found = {}
    try:
        fields = json.loads(header)
        fields.pop("__metadata__", None)
        for name, field in fields.items():
            dtype = DTYPES[field["dtype"]]
            shape = tuple(map(int, field["shape"]))
            start, stop = map(int, field["data_offsets"])
            found[name] = Entry(dtype, shape, start, stop)
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise UserError(f"{path}: wrong header: {one_line(error)}") from error
    return dict(sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)))


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


def _header(layout: Layout) -> bytes:
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
