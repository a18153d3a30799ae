"""`Family`, the description of one kind of foreign checkpoint.

It has the conversion table, says how the files determine our config, and makes the config.json of
the family's own library. Read next: emu1.py, which combines several others; families.py.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from emu_jax import tree
from emu_jax.config import UserError
from emu_jax.models import emu, module
from emu_jax.models.emu import EmuConfig
from emu_jax.weights.convert import Table, Tensors

# Foreign name -> shape.
Shapes = Mapping[str, tuple[int, ...]]


# Building the abstract model takes a second or two. The cache shares it between the sources of an
# import.
@lru_cache(maxsize=16)
def emu_shapes(model_config: EmuConfig) -> Shapes:
    """Shapes of all leaves of an Emu."""
    return {path: leaf.shape for path, leaf in tree.leaves(module.abstract(emu.Emu, model_config))}


def no_fields(shapes: Shapes, config: dict[str, Any]) -> dict[str, Any]:
    """Return {}: an `infer_config` or `default_config` that sets no fields."""
    return {}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of foreign checkpoint; `model` is our config.model, `config` their config.json."""

    # The value of --family.
    name: str
    # Which checkpoints these are, for the help.
    about: str
    # Regex for the name of a tensor that identifies files of this family.
    signature: str
    # (config of our model) -> conversion table.
    table: Callable[[Any], Table]
    # (shapes, config) -> {field of config.model: value, or None if the files do not determine it}.
    infer_config: Callable[[Shapes, dict[str, Any]], dict[str, Any]]
    # (model, tokens per row) -> config.json of an export, or {path: JSON} if `stem` is not "model".
    config_json: Callable[[dict[str, Any], int], dict[str, Any]]
    # (shapes, config) -> further fields of config.model to set if the user gives no config.
    default_config: Callable[[Shapes, dict[str, Any]], dict[str, Any]] = no_fields
    # Foreign tensors -> the same tensors with the table's names.
    canonical: Callable[[Tensors], dict[str, Any]] = dict
    # (model) -> config of our model, the argument of `table` and `shapes`.
    make_config: Callable[[dict[str, Any]], Any] = EmuConfig.of
    # (config of our model) -> shapes of our leaves.
    shapes: Callable[[Any], Shapes] = emu_shapes
    # Subfolders with the parts of a model, each with a config.json. The table's names then start
    # with "component.", and `config` has one entry per component.
    components: tuple[str, ...] = ()
    # Stem of the file names of an export. Only "model", Hugging Face's, gets an index even if there
    # is a single file.
    stem: str = "model"
    # (field of config.model, regex of leaves): the files may contradict a given config in this
    # field. Then the import keeps the value of the files, and training initialises those leaves.
    may_override: tuple[str, str] | None = None
    # Name of the config to use if the user gives none.
    config_file: str = "pretrain"
    # Files next to the tensors that an import copies.
    extra_files: tuple[str, ...] = ()
    # How to use an import, printed after it; {to} is its directory.
    hint: str = "start from it with --config.init={to}"


def count_layers(shapes: Shapes, pattern: str) -> int | None:
    """Number of layers: 1 + the largest number that `pattern` finds; None if there is none.

    Raises UserError if that number exceeds the number of tensors, so that a malicious name cannot
    cause a huge allocation.
    """
    matches = [re.fullmatch(pattern, name) for name in shapes]
    numbers = [int(match[1]) for match in matches if match]
    if not numbers:
        return None
    if max(numbers) > len(shapes):
        raise UserError(f"a tensor names layer {max(numbers)}, but there are {len(shapes)} tensors")
    return max(numbers) + 1
