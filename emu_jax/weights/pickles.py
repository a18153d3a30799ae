"""PyTorch's .bin and .pt files, read without unpickling: nothing that they name is ever imported or
called.

Such a file is a zip of one pickle, which says names, shapes and places, and of storages, which are
plain bytes. A machine that knows dictionaries, lists, tuples, numbers, strings and tensors
interprets the pickle here; everything else is refused by its name. Read next: files.py.
"""

import io
import lzma
import pickletools
import struct
import zipfile
import zlib
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from emu_jax.config import UserError

STORAGES = {
    "Float": np.float32,
    "Half": np.float16,
    "BFloat16": ml_dtypes.bfloat16,
    "Double": np.float64,
    "Long": np.int64,
    "Int": np.int32,
    "Short": np.int16,
    "Char": np.int8,
    "Byte": np.uint8,
    "Bool": np.bool_,
}
DTYPES = {f"torch.{name}Storage": np.dtype(dtype) for name, dtype in STORAGES.items()}
TENSOR = "torch._utils._rebuild_tensor_v2"
PARAMETER = "torch._utils._rebuild_parameter"
MAKES_DICT = "collections.OrderedDict"
MAKES_TUPLE = "torch.Size"
KNOWN = {*DTYPES, TENSOR, PARAMETER, MAKES_DICT, MAKES_TUPLE}
# under which a training run's file keeps the tensors
WRAPPERS = ("state_dict", "module", "model")
LARGEST_PICKLE = 2**27
DEEPEST = 16


class Refused(UserError):
    """The pickle is more than tensors."""


class Global(NamedTuple):
    """A class or function that the pickle names: only ever compared with those that are known."""

    name: str


class Storage(NamedTuple):
    key: str
    dtype: np.dtype
    count: int


