"""Read PyTorch's .bin and .pt files without unpickling, so that no code in them is run.

Such a file is a zip with one pickle, which has the tensors' names, shapes and offsets, and with
storages, which are plain bytes. A small stack machine interprets the pickle. It supports
dictionaries, lists, tuples, numbers, strings and tensors, and refuses everything else. Read next:
files.py.
"""

import io
import lzma
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import ml_dtypes
import numpy as np

from emu_jax.config import UserError
from emu_jax.files import one_line

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
# Keys under which training checkpoints store the tensors.
WRAPPERS = ("state_dict", "module", "model")
# Limits: bytes of a pickle, and depth of nested dictionaries.
LARGEST_PICKLE = 2**27
DEEPEST = 16


class Refused(UserError):
    """The pickle contains something other than tensors."""


class Global(NamedTuple):
    """The name of a class or function in the pickle; it is never imported."""

    name: str


class Storage(NamedTuple):
    """A flat array of `count` elements in the zip, under the name `key`."""

    key: str
    dtype: np.dtype
    count: int


class Strided(NamedTuple):
    """A tensor as a view of a storage; `offset` and `strides` count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Place(NamedTuple):
    """The position of a tensor in the file: `count` elements from byte `start`."""

    start: int
    count: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def places(path: Path) -> dict[str, Place]:
    """Find the position of each tensor in a .bin or .pt file.

    Raises Refused for a pickle with anything but tensors, and UserError for a damaged file or one
    of another format.
    """
    with path.open("rb") as file:
        first = file.read(1)
    if first == b"\x80":
        _refuse_old_format(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            if len(entries) != len(archive.infolist()):
                raise UserError(f"{path}: two entries of the zip have the same name")
            root = _root(path, entries)
            pickle = f"{root}data.pkl"
            size = entries[pickle].file_size
            if size > LARGEST_PICKLE:
                raise UserError(
                    f"{path}: its pickle has {size} bytes, too many for a list of tensors"
                )
            if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
                raise UserError(f"{path} was saved on a big-endian machine")
            value = interpret(io.BytesIO(archive.read(pickle)), str(path))
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
            f"{path}: truncated or damaged, or not a PyTorch file ({one_line(error)})"
        ) from error
    tensors = _tensors(str(path), value)
    storages = {f"{root}data/{tensor.storage.key}": tensor.storage for tensor in tensors.values()}
    starts = _starts(path, entries, storages)
    return {
        name: _place(f"{path}: {name}", tensor, starts[f"{root}data/{tensor.storage.key}"])
        for name, tensor in tensors.items()
    }


def _refuse_old_format(path: Path) -> None:
    """Raise UserError for the format before PyTorch 1.6, or Refused if it contains code."""
    with path.open("rb") as file:
        stream = io.BytesIO(file.read(LARGEST_PICKLE))
    try:
        # The file starts with four pickles: a magic number, a version, the kind of machine, and
        # what was saved.
        for _ in range(4):
            interpret(stream, str(path))
    # Report code in the file rather than its old format.
    except Refused:
        raise
    except UserError:
        pass
    raise UserError(
        f"{path} has the format of PyTorch before version 1.6; "
        "load it there and torch.save it again"
    )


def _root(path: Path, entries: dict[str, zipfile.ZipInfo]) -> str:
    """The common prefix of the entries in the zip. Raises UserError for a zip without tensors."""
    for name in entries:
        if name.endswith("/data.pkl"):
            root = name.removesuffix("data.pkl")
            # Only TorchScript archives have constants.pkl.
            if f"{root}constants.pkl" not in entries:
                return root
            break
    raise UserError(f"{path} is a zip, but not a torch.save file of tensors")


def read(path: Path, place: Place) -> np.ndarray:
    """Read one tensor, and no other bytes of the file."""
    size = place.count * place.dtype.itemsize
    flat = np.fromfile(path, np.uint8, size, offset=place.start)
    if flat.size < size:
        raise UserError(f"{path} ends within a tensor")
    strides = [stride * place.dtype.itemsize for stride in place.strides]
    view = np.lib.stride_tricks.as_strided(
        flat.view(place.dtype), place.shape, strides, writeable=False
    )
    return np.asarray(view, order="C")


def interpret(stream: io.BytesIO, where: str) -> Any:
    """The value of the next pickle in `stream`.

    It consists of dicts, lists, tuples, numbers, strings and `Strided`. Raises Refused, which names
    the first thing that is anything else, and UserError for a damaged pickle. where: the file, for
    messages.
    """
    machine = Machine(where)
    try:
        for op, argument, _ in pickletools.genops(stream):
            if op.name == "STOP":
                return machine.pop()
            if op.name not in OPCODES:
                machine.refuse(f"has the opcode {op.name}")
            OPCODES[op.name](machine, argument)
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
            f"{where}: its pickle is damaged, or not a list of tensors ({one_line(error)})"
        ) from error
    raise UserError(f"{where}: its pickle has no end")


class Machine:
    """The stack machine that interprets a pickle, with a method for each kind of opcode."""

    def __init__(self, where: str):
        self.where = where
        self.stack: list[Any] = []
        # Height of the stack at each MARK.
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def refuse(self, what: str) -> NoReturn:
        raise Refused(
            f"{self.where}: its pickle {what}, which is not part of a tensor; "
            "refused, and nothing in it was run"
        )

    def pop(self) -> Any:
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        """Pop everything above the last mark."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def skip(self, _) -> None:
        pass

    def push(self, argument: Any) -> None:
        self.stack.append(argument)

    def push_none(self, _) -> None:
        self.stack.append(None)

    def push_true(self, _) -> None:
        self.stack.append(True)

    def push_false(self, _) -> None:
        self.stack.append(False)

    def empty_dict(self, _) -> None:
        self.stack.append({})

    def empty_list(self, _) -> None:
        self.stack.append([])

    def empty_tuple(self, _) -> None:
        self.stack.append(())

    def mark(self, _) -> None:
        self.marks.append(len(self.stack))

    def make_tuple(self, _) -> None:
        self.stack.append(tuple(self.pop_mark()))

    def make_list(self, _) -> None:
        self.stack.append(self.pop_mark())

    def make_dict(self, _) -> None:
        self.stack.append(_dict(self.pop_mark()))

    def tuple1(self, _) -> None:
        self.stack[-1:] = [tuple(self.stack[-1:])]

    def tuple2(self, _) -> None:
        self.stack[-2:] = [tuple(self.stack[-2:])]

    def tuple3(self, _) -> None:
        self.stack[-3:] = [tuple(self.stack[-3:])]

    def append(self, _) -> None:
        item = self.pop()
        self.stack[-1].append(item)

    def appends(self, _) -> None:
        items = self.pop_mark()
        self.stack[-1].extend(items)

    def set_item(self, _) -> None:
        item = self.pop()
        key = self.pop()
        self.stack[-1][key] = item

    def set_items(self, _) -> None:
        items = self.pop_mark()
        self.stack[-1].update(_dict(items))

    def put(self, argument: Any) -> None:
        self.memo[int(argument)] = self.stack[-1]

    def memoize(self, _) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def get(self, argument: Any) -> None:
        self.stack.append(self.memo[int(argument)])

    def name(self, argument: Any) -> None:
        self.push_global(argument.replace(" ", "."))

    def stack_name(self, _) -> None:
        name = self.pop()
        module = self.pop()
        self.push_global(f"{module}.{name}")

    def push_global(self, name: str) -> None:
        if name not in KNOWN:
            self.refuse(f"names {name}")
        self.stack.append(Global(name))

    def storage(self, _) -> None:
        self.stack.append(_storage(self.pop()))

    def call(self, _) -> None:
        arguments = self.pop()
        function = self.pop()
        self.stack.append(_call(function, arguments))

    def set_state(self, _) -> None:
        """Ignore attributes of a dict, such as _metadata of a state dict; refuse all others."""
        self.pop()
        if not isinstance(self.stack[-1], dict):
            self.refuse("sets the attributes of an object")


