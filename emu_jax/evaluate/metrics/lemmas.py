"""The words of an answer that NExT-QA's official script counts (doc-doc/NExT-OE, eval_oe.py):
tagged, as lemmas, without its stop words.

It calls pywsd's lemmatize_sentence, which asks NLTK: its averaged perceptron says what kind of word
each is, WordNet has the lemma, and Porter's stemmer serves where WordNet has none. All three are
here; the perceptron's weights are a file. Read next: wups.py.
"""

import json
import re
from pathlib import Path
from typing import Any

from emu_jax.config import UserError
from emu_jax.evaluate.metrics import wups
from emu_jax.evaluate.metrics.wordnet import WordNet

NAME = "averaged_perceptron_tagger_eng"
WHERE = f"--tagger=DIR: a folder with NLTK's {NAME}.weights.json, .tagdict.json and .classes.json (nltk_data, taggers/{NAME}.zip)"
# of WordNet, by the first letters of the Penn Treebank's tags
KINDS = {"NN": "n", "JJ": "a", "VB": "v", "RB": "r"}
STOP = set(
    (
        "i me my myself we our ours ourselves you you're you've you'll you'd your yours yourself yourselves he him his himself she she's her hers "
        "herself it it's its itself they them their theirs themselves what which who whom this that that'll these those am is are was were be been "
        "being have has had having do does did doing a an the and but if or because as until while to from of at for with about into through during "
        "again further then here there when where why how all any each most other some such only own so than too very s t can will just don don't "
        "should should've now d ll m o re ve y ain aren aren't couldn couldn't didn didn't doesn doesn't hadn hadn't hasn hasn't haven haven't isn "
        "isn't ma mightn mightn't mustn mustn't needn needn't shan shan't shouldn shouldn't wasn wasn't weren weren't won won't wouldn wouldn't"
    ).split()
)


def reduced(wordnet: WordNet, tagger: "Tagger", text: str) -> str:
    """The lemmas of a text that count, with a space between."""
    tokens = wups.words(text)
    found = (
        lemma(wordnet, tagger, word.lower(), KINDS.get(tag[:2], ""))
        for word, tag in zip(tokens, tagger.tags(tokens), strict=True)
    )
    return " ".join(word for word in found if word not in STOP)


def lemma(wordnet: WordNet, tagger: "Tagger", word: str, kind: str) -> str:
    """The shortest base form of the word as what it is (of an unknown kind: as what it is alone, or
    else a noun); its stem where only that is a word of WordNet; itself where neither is.
    """
    forms = wordnet.base_forms(word, kind or KINDS.get(tagger.tags([word])[0][:2], "n"))
    found = min(forms, key=len) if forms else word
    return next((form for form in (found, stem(word)) if wordnet.first(form)), word)


class Tagger:
    """NLTK's greedy averaged perceptron (after M. Honnibal): a tag is the best sum of the weights
    of what is seen around a word.
    """

    def __init__(self, folder: str):
        """Reads its three files. Raises UserError where one is missing or is something else."""
        try:
            self._weights, self._known, classes = (
                _read(Path(folder, f"{NAME}.{part}.json"))
                for part in ("weights", "tagdict", "classes")
            )
            self._classes = sorted(classes)
        except (TypeError, AttributeError) as error:
            raise UserError(f"{folder}: not NLTK's tagger; {WHERE}") from error
        if not (
            isinstance(self._weights, dict) and isinstance(self._known, dict) and self._classes
        ):
            raise UserError(f"{folder}: not NLTK's tagger; {WHERE}")

    def tags(self, words: list[str]) -> list[str]:
        """The Penn Treebank's tag of each word of a sentence."""
        around = ["-START-", "-START2-", *map(_normal, words), "-END-", "-END2-"]
        found = ["-START2-", "-START-"]
        for place, word in enumerate(words, 2):
            found.append(
                self._known.get(word)
                or self._best(word, found[-1], found[-2], around[place - 2 : place + 3])
            )
        return found[2:]

    def _best(self, word: str, tag1: str, tag2: str, around: list[str]) -> str:
        before2, before, this, after, after2 = around
        seen = (
            "bias",
            f"i suffix {word[-3:]}",
            f"i pref1 {word[:1]}",
            f"i-1 tag {tag1}",
            f"i-2 tag {tag2}",
            f"i tag+i-2 tag {tag1} {tag2}",
            f"i word {this}",
            f"i-1 tag+i word {tag1} {this}",
            f"i-1 word {before}",
            f"i-1 suffix {before[-3:]}",
            f"i-2 word {before2}",
            f"i+1 word {after}",
            f"i+1 suffix {after[-3:]}",
            f"i+2 word {after2}",
        )
        scores = dict.fromkeys(self._classes, 0.0)
        for feature in seen:
            for tag, weight in self._weights.get(feature, {}).items():
                scores[tag] += weight
        return max(self._classes, key=lambda tag: (scores[tag], tag))


