"""Checkpoints: DIR/checkpoints/<step>/, in a folder or bucket, written by Orbax in the background,
read back onto any mesh.

A step has parts that can be read alone: `params` (trainable and frozen leaves as one tree, so that
another split of them finds everything), `optimizer` (the rest of the state), `ema` where there is
one, and as JSON `data`, `config` and `manifest`. The manifest holds dtype, shape and a sum over the
bits of every array: TensorStore notices a missing or shortened file, but hands out flipped bits as
if nothing had happened. Read next: loop.py.
"""

import dataclasses
import json
import logging
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from etils import epath
from orbax.checkpoint import v1 as ocp

from emu_jax import processes, tree
from emu_jax.config import UserError

log = logging.getLogger(__name__)

# Orbax logs every file at INFO, and each thread's traceback at ERROR, asyncio its failed tasks:
# what matters reaches us as an exception.
logging.getLogger("absl").addFilter(lambda record: "/orbax/" not in record.pathname)
logging.getLogger("asyncio").addFilter(lambda record: "never retrieved" not in record.getMessage())


# bytes of the largest chunk of an array that is written by slices
CHUNK = 2**25
# bytes: an array's copies each write a share of at least so many, or one of them writes all; each
# share is a program of its own
SPLIT = 2**20
# bytes that Orbax reads or writes at a time, where no array is larger: else it might hold the state
# twice
UNDER_WAY = 2**31


