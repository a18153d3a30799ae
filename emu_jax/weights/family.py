"""The description of one foreign family of checkpoints.

Its conversion table, how its files determine our config, and the config.json of its own library.
Read next: emu1.py, which is composed of the others; families.py.
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


# Building the abstract model takes a second or two, and the sources of one import share it.
@lru_cache(maxsize=16)
def emu_shapes(model_config: EmuConfig) -> Shapes:
    """Shapes of all leaves of an Emu."""
    return {path: leaf.shape for path, leaf in tree.leaves(module.abstract(emu.Emu, model_config))}


def no_fields(shapes: Shapes, config: dict[str, Any]) -> dict[str, Any]:
    """An `infer_config` or `default_config` that sets no field of config.model."""
    return {}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of foreign checkpoint; `model` is our config.model, `config` their config.json."""

    # The value of --family.
    name: str
    # One line of help: which checkpoints these are.
    about: str
    # Regex of a tensor's name by which files of the family are recognised.
    signature: str
    # (our model's config) -> conversion table.
    table: Callable[[Any], Table]
    # (shapes, config) -> fields of config.model that the files determine; None: they do not.
    infer_config: Callable[[Shapes, dict[str, Any]], dict[str, Any]]
    # (model, tokens a row) -> config.json of an export; if `stem` is not "model", {path: JSON}.
    config_json: Callable[[dict[str, Any], int], dict[str, Any]]
    # (shapes, config) -> fields of config.model to use where the user gives no config.
    default_config: Callable[[Shapes, dict[str, Any]], dict[str, Any]] = no_fields
    # Foreign tensors -> the same under the names of the table.
    canonical: Callable[[Tensors], dict[str, Any]] = dict
    # (model) -> our model's config, the argument of `table` and `shapes`.
    make_config: Callable[[dict[str, Any]], Any] = EmuConfig.of
    # (our model's config) -> shapes of our leaves.
    shapes: Callable[[Any], Shapes] = emu_shapes
    # Subfolders, each with a config.json, that hold the parts of a model. Names in the table start
    # with "component.", and `config` has one entry a component.
    components: tuple[str, ...] = ()
    # Stem of an export's files. Any other than Hugging Face's "model" gets no index for one file.
    stem: str = "model"
    # (field of config.model, regex of leaves): the files may differ from a given config in this
    # field. The import keeps their value, and training initialises those leaves.
    may_override: tuple[str, str] | None = None
    # The config, by name, where the user gives none.
    config_file: str = "pretrain"
    # Files next to the tensors that an import copies.
    extra_files: tuple[str, ...] = ()
    # What to do with an import; {to} is its directory.
    hint: str = "start from it with --config.init={to}"


def count_layers(shapes: Shapes, pattern: str) -> int | None:
    """One more than the largest number that `pattern` matches in a name; None without a match.

    Raises UserError where there are fewer tensors than that number, so a hostile name cannot make
    us allocate.
    """
    matches = [re.fullmatch(pattern, name) for name in shapes]
    numbers = [int(match[1]) for match in matches if match]
    if not numbers:
        return None
    if max(numbers) > len(shapes):
        raise UserError(f"a tensor names layer {max(numbers)}, but there are {len(shapes)} tensors")
    return max(numbers) + 1
