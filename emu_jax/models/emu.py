"""Emu (arXiv 2307.05222, section 2.1): an LLM that predicts the next text or visual token.

    images -> Vision -> ln_visual -> Resampler -> N visual tokens ┐
    tokens -> embed ──────────────────────────────────────────────┴-> Llama -> hidden -> losses.py

Outside this package a model is a plain nested dict of parameters (module.py). Read next: llama.py.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from emu_jax import sharding
from emu_jax.models import layers
from emu_jax.models.llama import Llama, LlamaConfig
from emu_jax.models.lora import NO_LORA, LoraConfig
from emu_jax.models.resampler import Resampler, ResamplerConfig
from emu_jax.models.vision import Vision, VisionConfig, normalise
from emu_jax.types import Batch


@dataclass(frozen=True)
class EmuConfig:
    vision: VisionConfig
    resampler: ResamplerConfig
    llama: LlamaConfig
    # Dtype of activations and matrix products.
    compute: str
    # Attention kernel of the three towers; see attention.py.
    attention: str
    # Whether `VisualStats` standardises the visual tokens.
    standardise: bool
    lora: LoraConfig = NO_LORA

    @classmethod
    def of(cls, model: dict) -> "EmuConfig":
        """Make the config from `config.model`, ignoring other groups there, such as `decoder`."""
        return cls(
            vision=VisionConfig(**model["vision"]),
            resampler=ResamplerConfig(**model["resampler"]),
            llama=LlamaConfig(**model["llama"]),
            compute=model["compute"],
            attention=model["attention"],
            standardise=model["standardise"],
            lora=LoraConfig(**model.get("lora", {})),
        )


class VisualStats(nnx.Module):
    """Standardise visual tokens by a mean and std per (token, dimension).

    The mean and std are measured once, before training, and gradients never change them.
    """

    def __init__(self, config: EmuConfig):
        shape = (config.resampler.tokens, config.llama.width)
        self.mean = nnx.Param(jnp.zeros(shape))
        self.std = nnx.Param(jnp.ones(shape))

    def __call__(self, z: Float[Array, "M N D"]) -> Float[Array, "M N D"]:
        return ((z - self.mean.get_value()) / self.std.get_value()).astype(z.dtype)


class Encoder(nnx.Module):
    """Emu's image side: vision tower, layer norm and resampler.

    It is a separate class because the contrastive warm-up trains it without the LLM.
    """

    def __init__(self, config: EmuConfig, rngs: layers.Rngs):
        self.config = config
        self.vision = Vision(config.vision, rngs)
        self.ln_visual = layers.LayerNorm(config.vision.width, eps=1e-6)
        self.resampler = Resampler(config.resampler, config.vision.width, config.llama.width, rngs)

    def encode(
        self, images: UInt8[Array, "M h w 3"], key: Array | None = None
    ) -> Float[Array, "M N D"]:
        """Encode each image into N visual tokens; `key` turns dropout on."""
        x = normalise(sharding.constrain_images(images), self.config.vision, self.config.compute)
        features = self.ln_visual(self.vision(x, kernel=self.config.attention))
        return self.resampler(features, key, kernel=self.config.attention)


class Emu(Encoder):
    """The image encoder, the LLM, and the head that regresses visual tokens."""

    def __init__(self, config: EmuConfig, rngs: layers.Rngs):
        super().__init__(config, rngs)
        if config.standardise:
            self.visual_stats = VisualStats(config)
        self.llama = Llama(config.llama, rngs)
        self.regress_head = layers.Linear(
            "bkD,DE->bkE", (config.llama.width, config.llama.width), std=0.02, rngs=rngs
        )

    def encode(self, images, key=None):
        z = super().encode(images, key)
        return self.visual_stats(z) if self.config.standardise else z

    def __call__(
        self, batch: Batch, key: Array | None = None
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B I N D"]]:
        """Return the LLM's hidden states and the visual tokens; `key` turns dropout on."""
        B = batch.images.shape[0]
        images = rearrange(batch.images, "B I h w c -> (B I) h w c")
        z = sharding.constrain_rows(self.encode(images, key))
        visual = rearrange(z, "(B I) N D -> B I N D", B=B)
        x = self.interleave(batch.tokens, visual, batch.image_slots)
        hidden, _ = self.llama(x, batch.positions, batch.segments, kernel=self.config.attention)
        return hidden, visual

    def interleave(
        self, tokens: Int[Array, "B T"], visual: Float[Array, "B I N D"], slots: Int[Array, "B I"]
    ) -> Float[Array, "B T D"]:
        """Embed tokens, and write the visual tokens of each image from its slot on.

        An empty place for an image has the slot T, the length of the row. Its visual tokens would
        be outside the row and are dropped.
        """
        x = self.llama.embeddings(tokens, visual.dtype)
        positions = slots[:, :, None] + jnp.arange(visual.shape[2])

        def write(row, positions, z):
            return row.at[positions].set(z, mode="drop")

        return jax.vmap(write)(
            x,
            rearrange(positions, "B I N -> B (I N)"),
            rearrange(visual, "B I N D -> B (I N) D"),
        )
