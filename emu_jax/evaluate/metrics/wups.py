"""WUPS of free-form answers as NExT-QA's official script computes it (doc-doc/NExT-OE, metrics.py):
similarity of words by WordNet.

Only the first sense of a word counts, and a similarity below the threshold counts a tenth. The
script first lemmatises both sides by a tagger and drops its own stop words (lemmas.py): texts are
scored here as they are given.
"""

import re
from collections.abc import Sequence

from emu_jax.evaluate.metrics.wordnet import WordNet


def score(wordnet: WordNet, prediction: str, truths: Sequence[str], threshold: float) -> float:
    """0 to 1: the best over the true answers. `threshold` is 0 or 0.9."""
    return max(
        min(_one_way(wordnet, ours, theirs, threshold), _one_way(wordnet, theirs, ours, threshold))
        for ours, theirs in ((words(prediction), words(truth)) for truth in truths)
    )


def _one_way(wordnet: WordNet, ours: list[str], theirs: list[str], threshold: float) -> float:
    """The product, over our words, of the best similarity to any of theirs; words like none of them
    are passed over.
    """
    product = 1.0
    found = False
    for word in ours:
        best = max((_similarity(wordnet, word, other, threshold) for other in theirs), default=0.0)
        if best:
            product = product * best
            found = True
    return product if found else 0.0


def _similarity(wordnet: WordNet, a: str, b: str, threshold: float) -> float:
    if a == b:
        return 1.0
    first = wordnet.first(a)
    second = wordnet.first(b)
    value = wordnet.similarity(first, second) if first and second else 0.0
    return value if value >= threshold else 0.1 * value


# What NLTK's word_tokenize does to a sentence, in order: spaces around what is a token of its own.
STEPS = (
    ("([«“‘„]|`+)", r" \1 "),
    (r'^"', "``"),
    ("(``)", r" \1 "),
    (r"([ (\[{<])(\"|'{2})", r"\1 `` "),
    (r"(?i)(?<!\w)(')(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)", r"\1 "),
    (r"([^.])(\.)([\])}>\"' »”’]*)\s*$", r"\1 \2 \3 "),
    (r"([:,])([^\d])", r" \1 \2"),
    (r"([:,])$", r" \1 "),
    (r"(\.{2,})", r" \1 "),
    (r"([;@#$%&])", r" \1 "),
    ("([\u2012-\u2015])", r" \1 "),
    (r"([^.])(\.)([\])}>\"']*)\s*$", r"\1 \2\3 "),
    ("([?!])", r" \1 "),
    ("([^'])' ", r"\1 ' "),
    (r"([*])", r" \1 "),
    (r"([\]\[(){}<>])", r" \1 "),
    ("--", " -- "),
    (r"^(.*)$", r" \1 "),
    ("([»”’])", r" \1 "),
    ("''", " '' "),
    ('"', " '' "),
    (r"\s+", " "),
    ("([^' ])('[sS]|'[mM]|'[dD]|') ", r"\1 \2 "),
    ("([^' ])('ll|'LL|'re|'RE|'ve|'VE|n't|N'T) ", r"\1 \2 "),
    (r"(?i)\b(can)(not)\b", r" \1 \2 "),
    (r"(?i)\b(d)('ye)\b", r" \1 \2 "),
    (r"(?i)\b(gim|lem)(me)\b", r" \1 \2 "),
    (r"(?i)\b(gon)(na)\b", r" \1 \2 "),
    (r"(?i)\b(got)(ta)\b", r" \1 \2 "),
    (r"(?i)\b(more)('n)\b", r" \1 \2 "),
    (r"(?i)\b(wan)(na)(?=\s)", r" \1 \2 "),
    (r"(?i) ('t)(is|was)\b", r" \1 \2 "),
)


def words(text: str) -> list[str]:
    """The tokens of a short answer, as NLTK's word_tokenize makes them; a sentence ends at a full
    stop, ! or ? before a space.
    """
    found = []
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        for pattern, put in STEPS:
            sentence = re.sub(pattern, put, sentence, flags=re.DOTALL)
        found += sentence.split()
    return found
