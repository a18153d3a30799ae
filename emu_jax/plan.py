"""The plan of a run: its program, its mesh, and the shapes of its state and batch.

Computes what train, fit, benchmarks and tests need from a config without allocating any array, so
that a 14B model can be planned on a laptop. Read next: train.py, fit/.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from flax.core import FrozenDict
from ml_collections import ConfigDict

from emu_jax import optim, sharding, stages, tree
from emu_jax.config import UserError
from emu_jax.data.packing import empty_batch
from emu_jax.models import module
from emu_jax.models.decoder import DecoderConfig
from emu_jax.step import Program, State, cast_frozen, init_state
from emu_jax.types import Batch, DecoderBatch


@dataclass(frozen=True)
class RunPlan:
    """A run on given devices, whose arrays are only shapes."""

    config: ConfigDict
    program: Program
    mesh: jax.sharding.Mesh
    # The parameters as they are initialised, in float32.
    params: tree.Tree
    # The training state; each leaf has its sharding.
    state: State

    @cached_property
    def batch(self) -> Batch:
        """The global batch, with its sharding."""
        return batch_shapes(self.config, self.program, self.mesh)

    @property
    def state_bytes(self) -> int:
        """Bytes of the state that one device holds: parameters, optimizer and average."""
        return bytes_per_device(self.state)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradient that one device holds."""
        return bytes_per_device(self.state.trainable)


def make_plan(c: ConfigDict, devices: list[jax.Device] | None = None) -> RunPlan:
    """Plan the run that `c` describes. devices: all of JAX's by default.

    Raises UserError for an invalid rule, model or batch, and for a model or batch that cannot be
    split evenly over the devices.
    """
    params = abstract_params(c)
    mesh = sharding.make_mesh(c.mesh.to_dict(), devices)
    check_batch(c, mesh)
    sharding.check_divides(mesh, params)
    stage = stages.get_stage(c)
    stage.check(stage.make_config(c.model.to_dict()))
    program = make_program(c, params)
    return RunPlan(c, program, mesh, params, abstract_state(program, mesh, params))


def abstract_params(c: ConfigDict) -> tree.Tree:
    """Shapes of the parameters that a config's stage initialises."""
    stage = stages.get_stage(c)
    return module.abstract(stage.module, stage.make_config(c.model.to_dict()))


def make_program(c: ConfigDict, params: tree.Tree | None = None) -> Program:
    """The program of a config. params: its parameters or their shapes, if already known.

    Each rule must cover all parameters. The program keeps its values for the parameters that train.
    """
    if params is None:
        params = abstract_params(c)
    stage = stages.get_stage(c)
    trains = which_train(c, params)

    def rule(name: str) -> tree.Tree:
        values = apply_rule(c.rules[name], params, f"rules.{name}")
        trainable, _ = tree.split(values, trains)
        return trainable

    return Program(
        stage=stage,
        model_config=stage.make_config(c.model.to_dict()),
        objective=FrozenDict(c.objective.to_dict() | {"sources": len(c.data.mixture)}),
        optimizer=optim.make_optimizer(c.optim, rule("peak_lr"), rule("decay")),
        trains=FrozenDict(trains),
        groups=FrozenDict(rule("groups")),
        specs=FrozenDict(tree.split(sharding.specs(params), trains)[0]),
        frozen_dtype=c.frozen_dtype,
        seed=c.seed,
        accumulate=c.optim.accumulate,
        ema=c.optim.ema,
        spike=c.optim.spike,
    )


def which_train(c: ConfigDict, params: tree.Tree) -> tree.Tree:
    """rules.train applied to the parameters: True, False, or a (start, stop) of rows.

    The measured constants of the visual tokens never train. Raises UserError for parameters that
    cannot train.
    """
    trains = apply_rule(c.rules.train, params, "rules.train")
    shapes = {path: leaf.shape for path, leaf in tree.leaves(params)}
    for path, chosen in tree.leaves(trains):
        if chosen and path.endswith(sharding.QUANTIZED):
            storage = path.rpartition("/")[2]
            raise UserError(
                f"rules.train: {sharding.matrix_path(path)} is stored as {storage} and cannot "
                "train; put this row first: "
                "('llama/blocks/.*/(int8|nf4|absmax)', False)"
            )
        if not isinstance(chosen, bool) and not _is_row_range(chosen, shapes[path][0]):
            raise UserError(
                f"rules.train: {chosen!r} is neither True, nor False, nor (start, stop) of the "
                f"rows of {path} {list(shapes[path])}"
            )
    if "visual_stats" in trains:
        trains["visual_stats"] = jax.tree.map(lambda _: False, trains["visual_stats"])
    if not any(chosen for _, chosen in tree.leaves(trains)):
        raise UserError("rules.train: nothing trains; at least one row must say True")
    return trains


