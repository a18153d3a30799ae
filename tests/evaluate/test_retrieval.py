"""RICES: features ignore the batch, the nearest shots come last, the index is cached."""

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


def test_features_have_norm_one_and_a_video_is_the_mean_of_its_frames(session):
    a, b, c = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 3), np.uint8)
    found = retrieval.compute_features(session, [[a], [a, b, c], [b], [c], [b, b]])
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    mean = found[0] + found[2] + found[3]
    np.testing.assert_allclose(found[1], mean / np.linalg.norm(mean), atol=1e-5)
    np.testing.assert_allclose(found[4], found[2], atol=1e-5)
    assert np.abs(found[0] - found[2]).max() > 1e-4 and retrieval.compute_features(
        session, []
    ).shape == (
        0,
        found.shape[1],
    )


def test_the_nearest_come_last_without_the_question_itself():
    index = Index(["x", "y", "z"], np.array([[1, 0], [0.8, 0.6], [0, 1]], np.float32))
    assert index.nearest(np.array([1, 0], np.float32), 2, exclude="x") == ["z", "y"]
    assert index.nearest(np.array([1, 0], np.float32), 1, exclude="") == ["x"] and index.nearest(
        np.array([0, 1], np.float32), 9, exclude="y"
    ) == ["x", "z"]


def test_an_index_is_built_once_for_each_model_and_its_images(session, tmp_path):
    loaded = []

    def load(name):
        return loaded.append(name) or [np.full((28, 28, 3), len(name), np.uint8)]

    for model_id, names, count in (
        ("a", ["x", "yy"], 2),
        ("a", ["x", "yy"], 2),
        ("b", ["x", "yy"], 4),
        ("b", ["x", "zz"], 6),
    ):
        index = retrieval.load_or_build_index(tmp_path / "i.npz", model_id, names, session, load)
        assert (
            len(loaded) == count
            and index.names == names
            and index.features.shape == (2, session.model_config.vision.width)
        )
    (tmp_path / "i.npz").write_bytes(b"no index")
    with pytest.raises(UserError, match="not an index of examples; remove it"):
        retrieval.load_or_build_index(tmp_path / "i.npz", "a", ["x"], session, load)
