"""What a foreign family of checkpoints is: its table, what its files say of the model's size, and
the config.json of its library.

Read next: emu1.py, which is made of the others; families.py.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from emu_jax import tree
from emu_jax.config import UserError
from emu_jax.models import emu, module
from emu_jax.models.emu import EmuConfig
from emu_jax.weights.convert import Table, Tensors

Shapes = Mapping[str, tuple[int, ...]]


def emu_shapes(model_config: EmuConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every leaf of an Emu."""
    return {path: leaf.shape for path, leaf in tree.leaves(module.abstract(emu.Emu, model_config))}


@dataclass(frozen=True)
class Family:
    """`sign`: regex of a tensor's name by which a file of the family is known. `says(shapes,
    config.json)`: fields of config.model that the files fix, None where they do not say; `assumes`:
    fields that they suggest where no config is given. `config_json(model, tokens)`: of
    config.model. `tensors`: their tensors under the table's names. `size` of config.model, and the
    `shapes` of our leaves.

    `components`: the subfolders, each with a config.json, in which some libraries keep the parts of
    a model; names in the table start with "component.", config.json are by component. `stem`: of
    the files that an export writes. Under another one than Hugging Face's "model" they are without
    an index where one holds all, and `config_json` makes all the files of JSON by their paths.
    `adapts`: a field of config.model of which the files may have another value than a given config,
    and a regex of the leaves that have other shapes then: the import keeps theirs, and training
    starts those leaves fresh. `config`: of configs/, where none is given. `carries`: files beside
    the tensors that an import copies into the new directory.
    """

    name: str
    signature: str
    table: Callable[[Any], Table]
    infer_config: Callable[[Shapes, dict[str, Any]], dict[str, Any]]
    config_json: Callable[[dict[str, Any], int], dict[str, Any]]
    default_config: Callable[[Shapes, dict[str, Any]], dict[str, Any]] = lambda shapes, config: {}
    canonical: Callable[[Tensors], dict[str, Any]] = dict
    model_config: Callable[[dict[str, Any]], Any] = EmuConfig.of
    shapes: Callable[[Any], dict[str, tuple[int, ...]]] = emu_shapes
    components: tuple[str, ...] = ()
    stem: str = "model"
    may_override: tuple[str, str] | None = None
    config_file: str = "pretrain"
    extra_files: tuple[str, ...] = ()
    hint: str = "start from it with --config.init={to}"


def layers(shapes: Shapes, pattern: str) -> int | None:
    """One more than the largest number that `pattern` finds in a name. Raises UserError for one
    that so few tensors cannot reach.
    """
    found = [int(match[1]) for name in shapes if (match := re.fullmatch(pattern, name))]
    if max(found, default=0) > len(shapes):
        raise UserError(
            f"a tensor is of layer {max(found)}, and there are only {len(shapes)} tensors"
        )
    return max(found) + 1 if found else None
