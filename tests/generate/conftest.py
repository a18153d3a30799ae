"""Small models whose programs are compiled once for all tests of this folder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from emu_jax import config
from emu_jax.checkpoint import CheckpointManager
from emu_jax.data import tokenizer
from emu_jax.generate import placement
from emu_jax.generate.session import Session
from tests.support import make
from tests.support.small import Uncached, make_session

WORDS = ["a dog", "a cat", "red and blue", "one two three four"] * 9


@pytest.fixture(scope="session")
def session():
    """A small model with large random weights (tests/support/small.py)."""
    return make_session()


@pytest.fixture(scope="session")
def uncached(session):
    return Uncached(session)


@pytest.fixture(scope="session")
def images():
    return list(np.random.default_rng(0).integers(0, 256, (5, 28, 28, 3), np.uint8))


@pytest.fixture(scope="session")
def save():
    """save(c, params, folder) writes a checkpoint of a config, as a run does."""
    State = dataclasses.make_dataclass("State", ("trainable", "frozen", "ema", "step"))

    def save(c, params, folder):
        # NumPy's arrays, whose checksums need no program.
        params = jax.tree.map(np.asarray, params)
        manager = CheckpointManager(str(folder), keep=1, keep_every=0)
        manager.save(7, State(params, {}, None, jnp.int32(7)), {}, config.to_dict(c), wait=True)

    return save


@pytest.fixture(scope="session")
def run(tmp_path_factory, save):
    """A folder with a checkpoint (`emu`) that has the chat tokens, an image, and a broken one."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer.train(WORDS, 110, folder / "tokenizer.json")
    c = make.cfg(
        "model.llama.vocab=110",
        "model.llama.added=6",
        f"data.tokenizer={folder}/tokenizer.json",
        "data.tokens=96",
    )
    params = make.params(make.program(c))
    save(c, jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, params), folder / "emu")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "x.png")
    (folder / "bad.png").write_text("no image")
    return folder


@pytest.fixture(scope="session")
def loaded(run):
    """The session of the checkpoint in `run`, on one device."""
    return Session.load(str(run / "emu"))


@pytest.fixture
def one_device(monkeypatch):
    """Let the commands use one device, so that they share the programs of `loaded`."""
    monkeypatch.setattr(placement, "inference_mesh", lambda *_: None)
