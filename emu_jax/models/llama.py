"""LLaMA 1, 2 and 3 (arXiv 2302.13971, 2307.09288, 2407.21783): RMSNorm, rotary positions, SwiGLU.
Emu's multimodal modelling block.

It takes embeddings, since an image's slots hold visual tokens and not ids, and returns the hidden
state after the final norm: in training the vocabulary head belongs to the loss (losses.py), which
never forms all logits. Read next: emu.py.
"""

from dataclasses import dataclass
from functools import partial

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
    # rows of LLaMA's own vocabulary
    vocab: int
    # and Emu's: [PAD] [IMG] [/IMG] <image>, in the chat model [USER] [ASSISTANT]
    added: int
    # D
    width: int
    depth: int
    heads: int
    # heads of keys and values, each serving heads / kv_heads queries' (grouped-query attention); 0:
    # as many as heads
    kv_heads: int
    ffn: int
    # of the RMSNorms
    eps: float
    rope_base: float
    # (), ("linear", factor) or ("llama3", factor, low, high, context): see `frequencies`
    rope_scaling: tuple
    # to which the frequencies are rounded: the release holds them in bfloat16, also when it
    # computes in float32
    rope_dtype: str
    # the output head is the input table
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
                f"model.llama: width {self.width} must be a multiple of heads {self.heads}, and that of kv_heads {self.kv}"
            )


class Attention(nnx.Module):
    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        D = config.width
        H = config.heads
        G = config.kv
        d = config.width // config.heads
        self.q = layers.Linear("btD,Dhd->bthd", (D, H, d), std=0.02, rngs=rngs)
        self.k = layers.Linear("btD,Dhd->bthd", (D, G, d), std=0.02, rngs=rngs)
        self.v = layers.Linear("btD,Dhd->bthd", (D, G, d), std=0.02, rngs=rngs)
        self.o = layers.Linear("bthd,hdD->btD", (H, d, D), std=0.02, rngs=rngs)

    def __call__(self, x, mask, rotation, kernel: str, remember):
        q = rotate(self.q(x), rotation)
        k = rotate(self.k(x), rotation)
        v = self.v(x)
        return self.o(attention(q, *remember(k, v), mask, scale=q.shape[-1] ** -0.5, kernel=kernel))


class Ffn(nnx.Module):
    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.gate = layers.Linear("btD,Df->btf", (config.width, config.ffn), std=0.02, rngs=rngs)
        self.up = layers.Linear("btD,Df->btf", (config.width, config.ffn), std=0.02, rngs=rngs)
        self.down = layers.Linear("btf,fD->btD", (config.ffn, config.width), std=0.02, rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.norm1 = layers.RMSNorm(config.width, eps=config.eps)
        self.attn = Attention(config, rngs)
        self.norm2 = layers.RMSNorm(config.width, eps=config.eps)
        self.ffn = Ffn(config, rngs)

    def __call__(self, x, mask, rotation, kernel: str, remember=lambda k, v: (k, v)):
        """`remember` gives the keys and values to look at for those of x."""
        x = x + self.attn(self.norm1(x), mask, rotation, kernel, remember)
        return sharding.constrain_rows(x + self.ffn(self.norm2(x)))


class Vocabulary(nnx.Module):
    """Rows of LLaMA's vocabulary `base` [V, D] and Emu's `added` [n, D], apart: V shards well and
    imports as it is.
    """

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.base = nnx.Param(0.02 * jax.random.normal(rngs.params(), (config.vocab, config.width)))
        self.added = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (config.added, config.width))
        )

    def arrays(self) -> dict[str, Array]:
        return {"base": self.base.get_value(), "added": self.added.get_value()}


