"""FID's Inception as torch-fidelity and pytorch-fid keep it (pt_inception-2015-12-05-6726825d.pth): its names and ours.

Convolutions are [out, in, h, w] there; `num_batches_tracked` counts for nothing.
"""
from emu_jax.models import inception
from emu_jax.weights.convert import Row, Table

WHERE = ("pt_inception-2015-12-05-6726825d.pth, from github.com/mseitzer/pytorch-fid/releases (fid_weights), "
         "made readable by `python -m emu_jax.weights import --family=inception`")


def table() -> Table:
    """Rows in the model's reading order."""
    stem = [(conv.name, conv.name) for conv in inception.STEM]
    mixed = [(f"{block.name}.{conv.name}", f"{block.name}/{conv.name}") for block in inception.BLOCKS
             for conv in (*(conv for branch in block.branches for step in branch for conv in step), *([block.project] if block.project else []))]
    leaves = (("conv.weight", "w", "o i h w -> h w i o"), ("bn.weight", "scale", ""), ("bn.bias", "bias", ""), ("bn.running_mean", "mean", ""),
              ("bn.running_var", "var", ""))
    rows = [Row(f"{theirs}.{name}", f"{ours}/{leaf}", pattern) for theirs, ours in (*stem, *mixed) for name, leaf, pattern in leaves]
    return Table((*rows, Row("fc.weight", "fc", "k c -> c k"), Row("fc.bias", "fc_bias")), axes={}, unused=(r".*\.num_batches_tracked",), depth={})
