"""Lemmatize answers as NExT-QA's official script does before it compares them.

That script (NExT-OE, eval_oe.py) calls pywsd's lemmatize_sentence: NLTK's averaged perceptron tags
each word, WordNet gives its lemma, and Porter's stemmer is used if WordNet has none. We use the
same three from NLTK (extra `eval`); the tagger's weights are in a folder. Read next: wups.py.
"""

from functools import cache
from pathlib import Path

from emu_jax.config import UserError
from emu_jax.evaluate.metrics import wups
from emu_jax.evaluate.metrics.wordnet import WordNet, allow

NAME = "averaged_perceptron_tagger_eng"
WHERE = (
    f"--tagger=DIR: a folder with NLTK's {NAME}.weights.json, .tagdict.json and .classes.json "
    f"(nltk_data, taggers/{NAME}.zip)"
)
# First two letters of a Penn Treebank tag -> WordNet's part of speech.
KINDS = {"NN": "n", "JJ": "a", "VB": "v", "RB": "r"}
# The script's own stop words: NLTK's list without negations and some other words.
STOP = set(
    """
    i me my myself we our ours ourselves you you're you've you'll you'd your yours yourself
    yourselves he him his himself she she's her hers herself it it's its itself they them their
    theirs themselves what which who whom this that that'll these those am is are was were be been
    being have has had having do does did doing a an the and but if or because as until while to
    from of at for with about into through during again further then here there when where why how
    all any each most other some such only own so than too very s t can will just don don't should
    should've now d ll m o re ve y ain aren aren't couldn couldn't didn didn't doesn doesn't hadn
    hadn't hasn hasn't haven haven't isn isn't ma mightn mightn't mustn mustn't needn needn't shan
    shan't shouldn shouldn't wasn wasn't weren weren't won won't wouldn wouldn't
    """.split()
)


class Tagger:
    """NLTK's part-of-speech tagger, from a folder with its three files.

    Raises UserError if a file is missing or is not the tagger's.
    """

    def __init__(self, folder: str):
        for part in ("weights", "tagdict", "classes"):
            path = Path(folder, f"{NAME}.{part}.json")
            if not path.is_file():
                raise UserError(f"no file {str(path)!r} of the tagger; {WHERE}")
        allow(folder)
        from nltk.tag.perceptron import PerceptronTagger

        try:
            self._tagger = PerceptronTagger(load=False)
            self._tagger.load_from_json(loc=str(Path(folder).resolve()))
            self.tags(["word"])
        # NLTK does not validate its files: malformed ones raise all kinds of errors when used.
        except Exception as error:
            raise UserError(f"{folder}: not NLTK's tagger; {WHERE}") from error

    def tags(self, words: list[str]) -> list[str]:
        """The Penn Treebank tag of each word of a sentence."""
        return [tag for _, tag in self._tagger.tag(words)]


def lemmatize(wordnet: WordNet, tagger: Tagger, text: str) -> str:
    """The lemmas of a text without stop words, joined by spaces."""
    tokens = wups.words(text)
    found = []
    for word, tag in zip(tokens, tagger.tags(tokens), strict=True):
        base = lemma(wordnet, tagger, word.lower(), KINDS.get(tag[:2], ""))
        if base not in STOP:
            found.append(base)
    return " ".join(found)


def lemma(wordnet: WordNet, tagger: Tagger, word: str, kind: str) -> str:
    """The shortest base form of a word, else its stem if WordNet has that, else the word.

    kind: WordNet's part of speech; "": that of the tag of the word alone, or else noun.
    """
    forms = wordnet.base_forms(word, kind or KINDS.get(tagger.tags([word])[0][:2], "n"))
    found = min(forms, key=len) if forms else word
    for form in (found, stem(word)):
        if wordnet.first_sense(form):
            return form
    return word


@cache
def stem(word: str) -> str:
    """Porter's stem, with NLTK's changes to the algorithm."""
    from nltk.stem import PorterStemmer

    return PorterStemmer().stem(word)
