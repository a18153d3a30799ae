"""VisDial's scores by hand."""

import numpy as np
import pytest

from emu_jax.evaluate.metrics import ranking


def test_ndcg_by_hand():
    relevance = [0.0, 1.0, 0.5, 0.0]
    assert ranking.ndcg([3, 1, 2, 4], relevance) == pytest.approx(1.0)
    assert ranking.ndcg([1, 2, 3, 4], relevance) == pytest.approx(
        (1 / np.log2(3)) / (1 + 0.5 / np.log2(3))
    )
    assert ranking.ndcg([1, 3, 4, 2], relevance) == 0.0
    assert ranking.ndcg([1, 2], [0.0, 0.0]) == 0.0


def test_true_rank_metrics_by_hand():
    assert ranking.true_rank_metrics([1, 2, 6, 20]) == {
        "recall@1": 0.25,
        "recall@5": 0.5,
        "recall@10": 0.75,
        "mean_rank": 7.25,
        "mrr": pytest.approx((1 + 1 / 2 + 1 / 6 + 1 / 20) / 4),
    }


def test_ndcg_is_best_for_the_order_of_relevance_alone():
    rng = np.random.default_rng(0)
    relevance = rng.integers(0, 5, 20) / 4
    ranks = np.argsort(np.argsort(-relevance, kind="stable"), kind="stable") + 1
    assert ranking.ndcg(ranks, relevance) == pytest.approx(1.0)
    assert all(ranking.ndcg(rng.permutation(20) + 1, relevance) <= 1.0 for _ in range(20))
