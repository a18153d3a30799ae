"""A tokenizer and sources small enough to write their results down by hand."""

import numpy as np
import pytest

from emu_jax.data.sequence import Document
from emu_jax.data.tokenizer import Tokenizer
from tests.support.memory import Memory


@pytest.fixture
def letters():
    """A tokenizer whose ids are the code points of the letters."""
    return Tokenizer(
        256, lambda text: [ord(letter) for letter in text], lambda ids: "".join(map(chr, ids))
    )


@pytest.fixture
def memory():
    """memory(documents, corrupt) makes a Memory; a number n stands for n short documents."""

    def make(documents, corrupt=()):
        if isinstance(documents, int):
            documents = [
                Document(f"d{k}", (chr(97 + k % 26) * (1 + k * 7 % 9),)) for k in range(documents)
            ]
        return Memory(documents, corrupt)

    return make


@pytest.fixture
def picture():
    """picture(k, size): an image all of whose values are k."""
    return lambda k, size=4: np.full((size, size, 3), k, np.uint8)
