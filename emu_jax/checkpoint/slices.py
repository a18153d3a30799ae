"""Parameters read and written a layer at a time, for models larger than the host's memory.

Orbax's arrays are zarr arrays in an OCDBT store, and TensorStore reads and writes parts of them.
Read next: weights/transfer.py, which imports and exports foreign weights.
"""

import base64
import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from etils import epath
from orbax.checkpoint import v1 as ocp

from emu_jax import tree
from emu_jax.checkpoint.format import (
    JSON_FILE,
    ArrayInfo,
    checksum,
    make_manifest,
    orbax_context,
    root_cause,
)
from emu_jax.checkpoint.paths import complete_steps, resolve
from emu_jax.checkpoint.read import ema_entries, read_metadata
from emu_jax.config import UserError
from emu_jax.files import one_line

MAX_CHUNK_BYTES = 2**25


class ParamReader:
    """Reads the parameters of a step one leaf or one layer at a time.

    Attributes: `config`, the run's config, and `shapes`, {path: (dtype, shape)}.
    """

    def __init__(self, directory: str, step: int | None = None, *, ema: bool = False):
        """Open the newest intact step, or `step`; no array is read yet.

        directory: as in `read_metadata`. ema: read the moving average of each leaf that has one.
        Raises UserError if every step is damaged, or if no moving average was saved.
        """
        metadata = read_metadata(directory, step)
        averaged = ema_entries(metadata) if ema else {}
        self._path = metadata.path
        self._entries = metadata.arrays["params"] | averaged
        self._read_sums: dict[str, int] = {}
        self.config: dict = metadata.config
        self.shapes = {
            path: (jnp.dtype(info.dtype), tuple(info.shape)) for path, info in self._entries.items()
        }

        context = ts.Context()

        @cache
        def open_array(path: str) -> ts.TensorStore:
            part = "ema" if path in averaged else "params"
            spec = _array_spec(self._path, path, part)
            return ts.open(spec, open=True, context=context).result()

        self._open_array = open_array

    def read(self, path: str, layer: int | None) -> np.ndarray:
        """Read a leaf, or its slice `layer`. Raises UserError if it cannot be read."""
        try:
            store = self._open_array(path)
            array = (store if layer is None else store[layer]).read().result()
        # TensorStore raises ValueError for every failure.
        except ValueError as error:
            raise UserError(f"{self._path} is damaged: {one_line(root_cause(error))}") from error
        self._read_sums[path] = (self._read_sums.get(path, 0) + checksum(array)) % 2**32
        return array

    def check(self) -> None:
        """Raise UserError if a leaf that was read completely has changed since it was saved.

        Every slice of a leaf must have been read exactly once.
        """
        for path, total in self._read_sums.items():
            if total != self._entries[path].checksum:
                raise UserError(
                    f"{self._path} is damaged: the array {path!r} has changed since it was saved"
                )


