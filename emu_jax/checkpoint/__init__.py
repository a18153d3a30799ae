"""Checkpoints of runs: DIR/checkpoints/STEP, in a folder or a Google Cloud Storage bucket.

Orbax writes them in the background, and they can be read on any mesh. Read next: format.py (the
contents of a step), read.py, manager.py (the checkpoints of a run), slices.py (models larger than
the host's memory).
"""

from emu_jax.checkpoint.format import ArrayInfo, Metadata
from emu_jax.checkpoint.manager import CheckpointManager
from emu_jax.checkpoint.paths import split_step
from emu_jax.checkpoint.read import (
    fingerprint,
    latest_step,
    param_shapes,
    read_config,
    read_metadata,
    restore_params,
)
from emu_jax.checkpoint.slices import ParamReader, param_writer

__all__ = [
    "ArrayInfo",
    "CheckpointManager",
    "Metadata",
    "ParamReader",
    "fingerprint",
    "latest_step",
    "param_shapes",
    "param_writer",
    "read_config",
    "read_metadata",
    "restore_params",
    "split_step",
]
