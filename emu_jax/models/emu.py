"""Emu (arXiv 2307.05222, section 3): images become visual tokens in the LLM's input, and the LLM
predicts the next element.

    images -> Vision -> ln_visual -> Resampler -> N visual tokens ┐ tokens -> embed
    ----------------------------------------------┴-> Llama -> hidden -> lm_head, regress_head
    (losses.py)

Outside this package a model is a plain nested dict of parameters: module.py. Read next: llama.py.
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
    # dtype of the arithmetic
    compute: str
    # kernel of the three towers' attention
    attention: str
    # visual tokens standardised by constants measured once (visual_stats)
    standardise: bool
    lora: LoraConfig = NO_LORA

    @classmethod
    def of(cls, model: dict) -> "EmuConfig":
        """From `config.model`, whose fields are these; what may stand beside them there (a decoder)
        is passed over.
        """
        towers = dict(
            vision=VisionConfig(**model["vision"]),
            resampler=ResamplerConfig(**model["resampler"]),
            llama=LlamaConfig(**model["llama"]),
            lora=LoraConfig(**model.get("lora", {})),
        )
        return cls(
            **towers, **{name: model[name] for name in ("compute", "attention", "standardise")}
        )


class VisualStats(nnx.Module):
    """Constants that standardise the visual tokens per (token, dimension); measured, never
    trained.
    """

    def __init__(self, config: EmuConfig):
        shape = (config.resampler.tokens, config.llama.width)
        self.mean = nnx.Param(jnp.zeros(shape))
        self.std = nnx.Param(jnp.ones(shape))

    def __call__(self, z: Float[Array, "M N D"]) -> Float[Array, "M N D"]:
        return ((z - self.mean.get_value()) / self.std.get_value()).astype(z.dtype)


class Encoder(nnx.Module):
    """The half of Emu that reads images; the contrastive warm-up trains it alone."""

    def __init__(self, config: EmuConfig, rngs: nnx.Rngs):
        self.config = config
        self.vision = Vision(config.vision, rngs)
        self.ln_visual = layers.LayerNorm(config.vision.width, eps=1e-6)
        self.resampler = Resampler(config.resampler, config.vision.width, config.llama.width, rngs)

    def encode(
        self, images: UInt8[Array, "M h w 3"], key: Array | None = None
    ) -> Float[Array, "M N D"]:
        """The visual tokens of each image."""
        x = normalise(sharding.constrain_images(images), self.config.vision, self.config.compute)
        features = self.ln_visual(self.vision(x, kernel=self.config.attention))
        return self.resampler(features, key, kernel=self.config.attention)


class Emu(Encoder):
    def __init__(self, config: EmuConfig, rngs: nnx.Rngs):
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
        """(hidden, visual tokens) of packed rows; `key` turns dropout on."""
        B = batch.images.shape[0]
        z = sharding.constrain_rows(
            self.encode(rearrange(batch.images, "B I h w c -> (B I) h w c"), key)
        )
        visual = rearrange(z, "(B I) N D -> B I N D", B=B)
        x = self.interleave(batch.tokens, visual, batch.image_slots)
        return self.llama(x, batch.positions, batch.segments, kernel=self.config.attention)[
            0
        ], visual

    def interleave(
        self, tokens: Int[Array, "B T"], visual: Float[Array, "B I N D"], slots: Int[Array, "B I"]
    ) -> Float[Array, "B T D"]:
        """Embeddings of the ids, with the visual tokens in their images' slots. A slot of T (no
        image) falls off the row.
        """
        x = self.llama.embeddings(tokens, visual.dtype)
        places = rearrange(slots[:, :, None] + jnp.arange(visual.shape[2]), "B I N -> B (I N)")
        return jax.vmap(lambda row, at, z: row.at[at].set(z, mode="drop"))(
            x, places, rearrange(visual, "B I N D -> B (I N) D")
        )
