"""FID's Inception, from pt_inception-2015-12-05-6726825d.pth.

torch-fidelity and pytorch-fid use that file. Its convolutions are [out, in, h, w]. The network has
one size and is not part of an Emu, so it has no config.
"""

from typing import Any

from emu_jax import tree
from emu_jax.models import inception, module
from emu_jax.weights.convert import Row, Table
from emu_jax.weights.family import Family, no_fields


def table(model_config: None = None) -> Table:
    """Rows in the model's reading order."""
    rows: list[Row] = []
    for conv in inception.STEM:
        rows += _conv(conv.name, conv.name)
    for block in inception.BLOCKS:
        convs = [conv for branch in block.branches for step in branch for conv in step]
        if block.project:
            convs.append(block.project)
        for conv in convs:
            rows += _conv(f"{block.name}.{conv.name}", f"{block.name}/{conv.name}")
    rows += [Row("fc.weight", "fc/w", "k c -> c k"), Row("fc.bias", "fc/bias")]
    return Table(
        tuple(rows),
        axes={},
        unused=(r".*\.num_batches_tracked",),
        depth={},
    )


def _conv(theirs: str, ours: str) -> list[Row]:
    """Rows of a convolution and its batch norm."""
    return [
        Row(f"{theirs}.conv.weight", f"{ours}/w", "o i h w -> h w i o"),
        Row(f"{theirs}.bn.weight", f"{ours}/scale"),
        Row(f"{theirs}.bn.bias", f"{ours}/bias"),
        Row(f"{theirs}.bn.running_mean", f"{ours}/mean"),
        Row(f"{theirs}.bn.running_var", f"{ours}/var"),
    ]


def shapes(model_config: None = None) -> dict[str, tuple[int, ...]]:
    """Shapes of all leaves."""
    fresh = module.abstract(inception.Inception, None)
    return {path: leaf.shape for path, leaf in tree.leaves(fresh)}


def make_config(model: dict[str, Any]) -> None:
    """Return None: there is only one Inception, so it needs no config."""


def config_json(model: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Make a config.json that names the network."""
    return {"model_type": "inception-2015-12-05"}


FAMILY = Family(
    name="inception",
    about="FID's Inception: pt_inception-2015-12-05-6726825d.pth",
    signature=r"Mixed_7c\.branch_pool\.conv\.weight",
    table=table,
    infer_config=no_fields,
    config_json=config_json,
    make_config=make_config,
    shapes=shapes,
    hint="use it for FID with --inception={to}",
)
