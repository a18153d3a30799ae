"""The causal transformer: a T5 decoder (arXiv 1910.10683) that turns an image's features into N
causal visual tokens.

N learned queries pass blocks of causal self-attention, cross-attention to the features, and ffn
(section 3.1). T5's ways: no 1/sqrt(d) in attention, a relative position bias shared by all blocks,
RMSNorm before each sublayer, no biases, dropout. `project` takes the result to the LLM's width.
Read next: llama.py.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from emu_jax import sharding
from emu_jax.models import layers
from emu_jax.models.attention import Mask, attention


@dataclass(frozen=True)
class ResamplerSize:
    # N
    tokens: int
    # C
    width: int
    depth: int
    heads: int
    head_width: int
    ffn: int
    # of the relative position bias
    buckets: int
    max_distance: int
    dropout: float
    remat: str


class Attention(nnx.Module):
    def __init__(self, size: ResamplerSize, keys_width: int, rngs: nnx.Rngs):
        C = size.width
        H = size.heads
        d = size.head_width
        self.q = layers.Linear("btc,chd->bthd", (C, H, d), std=(C * d) ** -0.5, rngs=rngs)
        self.k = layers.Linear("bse,ehd->bshd", (keys_width, H, d), std=C**-0.5, rngs=rngs)
        self.v = layers.Linear("bse,ehd->bshd", (keys_width, H, d), std=C**-0.5, rngs=rngs)
        self.o = layers.Linear("bthd,hdc->btc", (H, d, C), std=(H * d) ** -0.5, rngs=rngs)

    def __call__(self, x, keys, mask, bias, dropout: float, key, kernel: str):
        return self.o(
            attention(
                self.q(x),
                self.k(keys),
                self.v(keys),
                mask,
                scale=1.0,
                bias=bias,
                dropout=dropout,
                key=key,
                kernel=kernel,
            )
        )


class Ffn(nnx.Module):
    def __init__(self, size: ResamplerSize, rngs: nnx.Rngs):
        self.up = layers.Linear(
            "btc,cf->btf", (size.width, size.ffn), std=size.width**-0.5, rngs=rngs
        )
        self.down = layers.Linear(
            "btf,fc->btc", (size.ffn, size.width), std=size.ffn**-0.5, rngs=rngs
        )

    def __call__(self, x, dropout: float, key):
        return self.down(layers.dropout(jax.nn.relu(self.up(x)), dropout, key))


class Block(nnx.Module):
    def __init__(self, size: ResamplerSize, vision_width: int, rngs: nnx.Rngs):
        self.dropout = size.dropout
        self.norm1 = layers.RMSNorm(size.width, eps=1e-6)
        self.self = Attention(size, size.width, rngs)
        self.norm2 = layers.RMSNorm(size.width, eps=1e-6)
        self.cross = Attention(size, vision_width, rngs)
        self.norm3 = layers.RMSNorm(size.width, eps=1e-6)
        self.ffn = Ffn(size, rngs)

    def __call__(self, x, features, bias, key, kernel: str):
        keys = [None] * 6 if key is None else jax.random.split(key, 6)
        y = self.norm1(x)
        # with a bias: N x N is small
        y = self.self(y, y, Mask(causal=True), bias, self.dropout, keys[0], "dense")
        x = x + layers.dropout(y, self.dropout, keys[1])
        y = self.cross(self.norm2(x), features, None, None, self.dropout, keys[2], kernel)
        x = x + layers.dropout(y, self.dropout, keys[3])
        return x + layers.dropout(
            self.ffn(self.norm3(x), self.dropout, keys[4]), self.dropout, keys[5]
        )


class Resampler(nnx.Module):
    def __init__(self, size: ResamplerSize, vision_width: int, llm_width: int, rngs: nnx.Rngs):
        self.size = size
        self.queries = nnx.Param(0.02 * jax.random.normal(rngs.params(), (size.tokens, size.width)))
        self.relative = nnx.Param(
            size.width**-0.5 * jax.random.normal(rngs.params(), (size.buckets, size.heads))
        )
        self.blocks = layers.stack(lambda rngs: Block(size, vision_width, rngs), size.depth, rngs)
        self.norm = layers.RMSNorm(size.width, eps=1e-6)
        self.project = layers.Linear(
            "bnc,cd->bnd", (size.width, llm_width), bias=(llm_width,), std=0.02, rngs=rngs
        )

    def __call__(
        self, features: Float[Array, "M S E"], key: Array | None = None, *, kernel: str = "auto"
    ) -> Float[Array, "M N D"]:
        """The N visual tokens of each image; `key` turns dropout on."""
        size = self.size
        key_in, key_blocks, key_out = (None,) * 3 if key is None else jax.random.split(key, 3)
        x = jnp.broadcast_to(
            self.queries.get_value().astype(features.dtype),
            (features.shape[0], size.tokens, size.width),
        )
        x = layers.dropout(sharding.constrain_images(x), size.dropout, key_in)
        buckets = relative_buckets(size.tokens, size.buckets, size.max_distance)
        bias = jnp.moveaxis(self.relative.get_value()[buckets], -1, 0)
        x = layers.run(
            self.blocks,
            x,
            lambda block, x, key: block(x, features, bias, key, kernel),
            where="resampler/blocks",
            remat=size.remat,
            key=key_blocks,
        )
        return sharding.constrain_images(
            self.project(layers.dropout(self.norm(x), size.dropout, key_out))
        )


def relative_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of each (query, key) pair [length, length], T5's unidirectional rule: exact up to
    buckets / 2 tokens back, then logarithmic up to max_distance; keys that lie ahead share bucket 0
    (and are masked).
    """
    back = np.maximum(np.arange(length)[:, None] - np.arange(length)[None, :], 0)
    exact = buckets // 2
    far = exact + (
        np.log(np.maximum(back, 1).astype(np.float32) / exact)
        / np.log(np.float32(max_distance / exact))
        * (buckets - exact)
    ).astype(int)
    return np.where(back < exact, back, np.minimum(far, buckets - 1))
