"""CLIP score (arXiv 2104.08718): the cosine between a picture's and its text's features, as CLIP gives them."""
import numpy as np
from jaxtyping import Float


def score(images: Float[np.ndarray, "n C"], texts: Float[np.ndarray, "n C"]) -> float:
    """100 * the mean over the pairs of max(cosine, 0)."""
    images, texts = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (np.asarray(images, np.float64), np.asarray(texts, np.float64)))
    return float(100 * np.maximum((images * texts).sum(1), 0).mean())
