"""What the LLM has read so far: the state that text and images are generated from.

Prefilling a and then b equals prefilling a + b. So a shared prefix is prefilled once for many
prompts, a chat continues from its last turn, and an image is N embeddings fed back one by one. Read
next: text_decoding.py, image_decoding.py, session.py.
"""

from dataclasses import replace
from functools import partial
from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from emu_jax.models import module
from emu_jax.models.emu import Emu, EmuConfig
from emu_jax.tree import Tree
from emu_jax.types import KVCache


@flax.struct.dataclass
# JAX also builds this class with leaves that are not arrays, so its types cannot be checked.
@no_type_check
class DecodeState:
    """The LLM after reading B rows, each of its own length."""

    cache: KVCache
    # Hidden state of the last element read; the next element is predicted from it.
    hidden: Float[Array, "B D"]
    # Number of elements read, which is also the position of the next one.
    lengths: Int[Array, "B"]


def bind(config: EmuConfig, params: Tree) -> Emu:
    """The Emu whose parameters are `params`, for use inside a jitted function."""
    model = module.bind(Emu, config, params)
    assert isinstance(model, Emu)
    return model


@partial(jax.jit, static_argnums=(0, 2, 3))
def init(config: EmuConfig, params: Tree, rows: int, capacity: int) -> DecodeState:
    """Make the state of `rows` rows that have read nothing, with room for `capacity` elements."""
    cache = bind(config, params).llama.empty_cache(rows, capacity, config.compute)
    hidden = jnp.zeros((rows, config.llama.width), config.compute)
    return DecodeState(cache, hidden, jnp.zeros(rows, jnp.int32))


@partial(jax.jit, static_argnums=(1, 2))
def expand(state: DecodeState, repeats: int, capacity: int) -> DecodeState:
    """Copy a state, with every row repeated and the cache grown to `capacity` elements.

    Copies of a row are neighbours. capacity: at least the cache's own.
    """
    free = capacity - state.cache.capacity

    def repeat(x, axis):
        return jnp.repeat(x, repeats, axis) if repeats > 1 else jnp.copy(x)

    def grow(x, rows_axis):
        padding = [(0, free if axis == rows_axis + 1 else 0) for axis in range(x.ndim)]
        return jnp.pad(repeat(x, rows_axis), padding)

    cache = state.cache
    cache = replace(
        cache,
        k=grow(cache.k, 1),
        v=grow(cache.v, 1),
        positions=grow(cache.positions, 0),
        segments=grow(cache.segments, 0),
    )
    return DecodeState(cache, repeat(state.hidden, 0), repeat(state.lengths, 0))


@partial(jax.jit, static_argnums=0)
def encode_images(
    config: EmuConfig, params: Tree, images: UInt8[Array, "M h w 3"]
) -> Float[Array, "M N D"]:
    """Encode images as visual tokens."""
    return bind(config, params).encode(images)


@partial(jax.jit, static_argnums=0)
def embed(
    config: EmuConfig,
    params: Tree,
    tokens: Int[Array, "B T"],
    visual: Float[Array, "M N D"],
    images: Int[Array, "B I"],
    slots: Int[Array, "B I"],
) -> Float[Array, "B T D"]:
    """Make the LLM's input from ids and visual tokens.

    The i-th image of row b is visual[images[b, i]] and starts at position slots[b, i], which is T
    if the row has fewer images.
    """
    return bind(config, params).interleave(tokens, visual[images], slots)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill(
    config: EmuConfig,
    params: Tree,
    state: DecodeState,
    x: Float[Array, "B T D"],
    lengths: Int[Array, "B"],
) -> DecodeState:
    """Read the first `lengths` elements of each row of x.

    The cache needs T free slots. Donates `state`: it cannot be used again.
    """
    return extend(bind(config, params), state, x, lengths)


def extend(
    model: Emu, state: DecodeState, x: Float[Array, "B T D"], lengths: Int[Array, "B"]
) -> DecodeState:
    """Do the same as `prefill`, but inside another jitted function."""
    hidden, cache = forward(model, state, x, lengths)
    last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], 1)[:, 0]
    # A row that reads nothing keeps its hidden state.
    last = jnp.where(lengths[:, None] > 0, last, state.hidden)
    return DecodeState(cache, last, state.lengths + lengths)


def forward(
    model: Emu, state: DecodeState, x: Float[Array, "B T D"], lengths: Int[Array, "B"]
) -> tuple[Float[Array, "B T D"], KVCache]:
    """Hidden states of x as the continuation of the state, and the cache with x in it."""
    steps = jnp.arange(x.shape[1])
    real = steps < lengths[:, None]
    positions = jnp.where(real, state.lengths[:, None] + steps, 0)
    segments = real.astype(jnp.int32)
    hidden, cache = model.llama(x, positions, segments, state.cache, kernel=model.config.attention)
    assert cache is not None
    return hidden, cache
