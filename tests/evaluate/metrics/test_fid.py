"""Frechet distance: closed forms, singular covariances, the cache; and CLIP score."""

import numpy as np
import pytest

from emu_jax.config import UserError
from emu_jax.evaluate.metrics import clip_score, fid


def normal(seed, n, dims):
    return np.random.default_rng(seed).standard_normal((n, dims))


def test_diagonal_gaussians_have_a_closed_form():
    a = fid.Statistics(np.zeros(3), np.diag([1.0, 4.0, 9.0]))
    b = fid.Statistics(np.array([1.0, 0.0, 2.0]), np.diag([4.0, 4.0, 1.0]))
    assert fid.distance(a, b) == pytest.approx(5 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2)


def test_the_distance_is_symmetric_and_zero_to_itself_even_for_few_images():
    a = fid.statistics(normal(0, 20, 64))
    b = fid.statistics(1.5 * normal(1, 30, 64) + 0.2)
    assert fid.distance(a, a) == pytest.approx(0, abs=1e-5)
    assert fid.distance(a, b) == pytest.approx(fid.distance(b, a), rel=1e-6)


def test_a_rotation_of_both_sets_changes_nothing():
    x = normal(0, 200, 8)
    y = normal(1, 300, 8) @ np.diag(np.arange(1, 9.0))
    turn = np.linalg.qr(normal(2, 8, 8))[0]
    assert fid.distance(fid.statistics(x @ turn), fid.statistics(y @ turn)) == pytest.approx(
        fid.distance(fid.statistics(x), fid.statistics(y))
    )


def test_statistics_are_cached(tmp_path):
    computed = []

    def make():
        return computed.append(1) or fid.statistics(normal(0, 20, 4))

    path = tmp_path / "cache" / "coco.npz"
    first = fid.cached_statistics(path, make)
    second = fid.cached_statistics(path, make)
    assert len(computed) == 1 and [one.name for one in path.parent.iterdir()] == ["coco.npz"]
    np.testing.assert_array_equal(first.cov, second.cov)


def test_bad_input(tmp_path):
    with pytest.raises(UserError, match="at least two images.* has 1"):
        fid.statistics(normal(0, 1, 4))
    with pytest.raises(UserError, match="same layer"):
        fid.distance(fid.statistics(normal(0, 9, 4)), fid.statistics(normal(0, 9, 5)))
    (tmp_path / "a.npz").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not statistics"):
        fid.read_statistics(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    with pytest.raises(UserError, match="not a mean and a covariance of finite"):
        fid.read_statistics(tmp_path / "b.npz")


def test_clip_score_by_hand():
    pictures = np.array([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    texts = np.array([[1.0, 0.0], [3.0, 4.0], [-1.0, 0.0]])
    assert clip_score.score(pictures, texts) == pytest.approx(100 * (1 + 0.8 + 0) / 3)