class Llama(nnx.Module):
    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.config = config
        self.embed = Vocabulary(config, rngs)
        self.blocks = layers.stack(lambda rngs: Block(config, rngs), config.depth, rngs)
        self.norm = layers.RMSNorm(config.width, eps=config.eps)
        if not config.tied:
            self.lm_head = Vocabulary(config, rngs)

    def head(self) -> dict[str, Array]:
        """The output head's rows, {"base": [V, D], "added": [n, D]}: what losses and generation
        multiply by.
        """
        return (self.embed if self.config.tied else self.lm_head).arrays()

    def embeddings(self, tokens: Int[Array, "B T"], dtype) -> Float[Array, "B T D"]:
        """Input embeddings of ids; ids from V on are the added tokens."""
        return sharding.embedding_lookup(
            self.embed.base.get_value(), self.embed.added.get_value(), tokens, dtype
        )

    def logits(self, hidden: Float[Array, "B D"]) -> Float[Array, "B V"]:
        """Of the next token, in float32: LLaMA's vocabulary and then the added tokens. For a few
        positions: never for a batch in training.
        """
        head = sharding.gather_weights("llama/lm_head", self.head(), hidden.dtype)
        product = partial(
            jnp.einsum, "bD,vD->bv", hidden, precision="highest", preferred_element_type=jnp.float32
        )
        return jnp.concatenate([product(head["base"]), product(head["added"])], -1)

    def empty_cache(self, rows: int, slots: int, dtype) -> KVCache:
        """A cache with room for `slots` tokens a row."""
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
        """(hidden states after the final norm, the cache with x in its next T slots); position t
        sees its own segment up to itself.

        Without a cache, x is all there is. With one, x goes on from what the cache holds, which
        must have T slots free; where x is the first that a cache reads, padding (segment 0) stands
        at the ends of the rows.
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
        if cache is None:
            mask = self_mask(segments)
            return self.norm(
                run(
                    sharding.constrain_rows(x), lambda block, x, _: block(x, mask, rotation, kernel)
                )
            ), None

        def put(old, new, *place):
            return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), place)

        seen = (
            put(cache.segments, segments, 0, cache.length),
            put(cache.positions, positions, 0, cache.length),
        )
        mask = (
            self_mask(segments)
            if cache.empty
            else Mask(segments, seen[0], positions, seen[1], causal=True)
        )

        def layer(block, carry, _):
            x, k, v, number = carry

            def remember(new_k, new_v):
                nonlocal k, v
                k, v = (
                    put(old, new[None], number, 0, cache.length, 0, 0)
                    for old, new in ((k, new_k), (v, new_v))
                )
                return (new_k, new_v) if cache.empty else (k[number], v[number])

            x = block(x, mask, rotation, kernel, remember)
            return x, sharding.constrain_cache(k), sharding.constrain_cache(v), number + 1

        x, k, v, _ = run((sharding.constrain_rows(x), cache.k, cache.v, jnp.int32(0)), layer)
        return self.norm(x), KVCache(k, v, seen[1], seen[0], cache.length + x.shape[1], empty=False)


def rotary(
    positions: Int[Array, "B T"], width: int, base: float, dtype: str, scaling: tuple = ()
) -> tuple[Array, Array]:
    """cos and sin [B, T, 1, d/2] of rotary position embeddings (arXiv 2104.09864), in float32;
    frequencies rounded to `dtype`.
    """
    angles = positions[:, :, None, None].astype(jnp.float32) * jnp.asarray(
        frequencies(width, base, scaling), dtype
    ).astype(jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


def frequencies(width: int, base: float, scaling: tuple) -> np.ndarray:
    """Radians a token of each pair of dimensions [d/2], stretched to a longer context by `scaling`.
    ("linear", factor): all are divided by factor (arXiv 2306.15595). ("llama3", factor, low, high,
    context): those that turn less than `low` times within `context` tokens are, those that turn
    more than `high` times are not, and between the two it is interpolated (LLaMA 3.1's model
    card).
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
        f"model.llama.rope_scaling={scaling!r} is none of (), ('linear', factor), ('llama3', factor, low, high, context)"
    )


def rotate(x: Float[Array, "B T H d"], rotation: tuple[Array, Array]) -> Float[Array, "B T H d"]:
    """x turned by its position; pairs are (i, i + d/2), as in Hugging Face's checkpoints."""
    cos, sin = rotation
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