def _normal(word: str) -> str:
    if "-" in word[1:] and not word.startswith("-"):
        return "!HYPHEN"
    return (
        "!YEAR"
        if word.isdigit() and len(word) == 4
        else "!DIGITS"
        if word[:1].isdigit()
        else word.lower()
    )


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"no file {str(path)!r} of the tagger; {WHERE}") from error
    except ValueError as error:
        raise UserError(f"{path}: not NLTK's tagger; {WHERE}") from error


# Porter's stemmer (Program 14, 1980) with NLTK's changes. A step is rules (ending, new ending, the
# least measure of what is before it), of which the first whose ending is there decides.
IRREGULAR = {
    word: root
    for root, words in {
        "sky": "sky skies",
        "die": "dying",
        "lie": "lying",
        "tie": "tying",
        "news": "news",
        "inning": "innings inning",
        "outing": "outings outing",
        "canning": "cannings canning",
        "howe": "howe",
        "proceed": "proceed",
        "exceed": "exceed",
        "succeed": "succeed",
    }.items()
    for word in words.split()
}
PLURAL = (
    (r"(?<=^.)ies", "ie", 0),
    ("sses", "ss", 0),
    ("ies", "i", 0),
    ("ss", "ss", 0),
    ("s", "", 0),
)
PAST = ((r"(?<=^.)ied", "ie", 0), ("ied", "i", 0), ("eed", "ee", 1))
DERIVED = (
    tuple(
        (*pair.split(">"), 1)
        for pair in (
            "ational>ate tional>tion enci>ence anci>ance izer>ize bli>ble entli>ent eli>e ousli>ous ization>ize ation>ate ator>ate alism>al "
            "iveness>ive fulness>ful ousness>ous aliti>al iviti>ive biliti>ble fulli>ful (?<=l)ogi>og"
        ).split()
    ),
    tuple(
        (*pair.split(">"), 1)
        for pair in "icate>ic ative> alize>al iciti>ic ical>ic ful> ness>".split()
    ),
    tuple(
        (ending, "", 2)
        for ending in (
            "al ance ence er ic able ible ant ement ment ent (?<=[st])ion ou ism ate iti ous ive ize"
        ).split()
    ),
)


def stem(word: str) -> str:
    """Of a word in lower case."""
    if word in IRREGULAR or len(word) <= 2:
        return IRREGULAR.get(word, word)
    word = _rewritten(word, PLURAL)
    cut = re.sub(r"(ed|ing)\Z", "", word)
    if word.endswith(("ied", "eed")):
        word = _rewritten(word, PAST)
    elif cut != word and "v" in _sounds(cut):
        word = _mended(cut)
    if word.endswith("y") and len(word) > 2 and _sounds(word[:-1]).endswith("c"):
        word = word[:-1] + "i"
    if word.endswith("alli") and _measure(word[:-4]):
        word = word[:-2]
    for rules in DERIVED:
        word = _rewritten(word, rules)
    if word.endswith("e") and (
        _measure(word[:-1]) > 1 or (_measure(word[:-1]) == 1 and not _short(word[:-1]))
    ):
        word = word[:-1]
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word


def _rewritten(word: str, rules: tuple) -> str:
    for ending, new, least in rules:
        if found := re.search(rf"{ending}\Z", word):
            before = word[: found.start()]
            return before + new if _measure(before) >= least else word
    return word


def _mended(word: str) -> str:
    """After -ed or -ing is gone."""
    if word.endswith(("at", "bl", "iz")):
        return word + "e"
    if len(word) > 1 and word[-1] == word[-2] and _sounds(word).endswith("c"):
        return word if word[-1] in "lsz" else word[:-1]
    return word + "e" if _measure(word) == 1 and _short(word) else word


def _sounds(word: str) -> str:
    """c and v; y is a vowel after a consonant."""
    found = ""
    for letter in word:
        found += "v" if letter in "aeiou" or (letter == "y" and found.endswith("c")) else "c"
    return found


def _measure(word: str) -> int:
    return _sounds(word).count("vc")


def _short(word: str) -> bool:
    """Ends as "hop" does, or is as "at"."""
    sounds = _sounds(word)
    return sounds == "vc" or (sounds.endswith("cvc") and word[-1] not in "wxy")