class CheckpointManager:
    """The checkpoints of a run: the last `keep` steps, and every `keep_every`-th for good (0:
    none).

    A state is any dataclass with the fields `trainable`, `frozen` (nested dicts), `ema` (nested
    dict or None), and others of any kind (step, opt_state, ...). All processes of a run call the
    same methods in the same order.
    """

    def __init__(self, workdir: str, *, keep: int, keep_every: int):
        if keep < 1 or keep_every < 0:
            raise UserError(
                f"checkpoint.keep={keep} must be at least 1 and checkpoint.keep_every={keep_every} at least 0"
            )
        self._root = _path(workdir) / "checkpoints"
        self._keep = keep
        self._keep_every = keep_every
        self._saving: tuple[int, ocp.AsyncResponse] | None = None
        # the step saved or restored last
        self._current = -1
        # steps after the restored one: damaged, they must not crowd out whole ones
        self._abandoned: set[int] = set()

    def save(self, step: int, state: Any, data: dict, config: dict, *, wait: bool = False) -> None:
        """Saves a state, the data's state and the config (both JSON-able); a step that was just
        saved or restored is not saved again.

        Returns once the arrays are copied to the host, so the state may be donated; with `wait`,
        once all is on disk. Raises UserError when this save, or the one before it that ran in the
        background, does not succeed.
        """
        self.wait()
        if step == self._current:
            return
        self._tidy()
        # what is half saved in a bucket has the step's own name: all must find it gone, or they
        # wait for one another
        processes.allgather_json(None)
        parts = _parts(state)
        manifest = {
            "arrays": {name: _describe(part) for name, part in parts.items()},
            "json": {"data": _crc(data), "config": _crc(config)},
        }
        try:
            with _context(parts):
                self._saving = (
                    step,
                    ocp.save_checkpointables_async(
                        self._root / str(step),
                        {**parts, "data": data, "config": config, "manifest": manifest},
                        overwrite=True,
                    ),
                )
        # of the disk, from Orbax, TensorStore or Python: they have no class in common
        except Exception as error:
            raise self._unsaved(step, error) from error
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until the save in the background is done. Raises UserError when it did not succeed."""
        if self._saving is None:
            return
        step, saving = self._saving
        try:
            saving.result()
        except Exception as error:
            self._saving = None
            raise self._unsaved(step, error) from error
        self._saving = None
        self._current = step
        self._abandoned.discard(step)
        self._tidy()

    def close(self) -> None:
        """As `wait`: the last thing a run calls."""
        self.wait()

    def latest(self) -> int | None:
        """The newest step that looks whole (its small files are read, its arrays are not); None
        where there is none at all.
        """
        self.wait()
        return _newest(self._root, None, _notes)[0] if _steps(self._root) else None

    def restore(
        self, abstract_state: Any, step: int | None = None
    ) -> tuple[int, Any, dict, dict] | None:
        """(step, state, data, config) of the newest whole step, or of `step`; None where there is
        no checkpoint at all.

        abstract_state: the state with ShapeDtypeStructs for arrays; their shardings say where the
        arrays are put, on whatever mesh. Values come back bit for bit. A damaged step is passed
        over with a warning that names it. Raises UserError when no step is whole, and when a leaf's
        shape or dtype is another than `abstract_state` wants.
        """
        self.wait()
        if step is None and not processes.allgather_json(_steps(self._root))[0]:
            return None
        abstract = _parts(abstract_state)

        def read(path):
            notes = _notes(path)
            _check(path, abstract, notes["manifest"]["arrays"])
            return _load(path, abstract, notes["manifest"]["arrays"]), notes

        step, (parts, notes) = _newest(self._root, step, read)
        self._current = step
        self._abandoned = {other for other in _steps(self._root) if other > step}
        return step, _join(abstract_state, parts), notes["data"], notes["config"]

    def _unsaved(self, step: int, error: Exception) -> UserError:
        self._tidy()
        return UserError(
            f"checkpoint {self._root / str(step)} could not be saved: {_reason(error)}; the earlier ones are as they were"
        )

    def _tidy(self) -> None:
        """Removes what a killed or failed save left, and the steps that nobody wants to keep."""
        if jax.process_index() != 0 or not self._root.is_dir():
            return
        half = [
            path
            for path in self._root.iterdir()
            if ".orbax-checkpoint-tmp" in path.name or (path.name.isdigit() and not _ended(path))
        ]
        past = [
            step
            for step in _steps(self._root)
            if step <= self._current and step not in self._abandoned
        ]
        old = [
            step
            for step in past[: -self._keep]
            if not (self._keep_every and step % self._keep_every == 0)
        ]
        for path in (*half, *(self._root / str(step) for step in old)):
            try:
                path.rmtree()
            # no reason to stop a run
            except OSError as error:
                log.warning("cannot remove %s: %s", path, error)


def latest_step(directory: str) -> int:
    """The step of the newest whole checkpoint in a run's workdir, or of the one that `directory`
    is. Raises UserError when there is none.
    """
    return _newest(*_locate(directory, None), _notes)[0]


def read_config(directory: str, step: int | None = None) -> dict:
    """The config in the newest whole checkpoint. directory: a run's workdir, or one step,
    workdir/checkpoints/1000.

    Raises UserError when there is none.
    """
    return _newest(*_locate(directory, step), _notes)[1]["config"]


def param_shapes(directory: str, step: int | None = None) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter in the newest whole checkpoint by its path; no array is read. Raises
    UserError when there is none.
    """
    arrays = _newest(*_locate(directory, step), _notes)[1]["manifest"]["arrays"]
    return {path: tuple(shape) for path, (_, shape, _) in arrays["params"].items()}


def fingerprint(directory: str, tower: str) -> int:
    """Of the bits of a tower's parameters in the newest whole checkpoint, from what its manifest
    says of them: another one for other weights.
    """
    arrays = _newest(*_locate(directory, None), _notes)[1]["manifest"]["arrays"]["params"]
    return _crc({path: told for path, told in arrays.items() if path.startswith(f"{tower}/")})


