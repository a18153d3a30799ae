"""CLIP (arXiv 2103.00020): a text's and a picture's features, whose cosine says how well they go
together. It scores pictures; Emu does not contain it.

Two towers of the same pre-norm blocks, the text's causal. Read next: weights/clip.py,
evaluate/metrics/clip_score.py.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from emu_jax.models import layers
from emu_jax.models.attention import Mask, attention, self_mask

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}
# what config.json says of </s> where it says nothing true: a text ends at its largest id then
OLD_EOS = 2


@dataclass(frozen=True)
class TowerConfig:
    # E
    width: int
    depth: int
    heads: int
    ffn: int
    eps: float
    # a key of ACTIVATIONS
    activation: str


@dataclass(frozen=True)
class ClipConfig:
    # C, width of what both towers give
    features: int
    # pixels a side
    image: int
    patch: int
    vocab: int
    # tokens of a text at most
    context: int
    # id of the token at which a text is read; see OLD_EOS
    eos: int
    text: TowerConfig
    vision: TowerConfig

    @classmethod
    def of(cls, model: dict) -> "ClipConfig":
        """From `config.model` with its group `clip`."""
        towers = {name: TowerConfig(**model["clip"][name]) for name in ("text", "vision")}
        return cls(**{**model["clip"], **towers})


class ClipBlock(nnx.Module):
    def __init__(self, config: TowerConfig, rngs: nnx.Rngs):
        E = config.width
        H = config.heads
        d = config.width // config.heads
        F = config.ffn
        self.activation = config.activation
        self.norm1 = layers.LayerNorm(E, eps=config.eps)
        self.q, self.k, self.v = (
            layers.Linear("bte,ehd->bthd", (E, H, d), bias=(H, d), std=0.02, rngs=rngs)
            for _ in "qkv"
        )
        self.o = layers.Linear("bthd,hde->bte", (H, d, E), bias=(E,), std=0.02, rngs=rngs)
        self.norm2 = layers.LayerNorm(E, eps=config.eps)
        self.up = layers.Linear("bte,ef->btf", (E, F), bias=(F,), std=0.02, rngs=rngs)
        self.down = layers.Linear("btf,fe->bte", (F, E), bias=(E,), std=0.02, rngs=rngs)

    def __call__(self, x, mask: Mask | None):
        y = self.norm1(x)
        q = self.q(y)
        x = x + self.o(
            attention(q, self.k(y), self.v(y), mask, scale=q.shape[-1] ** -0.5, kernel="dense")
        )
        return x + self.down(ACTIVATIONS[self.activation](self.up(self.norm2(x))))


class ClipText(nnx.Module):
    def __init__(self, config: ClipConfig, rngs: nnx.Rngs):
        tower = config.text
        self.eos = config.eos
        self.tokens = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (config.vocab, tower.width))
        )
        self.positions = nnx.Param(
            0.01 * jax.random.normal(rngs.params(), (config.context, tower.width))
        )
        self.blocks = layers.stack(lambda rngs: ClipBlock(tower, rngs), tower.depth, rngs)
        self.norm = layers.LayerNorm(tower.width, eps=tower.eps)
        self.project = layers.Linear(
            "be,ec->bc", (tower.width, config.features), std=tower.width**-0.5, rngs=rngs
        )

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B C"]:
        """Features of texts, each read at its first end; what follows that counts for nothing."""
        x = self.tokens.get_value()[ids] + self.positions.get_value()[: ids.shape[1]]
        x = layers.run(
            self.blocks,
            x,
            lambda block, x, _: block(x, self_mask()),
            where="text/blocks",
            remat="none",
        )
        end = jnp.argmax(ids if self.eos == OLD_EOS else ids == self.eos, -1)
        return self.project(self.norm(x[jnp.arange(len(ids)), end]))


class ClipVision(nnx.Module):
    def __init__(self, config: ClipConfig, rngs: nnx.Rngs):
        tower = config.vision
        p = config.patch
        self.side = config.patch
        self.cls = nnx.Param(0.02 * jax.random.normal(rngs.params(), (tower.width,)))
        self.patch = layers.Linear("bxyijc,ijce->bxye", (p, p, 3, tower.width), std=0.02, rngs=rngs)
        self.positions = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (1 + (config.image // p) ** 2, tower.width))
        )
        self.before = layers.LayerNorm(tower.width, eps=tower.eps)
        self.blocks = layers.stack(lambda rngs: ClipBlock(tower, rngs), tower.depth, rngs)
        self.after = layers.LayerNorm(tower.width, eps=tower.eps)
        self.project = layers.Linear(
            "be,ec->bc", (tower.width, config.features), std=tower.width**-0.5, rngs=rngs
        )

    def __call__(self, images: Float[Array, "B h w 3"]) -> Float[Array, "B C"]:
        """Features of normalised images."""
        x = self.patch(
            rearrange(images, "b (x i) (y j) c -> b x y i j c", i=self.side, j=self.side)
        )
        cls = jnp.broadcast_to(self.cls.get_value(), (len(x), 1, x.shape[-1]))
        x = self.before(
            jnp.concatenate([cls, rearrange(x, "b x y e -> b (x y) e")], 1)
            + self.positions.get_value()
        )
        x = layers.run(
            self.blocks, x, lambda block, x, _: block(x, None), where="vision/blocks", remat="none"
        )
        return self.project(self.after(x[:, 0]))


class Clip(nnx.Module):
    def __init__(self, config: ClipConfig, rngs: nnx.Rngs):
        self.text = ClipText(config, rngs)
        self.vision = ClipVision(config, rngs)
        # of training: no feature knows it
        self.logit_scale = nnx.Param(jnp.zeros(()))
