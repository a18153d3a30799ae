"""RICES: features that do not depend on the batch, the nearest last, and an index that is made
once.
"""

import numpy as np
import pytest

from emu_jax.config import UserError
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.evaluate import retrieval
from emu_jax.evaluate.retrieval import Index
from emu_jax.generate.session import Session
from tests.support import make


@pytest.fixture(scope="module")
def session():
    p = make.program(make.cfg())
    return Session(
        p.model_config,
        make.params(p),
        Tokenizer(p.model_config.llama.vocab, list, str),
        context=64,
        batch=2,
    )


def test_features_are_of_length_one_and_a_video_is_the_mean_of_its_frames(session):
    a, b, c = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 3), np.uint8)
    found = retrieval.features(session, [[a], [a, b, c], [b], [c], [b, b]])
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    mean = found[0] + found[2] + found[3]
    np.testing.assert_allclose(found[1], mean / np.linalg.norm(mean), atol=1e-5)
    np.testing.assert_allclose(found[4], found[2], atol=1e-5)
    assert np.abs(found[0] - found[2]).max() > 1e-4 and retrieval.features(session, []).shape == (
        0,
        found.shape[1],
    )


def test_the_nearest_come_last_and_the_question_is_no_example():
    index = Index(["x", "y", "z"], np.float32([[1, 0], [0.8, 0.6], [0, 1]]))
    assert index.nearest(np.float32([1, 0]), 2, but="x") == ["z", "y"]
    assert index.nearest(np.float32([1, 0]), 1, but="") == ["x"] and index.nearest(
        np.float32([0, 1]), 9, but="y"
    ) == ["x", "z"]


def test_an_index_is_made_once_and_again_for_another_model_or_other_pictures(session, tmp_path):
    made = []

    def load(name):
        return made.append(name) or [np.full((28, 28, 3), len(name), np.uint8)]

    for of, names, count in (
        ("a", ["x", "yy"], 2),
        ("a", ["x", "yy"], 2),
        ("b", ["x", "yy"], 4),
        ("b", ["x", "zz"], 6),
    ):
        index = retrieval.saved(tmp_path / "i.npz", of, names, session, load)
        assert (
            len(made) == count
            and index.names == names
            and index.features.shape == (2, session.model_config.vision.width)
        )
    (tmp_path / "i.npz").write_bytes(b"no index")
    with pytest.raises(UserError, match="no index of examples; remove it"):
        retrieval.saved(tmp_path / "i.npz", "a", ["x"], session, load)
