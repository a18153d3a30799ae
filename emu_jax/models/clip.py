"""CLIP (arXiv 2103.00020): features of texts and images, compared by their cosine.

CLIP scores generated images and is not part of Emu. Both towers are stacks of the same pre-norm
block, and the text tower is causal. Read next: weights/clip.py, evaluate/metrics/clip_score.py.
"""

from dataclasses import dataclass
from typing import Any

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
# Old config.json files wrongly give 2 as the id of the end token. For a model with this id, the end
# of a text is its largest id, as in transformers: CLIP's end token has the largest id of all.
OLD_EOS = 2


@dataclass(frozen=True)
class TowerConfig:
    """Sizes of one tower. Each of its `heads` attention heads has width / heads channels."""

    width: int
    depth: int
    heads: int
    # Hidden width of the feed-forward layers.
    ffn: int
    eps: float
    # A key of ACTIVATIONS.
    activation: str


@dataclass(frozen=True)
class ClipConfig:
    # Width C of the features of both towers.
    features: int
    # Height and width of images, in pixels.
    image: int
    patch: int
    vocab: int
    # Longest text, in tokens.
    context: int
    # Id of the token that ends a text. The hidden state at this token gives the text's features.
    # See also OLD_EOS.
    eos: int
    text: TowerConfig
    vision: TowerConfig

    @classmethod
    def of(cls, model: dict) -> "ClipConfig":
        """Make the config from `config.model`, which must have the group `clip`."""
        towers = {name: TowerConfig(**model["clip"][name]) for name in ("text", "vision")}
        fields: dict[str, Any] = {**model["clip"], **towers}
        return cls(**fields)


class ClipBlock(nnx.Module):
    def __init__(self, config: TowerConfig, rngs: layers.Rngs):
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
        scale = q.shape[-1] ** -0.5
        x = x + self.o(attention(q, self.k(y), self.v(y), mask, scale=scale, kernel="dense"))
        activate = ACTIVATIONS[self.activation]
        return x + self.down(activate(self.up(self.norm2(x))))


class ClipText(nnx.Module):
    def __init__(self, config: ClipConfig, rngs: layers.Rngs):
        tower = config.text
        self.eos = config.eos
        self.tokens = nnx.Param(rngs.normal(0.02, (config.vocab, tower.width)))
        self.positions = nnx.Param(rngs.normal(0.01, (config.context, tower.width)))
        self.blocks = layers.stack(lambda rngs: ClipBlock(tower, rngs), tower.depth, rngs)
        self.norm = layers.LayerNorm(tower.width, eps=tower.eps)
        self.project = layers.Linear(
            "be,ec->bc", (tower.width, config.features), std=tower.width**-0.5, rngs=rngs
        )

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B C"]:
        """Compute the features of each text from the hidden state at its first end token.

        Padding after the end token has no effect, because the tower is causal.
        """
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
    def __init__(self, config: ClipConfig, rngs: layers.Rngs):
        tower = config.vision
        p = config.patch
        self.side = config.patch
        self.cls = nnx.Param(rngs.normal(0.02, (tower.width,)))
        self.patch = layers.Linear("bxyijc,ijce->bxye", (p, p, 3, tower.width), std=0.02, rngs=rngs)
        self.positions = nnx.Param(rngs.normal(0.02, (1 + (config.image // p) ** 2, tower.width)))
        self.before = layers.LayerNorm(tower.width, eps=tower.eps)
        self.blocks = layers.stack(lambda rngs: ClipBlock(tower, rngs), tower.depth, rngs)
        self.after = layers.LayerNorm(tower.width, eps=tower.eps)
        self.project = layers.Linear(
            "be,ec->bc", (tower.width, config.features), std=tower.width**-0.5, rngs=rngs
        )

    def __call__(self, images: Float[Array, "B h w 3"]) -> Float[Array, "B C"]:
        """Compute the features of normalised images."""
        side = self.side
        patches = rearrange(images, "b (x i) (y j) c -> b x y i j c", i=side, j=side)
        x = rearrange(self.patch(patches), "b x y e -> b (x y) e")
        cls = jnp.broadcast_to(self.cls.get_value(), (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([cls, x], 1)
        x = self.before(x + self.positions.get_value())
        x = layers.run(
            self.blocks, x, lambda block, x, _: block(x, None), where="vision/blocks", remat="none"
        )
        return self.project(self.after(x[:, 0]))


class Clip(nnx.Module):
    def __init__(self, config: ClipConfig, rngs: layers.Rngs):
        self.text = ClipText(config, rngs)
        self.vision = ClipVision(config, rngs)
        # Checkpoints contain this parameter, but only CLIP's training loss uses it.
        self.logit_scale = nnx.Param(jnp.zeros(()))
