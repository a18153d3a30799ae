"""Readers of a step: its metadata, its parameters, or any of its parts.

They read the newest intact step by default, and warn about the damaged steps that they skip. Read
next: manager.py.
"""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from emu_jax import processes, tree
from emu_jax.checkpoint.format import (
    ArrayInfo,
    Metadata,
    checksums,
    flatten,
    json_checksum,
    load_metadata,
    orbax_context,
    root_cause,
)
from emu_jax.checkpoint.paths import complete_steps, find_steps
from emu_jax.config import UserError
from emu_jax.files import one_line

log = logging.getLogger(__name__)

Result = TypeVar("Result")


def read_metadata(directory: str, step: int | None = None) -> Metadata:
    """The metadata of the newest intact step, or of `step`; no array is read.

    directory: a run's workdir, or one step, workdir/checkpoints/1000. Raises UserError if there is
    no such step.
    """
    root, step = find_steps(directory, step)
    return read_newest(root, step, load_metadata)


def latest_step(directory: str) -> int:
    """The number of the newest intact step; arguments and errors as in `read_metadata`."""
    return read_metadata(directory).step


def read_config(directory: str, step: int | None = None) -> dict:
    """The config that a step was trained with; arguments and errors as in `read_metadata`."""
    return read_metadata(directory, step).config


def param_shapes(directory: str, step: int | None = None) -> dict[str, tuple[int, ...]]:
    """{path: shape} of every parameter; arguments and errors as in `read_metadata`."""
    entries = read_metadata(directory, step).arrays["params"]
    return {path: tuple(info.shape) for path, info in entries.items()}


def fingerprint(directory: str, tower: str) -> int:
    """CRC-32 over a tower's parameters in the newest intact step; it changes when they do.

    Computed from the manifest: no array is read.
    """
    entries = read_metadata(directory).arrays["params"]
    return json_checksum(
        {path: info for path, info in entries.items() if path.startswith(f"{tower}/")}
    )


def restore_params(
    directory: str,
    abstract_params: tree.Tree | None = None,
    *,
    step: int | None = None,
    ema: bool = False,
) -> tree.Tree:
    """The parameters of the newest intact step, or of `step`, without the optimizer's state.

    directory: as in `read_metadata`. abstract_params: a nested dict of ShapeDtypeStructs with
    shardings; it may be a subtree, such as one tower, and parameters are cast to its dtypes. None
    means all parameters, as NumPy arrays on the host. ema: take the moving average of each leaf
    that has one. Raises UserError if every step is damaged, or if a leaf is missing or has a
    different shape.
    """

    def load(path: epath.Path) -> tree.Tree:
        metadata = load_metadata(path)
        averaged = ema_entries(metadata) if ema else {}
        wanted = abstract_params
        if wanted is None:
            # np.empty uses no memory until its pages are written.
            wanted = tree.unflatten(
                {
                    leaf: np.empty(info.shape, jnp.dtype(info.dtype))
                    for leaf, info in metadata.arrays["params"].items()
                }
            )
        is_averaged = tree.unflatten({leaf: leaf in averaged for leaf, _ in tree.leaves(wanted)})
        averages, others = tree.split(wanted, is_averaged)
        parts = {"ema": averages, "params": others}
        parts = {name: part for name, part in parts.items() if part}
        check_arrays(metadata, parts, partial=True)
        return tree.merge(*load_arrays(metadata, parts).values())

    root, step = find_steps(directory, step)
    return read_newest(root, step, load)


def ema_entries(metadata: Metadata) -> dict[str, ArrayInfo]:
    """The manifest's entries of the moving averages. Raises UserError if there are none."""
    if "ema" not in metadata.arrays:
        raise UserError(
            f"{metadata.path} has no moving average of the parameters: "
            "it was trained with optim.ema=0"
        )
    return metadata.arrays["ema"]


