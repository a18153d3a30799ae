"""A small model of random weights, strong enough that its answers differ, and a tokenizer of the
letters.
"""

import jax
import jax.numpy as jnp
import numpy as np

from emu_jax.data.tokenizer import Tokenizer
from emu_jax.generate.session import Session
from emu_jax.models import emu, module
from tests.support import make

VOCAB = 140


class Uncached:
    """The same model without a cache: the whole row again for every element. One shape, so that it
    is compiled once.
    """

    def __init__(self, session, length=64):
        self.session = session
        self.length = length
        config = session.model_config

        def bound(params):
            return module.bind(emu.Emu, config, params)

        self._hidden = jax.jit(
            lambda params, x: bound(params).llama(
                x, jnp.arange(length)[None], jnp.ones((1, length), int)
            )[0][0]
        )
        self._logits = jax.jit(lambda params, hidden: bound(params).llama.logits(hidden))
        self._embed = jax.jit(
            lambda params, tokens: bound(params).llama.embeddings(tokens, config.compute)
        )
        self._regress = jax.jit(
            lambda params, hidden: bound(params).regress_head(hidden[None, None])[0, 0]
        )
        self._encode = jax.jit(lambda params, images: bound(params).encode(images))

    def x(self, prompt):
        """The LLM's input for a prompt [t, D]."""
        x = np.array(self._embed(self.session.params, np.array([prompt.tokens]))[0])
        for image, slot in zip(prompt.images, prompt.slots, strict=True):
            x[slot : slot + self.session.processor.n_visual] = (
                self._encode(self.session.params, image[None])[0]
                if image.dtype == np.uint8
                else image
            )
        return x

    def embedding(self, token):
        return np.asarray(self._embed(self.session.params, np.array([[token]]))[0])

    def hidden(self, x):
        """Of every element of x [t, D]."""
        return np.asarray(
            self._hidden(self.session.params, np.pad(x, ((0, self.length - len(x)), (0, 0)))[None])
        )[: len(x)]

    def logits(self, x):
        """Of what comes after each element of x [t, D]."""
        return np.asarray(
            self._logits(
                self.session.params,
                jnp.asarray(np.pad(self.hidden(x), ((0, self.length - len(x)), (0, 0)))),
            )
        )[: len(x)]

    def regressed(self, x):
        return np.asarray(self._regress(self.session.params, self.hidden(x)[-1]))


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
    return Session(p.model_config, params, letters, **{"context": 128} | options)
