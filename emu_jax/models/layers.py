"""Layers of every tower: linear maps, norms, dropout, and depth as a scan over blocks.

Parameters are float32; arithmetic is in the dtype of the activations, except for norms, which are
in float32. Modules only hold parameters and define arithmetic. They have no random state: dropout
takes a key as an argument. Read next: vision.py, resampler.py, llama.py.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from emu_jax import sharding
from emu_jax.models.lora import Lora, Quantized, equations, split_axes

# Kinds of rematerialisation. A block saves these values for its backward pass and computes the
# others again: "none" saves all values, "full" only the block's inputs, and "dots" only the outputs
# of matrix products.
REMAT = {
    "none": lambda block, **_: block,
    "full": partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable),
    "dots": partial(
        jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
}
# Without rematerialisation, stacks of at most this many blocks are unrolled, because a scan would
# copy all saved activations into stacked arrays and out of them again.
SHORT = 8


def einsum(equation: str, x: Array, w: Array | Quantized | Lora) -> Array:
    """Multiply x by any kind of weight, in x's dtype; float32 is multiplied at full precision."""
    if isinstance(w, Lora):
        to_rank, from_rank = equations(equation)
        # This product must stay first. The backward pass adds up gradients in the order of the
        # products, and another order would change the rounding of old runs that resume.
        base = einsum(equation, x, w.w)
        low_rank = einsum(to_rank, dropout(x, w.dropout, w.keys), w.a)
        return base + w.scale * einsum(from_rank, low_rank, w.b)
    if isinstance(w, Quantized):
        w = w.dequantize(x.dtype)
    precision = "highest" if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, w.astype(x.dtype), precision=precision)


class Rngs:
    """Random keys for fresh parameters: `params()` returns the next key.

    The keys equal those of `nnx.Rngs(params=key)`. The count is a plain int because the count of
    nnx is an array, whose updates took a sixth of the time to trace a model.
    """

    def __init__(self, key: Array):
        self.key = key
        self.count = 0

    def params(self) -> Array:
        key = jax.random.fold_in(self.key, self.count)
        self.count += 1
        return key

    def normal(self, std: float, shape: tuple[int, ...]) -> Array:
        """Draw a fresh parameter from a normal distribution around 0."""
        return std * jax.random.normal(self.params(), shape)


class AbstractRngs(Rngs):
    """Make zeros instead of random parameters.

    Zeros suffice if only the shapes of parameters matter, and are faster to trace.
    """

    def normal(self, std: float, shape: tuple[int, ...]) -> Array:
        return jnp.zeros(shape)


class Linear(nnx.Module):
    """`einsum` with a weight `w` of `shape`, plus a `bias` of the output's last axes if given.

    equation: an einsum equation "x,w->y" with one letter per axis.
    """

    def __init__(
        self,
        equation: str,
        shape: tuple[int, ...],
        *,
        std: float,
        rngs: Rngs,
        bias: tuple[int, ...] | None = None,
    ):
        self.equation = equation
        # Number of w's axes that are summed over.
        self.inputs = len(split_axes(equation)[0])
        self.w = nnx.Param(rngs.normal(std, shape))
        if bias is not None:
            self.bias = nnx.Param(jnp.zeros(bias))

    def __call__(self, x: Array) -> Array:
        y = einsum(self.equation, x, self.w.get_value())
        return y + self.bias.get_value().astype(y.dtype) if hasattr(self, "bias") else y


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis, in float32."""

    def __init__(self, width: int, *, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "... E"]) -> Float[Array, "... E"]:
        x32 = x.astype(jnp.float32)
        centred = x32 - x32.mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + self.eps)
        return (normed * self.scale.get_value() + self.bias.get_value()).astype(x.dtype)


class RMSNorm(nnx.Module):
    """scale * x / rms(x) over the last axis, in float32: the norm of LLaMA and T5."""

    def __init__(self, width: int, *, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt((x32 * x32).mean(-1, keepdims=True) + self.eps)
        return (normed * self.scale.get_value()).astype(x.dtype)


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Inverted dropout; the identity without a key."""
    if key is None or rate == 0.0:
        return x
    kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), 0).astype(x.dtype)


def stack(make: Callable[[Rngs], nnx.Module], depth: int, rngs: Rngs) -> nnx.Module:
    """Make `depth` modules as one, whose parameters have a leading axis L of this length."""
    return jax.vmap(lambda key: make(type(rngs)(key)))(jax.random.split(rngs.params(), depth))


def run(
    blocks: nnx.Module,
    x: Any,
    call: Callable[[nnx.Module, Any, Array | None], Any],
    *,
    where: str,
    remat: str,
    key: Array | None = None,
) -> Any:
    """Run x through all L blocks of a stack: `x = call(block, x, key)` for each.

    The blocks run in a scan, so that XLA compiles the code of only one block. A stack of at most
    SHORT blocks is unrolled if `remat` is "none". x: the activations, or a tuple that begins with
    them. where: the parameter path of the stack, which determines how the weights of a block are
    gathered just before use. key: a random key, which is split into one key per block.
    """
    graphdef, state = nnx.split(blocks)
    weights = nnx.to_pure_dict(state)
    depth = jax.tree.leaves(weights)[0].shape[0]
    dtype = jax.tree.leaves(x)[0].dtype

    def block(x, layer):
        weights, key = layer
        weights = sharding.gather_weights(where, weights, dtype, sliced=1)
        return call(nnx.merge(graphdef, weights), x, key), None

    keys = None if key is None else jax.random.split(key, depth)
    x, _ = jax.lax.scan(
        REMAT[remat](block, prevent_cse=False),
        x,
        (weights, keys),
        unroll=remat == "none" and depth <= SHORT,
    )
    return x


def once(
    block: nnx.Module, call: Callable[..., Array], x: Array, *inputs: Array, where: str, remat: str
) -> Array:
    """Run one block as `run` does. Towers whose blocks differ in shape need this."""
    graphdef, state = nnx.split(block)

    def one(weights, x, *inputs):
        return call(
            nnx.merge(graphdef, sharding.gather_weights(where, weights, x.dtype)), x, *inputs
        )

    return REMAT[remat](one)(nnx.to_pure_dict(state), x, *inputs)
