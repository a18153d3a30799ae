"""An image: N embeddings, each regressed from the hidden state and read as the next input (section
2.2 of the paper). No noise.

Read next: text_decoding.py.
"""

from functools import partial
from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from emu_jax.generate import decode_state
from emu_jax.generate.decode_state import DecodeState
from emu_jax.models import emu, module
from emu_jax.tree import Tree


@flax.struct.dataclass
# JAX rebuilds it with what are no arrays
@no_type_check
class ImageDecodeState:
    """Images that are being drawn; of each row's N visual tokens the first `count` are there, and
    read.
    """

    llm: DecodeState
    visual: Float[Array, "B N D"]
    count: Int[Array, ""]


def start(config: emu.EmuConfig, llm: DecodeState) -> ImageDecodeState:
    """From a context whose rows have read `[IMG]` last, and that has room for N."""
    rows = llm.lengths.shape[0]
    return ImageDecodeState(
        llm,
        jnp.zeros((rows, config.resampler.tokens, config.llama.width), config.compute),
        jnp.int32(0),
    )


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def regress(
    config: emu.EmuConfig, params: Tree, state: ImageDecodeState, until: Int[Array, ""]
) -> ImageDecodeState:
    """The state with its first `until` visual tokens (N at most)."""
    model = module.bind(emu.Emu, config, params)
    one_each = jnp.ones_like(state.llm.lengths)

    def step(state: ImageDecodeState) -> ImageDecodeState:
        z = model.regress_head(state.llm.hidden[:, None])
        visual = jax.lax.dynamic_update_slice_in_dim(state.visual, z, state.count, 1)
        return ImageDecodeState(
            decode_state.extend(model, state.llm, z, one_each), visual, state.count + 1
        )

    return jax.lax.while_loop(lambda state: state.count < until, step, state)
