"""CIDEr-D, BLEU and ROUGE-L of captions, as coco-caption computes them.

Every metric takes tokenized captions: predictions by id, and lists of references by the same ids.
Read next: ptb.py.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from emu_jax.evaluate.metrics import ptb

# Length of the longest n-grams in CIDEr-D and BLEU.
N = 4
# Standard deviation of CIDEr-D's Gaussian penalty for a difference in length.
SIGMA = 6.0
# Weight of recall in ROUGE-L.
BETA = 1.2

Predictions = Mapping[str, str]
References = Mapping[str, Sequence[str]]


def tokenize(
    predictions: Predictions, references: References
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Tokenize predictions and references.

    Each side is tokenized as one text in the order of the references, as coco-caption does.
    """
    tokens = ptb.tokenize([predictions[id] for id in references])
    flat = [caption for captions in references.values() for caption in captions]
    reference_tokens = iter(ptb.tokenize(flat))
    by_id = {}
    for id, refs in references.items():
        by_id[id] = [next(reference_tokens) for _ in refs]
    return dict(zip(references, tokens, strict=True)), by_id


def cider(predictions: Predictions, references: References) -> dict[str, float]:
    """CIDEr-D of each caption, from 0 to 10 (a perfect match); the corpus score is the mean.

    The references are also the corpus for the TF-IDF weights of n-grams, so the score of a single
    image is 0.
    """
    counts = {id: list(map(_count_ngrams, refs)) for id, refs in references.items()}
    images_with: Counter = Counter()
    for ref_counts in counts.values():
        images_with.update(set().union(*ref_counts))
    log_images = np.log(float(len(references)))

    def tf_idf(ngrams: Counter) -> _TfIdf:
        weights: list[dict] = [{} for _ in range(N)]
        for ngram, count in ngrams.items():
            idf = log_images - np.log(max(1.0, images_with[ngram]))
            weights[len(ngram) - 1][ngram] = count * idf
        norms = []
        for by_ngram in weights:
            norms.append(math.sqrt(sum(weight * weight for weight in by_ngram.values())))
        bigrams = sum(count for ngram, count in ngrams.items() if len(ngram) == 2)
        return _TfIdf(weights, norms, bigrams)

    scores = {}
    for id, ref_counts in counts.items():
        predicted = tf_idf(_count_ngrams(predictions[id]))
        total = sum(_similarity(predicted, tf_idf(ngrams)) for ngrams in ref_counts)
        scores[id] = float(10 * np.mean(total) / len(ref_counts))
    return scores


class _TfIdf(NamedTuple):
    """A caption as CIDEr-D represents it."""

    # For each n, the weights of its n-grams.
    weights: list[dict[tuple[str, ...], float]]
    # For each n, the norm of the weights.
    norms: list[float]
    # The number of bigrams, which the original uses as the length.
    length: int


def _similarity(predicted: _TfIdf, reference: _TfIdf) -> Float[np.ndarray, "N"]:
    """Clipped cosine for each n, with a penalty for a difference in length."""
    values = np.zeros(N)
    for n in range(N):
        for ngram, weight in predicted.weights[n].items():
            other = reference.weights[n].get(ngram, 0.0)
            values[n] += min(weight, other) * other
        norm = predicted.norms[n] * reference.norms[n]
        if norm:
            values[n] /= norm
    return values * math.exp(-((predicted.length - reference.length) ** 2) / (2 * SIGMA**2))


def bleu(predictions: Predictions, references: References) -> list[float]:
    """BLEU-1 to BLEU-4 of the corpus; the brevity penalty uses the closest reference length."""
    predicted = np.zeros(N)
    correct = np.zeros(N)
    length = 0
    reference_length = 0
    for id, refs in references.items():
        words = len(predictions[id].split())
        most: Counter = Counter()
        for caption in refs:
            most |= _count_ngrams(caption)
        for ngram, count in _count_ngrams(predictions[id]).items():
            correct[len(ngram) - 1] += min(count, most[ngram])
        predicted += [max(0, words - n) for n in range(N)]
        length += words
        # Of two equally close lengths, take the shorter.
        lengths = [len(caption.split()) for caption in refs]
        reference_length += min((abs(other - words), other) for other in lengths)[1]
    ratio = (length + 1e-15) / (reference_length + 1e-9)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    products = np.cumprod((correct + 1e-15) / (predicted + 1e-9))
    return [float(product ** (1 / n) * penalty) for n, product in enumerate(products, 1)]


def rouge(predictions: Predictions, references: References) -> dict[str, float]:
    """ROUGE-L of each caption.

    It is the F-measure of the best precision and the best recall of the longest common subsequence
    over the references. The two may come from different references.
    """
    scores = {}
    for id, refs in references.items():
        predicted = predictions[id].split(" ")
        precision = 0.0
        recall = 0.0
        for caption in refs:
            words = caption.split(" ")
            common = _longest_common_subsequence(words, predicted)
            precision = max(precision, common / len(predicted))
            recall = max(recall, common / len(words))
        scores[id] = 0.0
        if precision and recall:
            scores[id] = (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)
    return scores


def _count_ngrams(caption: str) -> Counter:
    """Count the n-grams of a caption, for n from 1 to N."""
    words = caption.split()
    counts: Counter = Counter()
    for n in range(1, N + 1):
        counts.update(tuple(words[start : start + n]) for start in range(len(words) - n + 1))
    return counts


def _longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, by dynamic programming over prefixes of a."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for k, other in enumerate(b, 1):
            above = row[k]
            row[k] = diagonal + 1 if word == other else max(above, row[k - 1])
            diagonal = above
    return row[-1]
