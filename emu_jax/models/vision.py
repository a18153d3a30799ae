"""EVA-01-CLIP's vision transformer (arXiv 2211.07636), Emu's visual encoder (section 2.1).

Its blocks are pre-norm with an exact GELU, its positions are learned and absolute, and its keys
have no bias. Emu reads the raw output of the last block, including the CLS token. The final norm,
head and pooling of EVA-CLIP are not used. Read next: resampler.py.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from emu_jax import sharding
from emu_jax.models import layers
from emu_jax.models.attention import attention


@dataclass(frozen=True)
class VisionConfig:
    # Height and width of images, in pixels.
    image: int
    # Height and width of a patch, in pixels.
    patch: int
    # E, width of the hidden states.
    width: int
    depth: int
    heads: int
    ffn: int
    # Mean and standard deviation of pixels in 0..1, by channel.
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    remat: str

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2


class VisionAttention(nnx.Module):
    def __init__(self, config: VisionConfig, rngs: layers.Rngs):
        E = config.width
        H = config.heads
        d = config.width // config.heads
        self.q = layers.Linear("bte,ehd->bthd", (E, H, d), bias=(H, d), std=0.02, rngs=rngs)
        self.k = layers.Linear("bte,ehd->bthd", (E, H, d), std=0.02, rngs=rngs)
        self.v = layers.Linear("bte,ehd->bthd", (E, H, d), bias=(H, d), std=0.02, rngs=rngs)
        self.o = layers.Linear("bthd,hde->bte", (H, d, E), bias=(E,), std=0.02, rngs=rngs)

    def __call__(self, x, kernel: str):
        q = self.q(x)
        return self.o(
            attention(q, self.k(x), self.v(x), None, scale=q.shape[-1] ** -0.5, kernel=kernel)
        )


class VisionFfn(nnx.Module):
    def __init__(self, config: VisionConfig, rngs: layers.Rngs):
        self.up = layers.Linear(
            "bte,ef->btf", (config.width, config.ffn), bias=(config.ffn,), std=0.02, rngs=rngs
        )
        self.down = layers.Linear(
            "btf,fe->bte", (config.ffn, config.width), bias=(config.width,), std=0.02, rngs=rngs
        )

    def __call__(self, x):
        return self.down(jax.nn.gelu(self.up(x), approximate=False))


class VisionBlock(nnx.Module):
    def __init__(self, config: VisionConfig, rngs: layers.Rngs):
        self.norm1 = layers.LayerNorm(config.width, eps=1e-6)
        self.attn = VisionAttention(config, rngs)
        self.norm2 = layers.LayerNorm(config.width, eps=1e-6)
        self.ffn = VisionFfn(config, rngs)

    def __call__(self, x, kernel: str):
        x = x + self.attn(self.norm1(x), kernel)
        return x + self.ffn(self.norm2(x))


class Vision(nnx.Module):
    def __init__(self, config: VisionConfig, rngs: layers.Rngs):
        self.config = config
        E = config.width
        p = config.patch
        self.patch = layers.Linear(
            "bxyijc,ijce->bxye", (p, p, 3, E), bias=(E,), std=0.02, rngs=rngs
        )
        self.cls = nnx.Param(rngs.normal(0.02, (E,)))
        # Learned positions start as sines and cosines, so that they differ from the first step on.
        self.pos = nnx.Param(jnp.asarray(sincos(config.image // p, E)))
        self.blocks = layers.stack(lambda rngs: VisionBlock(config, rngs), config.depth, rngs)

    def __call__(
        self, images: Float[Array, "M h w 3"], *, kernel: str = "auto"
    ) -> Float[Array, "M S E"]:
        """Compute the features of CLS and then the patches, for images from `normalise`."""
        p = self.config.patch
        x = self.patch(rearrange(images, "m (x i) (y j) c -> m x y i j c", i=p, j=p))
        x = rearrange(x, "m x y e -> m (x y) e")
        cls = jnp.broadcast_to(self.cls.get_value().astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([cls, x], 1) + self.pos.get_value().astype(x.dtype)
        x = sharding.constrain_images(x)
        return layers.run(
            self.blocks,
            x,
            lambda block, x, _: block(x, kernel),
            where="vision/blocks",
            remat=self.config.remat,
        )


def sincos(side: int, width: int) -> np.ndarray:
    """Make sine-cosine position embeddings [1 + side * side, width], as in MAE.

    The first row, for CLS, is zero.
    """
    frequencies = 10000.0 ** -(np.arange(width // 4) / (width // 4))
    y, x = (position.reshape(-1, 1) * frequencies for position in np.mgrid[:side, :side])
    patches = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], 1)
    return np.pad(patches, ((1, 0), (0, width % 4))).astype(np.float32)


def normalise(images: Array, config: VisionConfig, dtype) -> Array:
    """Normalise RGB [..., h, w, 3] in 0..255 for the encoder: (x / 255 - mean) / std."""
    x = images.astype(jnp.float32) / 255
    return ((x - jnp.array(config.mean)) / jnp.array(config.std)).astype(dtype)
