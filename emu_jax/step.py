"""One training step: its state, the program that it runs, train_step and eval_step.

A step is a pure function, jitted once; the loss comes from stages.py. Read next: loop.py.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from flax.core import FrozenDict
from jaxtyping import Array, Float, Int

from emu_jax import hardware, sharding, tree
from emu_jax.models import module
from emu_jax.stages import Stage
from emu_jax.types import Batch, Metrics


@flax.struct.dataclass
class State:
    """All arrays of a run."""

    # Number of batches consumed.
    step: Int[Array, ""]
    trainable: tree.Tree
    frozen: tree.Tree
    opt_state: Any
    # Moving average of the trainable leaves.
    ema: tree.Tree | None
    # Number of steps that were skipped because loss or gradient was not finite, or because the
    # gradient spiked.
    bad: Int[Array, ""]
    # Running mean of the gradient's norm; a norm far above it is a spike.
    typical_norm: Float[Array, ""]


@dataclass(frozen=True)
class Program:
    """All that a step needs besides its arrays.

    Hashable: jit takes it as a static argument, and traces equal programs once.
    """

    stage: Stage
    # Config of the stage's module.
    model_config: Any
    # config.objective, and "sources": the number of sources in the mixture.
    objective: FrozenDict
    optimizer: optax.GradientTransformation
    # For every parameter: True, False, or (start, stop) if only these rows of it train.
    trains: FrozenDict
    # For every trainable parameter: the name under which its gradient's norm is logged.
    groups: FrozenDict
    # For every trainable parameter: its PartitionSpec.
    specs: FrozenDict
    # Dtype of the matrices that do not train.
    frozen_dtype: str
    seed: int
    accumulate: int
    ema: float
    spike: float

    def bind(self, params: tree.Tree, key: Array | None = None):
        """The module with `params`, for use in a jitted function. key: turns LoRA's dropout on."""
        return module.bind(self.stage.module, self.model_config, params, key)

    def split(self, params: tree.Tree) -> tuple[tree.Tree, tree.Tree]:
        """(parameters that train, parameters that do not)."""
        return tree.split(params, self.trains.unfreeze())


def init_params(program: Program, key: Array) -> tree.Tree:
    """Fresh parameters in the dtypes in which a run holds them."""
    return cast_frozen(program, module.init(program.stage.module, program.model_config, key))


def cast_frozen(program: Program, params: tree.Tree) -> tree.Tree:
    """Cast the matrices that do not train to the program's frozen_dtype."""
    trains = dict(tree.leaves(program.trains.unfreeze()))

    def cast(path, leaf):
        frozen = sharding.is_matrix(path) and not trains[path]
        return leaf.astype(program.frozen_dtype) if frozen else leaf

    return tree.unflatten({path: cast(path, leaf) for path, leaf in tree.leaves(params)})


def init_state(program: Program, params: tree.Tree) -> State:
    """The state at step 0."""
    trainable, frozen = program.split(params)
    return State(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        frozen=frozen,
        opt_state=program.optimizer.init(trainable),
        ema=jax.tree.map(jnp.copy, trainable) if program.ema else None,
        bad=jnp.zeros((), jnp.int32),
        typical_norm=jnp.zeros(()),
    )


def train_step(program: Program, state: State, batch: Batch) -> tuple[State, Metrics]:
    """One step on a global batch.

    If the loss or the gradient is not finite, or the gradient spikes, only the counters change.
    """
    loss, grads, metrics = _accumulate(program, state, batch)

    # Skip the update if loss or gradient is not finite, or the norm is far above its running mean.
    trained_rows, _ = program.split(program.trains.unfreeze())
    grads = mask_rows(grads, trained_rows)
    norm = optax.global_norm(grads)
    ok = jnp.isfinite(loss) & jnp.isfinite(norm)
    if program.spike:
        ok &= (state.typical_norm == 0) | (norm < program.spike * state.typical_norm)

    updates, opt_state = program.optimizer.update(grads, state.opt_state, state.trainable)
    trainable = optax.apply_updates(state.trainable, mask_rows(updates, trained_rows))
    ema = state.ema and jax.tree.map(
        lambda old, new: old + (1 - program.ema) * (new - old), state.ema, trainable
    )
    running_mean = 0.98 * state.typical_norm + 0.02 * norm
    typical = jnp.where(state.typical_norm == 0, norm, running_mean)

    new = replace(state, trainable=trainable, opt_state=opt_state, ema=ema, typical_norm=typical)
    new = jax.tree.map(lambda new, old: jnp.where(ok, new, old), new, state)
    new = replace(new, step=state.step + 1, bad=state.bad + ~ok)

    one = jnp.ones(())
    metrics = metrics | {
        f"grad_norm/{name}": (group_norm, one)
        for name, group_norm in _group_norms(grads, program.groups.unfreeze()).items()
    }
    metrics["loss"] = (loss, one)
    metrics["grad_norm"] = (norm, one)
    metrics["bad_steps"] = (new.bad.astype(jnp.float32), one)
    return new, metrics


