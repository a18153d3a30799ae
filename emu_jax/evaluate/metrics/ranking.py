"""VisDial's scores of ranked candidates, as its challenge computes them: NDCG against graded
relevance, and where the one true answer stands.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int


def ndcg(
    ranks: Sequence[int] | Int[np.ndarray, "C"], relevance: Sequence[float] | Float[np.ndarray, "C"]
) -> float:
    """Of one round: `ranks[k]` is the place (from 1) of candidate k, `relevance[k]` its share of
    annotators. As many places count as there are candidates with any relevance. 0 where there is
    none.
    """
    ranks = np.asarray(ranks)
    relevance = np.asarray(relevance, float)
    count = int((relevance != 0).sum())

    def gain(values):
        return float((values / np.log2(np.arange(len(values)) + 2)).sum())

    best = gain(np.sort(relevance)[::-1][:count])
    return gain(relevance[np.argsort(ranks, kind="stable")[:count]]) / best if best else 0.0


def places(found: Sequence[int]) -> dict[str, float]:
    """Scores of the true answers' places (from 1)."""
    found = np.asarray(found, float)
    return {f"recall@{k}": float((found <= k).mean()) for k in (1, 5, 10)} | {
        "mean_rank": float(found.mean()),
        "mrr": float((1 / found).mean()),
    }