def restore_params(
    directory: str,
    abstract_params: tree.Tree | None = None,
    *,
    step: int | None = None,
    ema: bool = False,
) -> tree.Tree:
    """The parameters in the newest whole checkpoint, and nothing else of it: no optimizer state is
    read.

    directory: a run's workdir, or one step of it. abstract_params: nested dict of ShapeDtypeStructs
    with shardings; it may be a part of what was saved (a tower), and another dtype is cast to.
    None: everything, as NumPy arrays on the host. ema: where a leaf has a moving average, that one.
    Raises UserError for no whole checkpoint, a missing leaf, another shape.
    """

    def read(path):
        arrays = _notes(path)["manifest"]["arrays"]
        if ema and "ema" not in arrays:
            raise UserError(
                f"{path} has no moving average of the parameters: it was trained with optim.ema=0"
            )
        wanted = abstract_params
        # np.empty costs nothing until it is written to
        if wanted is None:
            wanted = tree.unflatten(
                {
                    leaf: np.empty(shape, jnp.dtype(dtype))
                    for leaf, (dtype, shape, _) in arrays["params"].items()
                }
            )
        averaged = {leaf: ema and leaf in arrays["ema"] for leaf, _ in tree.leaves(wanted)}
        parts = dict(
            zip(("ema", "params"), tree.split(wanted, tree.unflatten(averaged)), strict=True)
        )
        parts = {name: part for name, part in parts.items() if part}
        _check(path, parts, arrays, partial=True)
        return tree.merge(*_load(path, parts, arrays).values())

    return _newest(*_locate(directory, step), read)[1]


class ParamReader:
    """The parameters in the newest whole checkpoint, read a leaf or a layer of a stacked leaf at a
    time.
    """

    def __init__(self, directory: str, step: int | None = None, *, ema: bool = False):
        """ema: where a leaf has a moving average, that one. Raises UserError for no whole
        checkpoint, and for one without averages.
        """
        root, step = _locate(directory, step)
        number, notes = _newest(root, step, _notes)
        self._where = root / str(number)
        arrays = notes["manifest"]["arrays"]
        if ema and "ema" not in arrays:
            raise UserError(
                f"{self._where} has no moving average of the parameters: it was trained with optim.ema=0"
            )
        averaged = arrays["ema"] if ema else {}
        described = arrays["params"] | averaged
        self.config: dict = notes["config"]
        self.shapes = {
            path: (jnp.dtype(dtype), tuple(shape)) for path, (dtype, shape, _) in described.items()
        }
        self._sums = {path: total for path, (_, _, total) in described.items()}
        self._read: dict[str, int] = {}
        self._store = cache(
            lambda path: ts.open(
                _array_spec(self._where, path, "ema" if path in averaged else "params"), open=True
            ).result()
        )

    def read(self, path: str, layer: int | None) -> np.ndarray:
        """The leaf, or its `layer`-th slice. Raises UserError where it cannot be read."""
        try:
            array = (
                (self._store(path) if layer is None else self._store(path)[layer]).read().result()
            )
        # all of TensorStore's
        except ValueError as error:
            raise UserError(f"{self._where} is damaged: {_reason(error)}") from error
        self._read[path] = (self._read.get(path, 0) + _sum_of_slice(array)) % 2**32
        return array

    def check(self) -> None:
        """Raises UserError for a leaf that was read, each part once, and is not what was saved."""
        if changed := [path for path, total in self._read.items() if total != self._sums[path]]:
            raise UserError(
                f"{self._where} is damaged: the array {changed[0]!r} has changed since it was saved"
            )


