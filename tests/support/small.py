"""A small Emu with large random weights, so that its answers differ."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emu_jax.data.tokenizer import Tokenizer
from emu_jax.generate import decode_state
from emu_jax.generate.session import Session
from emu_jax.models import emu, module
from tests.support import make

VOCAB = 140


@cache
def _compiled(config, length):
    """Jitted parts of a model without a cache, shared by all sessions of one config."""

    def bound(params):
        return module.bind(emu.Emu, config, params)

    def hidden(params, x):
        positions = jnp.arange(length)[None]
        return bound(params).llama(x, positions, jnp.ones((1, length), int))[0][0]

    def logits(params, hidden):
        return bound(params).llama.logits(hidden)

    def embed(params, tokens):
        return bound(params).llama.embeddings(tokens, config.compute)

    def regress(params, hidden):
        return bound(params).regress_head(hidden[None, None])[0, 0]

    return tuple(map(jax.jit, (hidden, logits, embed, regress)))


class Uncached:
    """A session's model without a KV cache: it runs the complete row for every element.

    length: every row is padded to it, so that one shape is compiled.
    """

    def __init__(self, session, length=64):
        self.session = session
        self.length = length
        parts = _compiled(session.model_config, length)
        self._hidden, self._logits, self._embed, self._regress = parts

    def x(self, prompt):
        """The LLM's input for a prompt [t, D]."""
        session = self.session
        x = self._embeddings(prompt.tokens)
        for image, slot in zip(prompt.images, prompt.slots, strict=True):
            if image.dtype == np.uint8:
                (image,) = decode_state.encode_images(
                    session.model_config, session.params, image[None]
                )
            x[slot : slot + session.processor.n_visual] = image
        return x

    def embedding(self, token):
        return self._embeddings([token])

    def hidden(self, x):
        """Hidden states of every element of x [t, D]."""
        return np.asarray(self._hidden(self.session.params, self._padded(x)[None]))[: len(x)]

    def logits(self, x):
        """Logits of what follows each element of x [t, D]."""
        hidden = self._padded(self.hidden(x))
        return np.asarray(self._logits(self.session.params, hidden))[: len(x)]

    def regressed(self, x):
        return np.asarray(self._regress(self.session.params, self.hidden(x)[-1]))

    def _embeddings(self, tokens):
        x = self._embed(self.session.params, self._padded(np.array(tokens))[None])[0]
        return np.array(x[: len(tokens)])

    def _padded(self, x):
        return np.pad(x, [(0, self.length - len(x)), *[(0, 0)] * (x.ndim - 1)])


def make_session(*overrides, scale=4, **options):
    p = make.program(
        make.cfg(
            f"model.llama.vocab={VOCAB}",
            "model.llama.added=6",
            "model.llama.rope_dtype=float32",
            *overrides,
        )
    )
    params = jax.tree.map(lambda x: scale * x if x.ndim > 1 else x, make.params(p))
    letters = Tokenizer(
        VOCAB,
        lambda text: [3 + ord(letter) - 32 for letter in text],
        lambda ids: "".join(chr(32 + i - 3) for i in ids),
    )
    settings: dict[str, Any] = {"context": 128} | options
    return Session(p.model_config, params, letters, **settings)
