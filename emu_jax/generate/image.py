"""An image: N embeddings, each regressed from the hidden state and read as the next input (section
2.2 of the paper). No noise.

Read next: text.py.
"""

from functools import partial
from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from emu_jax.generate import reading
from emu_jax.generate.reading import Context
from emu_jax.models import emu
from emu_jax.tree import Tree


@flax.struct.dataclass
# JAX rebuilds it with what are no arrays
@no_type_check
class Sketch:
    """Images that are being drawn; of each row's N visual tokens the first `count` are there, and
    read.
    """

    context: Context
    visual: Float[Array, "B N D"]
    count: Int[Array, ""]


def begin(size: emu.EmuSize, context: Context) -> Sketch:
    """From a context whose rows have read `[IMG]` last, and that has room for N."""
    rows = context.lengths.shape[0]
    return Sketch(
        context,
        jnp.zeros((rows, size.resampler.tokens, size.llama.width), size.compute),
        jnp.int32(0),
    )


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def draw(size: emu.EmuSize, params: Tree, sketch: Sketch, until: Int[Array, ""]) -> Sketch:
    """The sketch with its first `until` visual tokens (N at most)."""
    model = emu.bind(emu.Emu, size, params)
    one_each = jnp.ones_like(sketch.context.lengths)

    def one(sketch: Sketch) -> Sketch:
        z = model.regress_head(sketch.context.hidden[:, None])
        visual = jax.lax.dynamic_update_slice_in_dim(sketch.visual, z, sketch.count, 1)
        return Sketch(reading.step(model, sketch.context, z, one_each), visual, sketch.count + 1)

    return jax.lax.while_loop(lambda sketch: sketch.count < until, one, sketch)