@contextmanager
def param_writer(
    workdir: str, params: dict[str, jax.ShapeDtypeStruct], stacked: set[str], config: dict
) -> Iterator[Callable[[str, int | None, np.ndarray], None]]:
    """Step 0 of a new workdir, with parameters only, written a slice at a time by `write(path,
    layer or None, array)`, each once: what is larger than the host's memory is never held. It is
    there when the context ends, whole or not at all.

    params: flat. stacked: leaves that come by layer. Raises UserError where there is a checkpoint
    already and where the disk is full.
    """
    root = _path(workdir) / "checkpoints"
    if _steps(root):
        raise UserError(f"{root} holds a checkpoint already; choose another directory")
    # what CheckpointManager clears away, should this be killed
    half = root / "0.orbax-checkpoint-tmp"
    sums = dict.fromkeys(params, 0)

    def write(path: str, layer: int | None, array: np.ndarray) -> None:
        (stores[path] if layer is None else stores[path][layer]).write(array).result()
        sums[path] = (sums[path] + _sum_of_slice(array)) % 2**32

    try:
        notes = {"data": {}, "config": config, "manifest": {}}
        # Orbax writes its own notes, of arrays with one element
        with _context():
            ones = {path: jnp.zeros((1,) * len(x.shape), x.dtype) for path, x in params.items()}
            ocp.save_checkpointables(half / "0", {"params": tree.unflatten(ones), **notes})
        stores = {
            path: ts.open(
                _array_spec(half / "0", path) | _layout(x, path in stacked),
                create=True,
                delete_existing=True,
            ).result()
            for path, x in params.items()
        }
        _set_shapes(half / "0" / "params", {path: list(x.shape) for path, x in params.items()})
        yield write
        arrays = {path: (str(x.dtype), list(x.shape), sums[path]) for path, x in params.items()}
        manifest = {
            "arrays": {"params": arrays},
            "json": {name: _crc(notes[name]) for name in ("data", "config")},
        }
        (half / "0" / "manifest" / "data.json").write_text(json.dumps(manifest))
        (half / "0").rename(root / "0")
    # TensorStore's and the disk's
    except (ValueError, OSError) as error:
        raise UserError(
            f"{root / '0'} could not be written: {_reason(error)}; nothing is left of it"
        ) from error
    finally:
        half.rmtree(missing_ok=True)
        for folder in (root, root.parent):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _array_spec(step: epath.Path, path: str, part: str = "params") -> dict:
    """TensorStore's words for where Orbax keeps an array."""
    base = str(step / part)
    store = {
        "driver": "ocdbt",
        "base": f"{base if '://' in base else f'file://{base}'}/",
        "path": path.replace("/", ".") + "/",
    }
    return {"driver": "zarr3", "kvstore": store}


def _layout(x: jax.ShapeDtypeStruct, stacked: bool) -> dict:
    """Chunks within one layer, of at most CHUNK bytes, so that a host that wants a shard reads
    little else.
    """
    chunk = [max(length, 1) for length in ((1, *x.shape[1:]) if stacked else x.shape)]
    while np.prod(chunk) * x.dtype.itemsize > CHUNK and max(chunk) % 2 == 0:
        chunk[chunk.index(max(chunk))] //= 2
    # Orbax takes a chunk that is not there for a damage, not for zeros
    return {
        "store_data_equal_to_fill_value": True,
        "metadata": {
            "shape": list(x.shape),
            "data_type": str(x.dtype),
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        },
    }


def _set_shapes(params: epath.Path, shapes: dict[str, list[int]]) -> None:
    """The arrays' true shapes in Orbax's notes."""
    tree_notes = json.loads((params / "_METADATA").read_text())
    for entry in tree_notes["tree_metadata"].values():
        entry["value_metadata"]["write_shape"] = shapes[
            "/".join(key["key"] for key in entry["key_metadata"])
        ]
    (params / "_METADATA").write_text(json.dumps(tree_notes))
    for file in (params / "array_metadatas").iterdir():
        array_notes = json.loads(file.read_text())
        for entry in array_notes["array_metadatas"]:
            shape = shapes[entry["array_metadata"]["param_name"].replace(".", "/")]
            entry["array_metadata"] |= {"write_shape": shape, "chunk_shape": shape}
        file.write_text(json.dumps(array_notes))


def _sum_of_slice(array: np.ndarray) -> int:
    """As `_sums`, of an array on the host."""
    return int(np.sum(array.view(f"u{array.dtype.itemsize}"), dtype=np.uint32))


def _newest(
    root: epath.Path, step: int | None, read: Callable[[epath.Path], Any]
) -> tuple[int, Any]:
    """(step, read(its path)) for `step`, or for the newest step that can be read, by every process;
    warns of those passed over.
    """
    steps = processes.allgather_json(_steps(root))[0]
    if not steps or step not in (None, *steps):
        raise UserError(
            f"no checkpoint{'' if step is None else f' of step {step}'} in {root}"
            + (f"; there are {', '.join(map(str, steps))}" if steps else "")
        )
    for number in reversed(steps) if step is None else [step]:
        found = None
        reason = ""
        try:
            found = read(root / str(number))
        # not damage, but another model than the caller's
        except UserError:
            raise
        # Orbax and TensorStore raise KeyError, ValueError, OSError, JSONDecodeError, ...
        except Exception as error:
            reason = _reason(error)
        if not (reasons := list(filter(None, processes.allgather_json(reason)))):
            return number, found
        found = None
        reason = reasons[0]
        log.warning(
            "checkpoint %s is damaged or incomplete and is passed over: %s",
            root / str(number),
            reason,
        )
    raise UserError(f"no whole checkpoint in {root}; {number} is damaged: {reason}")


