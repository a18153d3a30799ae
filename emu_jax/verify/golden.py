"""Golden files: outputs of reference code at tiny sizes, and a rule for the weights.

Read next: tests/golden/README.md for the contents of the files; emu.py for the comparison.
"""

import json
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from emu_jax.config import UserError


class Quantity(NamedTuple):
    name: str
    # Largest error relative to the reference's largest absolute value; None: not covered.
    error: float | None
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error is not None and self.error <= self.tolerance


def load(path: str) -> dict[str, np.ndarray]:
    """Read the arrays of a golden file; raise UserError if it is missing or damaged."""
    if not Path(path).is_file():
        raise UserError(f"no golden file {path!r}")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path}: not a readable .npz of plain arrays ({str(error).splitlines()[0]})"
        ) from error


def weights(file: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Make the reference code's tensors from their names, shapes and the file's seed."""
    out = {}
    for name, shape in zip(
        map(str, file["parameter_names"]),
        map(json.loads, map(str, file["parameter_shapes"])),
        strict=True,
    ):
        x = (
            np.random.RandomState((zlib.crc32(name.encode()) + int(file["seed"])) % 2**32)
            .standard_normal(shape)
            .astype(np.float32)
        )
        if len(shape) == 1:
            x = np.float32(0.1) * x + np.float32(name.endswith("weight"))
        elif "embed_tokens" in name:
            x = np.float32(0.5) * x
        else:
            x = x / np.float32(np.sqrt(shape[-1] if len(shape) == 2 else np.prod(shape[1:])))
        if name.endswith("lm_head.weight"):
            x[2] *= np.float32(file["eos_row_scale"])
        out[name] = x
    return out


def compare(name: str, reference, ours, tolerance: float) -> Quantity:
    """Compare our value with the file's; raise UserError if their shapes differ."""
    reference = np.asarray(reference, np.float64)
    ours = np.asarray(ours, np.float64)
    if reference.shape != ours.shape:
        raise UserError(
            f"golden file: {name} has shape {reference.shape}, its config makes {ours.shape}"
        )
    error = np.abs(reference - ours).max(initial=0.0) / max(
        np.abs(reference).max(initial=0.0), 1e-30
    )
    return Quantity(name, float(error) if np.isfinite(error) else float("inf"), tolerance)