def read_newest(root: epath.Path, step: int | None, read: Callable[[epath.Path], Result]) -> Result:
    """Apply `read` to the path of `step`, or of the newest step that every process can read.

    Returns what `read` returns, and warns about each step that is skipped. For a damaged step,
    `read` may raise any exception. A UserError from `read` ends the search, because it means that
    the request is wrong. Raises UserError if no step can be read.
    """
    # Use the listing of process 0, because others may see that a save is complete a moment later.
    steps = processes.allgather_json(complete_steps(root))[0]
    if not steps:
        which = "" if step is None else f" of step {step}"
        raise UserError(f"no checkpoint{which} in {root}")
    if step is not None and step not in steps:
        there = ", ".join(map(str, steps))
        raise UserError(f"no checkpoint of step {step} in {root}; there are {there}")
    reason = ""
    number = -1
    for number in reversed(steps) if step is None else [step]:
        path = root / str(number)
        found = None
        reason = ""
        try:
            found = read(path)
        except UserError:
            raise
        # Orbax and TensorStore raise KeyError, ValueError, OSError, JSONDecodeError and others.
        except Exception as error:
            reason = one_line(root_cause(error))
        reasons = [reason for reason in processes.allgather_json(reason) if reason]
        if not reasons:
            assert found is not None
            return found
        # Free the arrays of this step before the next one is read.
        found = None
        reason = reasons[0]
        log.warning("skipping checkpoint %s, which is damaged or incomplete: %s", path, reason)
    raise UserError(f"no intact checkpoint in {root}; {number} is damaged: {reason}")


def check_arrays(metadata: Metadata, abstract: dict[str, Any], partial: bool = False) -> None:
    """Compare the parts that a caller wants with those of a step.

    Raises UserError if the step lacks a leaf or has it in a different shape. Unless `partial`, also
    raises UserError if a dtype differs or the step has a leaf that the caller does not want.
    """
    path = metadata.path
    for name, part in abstract.items():
        saved = metadata.arrays.get(name, {})
        wanted = flatten(part)
        for leaf, value in wanted.items():
            if leaf not in saved:
                raise UserError(
                    f"{path} has no {name} {leaf!r}; "
                    "it was saved by a different model, or with other rules or another optimizer"
                )
            info = saved[leaf]
            same_dtype = partial or info.dtype == str(value.dtype)
            if tuple(info.shape) != value.shape or not same_dtype:
                raise UserError(
                    f"{name} {leaf!r} is {info.dtype}{info.shape} in {path}, "
                    f"but {value.dtype}{list(value.shape)} in this run's config"
                )
        extra = sorted(saved.keys() - wanted.keys())
        if extra and not partial:
            raise UserError(
                f"{path} has {name} {extra[0]!r}, which this run's config does not have"
            )


def load_arrays(metadata: Metadata, abstract: dict[str, Any]) -> dict[str, Any]:
    """Read the parts `abstract` of a step. Damage raises exceptions of many classes.

    abstract: {part: tree of ShapeDtypeStructs or NumPy arrays}. Leaves that are not cast are
    compared with the manifest's checksums.
    """
    parts = {}
    # Read one part at a time: if all were read together and one failed, Orbax would report errors
    # about the other parts.
    for name, part in abstract.items():
        with orbax_context(part):
            wanted = {name: jax.tree.map(_with_sharding, part)}
            parts[name] = ocp.load_checkpointables(metadata.path, wanted)[name]
        saved = metadata.arrays[name]
        leaves = flatten(parts[name])
        uncast = {leaf: x for leaf, x in leaves.items() if str(x.dtype) == saved[leaf].dtype}
        for leaf, total in checksums(uncast).items():
            if total != saved[leaf].checksum:
                raise ValueError(f"the array {leaf!r} of {name!r} has changed since it was saved")
    return parts


def _with_sharding(leaf: Any) -> Any:
    """Place a ShapeDtypeStruct without a sharding on this process's first device.

    Without a sharding, Orbax would look for the devices of the run that saved the array.
    """
    if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is None:
        return leaf.update(sharding=jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    return leaf
