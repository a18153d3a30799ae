"""FID's Inception as torch-fidelity and pytorch-fid keep it (pt_inception-2015-12-05-6726825d.pth):
its names and ours.

Convolutions are [out, in, h, w] there; `num_batches_tracked` counts for nothing. No part of an Emu:
a config says nothing of it.
"""

import jax
from flax import nnx

from emu_jax import tree
from emu_jax.models import inception
from emu_jax.weights.convert import Row, Table
from emu_jax.weights.family import Family

WHERE = (
    "--inception=DIR: FID's Inception, made of pt_inception-2015-12-05-6726825d.pth (github.com/mseitzer/pytorch-fid, releases, fid_weights) "
    "by: python -m emu_jax.weights import --family=inception FILE --to=DIR"
)


def table() -> Table:
    """Rows in the model's reading order."""
    stem = [(conv.name, conv.name) for conv in inception.STEM]
    mixed = [
        (f"{block.name}.{conv.name}", f"{block.name}/{conv.name}")
        for block in inception.BLOCKS
        for conv in (
            *(conv for branch in block.branches for step in branch for conv in step),
            *([block.project] if block.project else []),
        )
    ]
    leaves = (
        ("conv.weight", "w", "o i h w -> h w i o"),
        ("bn.weight", "scale", ""),
        ("bn.bias", "bias", ""),
        ("bn.running_mean", "mean", ""),
        ("bn.running_var", "var", ""),
    )
    rows = [
        Row(f"{theirs}.{name}", f"{ours}/{leaf}", pattern)
        for theirs, ours in (*stem, *mixed)
        for name, leaf, pattern in leaves
    ]
    return Table(
        (*rows, Row("fc.weight", "fc/w", "k c -> c k"), Row("fc.bias", "fc/bias")),
        axes={},
        unused=(r".*\.num_batches_tracked",),
        depth={},
    )


def shapes() -> dict[str, tuple[int, ...]]:
    """The shape of every leaf."""
    fresh = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(inception.Inception(nnx.Rngs(0)))))
    return {path: leaf.shape for path, leaf in tree.leaves(fresh)}


FAMILY = Family(
    "inception",
    signature=r"Mixed_7c\.branch_pool\.conv\.weight",
    table=lambda size: table(),
    infer_config=lambda shapes, config: {},
    config_json=lambda model, tokens: {"model_type": "inception-2015-12-05"},
    model_config=lambda model: None,
    shapes=lambda size: shapes(),
    hint="score pictures with --inception={to}",
)
