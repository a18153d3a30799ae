"""What a model has read: the one thing that text and images are generated from, and that can be
kept, shared and read on from.

Reading a then b is reading a + b: so a system message is read once for many prompts, a chat goes on
from its last turn, and an image is 32 elements read one by one. Read next: text_decoding.py, image_decoding.py,
session.py.
"""

from functools import partial
from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from emu_jax.models import emu, module
from emu_jax.tree import Tree
from emu_jax.types import KVCache


@flax.struct.dataclass
# JAX rebuilds it with what are no arrays
@no_type_check
class DecodeState:
    """B rows, each a sequence of its own length."""

    cache: KVCache
    # after the last element read, from which the next one is predicted
    hidden: Float[Array, "B D"]
    # elements read; the next one's position
    lengths: Int[Array, "B"]


@partial(jax.jit, static_argnums=(0, 2, 3))
def init(config: emu.EmuConfig, params: Tree, rows: int, capacity: int) -> DecodeState:
    """Nothing read yet, and room for `capacity` elements a row."""
    cache = module.bind(emu.Emu, config, params).llama.empty_cache(rows, capacity, config.compute)
    return DecodeState(
        cache, jnp.zeros((rows, config.llama.width), config.compute), jnp.zeros(rows, jnp.int32)
    )


@partial(jax.jit, static_argnums=(1, 2))
def expand(state: DecodeState, repeats: int, capacity: int) -> DecodeState:
    """A copy with every row `repeats` over, next to each other, and room for `capacity` elements (as
    many as there are, or more).
    """
    more = capacity - state.cache.capacity

    def each(x, axis):
        return jnp.repeat(x, repeats, axis) if repeats > 1 else jnp.copy(x)

    def room(x, axis):
        return jnp.pad(each(x, axis), [(0, more if k == axis + 1 else 0) for k in range(x.ndim)])

    cache = state.cache
    cache = cache.replace(
        k=room(cache.k, 1),
        v=room(cache.v, 1),
        positions=room(cache.positions, 0),
        segments=room(cache.segments, 0),
    )
    return DecodeState(cache, each(state.hidden, 0), each(state.lengths, 0))


@partial(jax.jit, static_argnums=0)
def encode_images(
    config: emu.EmuConfig, params: Tree, images: UInt8[Array, "M h w 3"]
) -> Float[Array, "M N D"]:
    """The visual tokens of images."""
    return module.bind(emu.Emu, config, params).encode(images)


@partial(jax.jit, static_argnums=0)
def embed(
    config: emu.EmuConfig,
    params: Tree,
    tokens: Int[Array, "B T"],
    visual: Float[Array, "M N D"],
    images: Int[Array, "B I"],
    slots: Int[Array, "B I"],
) -> Float[Array, "B T D"]:
    """The LLM's input for ids; the i-th image of row b is visual[images[b, i]], from slots[b, i] on
    (T for no image).
    """
    return module.bind(emu.Emu, config, params).interleave(tokens, visual[images], slots)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill(
    config: emu.EmuConfig,
    params: Tree,
    state: DecodeState,
    x: Float[Array, "B T D"],
    lengths: Int[Array, "B"],
) -> DecodeState:
    """The state after the first `lengths` elements of each row of x; it needs room for T."""
    return extend(module.bind(emu.Emu, config, params), state, x, lengths)


def extend(
    model: emu.Emu, state: DecodeState, x: Float[Array, "B T D"], lengths: Int[Array, "B"]
) -> DecodeState:
    """As `prefill`, inside a jitted function."""
    return advance(state, *forward(model, state, x, lengths), lengths)


def forward(
    model: emu.Emu, state: DecodeState, x: Float[Array, "B T D"], lengths: Int[Array, "B"]
) -> tuple[Float[Array, "B T D"], KVCache]:
    """Hidden states of elements that go on from the state, and the cache with them."""
    real = jnp.arange(x.shape[1]) < lengths[:, None]
    positions = jnp.where(real, state.lengths[:, None] + jnp.arange(x.shape[1]), 0)
    return model.llama(
        x, positions, real.astype(jnp.int32), state.cache, kernel=model.config.attention
    )


def advance(
    state: DecodeState, hidden: Float[Array, "B T D"], cache: KVCache, lengths: Int[Array, "B"]
) -> DecodeState:
    last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], 1)[:, 0]
    return DecodeState(
        cache, jnp.where(lengths[:, None] > 0, last, state.hidden), state.lengths + lengths
    )