def _locate(directory: str, step: int | None) -> tuple[epath.Path, int | None]:
    """(the folder of steps, step) of a workdir or of one step's own folder."""
    path = _path(directory)
    if not path.is_dir():
        raise UserError(
            f"no directory {str(directory)!r}; give a run's workdir, or one of its checkpoints, workdir/checkpoints/1000"
        )
    return (
        (path.parent, int(path.name))
        if path.parent.name == "checkpoints" and path.name.isdigit()
        else (path / "checkpoints", step)
    )


def _path(directory: str) -> epath.Path:
    """Raises UserError for a bucket that cannot be reached, and for one that is not Google's: how
    Orbax ends a save there is not known to us.
    """
    if "://" not in str(directory):
        return epath.Path(directory).resolve()
    if not str(directory).startswith("gs://"):
        raise UserError(
            f"{directory!r} is no place for checkpoints: they go into a folder, or into a bucket gs://NAME/..."
        )
    path = epath.Path(directory)
    try:
        # Or gcsfs would answer from listings as old as the process: others write and remove, too.
        import fsspec.config

        fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
        path.exists()
    # a package that is missing, a name, a right, the network: each with exceptions of its own
    except Exception as error:
        raise UserError(
            f"{directory!r} cannot be reached: {_reason(error)} (gs:// needs requirements-gcs.txt, and credentials)"
        ) from error
    return path


def _steps(root: epath.Path) -> list[int]:
    return (
        sorted(int(path.name) for path in root.iterdir() if path.name.isdigit() and _ended(path))
        if root.is_dir()
        else []
    )


def _ended(path: epath.Path) -> bool:
    """Whether a step's folder is of a save that has ended. A bucket cannot rename: there it is so
    with the last file that Orbax writes.
    """
    return "://" not in str(path) or (path / "commit_success.txt").exists()


def _parts(state: Any) -> dict[str, Any]:
    """A state as the parts that it is saved in; inverse of `_join`."""
    rest = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    parts = {
        "params": tree.merge(rest.pop("trainable"), rest.pop("frozen")),
        "ema": rest.pop("ema"),
        "optimizer": rest,
    }
    return {name: part for name, part in parts.items() if part is not None}


def _join(like: Any, parts: dict[str, Any]) -> Any:
    params = _flat(parts["params"])
    trainable, frozen = (
        jax.tree.map_with_path(lambda path, _: params[_name(path)], part)
        for part in (like.trainable, like.frozen)
    )
    return dataclasses.replace(
        like, trainable=trainable, frozen=frozen, ema=parts.get("ema"), **parts["optimizer"]
    )


def _notes(path: epath.Path) -> dict[str, Any]:
    """{"data", "config", "manifest"} of a step. Raises whatever damage brings about."""
    with _context():
        notes = {
            name: ocp.load_checkpointables(path, {name: None})[name]
            for name in ("data", "config", "manifest")
        }
    for name, crc in notes["manifest"]["json"].items():
        if _crc(notes[name]) != crc:
            raise ValueError(f"the contents of {name!r} have changed since they were saved")
    return notes


def _load(path: epath.Path, abstract: dict[str, Any], arrays: dict[str, dict]) -> dict[str, Any]:
    """The parts like `abstract` of a step, held to the manifest's sums. Raises whatever damage
    brings about.
    """
    # otherwise Orbax looks for the devices of the saving run
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def placed(leaf):
        return (
            leaf.update(sharding=here)
            if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is None
            else leaf
        )

    parts = {}
    # one by one: Orbax complains of the others when one fails
    for name, part in abstract.items():
        with _context(part):
            parts[name] = ocp.load_checkpointables(path, {name: jax.tree.map(placed, part)})[name]
        saved = arrays[name]
        uncast = {
            leaf: value
            for leaf, value in _flat(parts[name]).items()
            if str(value.dtype) == saved[leaf][0]
        }
        for leaf, total in _sums(uncast).items():
            if total != saved[leaf][2]:
                raise ValueError(f"the array {leaf!r} of {name!r} has changed since it was saved")
    return parts


