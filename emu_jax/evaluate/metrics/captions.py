"""CIDEr-D, BLEU and ROUGE-L of captions, as coco-caption computes them.

Every function takes tokenized captions (ptb.tokenize): predictions by id, and lists of references
by the same ids.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from emu_jax.evaluate.metrics import ptb

# the longest n-gram that counts
N = 4
# CIDEr-D's width of the penalty for another length
SIGMA = 6.0
# ROUGE-L's weight of recall
BETA = 1.2
Predictions = Mapping[str, str]
References = Mapping[str, Sequence[str]]


def tokenize(
    predictions: Predictions, references: References
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Both sides tokenized, each as one text in the order of the references."""
    told = dict(
        zip(references, ptb.tokenize([predictions[key] for key in references]), strict=True)
    )
    rest = iter(ptb.tokenize([caption for some in references.values() for caption in some]))
    return told, {key: [next(rest) for _ in some] for key, some in references.items()}


def cider(predictions: Predictions, references: References) -> dict[str, float]:
    """CIDEr-D of each caption (10 is a perfect match of rare words); the corpus score is the mean.
    The references are also the corpus that says which n-grams are rare: a single image scores 0.
    """
    counts = {key: [_ngrams(caption) for caption in some] for key, some in references.items()}
    documents = Counter(ngram for some in counts.values() for ngram in set().union(*some))
    total = np.log(float(len(references)))

    def vector(ngrams: Counter):
        """(weights by n, their norms, the length as the original counts it: of the bigrams)."""
        weights = [{} for _ in range(N)]
        for ngram, count in ngrams.items():
            weights[len(ngram) - 1][ngram] = count * (total - np.log(max(1.0, documents[ngram])))
        return (
            weights,
            [math.sqrt(sum(w * w for w in some.values())) for some in weights],
            sum(c for ngram, c in ngrams.items() if len(ngram) == 2),
        )

    def similarity(ours, theirs):
        (weights, norms, length) = ours
        (other_weights, other_norms, other_length) = theirs
        values = np.zeros(N)
        for n in range(N):
            values[n] = sum(
                min(w, other_weights[n].get(ngram, 0.0)) * other_weights[n].get(ngram, 0.0)
                for ngram, w in weights[n].items()
            )
            if norms[n] and other_norms[n]:
                values[n] /= norms[n] * other_norms[n]
        return values * math.exp(-((length - other_length) ** 2) / (2 * SIGMA**2))

    scores = {}
    for key, some in counts.items():
        ours = vector(_ngrams(predictions[key]))
        scores[key] = float(
            10 * np.mean(sum(similarity(ours, vector(ngrams)) for ngrams in some)) / len(some)
        )
    return scores


def bleu(predictions: Predictions, references: References) -> list[float]:
    """BLEU-1 to BLEU-4 of the corpus, against the references' closest length."""
    guessed = np.zeros(N)
    right = np.zeros(N)
    length = reference_length = 0
    for key, some in references.items():
        ours = _ngrams(predictions[key])
        words = len(predictions[key].split())
        most = Counter()
        for caption in some:
            most |= _ngrams(caption)
        for ngram, count in ours.items():
            right[len(ngram) - 1] += min(count, most[ngram])
        guessed += [max(0, words - n) for n in range(N)]
        length += words
        reference_length += min(
            (abs(len(caption.split()) - words), len(caption.split())) for caption in some
        )[1]
    ratio = (length + 1e-15) / (reference_length + 1e-9)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    precisions = np.cumprod((right + 1e-15) / (guessed + 1e-9))
    return [float(product ** (1 / n) * penalty) for n, product in enumerate(precisions, 1)]


def rouge(predictions: Predictions, references: References) -> dict[str, float]:
    """ROUGE-L of each caption: best precision and best recall of the longest common subsequence
    over its references.
    """
    scores = {}
    for key, some in references.items():
        words = predictions[key].split(" ")
        common = [(_common(caption.split(" "), words), len(caption.split(" "))) for caption in some]
        precision = max(c for c, _ in common) / len(words)
        recall = max(c / n for c, n in common)
        scores[key] = (
            (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)
            if precision and recall
            else 0.0
        )
    return scores


def _ngrams(caption: str) -> Counter:
    words = caption.split()
    return Counter(
        tuple(words[start : start + n])
        for n in range(1, N + 1)
        for start in range(len(words) - n + 1)
    )


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        # what row[k] was before this word
        last = 0
        for k, other in enumerate(b, 1):
            last, row[k] = row[k], last + 1 if word == other else max(row[k], row[k - 1])
    return row[-1]
