"""Text from images, greedily: the most likely next token, again and again, until </s>.

Plain and without a cache: each token runs the whole row again, which is enough for small models and short captions.
"""
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt8

from emu_jax.models import emu
from emu_jax.tree import Tree

BOS, EOS = 1, 2
IMG, END_IMG, IMAGE = 1, 2, 3       # of the added tokens


def greedy(model: emu.Emu, x: Array, lengths: Int[Array, "B"], new_tokens: int) -> Int[Array, "B new"]:
    """Ids that follow prompts of embeddings x [B, T, D], of which the first `lengths` are the prompt; </s> ends, and then repeats."""
    B, T, _ = x.shape
    rows = jnp.arange(B)
    x = jnp.pad(x, ((0, 0), (0, new_tokens), (0, 0)))
    positions = jnp.tile(jnp.arange(T + new_tokens), (B, 1))
    head = model.llama.head()["base"]

    def going(state):
        count, _, _, done = state
        return (count < new_tokens) & ~done.all()

    def one(state):
        count, x, ids, done = state
        hidden = model.llama(x, positions, jnp.ones_like(positions), kernel=model.size.attention)[rows, lengths + count - 1]
        logits = jnp.einsum("bD,vD->bv", hidden.astype(jnp.float32), head, precision="highest")
        token = jnp.where(done, EOS, jnp.argmax(logits, -1))
        x = x.at[rows, lengths + count].set(model.llama.embeddings(token[:, None], x.dtype)[:, 0])
        return count + 1, x, ids.at[:, count].set(token), done | (token == EOS)

    ids = jnp.full((B, new_tokens), EOS)
    return jax.lax.while_loop(going, one, (0, x, ids, jnp.zeros(B, bool)))[2]


def caption(size: emu.EmuSize, params: Tree, images: UInt8[Array, "B h w 3"], *, new_tokens: int) -> Int[Array, "B new"]:
    """What follows `<s>`, the image and `[/IMG]`."""
    model = emu.bind(emu.Emu, size, params)
    V, N, B = size.llama.vocab, size.resampler.tokens, images.shape[0]
    prompt = jnp.array([BOS, V + IMG, *[V + IMAGE] * N, V + END_IMG])
    x = model.interleave(jnp.tile(prompt, (B, 1)), model.encode(images)[:, None], jnp.full((B, 1), 2))
    return greedy(model, x, jnp.full(B, len(prompt)), new_tokens)


def until_end(ids: np.ndarray) -> list[int]:
    """The ids before the first </s>."""
    end = np.flatnonzero(ids == EOS)
    return ids[:end[0] if len(end) else None].tolist()