def _check(
    path: epath.Path, abstract: dict[str, Any], arrays: dict[str, dict], partial: bool = False
) -> None:
    """UserError for a leaf that the checkpoint lacks or has in another shape; unless `partial`,
    also for another dtype or one too many.
    """
    for name, part in abstract.items():
        saved = arrays.get(name, {})
        wanted = _flat(part)
        for leaf, value in wanted.items():
            if leaf not in saved:
                raise UserError(
                    f"{path} has no {name} {leaf!r}; it was saved by another model, or with other rules or optimizer"
                )
            dtype, shape, _ = saved[leaf]
            if tuple(shape) != value.shape or (not partial and dtype != str(value.dtype)):
                raise UserError(
                    f"{name} {leaf!r} is {dtype}{shape} in {path}, but {value.dtype}{list(value.shape)} in this run's config"
                )
        extra = sorted(saved.keys() - wanted.keys())
        if extra and not partial:
            raise UserError(
                f"{path} has {name} {extra[0]!r}, which this run's config does not; it was saved with another"
            )


def _describe(part: Any) -> dict[str, tuple[str, list[int], int]]:
    """{path: (dtype, shape, sum of its bits)} of every array."""
    leaves = _flat(part)
    sums = _sums(leaves)
    return {
        leaf: (str(value.dtype), list(value.shape), sums[leaf]) for leaf, value in leaves.items()
    }


def _sums(leaves: dict[str, jax.Array | np.ndarray]) -> dict[str, int]:
    """Sum modulo 2^32 of the bit patterns of each one's elements. Addition there has no order, so
    it is the same on every mesh.
    """
    on_host = {leaf: _sum_of_slice(x) for leaf, x in leaves.items() if isinstance(x, np.ndarray)}
    on_devices = jax.device_get(
        _sums_of_bits({leaf: x for leaf, x in leaves.items() if leaf not in on_host})
    )
    return on_host | {leaf: int(total) for leaf, total in on_devices.items()}


@jax.jit
def _sums_of_bits(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """In one program: many under way at once were seen to wait for each other for ever, on more CPU
    devices than cores; and among several processes every program has connections of its own to
    make.
    """
    return {leaf: _sum_of_bits(x) for leaf, x in leaves.items()}


def _sum_of_bits(x: jax.Array) -> jax.Array:
    bits = x if x.dtype == bool else jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    return jnp.sum(bits, dtype=jnp.uint32)


def _crc(value: Any) -> int:
    # twice: as it will be read back
    return zlib.crc32(json.dumps(json.loads(json.dumps(value)), sort_keys=True).encode())


def _flat(part: Any) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(part)}


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _context(arrays: Any = ()) -> ocp.Context:
    registry = ocp.handlers.local_registry()
    # by itself Orbax takes a dict of numbers for a tree of arrays
    for name in ("data", "config", "manifest"):
        registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
    context = ocp.Context()
    context.checkpointables.registry = registry
    # where that fails, threads would wait 20 minutes for it
    context.asynchronous.create_directories_asynchronously = False
    context.array.saving.min_slice_bytes_for_replica_parallel = SPLIT
    # `_check` has compared the trees
    context.pytree.loading.partial_load = True
    # Orbax refuses an array of the limit's size or more
    largest = max((leaf.size for leaf in jax.tree.leaves(arrays)), default=0)
    # 4 a float32, cast or not
    context.memory.write_concurrent_bytes = context.memory.read_concurrent_bytes = max(
        UNDER_WAY, 8 * largest
    )
    return context


def _reason(error: BaseException) -> str:
    """One short line: the first cause's. A Ctrl-C that Orbax has wrapped is raised again."""
    while error.__cause__:
        error = error.__cause__
    if not isinstance(error, Exception):
        raise error
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[
        :300
    ]