class Strided(NamedTuple):
    """A tensor: a window of a storage, offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Place(NamedTuple):
    """A tensor's bytes in the file, from the window's first element to its last."""

    start: int
    count: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def places(path: Path) -> dict[str, Place]:
    """Where each tensor of a .bin or .pt file lies. Raises UserError for whatever is not tensors,
    or not whole.
    """
    with path.open("rb") as file:
        start = io.BytesIO(
            file.read(LARGEST_PICKLE) if file.read(1) == b"\x80" and not file.seek(0) else b""
        )
    if start.getbuffer():
        try:
            # a magic number, a version, the machine's kind, and what was saved
            for _ in range(4):
                interpret(start, str(path))
        # code in it is the worse news
        except Refused:
            raise
        except UserError:
            pass
        raise UserError(
            f"{path} is in the format that PyTorch wrote before version 1.6; load it there and torch.save it again"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            if len(entries) != len(archive.infolist()):
                raise UserError(f"{path}: two entries of the zip have the same name")
            root = next(
                (name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")),
                None,
            )
            if root is None or f"{root}constants.pkl" in entries:
                raise UserError(f"{path} is a zip but no torch.save file of tensors")
            if entries[f"{root}data.pkl"].file_size > LARGEST_PICKLE:
                raise UserError(
                    f"{path}: its pickle has {entries[f'{root}data.pkl'].file_size} bytes, which no list of tensors needs"
                )
            if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
                raise UserError(f"{path} was saved on a big-endian machine")
            value = interpret(io.BytesIO(archive.read(f"{root}data.pkl")), str(path))
    except (
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        OSError,
        EOFError,
        NotImplementedError,
        RuntimeError,
        struct.error,
    ) as error:
        raise UserError(
            f"{path}: truncated or damaged, or no PyTorch file ({_line(error)})"
        ) from error
    tensors = _tensors(str(path), value)
    starts = _starts(
        path,
        entries,
        {f"{root}data/{tensor.storage.key}": tensor.storage for tensor in tensors.values()},
    )
    return {
        name: _place(f"{path}: {name}", tensor, starts[f"{root}data/{tensor.storage.key}"])
        for name, tensor in tensors.items()
    }


def read(path: Path, place: Place) -> np.ndarray:
    """The tensor, from its own bytes alone."""
    flat = np.fromfile(path, np.uint8, place.count * place.dtype.itemsize, offset=place.start)
    if flat.size < place.count * place.dtype.itemsize:
        raise UserError(f"{path} ends within a tensor")
    strides = [stride * place.dtype.itemsize for stride in place.strides]
    return np.asarray(
        np.lib.stride_tricks.as_strided(
            flat.view(place.dtype), place.shape, strides, writeable=False
        ),
        order="C",
    )


def interpret(stream: io.BytesIO, where: str) -> Any:
    """What the next pickle of a stream holds: dicts, lists, tuples, numbers, strings and `Strided`.
    Raises Refused, naming `where` and the first thing that is none of these, and UserError for a
    damaged one.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def refuse(what: str):
        raise Refused(
            f"{where}: its pickle {what}, which is no part of a tensor; refused, and nothing of it was run"
        )

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    def named(name: str) -> Global:
        return Global(name) if name in KNOWN else refuse(f"names {name}")

    try:
        for op, argument, _ in pickletools.genops(stream):
            match op.name:
                case "PROTO" | "FRAME":
                    pass
                case "EMPTY_DICT" | "EMPTY_LIST":
                    stack.append({} if op.name == "EMPTY_DICT" else [])
                case "EMPTY_TUPLE":
                    stack.append(())
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[op.name])
                case (
                    "BININT"
                    | "BININT1"
                    | "BININT2"
                    | "LONG1"
                    | "LONG4"
                    | "INT"
                    | "BINFLOAT"
                    | "BINUNICODE"
                    | "SHORT_BINUNICODE"
                    | "BINUNICODE8"
                    | "UNICODE"
                    | "BINSTRING"
                    | "SHORT_BINSTRING"
                ):
                    stack.append(argument)
                case "MARK":
                    marks.append(len(stack))
                case "TUPLE":
                    stack.append(tuple(since_mark()))
                case "LIST":
                    stack.append(since_mark())
                case "DICT":
                    stack.append(_dict(since_mark()))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    size = int(op.name[-1])
                    stack[-size:] = [tuple(stack[-size:])]
                case "APPEND":
                    stack[-2].append(stack.pop())
                case "APPENDS":
                    items = since_mark()
                    stack[-1].extend(items)
                case "SETITEM":
                    item = stack.pop()
                    key = stack.pop()
                    stack[-1][key] = item
                case "SETITEMS":
                    items = since_mark()
                    stack[-1].update(_dict(items))
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    memo[int(argument)] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(memo[int(argument)])
                case "GLOBAL":
                    stack.append(named(argument.replace(" ", ".")))
                case "STACK_GLOBAL":
                    name = stack.pop()
                    module = stack.pop()
                    stack.append(named(f"{module}.{name}"))
                case "BINPERSID":
                    stack.append(_storage(stack.pop()))
                case "REDUCE":
                    arguments = stack.pop()
                    function = stack.pop()
                    stack.append(_made(function, arguments))
                case "BUILD":
                    stack.pop()
                    # a dict's attributes (its _metadata) are nothing to us
                    if not isinstance(stack[-1], dict):
                        refuse("sets the attributes of an object")
                case "STOP":
                    return stack.pop()
                case _:
                    refuse(f"has the opcode {op.name}")
    except (
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        UnicodeError,
        OverflowError,
    ) as error:
        raise UserError(
            f"{where}: its pickle is damaged, or no list of tensors ({_line(error)})"
        ) from error
    raise UserError(f"{where}: its pickle has no end")


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _dict(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(items[::2], items[1::2], strict=True))


def _storage(identity: Any) -> Storage:
    kind, dtype, key, _location, count = identity
    if kind != "storage" or not isinstance(dtype, Global) or not isinstance(key, str):
        raise ValueError("a storage is described in an unknown way")
    return Storage(key, DTYPES[dtype.name], _natural(count))


