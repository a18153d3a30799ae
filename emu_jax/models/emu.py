"""Emu (arXiv 2307.05222, section 3): images become visual tokens in the LLM's input, and the LLM
predicts the next element.

    images -> Vision -> ln_visual -> Resampler -> N visual tokens ┐ tokens -> embed
    ----------------------------------------------┴-> Llama -> hidden -> lm_head, regress_head
    (losses.py)

Outside this package a model is a plain nested dict of parameters: `init` makes it, `bind` gives it
arithmetic.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from emu_jax import sharding
from emu_jax.models import layers, lora
from emu_jax.models.llama import Llama, LlamaSize
from emu_jax.models.lora import NO_LORA, LoraSize
from emu_jax.models.resampler import Resampler, ResamplerSize
from emu_jax.models.vision import Vision, VisionSize, normalise
from emu_jax.types import Batch


@dataclass(frozen=True)
class EmuSize:
    vision: VisionSize
    resampler: ResamplerSize
    llama: LlamaSize
    # dtype of the arithmetic
    compute: str
    # kernel of the three towers' attention
    attention: str
    # visual tokens standardised by constants measured once (visual_stats)
    standardise: bool
    lora: LoraSize = NO_LORA

    @classmethod
    def of(cls, model: dict) -> "EmuSize":
        """From `config.model`, whose fields are these; what may stand beside them there (a decoder)
        is passed over.
        """
        towers = dict(
            vision=VisionSize(**model["vision"]),
            resampler=ResamplerSize(**model["resampler"]),
            llama=LlamaSize(**model["llama"]),
            lora=LoraSize(**model.get("lora", {})),
        )
        return cls(
            **towers, **{name: model[name] for name in ("compute", "attention", "standardise")}
        )


class VisualStats(nnx.Module):
    """Constants that standardise the visual tokens per (token, dimension); measured, never
    trained.
    """

    def __init__(self, size: EmuSize):
        shape = (size.resampler.tokens, size.llama.width)
        self.mean = nnx.Param(jnp.zeros(shape))
        self.std = nnx.Param(jnp.ones(shape))

    def __call__(self, z: Float[Array, "M N D"]) -> Float[Array, "M N D"]:
        return ((z - self.mean.get_value()) / self.std.get_value()).astype(z.dtype)


class Encoder(nnx.Module):
    """The half of Emu that reads images; the contrastive warm-up trains it alone."""

    def __init__(self, size: EmuSize, rngs: nnx.Rngs):
        self.size = size
        self.vision = Vision(size.vision, rngs)
        self.ln_visual = layers.LayerNorm(size.vision.width, eps=1e-6)
        self.resampler = Resampler(size.resampler, size.vision.width, size.llama.width, rngs)

    def encode(
        self, images: UInt8[Array, "M h w 3"], key: Array | None = None
    ) -> Float[Array, "M N D"]:
        """The visual tokens of each image."""
        x = normalise(sharding.constrain_images(images), self.size.vision, self.size.compute)
        features = self.ln_visual(self.vision(x, kernel=self.size.attention))
        return self.resampler(features, key, kernel=self.size.attention)


class Emu(Encoder):
    def __init__(self, size: EmuSize, rngs: nnx.Rngs):
        super().__init__(size, rngs)
        if size.standardise:
            self.visual_stats = VisualStats(size)
        self.llama = Llama(size.llama, rngs)
        self.regress_head = layers.Linear(
            "bkD,DE->bkE", (size.llama.width, size.llama.width), std=0.02, rngs=rngs
        )

    def encode(self, images, key=None):
        z = super().encode(images, key)
        return self.visual_stats(z) if self.size.standardise else z

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
        return self.llama(x, batch.positions, batch.segments, kernel=self.size.attention)[0], visual

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


def init(module: type[nnx.Module], size: Any, key: Array) -> dict:
    """Fresh parameters of `module(size, rngs)` as a nested dict, with its LoRA; under
    jax.eval_shape, their shapes.
    """
    made = module(size, nnx.Rngs(params=key))
    linear = {
        "/".join(map(str, path)) + "/w": part.inputs
        for path, part in nnx.iter_modules(made)
        if isinstance(part, layers.Linear)
    }
    inputs = {path: axes for path, axes in linear.items() if "/blocks/" in path}
    return lora.extended(_lora(size), nnx.to_pure_dict(nnx.state(made)), inputs, key)


def bind(module: type[nnx.Module], size: Any, params: dict, key: Array | None = None) -> nnx.Module:
    """The module whose parameters are `params`: for use inside a jitted function. `key` turns the
    dropout of LoRA on.
    """
    return nnx.merge(_graphdef(module, size), lora.bound(_lora(size), params, key))


# a second or two each time that something is traced
@cache
def _graphdef(module: type[nnx.Module], size: Any) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: module(size, nnx.Rngs(params=0))))


def _lora(size: Any) -> LoraSize | None:
    """None for what has no Emu in it: a U-Net alone."""
    return getattr(size, "lora", None)
