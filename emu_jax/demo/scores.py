"""Scores of captions and of visual tokens, as pure functions.

Captions: F1 of the words, and for scenes the share of right facts (number or relation, drawings,
background). Visual tokens: retrieval ranks, R² and effective rank. Read next: evaluation.py.
"""

import re
from collections import Counter

import numpy as np
from einops import rearrange
from jaxtyping import Float, Int, UInt8

COUNTS = re.compile(r"(?P<number>one|two|three|four) (?P<first>\w+?)s? on (?P<background>\w+)")
SPATIAL = re.compile(
    r"an? (?P<first>\w+) (?P<relation>left of|above) an? (?P<second>\w+) on (?P<background>\w+)"
)


def plain(caption: str) -> str:
    """Normalise the white space of a caption to single spaces."""
    return " ".join(caption.split())


def f1(true: str, predicted: str) -> float:
    """F1 of the words as multisets; their order does not matter."""
    expected = Counter(true.split())
    given = Counter(predicted.split())
    if not expected and not given:
        return 1.0
    return 2 * (expected & given).total() / (expected.total() + given.total())


def facts(caption: str) -> dict[str, str]:
    """The facts in a scene's caption, by role.

    The roles are number, first and background, or first, relation, second and background. Returns
    {} for a text that is not a scene's caption.
    """
    match = COUNTS.fullmatch(caption) or SPATIAL.fullmatch(caption)
    return match.groupdict() if match else {}


def facts_right(true: str, predicted: str) -> float:
    """Share of the true caption's facts that the predicted one has in the same role."""
    expected = facts(true)
    given = facts(predicted)
    right = sum(given.get(role) == word for role, word in expected.items())
    return right / len(expected)


def swapped(true: str, predicted: str) -> bool:
    """Whether the prediction of a spatial caption has the right two drawings, swapped."""
    expected = facts(true)
    given = facts(predicted)
    if "second" not in expected:
        return False
    return (expected["first"], expected["second"]) == (given.get("second"), given.get("first"))


def ranks(distances: Float[np.ndarray, "Q K"], right: Int[np.ndarray, "Q"]) -> Int[np.ndarray, "Q"]:
    """Rank of the right key of each query; 0 is the nearest.

    Ties count as nearer, so that tokens that have collapsed to one point rank last, not first.
    """
    own = distances[np.arange(len(right)), right]
    return (distances <= own[:, None]).sum(1) - 1


def squared_distances(
    queries: Float[np.ndarray, "Q n"], keys: Float[np.ndarray, "K n"]
) -> Float[np.ndarray, "Q K"]:
    # Differences of large numbers would lose small distances, so centre the points first.
    centre = keys.mean(0)
    queries = queries - centre
    keys = keys - centre
    return np.square(queries).sum(1)[:, None] - 2 * queries @ keys.T + np.square(keys).sum(1)


def r2(true: Float[np.ndarray, "M N D"], predicted: Float[np.ndarray, "M N D"]) -> float:
    """Coefficient of determination R²: 1 is perfect; 0 is as good as predicting the mean.

    Returns 0 if all true tokens are the same.
    """
    total = np.square(true - true.mean(0)).sum()
    if not total:
        return 0.0
    return float(1 - np.square(true - predicted).sum() / total)


def effective_rank(tokens: Float[np.ndarray, "M N D"]) -> float:
    """Participation ratio of the covariance's eigenvalues: (sum)² / sum of squares.

    It is roughly the number of directions in which the visual tokens vary.
    """
    flat = rearrange(tokens, "M N D -> M (N D)").astype(np.float64)
    values = np.linalg.eigvalsh(np.cov(flat, rowvar=False))
    return float(values.sum() ** 2 / np.maximum(np.square(values).sum(), 1e-30))


def nearest(
    images: UInt8[np.ndarray, "Q h w 3"], among: UInt8[np.ndarray, "K h w 3"]
) -> Int[np.ndarray, "Q"]:
    """Index in `among` of the image nearest to each of `images`, by squared pixel distance."""

    def flat(pixels):
        return rearrange(pixels, "M h w c -> M (h w c)").astype(np.float32) / 255

    return squared_distances(flat(images), flat(among)).argmin(1)
