"""VisDial's scores of ranked candidates, as its challenge computes them.

They are NDCG against graded relevance, and recall and mean rank of the one true answer.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int


def ndcg(
    ranks: Sequence[int] | Int[np.ndarray, "C"], relevance: Sequence[float] | Float[np.ndarray, "C"]
) -> float:
    """Normalized discounted cumulative gain of one round; 0 if no candidate is relevant.

    The first K ranks count, where K is the number of candidates with any relevance.

    Args:
        ranks: Rank of each candidate, from 1.
        relevance: Share of the annotators who accept each candidate.
    """
    graded = np.asarray(relevance, float)
    count = int((graded != 0).sum())

    def discounted_gain(values: np.ndarray) -> float:
        return float((values / np.log2(np.arange(len(values)) + 2)).sum())

    best = discounted_gain(np.sort(graded)[::-1][:count])
    if not best:
        return 0.0
    order = np.argsort(np.asarray(ranks), kind="stable")
    return discounted_gain(graded[order[:count]]) / best


def true_rank_metrics(true_ranks: Sequence[int]) -> dict[str, float]:
    """Recall, mean rank and mean reciprocal rank.

    ranks: the rank of the true answer in each round, from 1.
    """
    ranks = np.asarray(true_ranks, float)
    metrics = {f"recall@{k}": float((ranks <= k).mean()) for k in (1, 5, 10)}
    return metrics | {"mean_rank": float(ranks.mean()), "mrr": float((1 / ranks).mean())}
