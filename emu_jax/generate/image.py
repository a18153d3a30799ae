"""An image from a prompt: the N regressed embeddings, each fed back as the next input (section 2.2 of the paper). No noise.

Plain and without a cache, like text.py.
"""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from emu_jax.generate.text import IMG
from emu_jax.models import emu
from emu_jax.tree import Tree


def regress(size: emu.EmuSize, params: Tree, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]) -> Float[Array, "B N D"]:
    """The visual tokens that follow text prompts and `[IMG]`; the first `lengths` ids of a row are its prompt, `<s>` first."""
    model = emu.bind(emu.Emu, size, params)
    (B, T), N = tokens.shape, size.resampler.tokens
    rows = jnp.arange(B)
    tokens = jnp.pad(tokens, ((0, 0), (0, 1 + N))).at[rows, lengths].set(size.llama.vocab + IMG)
    positions = jnp.tile(jnp.arange(T + 1 + N), (B, 1))

    def one(x, n):
        hidden = model.llama(x, positions, jnp.ones_like(positions), kernel=size.attention)[rows, lengths + n]
        z = model.regress_head(hidden[:, None])[:, 0]
        return x.at[rows, lengths + n + 1].set(z), z

    _, zs = jax.lax.scan(one, model.llama.embeddings(tokens, size.compute), jnp.arange(N))
    return jnp.moveaxis(zs, 0, 1)