# The method for each supported opcode of pickletools. All other opcodes are refused.
OPCODES: dict[str, Callable[[Machine, Any], None]] = {
    "PROTO": Machine.skip,
    "FRAME": Machine.skip,
    "NONE": Machine.push_none,
    "NEWTRUE": Machine.push_true,
    "NEWFALSE": Machine.push_false,
    "INT": Machine.push,
    "BININT": Machine.push,
    "BININT1": Machine.push,
    "BININT2": Machine.push,
    "LONG1": Machine.push,
    "LONG4": Machine.push,
    "BINFLOAT": Machine.push,
    "UNICODE": Machine.push,
    "BINUNICODE": Machine.push,
    "BINUNICODE8": Machine.push,
    "SHORT_BINUNICODE": Machine.push,
    "BINSTRING": Machine.push,
    "SHORT_BINSTRING": Machine.push,
    "EMPTY_DICT": Machine.empty_dict,
    "EMPTY_LIST": Machine.empty_list,
    "EMPTY_TUPLE": Machine.empty_tuple,
    "MARK": Machine.mark,
    "DICT": Machine.make_dict,
    "LIST": Machine.make_list,
    "TUPLE": Machine.make_tuple,
    "TUPLE1": Machine.tuple1,
    "TUPLE2": Machine.tuple2,
    "TUPLE3": Machine.tuple3,
    "APPEND": Machine.append,
    "APPENDS": Machine.appends,
    "SETITEM": Machine.set_item,
    "SETITEMS": Machine.set_items,
    "PUT": Machine.put,
    "BINPUT": Machine.put,
    "LONG_BINPUT": Machine.put,
    "MEMOIZE": Machine.memoize,
    "GET": Machine.get,
    "BINGET": Machine.get,
    "LONG_BINGET": Machine.get,
    "GLOBAL": Machine.name,
    "STACK_GLOBAL": Machine.stack_name,
    "BINPERSID": Machine.storage,
    "REDUCE": Machine.call,
    "BUILD": Machine.set_state,
}


