"""Contrastive warm-up of a randomly initialised image encoder.

Emu starts from the trained encoder of EVA-CLIP. If training starts from a random encoder instead,
Emu's objective collapses: visual tokens are both input and target, and they become constant. The
warm-up first trains the encoder to describe its images. It adds two losses: CLIP's loss (arXiv
2103.00020) against a bag of word trigrams, and the error of a linear readout of the pixels. Read
next: `contrastive` in ../stages.py.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from emu_jax.models import layers
from emu_jax.models.emu import EmuConfig, Encoder
from emu_jax.types import Batch

# Height and width, in pixels, of the small image that the linear readout predicts.
READOUT = 16


class TrigramEncoder(nnx.Module):
    """A text encoder that sees local word order: the mean of gelu(a[t] + b[t-1] + c[t-2]).

    a, b and c are embedding tables for the token itself, the token before it and the one before
    that.
    """

    def __init__(self, config: EmuConfig, rngs: layers.Rngs):
        V = config.llama.vocab + config.llama.added
        D = config.llama.width
        self.tables = nnx.Param(rngs.normal(0.5, (3, V, D)))
        self.project = layers.Linear("btD,DE->btE", (D, D), std=D**-0.5, rngs=rngs)

    def __call__(self, batch: Batch) -> Float[Array, "B I D"]:
        """Features of each image's text: the tokens of the image's document that carry loss."""
        T = batch.tokens.shape[1]
        is_text = batch.text_weights > 0
        tables = self.tables.get_value()
        # This id stands for everything that is not text of the same document.
        other = tables.shape[1] - 1
        text_ids = jnp.where(is_text, batch.tokens, other)

        def shift(x, n):
            return jnp.pad(x, ((0, 0), (n, 0)))[:, :T]

        def ids_before(n):
            same_document = shift(batch.segments, n) == batch.segments
            return jnp.where(same_document, shift(text_ids, n), other)

        x = jax.nn.gelu(sum(tables[n][ids_before(n)] for n in range(3)))

        # Average over the text of the document that contains the image.
        slots = jnp.minimum(batch.image_slots, T - 1)
        segment = jnp.take_along_axis(batch.segments, slots, 1)
        mask = (batch.segments[:, None] == segment[:, :, None]) & is_text[:, None]
        mask = mask.astype(x.dtype)
        count = jnp.maximum(mask.sum(-1, keepdims=True), 1)
        return self.project(jnp.einsum("bit,btd->bid", mask, x) / count)


class ContrastiveHeads(nnx.Module):
    """Heads of the warm-up: text encoder, image projection and pixel readout."""

    def __init__(self, config: EmuConfig, rngs: layers.Rngs):
        N = config.resampler.tokens
        D = config.llama.width
        self.text = TrigramEncoder(config, rngs)
        self.image = layers.Linear(
            "mnD,nDE->mE", (N, D, D), bias=(D,), std=(N * D) ** -0.5, rngs=rngs
        )
        values = READOUT * READOUT * 3
        self.readout = layers.Linear(
            "mnD,nDp->mp", (N, D, values), bias=(values,), std=(N * D) ** -0.5, rngs=rngs
        )

    def pixels(self, z: Float[Array, "M N D"]) -> Float[Array, "M x y 3"]:
        """Predict small images from the visual tokens `z` by the linear readout."""
        return rearrange(self.readout(z), "m (x y c) -> m x y c", x=READOUT, y=READOUT)


class ContrastiveModel(Encoder):
    """The image encoder, and heads that are discarded after the warm-up.

    The encoder has Emu's parameter paths, so that Emu can start from its checkpoint.
    """

    def __init__(self, config: EmuConfig, rngs: layers.Rngs):
        super().__init__(config, rngs)
        self.contrast = ContrastiveHeads(config, rngs)
