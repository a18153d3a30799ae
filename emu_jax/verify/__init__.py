"""Our code held to numbers that others computed: `python -m emu_jax.weights verify FILE.npz`.

A golden file holds inputs and outputs, and no weights: these follow a rule. Read next: golden.py,
then emu.py, stable_diffusion.py and inception.py.
"""

from collections.abc import Iterator

import numpy as np

from emu_jax.verify import emu, inception, stable_diffusion
from emu_jax.verify.golden import Quantity


def quantities(file: dict[str, np.ndarray]) -> Iterator[Quantity]:
    """Every quantity of a golden file: covered ones with their error, the others without."""
    if "input_ids" in file:
        return emu.quantities(file)
    if "unet_config" in file:
        return stable_diffusion.quantities(file)
    if any(name.startswith("Mixed_") for name in map(str, file.get("parameter_names", ()))):
        return inception.quantities(file)
    return (Quantity(name, None, 0.0) for name in file if not name.startswith("parameter_"))
