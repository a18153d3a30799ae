"""The warm-up of an encoder of your own: contrastive learning of its visual tokens against a bag of
word trigrams.

Emu starts from EVA-CLIP. From a random encoder its objective collapses: the visual tokens are input
and target at once, and become constant. This gives them content first (arXiv 2103.00020's loss),
with a linear reading of the pixels beside it.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from emu_jax.models import layers
from emu_jax.models.emu import EmuConfig, Encoder
from emu_jax.types import Batch

# pixels a side of the linear reading
READOUT = 16


class TrigramEncoder(nnx.Module):
    """A text encoder that sees the order of neighbours: the mean over tokens of gelu(a[t] + b[t-1]
    + c[t-2]).
    """

    def __init__(self, config: EmuConfig, rngs: nnx.Rngs):
        V = config.llama.vocab + config.llama.added
        D = config.llama.width
        self.tables = nnx.Param(0.5 * jax.random.normal(rngs.params(), (3, V, D)))
        self.project = layers.Linear("btD,DE->btE", (D, D), std=D**-0.5, rngs=rngs)

    def __call__(self, batch: Batch) -> Float[Array, "B I D"]:
        """Text features of each image: of the counted text of its own document."""
        T = batch.tokens.shape[1]
        segment = jnp.take_along_axis(batch.segments, jnp.minimum(batch.image_slots, T - 1), 1)
        mine = (batch.segments[:, None] == segment[:, :, None]) & (batch.text_weights > 0)[:, None]
        tables = self.tables.get_value()
        # one token for whatever is not text, or not of this document
        other = tables.shape[1] - 1
        spoken = jnp.where(batch.text_weights > 0, batch.tokens, other)

        def shift(x, n):
            return jnp.pad(x, ((0, 0), (n, 0)))[:, :T]

        def before(n):
            return jnp.where(shift(batch.segments, n) == batch.segments, shift(spoken, n), other)

        x = jax.nn.gelu(sum(tables[n][before(n)] for n in range(3)))
        mine = mine.astype(x.dtype)
        mean = jnp.einsum("bit,btd->bid", mine, x) / jnp.maximum(mine.sum(-1, keepdims=True), 1)
        return self.project(mean)


class ContrastiveHeads(nnx.Module):
    """Heads of the warm-up on visual tokens [M, N, D]."""

    def __init__(self, config: EmuConfig, rngs: nnx.Rngs):
        N = config.resampler.tokens
        D = config.llama.width
        self.text = TrigramEncoder(config, rngs)
        self.image = layers.Linear(
            "mnD,nDE->mE", (N, D, D), bias=(D,), std=(N * D) ** -0.5, rngs=rngs
        )
        self.readout = layers.Linear(
            "mnD,nDp->mp",
            (N, D, READOUT * READOUT * 3),
            bias=(READOUT * READOUT * 3,),
            std=(N * D) ** -0.5,
            rngs=rngs,
        )

    def pixels(self, z: Float[Array, "M N D"]) -> Float[Array, "M x y 3"]:
        return rearrange(self.readout(z), "m (x y c) -> m x y c", x=READOUT, y=READOUT)


class ContrastiveModel(Encoder):
    """Vision, ln_visual and resampler under the names they have in Emu, and the heads that are
    thrown away.
    """

    def __init__(self, config: EmuConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        self.contrast = ContrastiveHeads(config, rngs)
