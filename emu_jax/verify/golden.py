"""Golden files: outputs of reference code at tiny sizes, with weights that follow a rule.

Read next: tests/golden/README.md for the contents of the files; emu.py for the comparison.
"""

import json
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from emu_jax.config import UserError
from emu_jax.files import one_line


class Quantity(NamedTuple):
    """A quantity of a golden file, and the error of our code's value."""

    name: str
    # Largest error relative to the largest absolute value of the reference; None: not covered.
    error: float | None
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error is not None and self.error <= self.tolerance


def load(path: str) -> dict[str, np.ndarray]:
    """Read the arrays of a golden file. Raises UserError if it is missing or damaged."""
    if not Path(path).is_file():
        raise UserError(f"no golden file {path!r}")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = one_line(error)
        # NumPy takes any file that is not its own for a pickle.
        if "pickle" in reason:
            reason = "it has other contents"
        raise UserError(f"{path} is not a readable .npz of plain arrays: {reason}") from error


def parameter_shapes(file: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """Shapes of the reference code's tensors, by name."""
    names = map(str, file["parameter_names"])
    shapes = map(json.loads, map(str, file["parameter_shapes"]))
    return {name: tuple(shape) for name, shape in zip(names, shapes, strict=True)}


def standard_normal(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The standard normal tensor, float32, that a parameter's name and a seed determine."""
    rng = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
    return rng.standard_normal(shape).astype(np.float32)


def weights(file: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Make the reference code's tensors from their names, their shapes and the file's seed."""
    tensors = {}
    for name, shape in parameter_shapes(file).items():
        x = standard_normal(name, shape, int(file["seed"]))
        if len(shape) == 1:
            mean = np.float32(name.endswith("weight"))
            x = np.float32(0.1) * x + mean
        elif "embed_tokens" in name:
            x = np.float32(0.5) * x
        else:
            fan_in = shape[-1] if len(shape) == 2 else np.prod(shape[1:])
            x = x / np.float32(np.sqrt(fan_in))
        # Row 2 belongs to </s>. It is scaled so that the generated texts have different lengths.
        if name.endswith("lm_head.weight"):
            x[2] *= np.float32(file["eos_row_scale"])
        tensors[name] = x
    return tensors


def compare(name: str, reference, ours, tolerance: float) -> Quantity:
    """Compare our value with the file's. Raises UserError if their shapes differ."""
    reference = np.asarray(reference, np.float64)
    ours = np.asarray(ours, np.float64)
    if reference.shape != ours.shape:
        raise UserError(
            f"golden file: {name} has shape {reference.shape}, its config makes {ours.shape}"
        )
    largest = np.abs(reference).max(initial=0.0)
    error = float(np.abs(reference - ours).max(initial=0.0) / max(largest, 1e-30))
    return Quantity(name, error if np.isfinite(error) else float("inf"), tolerance)