def _dict(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(items[::2], items[1::2], strict=True))


def _storage(identity: Any) -> Storage:
    kind, dtype, key, _location, count = identity
    if kind != "storage" or not isinstance(dtype, Global) or not isinstance(key, str):
        raise ValueError("unknown description of a storage")
    return Storage(key, DTYPES[dtype.name], _size(count))


def _call(function: Any, arguments: tuple) -> Any:
    """The value that a known function would return; the function itself is not called."""
    if function == Global(TENSOR):
        storage, offset, shape, strides = arguments[:4]
        if not isinstance(storage, Storage) or len(shape) != len(strides):
            raise ValueError("unknown description of a tensor")
        sizes = tuple(map(_size, shape))
        return Strided(storage, _size(offset), sizes, tuple(map(_size, strides)))
    if function == Global(PARAMETER):
        return arguments[0]
    if function == Global(MAKES_TUPLE):
        return tuple(arguments[0])
    if function == Global(MAKES_DICT):
        return dict(*arguments)
    raise ValueError(f"{function} is called, which is not a function")


def _size(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise ValueError(f"expected a size, got {number!r}")
    return number


def _tensors(where: str, value: Any) -> dict[str, Strided]:
    """Tensors by dotted name, without the WRAPPERS of training checkpoints."""
    value = _unwrapped(value)
    found: dict[str, Strided] = {}
    seen: set[int] = set()

    def visit(prefix: str, node: Any, depth: int) -> None:
        if isinstance(node, Strided):
            found[prefix] = node
        elif isinstance(node, dict):
            if id(node) in seen or depth > DEEPEST:
                raise UserError(
                    f"{where}: its dictionaries contain each other, or nest deeper than {DEEPEST}"
                )
            seen.add(id(node))
            for key, item in node.items():
                visit(f"{prefix}.{key}" if prefix else str(key), item, depth + 1)

    visit("", value, 0)
    if not found:
        raise UserError(f"{where} holds no tensors")
    return found


def _unwrapped(value: Any) -> Any:
    while isinstance(value, dict):
        inner = next((key for key in WRAPPERS if isinstance(value.get(key), dict)), None)
        if inner is None:
            return value
        # Pop the key, so that this also ends for a dict that contains itself.
        value = value.pop(inner)
    return value


def _starts(
    path: Path, entries: dict[str, zipfile.ZipInfo], wanted: dict[str, Storage]
) -> dict[str, int]:
    """The position of each storage's first byte in the file.

    Raises UserError for a storage that is missing, compressed, of the wrong size, or overlaps
    another.
    """
    starts = {}
    # Each is (first byte of the header, end of the data, name).
    spans = []
    with path.open("rb") as file:
        for name, storage in wanted.items():
            if name not in entries:
                raise UserError(f"{path}: the storage {name} is missing")
            entry = entries[name]
            _check_entry(path, entry, storage)
            file.seek(entry.header_offset)
            header = file.read(30)
            if len(header) < 30 or header[:4] != b"PK\x03\x04":
                raise UserError(f"{path}: the storage {name} is not where the zip's index has it")
            # The header's last fields are the lengths of the name and of extra data.
            starts[name] = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
            spans.append((entry.header_offset, starts[name] + entry.file_size, name))
        size = file.seek(0, 2)
    spans.sort()
    for (_, end, name), (following, _, _) in zip(spans, [*spans[1:], (size, 0, "")]):
        if end > following:
            raise UserError(f"{path}: the storage {name} overlaps what follows it")
    return starts


def _check_entry(path: Path, entry: zipfile.ZipInfo, storage: Storage) -> None:
    """Raise UserError unless an entry of the zip is the plain bytes of the storage."""
    name = entry.filename
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise UserError(
            f"{path}: the storage {name} is compressed or encrypted; torch.save does neither"
        )
    size = storage.count * storage.dtype.itemsize
    if entry.file_size != size or entry.compress_size != size:
        raise UserError(
            f"{path}: the storage {name} has {entry.file_size} bytes, "
            f"not {storage.count} x {storage.dtype.itemsize}"
        )


def _place(what: str, tensor: Strided, start: int) -> Place:
    """The position of a tensor in a storage that starts at byte `start`.

    Raises UserError if the view exceeds its storage or contains an element twice.
    """
    storage, offset, shape, strides = tensor
    size = prod(shape)
    last = sum((n - 1) * stride for n, stride in zip(shape, strides)) if size else -1
    if size and offset + last >= storage.count:
        raise UserError(
            f"{what} reaches to element {offset + last} of a storage of {storage.count}"
        )
    # Each stride must exceed the extent of all smaller ones.
    extent = 0
    for stride, n in sorted((stride, n) for n, stride in zip(shape, strides) if n > 1):
        if size and stride <= extent:
            raise UserError(
                f"{what} contains elements of its storage more than once "
                f"(shape {shape}, strides {strides})"
            )
        extent += (n - 1) * stride
    return Place(start + offset * storage.dtype.itemsize, last + 1, storage.dtype, shape, strides)
