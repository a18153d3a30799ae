"""Image generation: N visual tokens, each regressed and fed back as the next input.

This is deterministic (section 2.2 of the paper); the diffusion decoder turns visual tokens into
pixels. Read next: text_decoding.py, then diffusion_decoder.py.
"""

from functools import partial
from typing import NamedTuple, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from emu_jax.generate import decode_state
from emu_jax.generate.decode_state import DecodeState
from emu_jax.models.emu import EmuConfig
from emu_jax.tree import Tree


class GeneratedImage(NamedTuple):
    """An image that the model generated."""

    # Visual tokens in float32; they can be part of later prompts.
    visual: Float[np.ndarray, "N D"]
    # None without an image decoder.
    pixels: UInt8[np.ndarray, "h w 3"] | None


@flax.struct.dataclass
# JAX also builds this class with leaves that are not arrays, so its types cannot be checked.
@no_type_check
class ImageDecodeState:
    """One image per row: the first `count` of its N visual tokens are generated and read."""

    llm: DecodeState
    visual: Float[Array, "B N D"]
    count: Int[Array, ""]


def start(config: EmuConfig, llm: DecodeState) -> ImageDecodeState:
    """Begin an image in each row; every row must have read `[IMG]` last and have N free slots."""
    rows = llm.lengths.shape[0]
    shape = (rows, config.resampler.tokens, config.llama.width)
    return ImageDecodeState(llm, jnp.zeros(shape, config.compute), jnp.int32(0))


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def regress(
    config: EmuConfig, params: Tree, state: ImageDecodeState, until: Int[Array, ""]
) -> ImageDecodeState:
    """Regress visual tokens until there are `until` of them, at most N. Donates `state`."""
    model = decode_state.bind(config, params)
    one_each = jnp.ones_like(state.llm.lengths)

    def step(state: ImageDecodeState) -> ImageDecodeState:
        token = model.regress_head(state.llm.hidden[:, None])
        visual = jax.lax.dynamic_update_slice_in_dim(state.visual, token, state.count, 1)
        llm = decode_state.extend(model, state.llm, token, one_each)
        return ImageDecodeState(llm, visual, state.count + 1)

    return jax.lax.while_loop(lambda state: state.count < until, step, state)
