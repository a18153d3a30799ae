"""WordNet's dictionary files (wndb(5WN); Debian's wordnet-base), and Wu and Palmer's similarity of
two synsets as NLTK computes it.

Read next: wups.py.
"""

from collections import deque
from pathlib import Path
from typing import NamedTuple

from emu_jax.config import UserError

# in the order in which senses are looked up
FILES = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
ENDINGS = {
    "n": (
        ("s", ""),
        ("ses", "s"),
        ("ves", "f"),
        ("xes", "x"),
        ("zes", "z"),
        ("ches", "ch"),
        ("shes", "sh"),
        ("men", "man"),
        ("ies", "y"),
    ),
    "v": (
        ("s", ""),
        ("ies", "y"),
        ("es", "e"),
        ("es", ""),
        ("ed", "e"),
        ("ed", ""),
        ("ing", "e"),
        ("ing", ""),
    ),
    "a": (("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
    "r": (),
}
WHERE = "--wordnet=DIR: a folder with WordNet's index.noun, data.noun, ... (Debian's package wordnet-base has them in /usr/share/wordnet)"


class Synset(NamedTuple):
    # a key of FILES
    kind: str
    # its byte in the data file
    place: int


# above every verb, adjective and adverb without a hypernym
ROOT = Synset("", 0)


class WordNet:
    def __init__(self, folder: str):
        """Reads the dictionary. Raises UserError where a file is missing or is something else."""
        self._data: dict[str, bytes] = {}
        # kind -> lemma -> places, the most frequent sense first
        self._index: dict[str, dict[str, list[int]]] = {}
        self._exceptions: dict[str, dict[str, list[str]]] = {}
        for kind, name in FILES.items():
            self._data[kind] = _read(folder, f"data.{name}")
            lines = [
                line.split() for line in _lines(folder, f"index.{name}") if not line.startswith(" ")
            ]
            try:
                self._index[kind] = {
                    fields[0]: list(map(int, fields[-int(fields[2]) :])) for fields in lines
                }
            except (ValueError, IndexError) as error:
                raise UserError(
                    f"{Path(folder, f'index.{name}')}: not an index of WordNet"
                ) from error
            self._exceptions[kind] = {
                fields[0]: fields[1:]
                for fields in map(str.split, _lines(folder, f"{name}.exc"))
                if fields
            }
        self._above: dict[Synset, tuple[Synset, ...]] = {ROOT: ()}

    def first(self, word: str) -> Synset | None:
        """The first sense that the word, or a form it is an inflection of, has as a noun, else as a
        verb, adjective or adverb.
        """
        for kind in FILES:
            for form in self.base_forms(word.lower(), kind):
                return Synset(kind, self._index[kind][form][0])
        return None

    def base_forms(self, word: str, kind: str) -> list[str]:
        """The word and its base forms, as far as the dictionary has them."""
        forms = self._exceptions[kind].get(word) or [
            word.removesuffix(old) + new for old, new in ENDINGS[kind] if word.endswith(old)
        ]
        return list(dict.fromkeys(form for form in (word, *forms) if form in self._index[kind]))

    def similarity(self, a: Synset, b: Synset) -> float:
        """2 depth(s) / (path(a, s) + path(b, s) + 2 depth(s)) for their lowest common subsumer s; 0
        without one.
        """
        rooted = a.kind != "n" or b.kind != "n"
        up = self._distances(a, rooted)
        other_up = self._distances(b, rooted)
        shared = [synset for synset in up if synset in other_up]
        if not shared:
            return 0.0
        lowest = max(self._depth(synset, min) for synset in shared)
        candidates = sorted(
            (synset for synset in shared if self._depth(synset, min) == lowest), key=self._name
        )
        subsumer = a if a in candidates else candidates[0]
        depth = self._depth(subsumer, max) + 1
        from_subsumer = {ROOT: 0} if subsumer == ROOT else self._distances(subsumer, rooted)
        length = sum(
            min(distances[one] + steps for one, steps in from_subsumer.items() if one in distances)
            for synset, distances in ((a, up), (b, other_up))
            if synset != subsumer
        )
        return 2 * depth / (length + 2 * depth)

    def _distances(self, synset: Synset, rooted: bool) -> dict[Synset, int]:
        """Steps up to every ancestor, itself included; the root's is one more than the
        furthest's.
        """
        found = {}
        waiting = deque([(synset, 0)])
        while waiting:
            one, distance = waiting.popleft()
            if one not in found:
                found[one] = distance
                waiting.extend((other, distance + 1) for other in self.above(one))
        return found | ({ROOT: max(found.values()) + 1} if rooted else {})

    def _depth(self, synset: Synset, among) -> int:
        return (
            1 + among(self._depth(one, among) for one in self.above(synset))
            if self.above(synset)
            else 0
        )

    def above(self, synset: Synset) -> tuple[Synset, ...]:
        """Its hypernyms, and the classes that it is an instance of."""
        if synset not in self._above:
            fields = self._fields(synset)
            start = 5 + 2 * int(fields[3], 16)
            pointers = [
                fields[start + 4 * k : start + 4 * k + 4] for k in range(int(fields[start - 1]))
            ]
            self._above[synset] = tuple(
                Synset(kind, int(place))
                for symbol, place, kind, _ in pointers
                if symbol in ("@", "@i")
            )
        return self._above[synset]

    def _name(self, synset: Synset) -> str:
        """NLTK's name, by which it orders: "dog.n.01"."""
        if synset == ROOT:
            return "*ROOT*"
        fields = self._fields(synset)
        lemma = fields[4].split("(")[0].lower()
        return f"{lemma}.{fields[2]}.{self._index[synset.kind][lemma].index(synset.place) + 1:02}"

    def _fields(self, synset: Synset) -> list[str]:
        data = self._data[synset.kind]
        return data[synset.place : data.index(b"\n", synset.place)].decode().split()


def _read(folder: str, name: str) -> bytes:
    try:
        return Path(folder, name).read_bytes()
    except OSError as error:
        raise UserError(f"no WordNet file {str(Path(folder, name))!r}; {WHERE}") from error


def _lines(folder: str, name: str) -> list[str]:
    try:
        return _read(folder, name).decode().splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{Path(folder, name)}: not a file of WordNet") from error
