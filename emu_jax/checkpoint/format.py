"""The contents of a step's folder, and the checksums that reveal damage.

Each part can be read alone: `params` (trainable and frozen leaves in one tree, so that a run in
which other parameters train can read it), `ema` if there is one, `optimizer` (the rest of the
state), and the JSON files `data`, `config` and `manifest`. TensorStore reports a missing or
truncated file but silently returns flipped bits, hence the checksums in the manifest. Read next:
read.py.
"""

import json
import logging
import zlib
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

JSON_PARTS = ("data", "config", "manifest")
# The file in which Orbax writes each of these parts.
JSON_FILE = "data.json"
# If an array has at least this many bytes, each of its replicas writes a share of it. One replica
# writes a smaller array alone, because a program must be compiled for every share.
MIN_REPLICA_BYTES = 2**20
# Bytes that Orbax reads or writes at a time, unless one array is larger. Without a limit, the host
# might hold the state twice.
MAX_CONCURRENT_BYTES = 2**31


class ArrayInfo(NamedTuple):
    """The manifest's entry for one array. checksum: see `checksums`."""

    dtype: str
    shape: list[int]
    checksum: int


@dataclass(frozen=True)
class Metadata:
    """The JSON of one step: everything but the values of its arrays."""

    path: epath.Path
    step: int
    # State of the data pipeline.
    data: dict
    config: dict
    # {"params", "ema" or "optimizer": {path of a leaf: its entry}}.
    arrays: dict[str, dict[str, ArrayInfo]]


def load_metadata(path: epath.Path) -> Metadata:
    """Read the JSON of a step. If it is damaged, raises exceptions of many classes."""
    # Read the files directly: Orbax took 15 ms, and a command may read the JSON several times.
    content = {name: json.loads((path / name / JSON_FILE).read_text()) for name in JSON_PARTS}
    manifest = content["manifest"]
    for name, checksum in manifest["json"].items():
        if json_checksum(content[name]) != checksum:
            raise ValueError(f"the contents of {name!r} have changed since they were saved")
    arrays = {}
    for part, entries in manifest["arrays"].items():
        arrays[part] = {leaf: ArrayInfo(*entry) for leaf, entry in entries.items()}
    return Metadata(path, int(path.name), content["data"], content["config"], arrays)


def make_manifest(arrays: dict[str, dict[str, ArrayInfo]], data: dict, config: dict) -> dict:
    """The manifest of a step with these arrays and this JSON."""
    # Use plain tuples: a JSON encoder may turn named ones into objects.
    plain = {}
    for part, entries in arrays.items():
        plain[part] = {leaf: tuple(info) for leaf, info in entries.items()}
    return {
        "arrays": plain,
        "json": {"data": json_checksum(data), "config": json_checksum(config)},
    }


def describe(part: Any) -> dict[str, ArrayInfo]:
    """The manifest's entry for every array of a tree."""
    leaves = flatten(part)
    sums = checksums(leaves)
    return {
        leaf: ArrayInfo(str(value.dtype), list(value.shape), sums[leaf])
        for leaf, value in leaves.items()
    }


def checksums(leaves: dict[str, jax.Array | np.ndarray]) -> dict[str, int]:
    """Sum modulo 2^32 of the bit patterns of each array's elements.

    The order of the additions does not matter, so the sum is the same on every mesh.
    """
    on_host = {leaf: checksum(x) for leaf, x in leaves.items() if isinstance(x, np.ndarray)}
    on_devices = {leaf: x for leaf, x in leaves.items() if leaf not in on_host}
    sums = jax.device_get(_device_checksums(list(on_devices.values())))
    return on_host | {leaf: int(total) for leaf, total in zip(on_devices, sums, strict=True)}


def checksum(array: np.ndarray) -> int:
    """The checksum of an array: the sum, modulo 2^32, of the checksums of its slices."""
    return int(np.sum(array.view(f"u{array.dtype.itemsize}"), dtype=np.uint32))


@jax.jit
def _device_checksums(arrays: list[jax.Array]) -> list[jax.Array]:
    """`checksums` of arrays on devices, in one program.

    One program per array has deadlocked on machines with more CPU devices than cores, and in a run
    of several processes every program sets up connections of its own. The arrays are passed without
    their names, so that trees with the same shapes share a compiled program.
    """
    return [_device_checksum(x) for x in arrays]


def _device_checksum(x: jax.Array) -> jax.Array:
    bits = x if x.dtype == bool else jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    return jnp.sum(bits, dtype=jnp.uint32)


def json_checksum(value: Any) -> int:
    """CRC-32 of a value as it will be read back from JSON; a tuple counts as a list."""
    parsed = json.loads(json.dumps(value))
    return zlib.crc32(json.dumps(parsed, sort_keys=True).encode())


def flatten(part: Any) -> dict[str, Any]:
    """{"path/of/a/leaf": leaf} of any tree, such as an optimizer's state."""
    return {leaf_name(path): leaf for path, leaf in jax.tree.leaves_with_path(part)}


def leaf_name(path: tuple) -> str:
    """JAX's path of a leaf as one string with slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def orbax_context(arrays: Any = ()) -> ocp.Context:
    """Orbax's settings for reading or writing the tree `arrays`."""
    quiet_orbax()
    registry = ocp.handlers.local_registry()
    # By default Orbax treats a dict of numbers as a tree of arrays.
    for name in JSON_PARTS:
        registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
    context = ocp.Context()
    context.checkpointables.registry = registry
    # Create directories in the foreground: if that failed in the background, threads would wait 20
    # minutes for them.
    context.asynchronous.create_directories_asynchronously = False
    context.array.saving.min_slice_bytes_for_replica_parallel = MIN_REPLICA_BYTES
    # Let the caller load only some leaves; `read.check_arrays` has compared the trees.
    context.pytree.loading.partial_load = True
    # Orbax refuses an array that reaches the limit, so allow twice the largest array, at 4 bytes
    # per element because arrays may be cast.
    largest = max((leaf.size for leaf in jax.tree.leaves(arrays)), default=0)
    limit = max(MAX_CONCURRENT_BYTES, 8 * largest)
    context.memory.write_concurrent_bytes = limit
    context.memory.read_concurrent_bytes = limit
    return context


@cache
def quiet_orbax() -> None:
    """Drop Orbax's log records; its errors are also raised as exceptions.

    Orbax logs every file at INFO and the traceback of every thread at ERROR. asyncio also logs the
    tasks in which Orbax failed; these records are dropped, too.
    """
    logging.getLogger("absl").addFilter(lambda record: "/orbax/" not in record.pathname)
    logging.getLogger("asyncio").addFilter(
        lambda record: "never retrieved" not in record.getMessage()
    )


def root_cause(error: BaseException) -> Exception:
    """The exception that started a chain of causes.

    A KeyboardInterrupt that Orbax has wrapped in an exception of its own is raised again.
    """
    while error.__cause__:
        error = error.__cause__
    if not isinstance(error, Exception):
        raise error
    return error
