"""The folder of a run: it belongs to one config, which a resumed run must match.

Read next: train.py.
"""

import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from emu_jax import config
from emu_jax.config import UserError
from emu_jax.files import atomic_write

log = logging.getLogger(__name__)

# Fields in which a resumed run may differ from the one that wrote the checkpoint: hosts and
# devices, cadence, logging, what to do about bad data.
MAY_DIFFER = (
    "workdir",
    "mesh.",
    "checkpoint.every",
    "checkpoint.keep",
    "log.",
    "profile.",
    "compile_cache",
    "drawing.",
    "eval.every",
    "eval.batches",
    "eval.tasks",
    "data.prefetch",
    "data.workers",
    "data.readers",
    "data.patience",
    "data.retries",
    "data.max_bad_share",
    "data.unreadable",
)
# The most differing fields that an error message names.
NAMED = 4


def check_workdir(workdir: Path, c: ConfigDict) -> None:
    """Create the workdir if needed, and check that it may be used for `c`.

    Raises UserError if the workdir is not writable, or belongs to a different config; the error
    then names the fields that differ.
    """
    path = workdir / "config.json"
    if path.exists():
        try:
            old = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(
                f"{path} is damaged: {error}; every checkpoint in {workdir} holds the config too"
            ) from error
        check_same_config(f"workdir {workdir}", old, config.to_dict(c))
    if jax.process_index() == 0:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            probe = workdir / "config.part"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise _not_writable(workdir, error) from error


def remove_if_empty(workdir: Path) -> None:
    """Remove the workdir of a run that ended in an error before it wrote anything."""
    if jax.process_index() == 0:
        with suppress(OSError):
            workdir.rmdir()


def write_config(workdir: Path, values: dict[str, Any]) -> None:
    """Write the config of a run to its workdir.

    Call this after everything that the config names was found, because from then on the workdir
    belongs to this config.
    """
    try:
        with atomic_write(workdir / "config.json") as file:
            file.write(json.dumps(values, indent=1) + "\n")
    except OSError as error:
        raise _not_writable(workdir, error) from error


def check_same_config(owner: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise UserError, naming the fields, if `new` differs from `old` outside MAY_DIFFER.

    Fields added since `old` was written cause only a warning, because their defaults leave a run
    unchanged. owner: what the old config belongs to, for the message.
    """
    old = _flatten(old)
    new = _flatten(new)
    added = [key for key in sorted(new.keys() - old.keys()) if not key.startswith(MAY_DIFFER)]
    if added:
        log.warning(
            "%s was written before these fields existed; this config's values are used: %s",
            owner,
            ", ".join(added),
        )
    differ = [
        key for key in sorted(old) if old[key] != new.get(key) and not key.startswith(MAY_DIFFER)
    ]
    if differ:
        changes = [f"{key} was {old[key]!r} and is {new.get(key)!r}" for key in differ[:NAMED]]
        more = f" and {len(differ) - NAMED} more" if len(differ) > NAMED else ""
        raise UserError(
            f"{owner} has a different config: {', '.join(changes)}{more}; choose another workdir"
        )


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a.b": leaf} of a nested dict."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _not_writable(workdir: Path, error: OSError) -> UserError:
    return UserError(f"cannot write into the workdir {workdir}: {error.strerror}")
