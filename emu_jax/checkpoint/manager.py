"""The checkpoints of one run: when they are saved, restored and removed.

Read next: loop.py, which saves, and train.py, which restores.
"""

import dataclasses
import logging
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from emu_jax import processes, tree
from emu_jax.checkpoint.format import (
    Metadata,
    describe,
    flatten,
    leaf_name,
    load_metadata,
    make_manifest,
    orbax_context,
    root_cause,
)
from emu_jax.checkpoint.paths import complete_steps, is_complete, resolve
from emu_jax.checkpoint.read import check_arrays, load_arrays, read_newest
from emu_jax.config import UserError
from emu_jax.files import one_line

log = logging.getLogger(__name__)


class CheckpointManager:
    """Saves and restores the states of a run.

    Keeps the last `keep` steps. Also keeps every step that is a multiple of `keep_every` forever
    (0: none). A state is any dataclass with the fields `trainable` and `frozen` (nested dicts),
    `ema` (a nested dict or None), and further fields of any kind (step, opt_state, ...). All
    processes of a run must call the same methods in the same order.
    """

    def __init__(self, workdir: str, *, keep: int, keep_every: int):
        if keep < 1 or keep_every < 0:
            raise UserError(
                f"checkpoint.keep={keep} must be at least 1 "
                f"and checkpoint.keep_every={keep_every} at least 0"
            )
        self._root = resolve(workdir) / "checkpoints"
        self._keep = keep
        self._keep_every = keep_every
        self._saving: tuple[int, ocp.AsyncResponse] | None = None
        # The step that was saved or restored last.
        self._current = -1
        # Damaged steps after the restored one, which do not count among the last `keep`.
        self._abandoned: set[int] = set()

    def save(self, step: int, state: Any, data: dict, config: dict, *, wait: bool = False) -> None:
        """Save a state, the data pipeline's state and the config (both JSON-able).

        Does nothing if `step` was the last to be saved or restored. Returns once the arrays are
        copied to the host, so that the state may be donated. With `wait`, returns once everything
        is on disk. Raises UserError if this save fails, or if the previous save has failed in the
        background.
        """
        self.wait()
        if step == self._current:
            return
        self._remove_old()
        # In a bucket, an unfinished save already has its final name. Wait until process 0 has
        # removed it: if only some processes saw it, they would deadlock.
        processes.allgather_json(None)
        parts = _split_state(state)
        arrays = {name: describe(part) for name, part in parts.items()}
        manifest = make_manifest(arrays, data, config)
        content = {**parts, "data": data, "config": config, "manifest": manifest}
        try:
            with orbax_context(parts):
                response = ocp.save_checkpointables_async(
                    self._root / str(step), content, overwrite=True
                )
        # Errors of the disk come from Orbax, TensorStore or Python and share no class.
        except Exception as error:
            raise self._save_error(step, error) from error
        self._saving = (step, response)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait for the save in the background. Raises UserError if it failed."""
        if self._saving is None:
            return
        step, response = self._saving
        try:
            response.result()
        except Exception as error:
            self._saving = None
            raise self._save_error(step, error) from error
        self._saving = None
        self._current = step
        self._abandoned.discard(step)
        self._remove_old()

    def close(self) -> None:
        """Wait for the save in the background; call this last."""
        self.wait()

    def restore(
        self, abstract_state: Any, step: int | None = None
    ) -> tuple[int, Any, dict, dict] | None:
        """(step, state, data, config) of the newest intact step, or of `step`.

        None if nothing was saved. abstract_state: the state with ShapeDtypeStructs for its
        arrays; their shardings decide where the arrays go, on any mesh. Values are restored bit for
        bit. A damaged step is skipped with a warning. Raises UserError if no step is intact, or if
        the shape or dtype of a leaf differs from that in `abstract_state`.
        """
        self.wait()
        if step is None and not processes.allgather_json(complete_steps(self._root))[0]:
            return None
        abstract = _split_state(abstract_state)

        def load(path: epath.Path) -> tuple[Metadata, dict[str, Any]]:
            metadata = load_metadata(path)
            check_arrays(metadata, abstract)
            return metadata, load_arrays(metadata, abstract)

        metadata, parts = read_newest(self._root, step, load)
        self._current = metadata.step
        later = [other for other in complete_steps(self._root) if other > metadata.step]
        self._abandoned = set(later)
        state = _join_state(abstract_state, parts)
        return metadata.step, state, metadata.data, metadata.config

    def _save_error(self, step: int, error: Exception) -> UserError:
        self._remove_old()
        return UserError(
            f"checkpoint {self._root / str(step)} could not be saved: "
            f"{one_line(root_cause(error))}; the earlier ones are unchanged"
        )

    def _remove_old(self) -> None:
        """Remove what killed or failed saves left behind, and steps that need not be kept."""
        if jax.process_index() != 0 or not self._root.is_dir():
            return
        unfinished = [
            path
            for path in self._root.iterdir()
            if ".orbax-checkpoint-tmp" in path.name
            or (path.name.isdigit() and not is_complete(path))
        ]
        past = [
            step
            for step in complete_steps(self._root)
            if step <= self._current and step not in self._abandoned
        ]
        old = [
            self._root / str(step)
            for step in past[: -self._keep]
            if not (self._keep_every and step % self._keep_every == 0)
        ]
        for path in unfinished + old:
            try:
                path.rmtree()
            # Only warn: the run can continue although the folder is still there.
            except OSError as error:
                log.warning("cannot remove %s: %s", path, error)


def _split_state(state: Any) -> dict[str, Any]:
    """Split a state into the parts of a step; the inverse of `_join_state`."""
    rest = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    parts = {
        "params": tree.merge(rest.pop("trainable"), rest.pop("frozen")),
        "ema": rest.pop("ema"),
        "optimizer": rest,
    }
    return {name: part for name, part in parts.items() if part is not None}


def _join_state(like: Any, parts: dict[str, Any]) -> Any:
    """Join the parts of a step into a state, with parameters split as in `like`."""
    params = flatten(parts["params"])

    def pick(part: tree.Tree) -> tree.Tree:
        return jax.tree.map_with_path(lambda path, _: params[leaf_name(path)], part)

    return dataclasses.replace(
        like,
        trainable=pick(like.trainable),
        frozen=pick(like.frozen),
        ema=parts.get("ema"),
        **parts["optimizer"],
    )