def _accumulate(
    program: Program, state: State, batch: Batch
) -> tuple[Float[Array, ""], tree.Tree, Metrics]:
    """(loss, gradients, metrics), summed over the micro-batches of a batch."""
    key = jax.random.fold_in(jax.random.key(program.seed), state.step)
    totals = program.stage.loss_weights(batch)
    specs = program.specs.unfreeze()

    def loss_fn(trainable, micro_batch, key):
        model = program.bind(tree.merge(trainable, state.frozen), key)
        return program.stage.loss(model, micro_batch, key, totals, program.objective)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    # Jitted, so that `eval_shape` and `scan` below share one trace.
    @partial(jax.jit, inline=True)
    def loss_and_grads(micro_batch, number):
        micro_key = jax.random.fold_in(key, number)
        (loss, metrics), grads = grad_fn(state.trainable, micro_batch, micro_key)
        return loss, sharding.constrain(grads, specs), metrics

    def add(sums, micro):
        return jax.tree.map(jnp.add, sums, loss_and_grads(*micro)), None

    # With A micro-batches, number `a` holds rows a, a + A, a + 2 A, ..., so that no row moves to
    # another device.
    micro_batches = jax.tree.map(
        lambda x: rearrange(x, "(b a) ... -> a b ...", a=program.accumulate), batch
    )
    micros = (micro_batches, jnp.arange(program.accumulate))
    shapes = jax.eval_shape(loss_and_grads, *jax.tree.map(lambda x: x[0], micros))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    sums, _ = jax.lax.scan(add, zeros, micros)
    return sums


def mask_rows(values: Any, rows: tree.Tree) -> Any:
    """Zero the rows of `values` that do not train.

    rows: for each leaf, the (start, stop) of the rows that train, or True for all.
    """

    def mask(x, rows):
        if rows is True:
            return x
        start, stop = rows
        row = jnp.arange(len(x)).reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where((start <= row) & (row < stop), x, 0)

    return jax.tree.map(mask, values, rows)


def _group_norms(grads: tree.Tree, groups: tree.Tree) -> dict[str, Array]:
    squares: dict[str, Array] = {}
    for (_, grad), (_, name) in zip(tree.leaves(grads), tree.leaves(groups), strict=True):
        squares[name] = squares.get(name, 0.0) + jnp.sum(jnp.square(grad.astype(jnp.float32)))
    return {name: jnp.sqrt(square) for name, square in squares.items()}


def eval_step(program: Program, params: tree.Tree, batch: Batch) -> Metrics:
    """Metrics of a batch, computed without dropout or a gradient."""
    totals = program.stage.loss_weights(batch)
    _, metrics = program.stage.loss(program.bind(params), batch, None, totals, program.objective)
    return metrics


def jit_train_step(state: State) -> jax.stages.Wrapped:
    """Jit `train_step` as the loop runs it, with donation of the state; its layout stays.

    state: arrays, or shapes with shardings. JAX caches by function and options, so a second run
    with an equal program and layout does not trace again.
    """
    shardings = jax.tree.map(lambda x: x.sharding, state)
    device = next(iter(jax.tree.leaves(shardings)[0].device_set))
    return jax.jit(
        train_step,
        static_argnums=0,
        donate_argnums=1,
        out_shardings=(shardings, None),
        compiler_options=hardware.compiler_options(device),
    )


jit_eval_step = jax.jit(eval_step, static_argnums=0)