def _made(function: Any, arguments: tuple) -> Any:
    """What a call of one of the known functions would make."""
    if function == Global(TENSOR):
        storage, offset, shape, strides = arguments[:4]
        if not isinstance(storage, Storage) or len(shape) != len(strides):
            raise ValueError("a tensor is described in an unknown way")
        return Strided(
            storage, _natural(offset), tuple(map(_natural, shape)), tuple(map(_natural, strides))
        )
    if function == Global(PARAMETER):
        return arguments[0]
    if function == Global(MAKES_TUPLE):
        return tuple(arguments[0])
    if function == Global(MAKES_DICT):
        return dict(*arguments)
    raise ValueError(f"{function} is called")


def _natural(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise ValueError(f"{number!r} in the place of a size")
    return number


def _tensors(where: str, value: Any) -> dict[str, Strided]:
    """Every tensor under its dotted name, without the wrappers of a training run's file."""
    while isinstance(value, dict) and (
        inner := next((key for key in WRAPPERS if isinstance(value.get(key), dict)), None)
    ):
        # popped: were it to hold itself, this would end
        value = value.pop(inner)
    found: dict[str, Strided] = {}
    seen: set[int] = set()

    def visit(prefix: str, node: Any, depth: int) -> None:
        if isinstance(node, Strided):
            found[prefix] = node
        elif isinstance(node, dict):
            if id(node) in seen or depth > DEEPEST:
                raise UserError(
                    f"{where}: its dictionaries hold one another, or lie more than {DEEPEST} deep"
                )
            seen.add(id(node))
            for key, item in node.items():
                visit(f"{prefix}.{key}" if prefix else str(key), item, depth + 1)

    visit("", value, 0)
    if not found:
        raise UserError(f"{where} holds no tensors")
    return found


def _starts(
    path: Path, entries: dict[str, zipfile.ZipInfo], wanted: dict[str, Storage]
) -> dict[str, int]:
    """Where each storage's bytes start. Raises UserError for one that is missing, compressed, of
    another size, or within another.
    """
    starts = {}
    ends = []
    with path.open("rb") as file:
        for name, storage in wanted.items():
            entry = entries.get(name)
            if entry is None:
                raise UserError(f"{path}: the storage {name} is missing")
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                raise UserError(
                    f"{path}: the storage {name} is compressed or encrypted, which torch.save does not do"
                )
            if (
                entry.file_size != storage.count * storage.dtype.itemsize
                or entry.compress_size != entry.file_size
            ):
                raise UserError(
                    f"{path}: the storage {name} has {entry.file_size} bytes, not {storage.count} x {storage.dtype.itemsize}"
                )
            file.seek(entry.header_offset)
            header = file.read(30)
            if len(header) < 30 or header[:4] != b"PK\x03\x04":
                raise UserError(f"{path}: the storage {name} is not where the zip says")
            starts[name] = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
            ends.append((entry.header_offset, starts[name] + entry.file_size, name))
        size = file.seek(0, 2)
    ends.sort()
    for (_, end, name), (following, _, _) in zip(ends, [*ends[1:], (size, 0, "")]):
        if end > following:
            raise UserError(f"{path}: the storage {name} overlaps what follows it")
    return starts


def _place(what: str, tensor: Strided, start: int) -> Place:
    """Raises UserError where the window leaves its storage, or shows one element twice."""
    storage, offset, shape, strides = tensor
    size = prod(shape)
    last = sum((n - 1) * stride for n, stride in zip(shape, strides)) if size else -1
    if offset + last >= storage.count and size:
        raise UserError(
            f"{what} reaches to element {offset + last} of a storage of {storage.count}"
        )
    reach = 0
    for stride, n in sorted((stride, n) for n, stride in zip(shape, strides) if n > 1):
        if stride <= reach and size:
            raise UserError(
                f"{what} shows elements of its storage more than once (shape {shape}, strides {strides})"
            )
        reach += (n - 1) * stride
    return Place(start + offset * storage.dtype.itemsize, last + 1, storage.dtype, shape, strides)