def _is_row_range(chosen: Any, count: int) -> bool:
    if not isinstance(chosen, tuple) or [type(row) for row in chosen] != [int, int]:
        return False
    start, stop = chosen
    return 0 <= start < stop <= count


def apply_rule(rows: Any, params: tree.Tree, name: str) -> tree.Tree:
    """Call tree.by_rule and turn its errors into UserErrors."""
    try:
        return tree.by_rule(rows, params, name)
    except ValueError as error:
        raise UserError(str(error)) from error


def abstract_state(program: Program, mesh: jax.sharding.Mesh, params: tree.Tree) -> State:
    """The state of a run as shapes, each with its sharding."""
    state = jax.eval_shape(lambda params: init_state(program, cast_frozen(program, params)), params)
    return jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
        state,
        sharding.state_shardings(mesh, params, state),
    )


def batch_shapes(c: ConfigDict, program: Program, mesh: jax.sharding.Mesh) -> Batch:
    """The global batch of a config as shapes, with their sharding."""
    stage = program.stage
    model = stage.emu_config(program.model_config)
    side = stage.image_side(program.model_config)
    row = empty_batch(1, c.data.tokens, c.data.images, side, pad=0)

    precomputed = {}
    if stage.draws and c.model.decoder.condition == "generated":
        precomputed["conditions"] = (model.resampler.tokens, model.llama.width)
    if c.data.latents:
        precomputed["latents"] = latent_metadata(c)["shape"]
    if precomputed:
        arrays = {
            kind: np.zeros((1, c.data.images, *shape), np.float16)
            for kind, shape in precomputed.items()
        }
        row = DecoderBatch(**vars(row), **arrays)

    at = sharding.batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((c.data.batch, *x.shape[1:]), x.dtype, sharding=at), row
    )


def latent_metadata(c: ConfigDict) -> dict[str, Any]:
    """What latents depend on besides the autoencoder's weights, and their shape.

    {"loaded": side of the loaded images, "image": side of the images that the decoder draws,
    "fit": how images become square, "shape": [y, x, m]}. Raises UserError for a config without an
    autoencoder, and for one whose images differ between epochs.
    """
    if c.stage != "decoder":
        raise UserError(
            "only a decoder with an autoencoder has latents (data.latents): "
            f"stage={c.stage!r} has none"
        )
    model_config = DecoderConfig.of(c.model.to_dict())
    if model_config.vae is None:
        raise UserError(
            "only a decoder with an autoencoder has latents (data.latents): model.decoder.vae is "
            "empty, and the U-Net draws pixels"
        )
    if c.data.fit not in ("squash", "centre"):
        raise UserError(
            f"data.fit={c.data.fit!r}: latents are computed once, so images must be the same in "
            "every epoch; set data.fit to squash or centre"
        )
    return {
        "loaded": model_config.loader_image,
        "image": model_config.image,
        "fit": c.data.fit,
        "shape": list(model_config.moments),
    }


def check_batch(c: ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """Raise UserError for a batch that cannot be split evenly over devices and micro-batches."""
    shards = batch_shards(mesh)
    if c.optim.accumulate < 1 or c.data.batch % (shards * c.optim.accumulate):
        raise UserError(
            f"data.batch={c.data.batch} is not divisible by {shards} (the mesh's data x fsdp) x "
            f"{c.optim.accumulate} (optim.accumulate)"
        )


def batch_shards(mesh: jax.sharding.Mesh) -> int:
    """Number of shards of a batch's rows."""
    return int(np.prod([mesh.shape[axis] for axis in sharding.ROWS]))


def bytes_per_device(shapes: Any) -> int:
    """Bytes that one device holds of arrays with these shapes and shardings."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape), dtype=np.int64)) * x.dtype.itemsize
        for x in jax.tree.leaves(shapes)
    )


def parameter_table(params: tree.Tree) -> str:
    """Parameters by tower, one line each."""
    counts = count_parameters(params)
    counts["total"] = sum(counts.values())
    return "\n".join(f"{tower:14}{count:>16,} parameters" for tower, count in counts.items())


def count_parameters(params: tree.Tree) -> dict[str, int]:
    """Number of parameters by tower."""
    return {
        tower: sum(leaf.size for leaf in jax.tree.leaves(part)) for tower, part in params.items()
    }
