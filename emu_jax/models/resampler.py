"""The causal transformer (Emu, section 2.1): an image's features become N visual tokens.

A T5 decoder (arXiv 1910.10683): N learned queries pass through blocks of causal self-attention,
cross-attention to the features, and feed-forward layers. As in T5, attention has no factor
1/sqrt(d), all blocks share a relative position bias, RMSNorm comes before each sublayer, linear
maps have no biases, and there is dropout. `project` maps the result to the LLM's width. Read next:
llama.py.
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
class ResamplerConfig:
    # N, number of visual tokens per image.
    tokens: int
    # C, width of the hidden states.
    width: int
    depth: int
    heads: int
    head_width: int
    ffn: int
    # Number of buckets of the relative position bias.
    buckets: int
    # Distances of at least this many tokens share the last bucket.
    max_distance: int
    dropout: float
    remat: str


class ResamplerAttention(nnx.Module):
    def __init__(self, config: ResamplerConfig, keys_width: int, rngs: layers.Rngs):
        C = config.width
        H = config.heads
        d = config.head_width
        self.q = layers.Linear("btc,chd->bthd", (C, H, d), std=(C * d) ** -0.5, rngs=rngs)
        self.k = layers.Linear("bse,ehd->bshd", (keys_width, H, d), std=C**-0.5, rngs=rngs)
        self.v = layers.Linear("bse,ehd->bshd", (keys_width, H, d), std=C**-0.5, rngs=rngs)
        self.o = layers.Linear("bthd,hdc->btc", (H, d, C), std=(H * d) ** -0.5, rngs=rngs)

    def __call__(self, x, keys, mask, bias, dropout: float, key, kernel: str):
        values = attention(
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
        return self.o(values)


class ResamplerFfn(nnx.Module):
    def __init__(self, config: ResamplerConfig, rngs: layers.Rngs):
        self.up = layers.Linear(
            "btc,cf->btf", (config.width, config.ffn), std=config.width**-0.5, rngs=rngs
        )
        self.down = layers.Linear(
            "btf,fc->btc", (config.ffn, config.width), std=config.ffn**-0.5, rngs=rngs
        )

    def __call__(self, x, dropout: float, key):
        return self.down(layers.dropout(jax.nn.relu(self.up(x)), dropout, key))


class ResamplerBlock(nnx.Module):
    def __init__(self, config: ResamplerConfig, vision_width: int, rngs: layers.Rngs):
        self.dropout = config.dropout
        self.norm1 = layers.RMSNorm(config.width, eps=1e-6)
        self.self = ResamplerAttention(config, config.width, rngs)
        self.norm2 = layers.RMSNorm(config.width, eps=1e-6)
        self.cross = ResamplerAttention(config, vision_width, rngs)
        self.norm3 = layers.RMSNorm(config.width, eps=1e-6)
        self.ffn = ResamplerFfn(config, rngs)

    def __call__(self, x, features, bias, key, kernel: str):
        keys = [None] * 6 if key is None else jax.random.split(key, 6)
        y = self.norm1(x)
        # Only the kernel "dense" supports a bias. It is cheap here, because N x N is small.
        y = self.self(y, y, Mask(causal=True), bias, self.dropout, keys[0], "dense")
        x = x + layers.dropout(y, self.dropout, keys[1])
        y = self.cross(self.norm2(x), features, None, None, self.dropout, keys[2], kernel)
        x = x + layers.dropout(y, self.dropout, keys[3])
        y = self.ffn(self.norm3(x), self.dropout, keys[4])
        return x + layers.dropout(y, self.dropout, keys[5])


class Resampler(nnx.Module):
    def __init__(
        self, config: ResamplerConfig, vision_width: int, llm_width: int, rngs: layers.Rngs
    ):
        self.config = config
        self.queries = nnx.Param(rngs.normal(0.02, (config.tokens, config.width)))
        self.relative = nnx.Param(rngs.normal(config.width**-0.5, (config.buckets, config.heads)))
        self.blocks = layers.stack(
            lambda rngs: ResamplerBlock(config, vision_width, rngs), config.depth, rngs
        )
        self.norm = layers.RMSNorm(config.width, eps=1e-6)
        self.project = layers.Linear(
            "bnc,cd->bnd", (config.width, llm_width), bias=(llm_width,), std=0.02, rngs=rngs
        )

    def __call__(
        self, features: Float[Array, "M S E"], key: Array | None = None, *, kernel: str = "auto"
    ) -> Float[Array, "M N D"]:
        """Map the features of each image to N visual tokens; `key` turns dropout on."""
        config = self.config
        key_in, key_blocks, key_out = [None] * 3 if key is None else jax.random.split(key, 3)
        queries = self.queries.get_value().astype(features.dtype)
        x = jnp.broadcast_to(queries, (features.shape[0], *queries.shape))
        x = layers.dropout(sharding.constrain_images(x), config.dropout, key_in)
        buckets = relative_buckets(config.tokens, config.buckets, config.max_distance)
        bias = jnp.moveaxis(self.relative.get_value()[buckets], -1, 0)
        x = layers.run(
            self.blocks,
            x,
            lambda block, x, key: block(x, features, bias, key, kernel),
            where="resampler/blocks",
            remat=config.remat,
            key=key_blocks,
        )
        x = layers.dropout(self.norm(x), config.dropout, key_out)
        return sharding.constrain_images(self.project(x))


def relative_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """Compute T5's bucket of each (query, key) pair [length, length], for causal attention.

    Every distance below buckets / 2 has one bucket. Longer distances up to max_distance share
    logarithmic buckets. Keys after the query are in bucket 0, but the causal mask hides them.
    """
    distance = np.maximum(np.arange(length)[:, None] - np.arange(length)[None, :], 0)
    exact = buckets // 2
    log_distance = np.log(np.maximum(distance, 1).astype(np.float32) / exact)
    share = log_distance / np.log(np.float32(max_distance / exact))
    logarithmic = exact + (share * (buckets - exact)).astype(int)
    return np.where(distance < exact, distance, np.minimum(logarithmic, buckets - 1))