@contextmanager
def param_writer(
    workdir: str, params: dict[str, jax.ShapeDtypeStruct], stacked: set[str], config: dict
) -> Generator[Callable[[str, int | None, np.ndarray], None], None, None]:
    """Write step 0 of a new workdir, with parameters only, a leaf or a layer at a time.

    Yields write(path, layer or None, array), to be called once for each leaf or layer. The step
    appears atomically when the context exits; after an exception nothing is left. params: {path:
    shape and dtype}. stacked: paths of the leaves that are written by layer. Raises UserError if
    there is a checkpoint already, or if the disk is full.
    """
    root = resolve(workdir) / "checkpoints"
    if complete_steps(root):
        raise UserError(f"{root} holds a checkpoint already; choose another directory")
    # CheckpointManager removes a folder of this name, in case this process is killed.
    unfinished = root / "0.orbax-checkpoint-tmp"
    step = unfinished / "0"
    sums = dict.fromkeys(params, 0)

    def write(path: str, layer: int | None, array: np.ndarray) -> None:
        store = stores[path] if layer is None else stores[path][layer]
        store.write(array).result()
        sums[path] = (sums[path] + checksum(array)) % 2**32

    try:
        _write_orbax_metadata(step, params, config)
        # Create all arrays at once and in one context, so that TensorStore commits the metadata of
        # many arrays together.
        context = ts.Context()
        created = {
            path: _create_array(step, path, x, path in stacked, context)
            for path, x in params.items()
        }
        stores = {path: store.result() for path, store in created.items()}
        yield write
        entries = {
            path: ArrayInfo(str(x.dtype), list(x.shape), sums[path]) for path, x in params.items()
        }
        manifest = make_manifest({"params": entries}, {}, config)
        (step / "manifest" / JSON_FILE).write_text(json.dumps(manifest))
        step.rename(root / "0")
    # TensorStore raises ValueError.
    except (ValueError, OSError) as error:
        raise UserError(
            f"{root / '0'} could not be written: {one_line(root_cause(error))}; "
            "nothing is left of it"
        ) from error
    finally:
        unfinished.rmtree(missing_ok=True)
        for folder in (root, root.parent):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _write_orbax_metadata(
    step: epath.Path, params: dict[str, jax.ShapeDtypeStruct], config: dict
) -> None:
    """Let Orbax write a step with one small array, and describe all arrays like that one."""
    one, x = next(iter(params.items()))
    tiny = tree.unflatten({one: jnp.zeros((1,) * len(x.shape), x.dtype)})
    with orbax_context():
        ocp.save_checkpointables(
            step, {"params": tiny, "data": {}, "config": config, "manifest": {}}
        )

    tree_file = step / "params" / "_METADATA"
    tree_metadata = json.loads(tree_file.read_text())
    (entry,) = tree_metadata["tree_metadata"].values()
    entries = {}
    for path, x in params.items():
        keys = path.split("/")
        entries[str(tuple(keys))] = {
            "key_metadata": [entry["key_metadata"][0] | {"key": key} for key in keys],
            "value_metadata": entry["value_metadata"] | {"write_shape": list(x.shape)},
        }
    tree_file.write_text(json.dumps(tree_metadata | {"tree_metadata": entries}))

    sharding_file = step / "params" / "_sharding"
    (sharding,) = json.loads(sharding_file.read_text()).values()
    names = [base64.b64encode(path.replace("/", ".").encode()).decode() for path in params]
    sharding_file.write_text(json.dumps(dict.fromkeys(names, sharding)))

    for file in (step / "params" / "array_metadatas").iterdir():
        arrays = json.loads(file.read_text())
        array = arrays["array_metadatas"][0]["array_metadata"]
        arrays["array_metadatas"] = []
        for path, x in params.items():
            shape = list(x.shape)
            named = {"param_name": path.replace("/", "."), "write_shape": shape}
            described = {"array_metadata": array | named | {"chunk_shape": shape}}
            arrays["array_metadatas"].append(described)
        file.write_text(json.dumps(arrays))


def _create_array(
    step: epath.Path, path: str, x: jax.ShapeDtypeStruct, stacked: bool, context: ts.Context
) -> ts.Future[ts.TensorStore]:
    """Start to create an empty array that replaces the one that Orbax wrote.

    Its chunks lie within one layer and have at most MAX_CHUNK_BYTES, so that a host that needs one
    shard reads little else.
    """
    shape = (1, *x.shape[1:]) if stacked else x.shape
    chunk = [max(length, 1) for length in shape]
    while np.prod(chunk) * x.dtype.itemsize > MAX_CHUNK_BYTES and max(chunk) % 2 == 0:
        chunk[chunk.index(max(chunk))] //= 2
    metadata = {
        "shape": list(x.shape),
        "data_type": str(x.dtype),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
    }
    spec = _array_spec(step, path) | {
        "metadata": metadata,
        # Store chunks of zeros, too: Orbax treats a missing chunk as damage.
        "store_data_equal_to_fill_value": True,
    }
    return ts.open(spec, create=True, delete_existing=True, context=context)


def _array_spec(step: epath.Path, path: str, part: str = "params") -> dict:
    """TensorStore's specification of an array that Orbax has written."""
    base = str(step / part)
    url = base if "://" in base else f"file://{base}"
    store = {"driver": "ocdbt", "base": f"{url}/", "path": f"{path.replace('/', '.')}/"}
    return {"driver": "zarr3", "kvstore": store}
