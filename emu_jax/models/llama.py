"""LLaMA 1, 2 and 3 (arXiv 2302.13971, 2307.09288, 2407.21783), the LLM of Emu.

It has RMSNorm, rotary positions and SwiGLU. Its input is embeddings instead of ids, because some
positions are visual tokens, which have no id. Its output is the hidden states after the final norm.
In training, the loss (losses.py) applies the vocabulary head to a part of the positions at a time,
so that all logits are never in memory at once. Read next: emu.py.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from emu_jax import sharding
from emu_jax.config import UserError
from emu_jax.models import layers
from emu_jax.models.attention import Mask, attention, self_mask
from emu_jax.types import KVCache


@dataclass(frozen=True)
class LlamaConfig:
    # Rows of LLaMA's own vocabulary.
    vocab: int
    # Number of tokens that Emu adds: [PAD] [IMG] [/IMG] <image>, and in the chat model also [USER]
    # [ASSISTANT]. Their ids follow those of LLaMA.
    added: int
    # D, width of the hidden states.
    width: int
    depth: int
    heads: int
    # Heads of keys and values (grouped-query attention); 0: as many as `heads`.
    kv_heads: int
    # Hidden width of the feed-forward layers.
    ffn: int
    # Epsilon of the RMSNorms.
    eps: float
    rope_base: float
    # How rotary frequencies are scaled to extend the context: (), ("linear", factor) or ("llama3",
    # factor, low, high, context); see `frequencies`.
    rope_scaling: tuple
    # Dtype that the frequencies are rounded to. The release keeps them in bfloat16, even when it
    # computes in float32.
    rope_dtype: str
    # Whether the output head is the input embedding.
    tied: bool
    remat: str

    @property
    def kv(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.heads

    @property
    def chats(self) -> bool:
        """Whether the added tokens include the chat model's [USER] and [ASSISTANT]."""
        return self.added >= 6

    def __post_init__(self):
        if self.width % self.heads or self.heads % self.kv:
            raise UserError(
                f"model.llama: width {self.width} must be a multiple of heads {self.heads}, "
                f"and heads a multiple of kv_heads {self.kv}"
            )


@flax.struct.dataclass
# JAX also builds this class with leaves that are not arrays, so its types cannot be checked.
@no_type_check
class LayerCache:
    """Keys and values of all layers. The scan over layers carries it; `layer` is the next."""

    k: Float[Array, "L B S G d"]
    v: Float[Array, "L B S G d"]
    layer: Int[Array, ""]
    # Slots in use before this call.
    length: Int[Array, ""]

    def update(self, k: Float[Array, "B T G d"], v: Float[Array, "B T G d"]) -> "LayerCache":
        """Write the keys and values of T new tokens into the next slots of layer `layer`."""
        start = (self.layer, 0, self.length, 0, 0)
        return replace(self, k=_write(self.k, k[None], start), v=_write(self.v, v[None], start))


class LlamaAttention(nnx.Module):
    def __init__(self, config: LlamaConfig, rngs: layers.Rngs):
        D = config.width
        H = config.heads
        G = config.kv
        d = config.width // config.heads
        self.q = layers.Linear("btD,Dhd->bthd", (D, H, d), std=0.02, rngs=rngs)
        self.k = layers.Linear("btD,Dhd->bthd", (D, G, d), std=0.02, rngs=rngs)
        self.v = layers.Linear("btD,Dhd->bthd", (D, G, d), std=0.02, rngs=rngs)
        self.o = layers.Linear("bthd,hdD->btD", (H, d, D), std=0.02, rngs=rngs)

    def __call__(self, x, mask, rotation, kernel: str, cache: LayerCache | None, use_cache: bool):
        """Return the output, and the cache with the keys and values of x added.

        If `use_cache`, x attends to everything in the cache, else only to itself.
        """
        q = rotate(self.q(x), rotation)
        k = rotate(self.k(x), rotation)
        v = self.v(x)
        if cache is not None:
            cache = cache.update(k, v)
            if use_cache:
                k = cache.k[cache.layer]
                v = cache.v[cache.layer]
        out = attention(q, k, v, mask, scale=q.shape[-1] ** -0.5, kernel=kernel)
        return self.o(out), cache


