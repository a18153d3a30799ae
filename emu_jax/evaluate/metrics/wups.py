"""WUPS of free-form answers, as in NExT-QA's official script (NExT-OE, metrics.py).

Only the first sense of a word counts, and a similarity below the threshold is multiplied by 0.1.
The script first reduces both sides to lemmas without stop words (lemmas.py does that); this module
scores texts as they are given.
"""

import re
from collections.abc import Sequence

from emu_jax.evaluate.metrics.wordnet import WordNet


def score(wordnet: WordNet, prediction: str, references: Sequence[str], threshold: float) -> float:
    """The best WUPS, 0 to 1, over the references. threshold: 0 or 0.9."""
    predicted = words(prediction)
    best = 0.0
    for reference in references:
        true = words(reference)
        forward = _one_way(wordnet, predicted, true, threshold)
        backward = _one_way(wordnet, true, predicted, threshold)
        best = max(best, min(forward, backward))
    return best


def words(text: str) -> list[str]:
    """Tokens of a short answer, by NLTK's Treebank-style word tokenizer.

    A sentence ends at ".", "!" or "?" before a space. NLTK's own sentence splitter would need a
    trained model, which mainly recognises abbreviations, and answers have none.
    """
    from nltk.tokenize import NLTKWordTokenizer

    tokenizer = NLTKWordTokenizer()
    sentences = re.split(r"(?<=[.!?])\s+", text)
    return [token for sentence in sentences for token in tokenizer.tokenize(sentence)]


def _one_way(wordnet: WordNet, ours: list[str], theirs: list[str], threshold: float) -> float:
    """Multiply, over our words, the best similarity to any of theirs; zeros are left out."""
    product = 1.0
    found = False
    for word in ours:
        best = max((_similarity(wordnet, word, other, threshold) for other in theirs), default=0.0)
        if best:
            product *= best
            found = True
    return product if found else 0.0


def _similarity(wordnet: WordNet, a: str, b: str, threshold: float) -> float:
    if a == b:
        return 1.0
    value = wordnet.similarity(a, b)
    return value if value >= threshold else 0.1 * value
