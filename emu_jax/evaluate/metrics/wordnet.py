"""WordNet through NLTK (extra `eval`): senses of words, and Wu-Palmer similarity.

The dictionary is a folder in the format of wndb(5WN), such as NLTK's corpora/wordnet or that of
Debian's package wordnet-base. Read next: wups.py.
"""

import io
import warnings
from functools import cache
from pathlib import Path

from emu_jax import cli
from emu_jax.config import UserError
from emu_jax.files import one_line

WHERE = (
    "--wordnet=DIR: a folder with WordNet's index.noun, data.noun, ... "
    "(Debian's package wordnet-base has them in /usr/share/wordnet)"
)
PARTS = ("noun", "verb", "adj", "adv")
FILES = [f"{kind}.{part}" for part in PARTS for kind in ("index", "data")]
FILES += [f"{part}.exc" for part in PARTS]


class WordNet:
    """A dictionary in a folder. Raises UserError if a file is missing or not WordNet's."""

    def __init__(self, folder: str):
        for name in FILES:
            if not Path(folder, name).is_file():
                raise UserError(f"no WordNet file {str(Path(folder, name))!r}; {WHERE}")
        allow(folder)
        from nltk.corpus.reader.wordnet import WordNetCorpusReader

        class Reader(WordNetCorpusReader):
            def open(self, file):
                # The names of lexicographer files: no score needs them, and Debian omits them.
                if file == "lexnames":
                    return io.StringIO("".join(f"{k:02} {k:02} 0\n" for k in range(45)))
                return super().open(file)

            def map_wn(self, version="wordnet"):
                # Skip the mapping of ids to WordNet 3.0, which only other languages need.
                return None

        try:
            with warnings.catch_warnings():
                # NLTK warns that other languages are missing.
                warnings.simplefilter("ignore")
                self._reader = Reader(str(Path(folder).resolve()), None)
        # NLTK's parsers raise many kinds of errors for files in another format.
        except Exception as error:
            raise UserError(
                f"{folder}: not a WordNet dictionary ({one_line(error)}); {WHERE}"
            ) from error
        # The same few words occur in many answers, so results are cached.
        self.first_sense = cache(self._first_sense)
        self.similarity = cache(self._similarity)

    def base_forms(self, word: str, kind: str) -> list[str]:
        """The words that `word` may be an inflection of. kind: "n", "v", "a" or "r"."""
        return self._reader._morphy(word, kind)

    def _first_sense(self, word: str):
        """The first sense as a noun, else as a verb, adjective or adverb; None without a sense."""
        return next(iter(self._reader.synsets(word)), None)

    def _similarity(self, a: str, b: str) -> float:
        """Wu-Palmer similarity, 0 to 1, of the first senses of two words; 0 without a sense."""
        first = self.first_sense(a)
        second = self.first_sense(b)
        if first is None or second is None:
            return 0.0
        return first.wup_similarity(second) or 0.0


def allow(folder: str) -> None:
    """Let NLTK read `folder`: it opens nothing outside nltk.data.path.

    Raises UserError if NLTK is not installed.
    """
    try:
        import nltk.data
    except ModuleNotFoundError as error:
        raise UserError(cli.missing_extra(error) or str(error)) from error
    path = str(Path(folder).resolve())
    if path not in nltk.data.path:
        nltk.data.path.append(path)