class LlamaFfn(nnx.Module):
    def __init__(self, config: LlamaConfig, rngs: layers.Rngs):
        self.gate = layers.Linear("btD,Df->btf", (config.width, config.ffn), std=0.02, rngs=rngs)
        self.up = layers.Linear("btD,Df->btf", (config.width, config.ffn), std=0.02, rngs=rngs)
        self.down = layers.Linear("btf,fD->btD", (config.ffn, config.width), std=0.02, rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class LlamaBlock(nnx.Module):
    def __init__(self, config: LlamaConfig, rngs: layers.Rngs):
        self.norm1 = layers.RMSNorm(config.width, eps=config.eps)
        self.attn = LlamaAttention(config, rngs)
        self.norm2 = layers.RMSNorm(config.width, eps=config.eps)
        self.ffn = LlamaFfn(config, rngs)

    def __call__(
        self,
        x,
        mask,
        rotation,
        kernel: str,
        cache: LayerCache | None = None,
        use_cache: bool = False,
    ):
        y, cache = self.attn(self.norm1(x), mask, rotation, kernel, cache, use_cache)
        x = x + y
        return sharding.constrain_rows(x + self.ffn(self.norm2(x))), cache


class Vocabulary(nnx.Module):
    """Rows of LLaMA's vocabulary, `base` [V, D], and of Emu's tokens, `added` [n, D].

    They are separate arrays because V can be divided evenly among devices and V + n cannot, and
    because LLaMA's rows are then imported unchanged.
    """

    def __init__(self, config: LlamaConfig, rngs: layers.Rngs):
        self.base = nnx.Param(rngs.normal(0.02, (config.vocab, config.width)))
        self.added = nnx.Param(rngs.normal(0.02, (config.added, config.width)))

    def arrays(self) -> dict[str, Array]:
        return {"base": self.base.get_value(), "added": self.added.get_value()}


class Llama(nnx.Module):
    def __init__(self, config: LlamaConfig, rngs: layers.Rngs):
        self.config = config
        self.embed = Vocabulary(config, rngs)
        self.blocks = layers.stack(lambda rngs: LlamaBlock(config, rngs), config.depth, rngs)
        self.norm = layers.RMSNorm(config.width, eps=config.eps)
        if not config.tied:
            self.lm_head = Vocabulary(config, rngs)

    def head(self) -> dict[str, Array]:
        """Rows of the output head, {"base": [V, D], "added": [n, D]}, for losses and generation."""
        return (self.embed if self.config.tied else self.lm_head).arrays()

    def embeddings(self, tokens: Int[Array, "B T"], dtype) -> Float[Array, "B T D"]:
        """Look up the input embeddings of ids; ids from V on are the added tokens."""
        return sharding.embedding_lookup(
            self.embed.base.get_value(), self.embed.added.get_value(), tokens, dtype
        )

    def logits(self, hidden: Float[Array, "B D"]) -> Float[Array, "B V"]:
        """Logits of the next token in float32: LLaMA's vocabulary, then the added tokens.

        Use it for few positions only: the logits of a training batch are too large to be in memory
        at once, which is why losses.py does not call this.
        """
        head = sharding.gather_weights("llama/lm_head", self.head(), hidden.dtype)
        product = partial(
            jnp.einsum, "bD,vD->bv", hidden, precision="highest", preferred_element_type=jnp.float32
        )
        return jnp.concatenate([product(head["base"]), product(head["added"])], -1)

    def empty_cache(self, rows: int, slots: int, dtype) -> KVCache:
        """Make an empty cache with room for `slots` tokens per row."""
        L = self.config.depth
        G = self.config.kv
        d = self.config.width // self.config.heads

        def zeros():
            return sharding.constrain_cache(jnp.zeros((L, rows, slots, G, d), dtype))

        free = jnp.zeros((rows, slots), jnp.int32)
        return KVCache(zeros(), zeros(), free, free, jnp.int32(0), empty=True)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        cache: KVCache | None = None,
        *,
        kernel: str = "auto",
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Return the hidden states after the final norm, and the cache with x added.

        Each position attends to itself and to the earlier positions of its segment. Without a
        cache, x is the complete sequence. With a cache, x continues the cached sequence, and the
        cache must have T free slots. If the cache is empty, padding (segment 0) of x must be at the
        ends of the rows.
        """
        config = self.config
        rotation = rotary(
            positions,
            config.width // config.heads,
            config.rope_base,
            config.rope_dtype,
            config.rope_scaling,
        )
        run = partial(layers.run, self.blocks, where="llama/blocks", remat=config.remat)
        x = sharding.constrain_rows(x)
        if cache is None:
            mask = self_mask(segments)
            x = run(x, lambda block, x, _: block(x, mask, rotation, kernel)[0])
            return self.norm(x), None

        kv_segments = _write(cache.segments, segments, (0, cache.length))
        kv_positions = _write(cache.positions, positions, (0, cache.length))
        # With an empty cache x attends only to itself, and every kernel supports such a mask.
        use_cache = not cache.empty
        if use_cache:
            mask = Mask(segments, kv_segments, positions, kv_positions, causal=True)
        else:
            mask = self_mask(segments)

        def step(block, carry, _):
            x, state = block(carry[0], mask, rotation, kernel, carry[1], use_cache)
            state = state.replace(
                k=sharding.constrain_cache(state.k),
                v=sharding.constrain_cache(state.v),
                layer=state.layer + 1,
            )
            return x, state

        x, state = run((x, LayerCache(cache.k, cache.v, jnp.int32(0), cache.length)), step)
        length = cache.length + x.shape[1]
        return self.norm(x), KVCache(
            state.k, state.v, kv_positions, kv_segments, length, empty=False
        )


def _write(cached: Array, new: Array, start: tuple) -> Array:
    return jax.lax.dynamic_update_slice(cached, new.astype(cached.dtype), start)


def rotary(
    positions: Int[Array, "B T"], width: int, base: float, dtype: str, scaling: tuple = ()
) -> tuple[Array, Array]:
    """Compute rotary position embeddings (arXiv 2104.09864): cos and sin [B, T, 1, d/2].

    Both are in float32. dtype: the frequencies are rounded to it.
    """
    rounded = jnp.asarray(frequencies(width, base, scaling), dtype).astype(jnp.float32)
    angles = positions[:, :, None, None].astype(jnp.float32) * rounded
    return jnp.cos(angles), jnp.sin(angles)


def frequencies(width: int, base: float, scaling: tuple) -> np.ndarray:
    """Radians per token of each pair of dimensions [d/2], for a context extended by `scaling`.

    ("linear", factor): all frequencies are divided by factor (arXiv 2306.15595). ("llama3", factor,
    low, high, context): frequencies with fewer than `low` turns in `context` tokens are divided by
    factor, those with more than `high` turns are kept, and those in between are interpolated, as in
    LLaMA 3.1.
    """
    plain = base ** (-np.arange(0, width, 2) / width)
    match scaling:
        case ():
            return plain
        case ("linear", factor):
            return plain / factor
        case ("llama3", factor, low, high, context):
            kept = np.clip((context * plain / (2 * np.pi) - low) / (high - low), 0, 1)
            return kept * plain + (1 - kept) * plain / factor
    raise UserError(
        f"model.llama.rope_scaling={scaling!r} must be (), ('linear', factor) or "
        "('llama3', factor, low, high, context)"
    )


def rotate(x: Float[Array, "B T H d"], rotation: tuple[Array, Array]) -> Float[Array, "B T H d"]:
    """Rotate each pair of channels of x by its position.

    The pairs are (i, i + d/2), as in Hugging Face's checkpoints.
    """
    cos, sin = rotation
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
