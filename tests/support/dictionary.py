"""A dictionary of 25 synsets in the format of WordNet's files (wndb(5WN))."""

from pathlib import Path

# (part of speech, lemmas, first lemma of each hypernym). A lemma's senses are in this order.
SYNSETS = (
    ("n", "entity", ()),
    ("n", "object physical_object", ("entity",)),
    ("n", "animal beast", ("object",)),
    ("n", "artifact", ("object",)),
    ("n", "pet", ("object",)),
    ("n", "canine", ("animal",)),
    ("n", "feline", ("animal",)),
    ("n", "dog domestic_dog", ("canine", "pet")),
    ("n", "puppy", ("dog",)),
    ("n", "cat", ("feline", "pet")),
    ("n", "mouse", ("animal",)),
    ("n", "furniture", ("artifact",)),
    ("n", "table", ("furniture",)),
    ("n", "child", ("animal",)),
    ("n", "box", ("artifact",)),
    ("n", "Lassie", ("@i dog",)),
    ("n", "run", ("artifact",)),
    ("v", "move", ()),
    ("v", "run", ("move",)),
    ("v", "walk", ("move",)),
    ("v", "chase", ("run",)),
    ("v", "eat", ()),
    ("a", "happy", ()),
    ("a", "big", ()),
    ("r", "quickly", ()),
)
EXCEPTIONS = {"n": "children child\nmice mouse\n", "v": "ate eat\nran run\n", "a": "", "r": ""}
NAMES = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}


def write(folder: Path) -> Path:
    """Write the files into `folder`, and return it."""
    folder.mkdir(exist_ok=True)
    licence = b"  1 This is a test's dictionary.\n"
    lines = {}
    # The first pass gives the lengths of the lines, which do not depend on the offsets in them.
    for _ in range(2):
        places = {}
        offset = dict.fromkeys(NAMES, len(licence))
        for kind, lemmas, _ in SYNSETS:
            places[kind, lemmas.split()[0].lower()] = offset[kind]
            offset[kind] += len(lines.get((kind, lemmas), b""))
        for kind, lemmas, above in SYNSETS:
            words = lemmas.split()
            pointers = [
                ("@i" if other.startswith("@i ") else "@", places[kind, other.removeprefix("@i ")])
                for other in above
            ]
            senses = " ".join(f"{word} 0" for word in words)
            text = (
                f"{places[kind, words[0].lower()]:08} 03 {kind} {len(words):02x} {senses} "
                f"{len(pointers):03} "
                + "".join(f"{symbol} {place:08} {kind} 0000 " for symbol, place in pointers)
                + ("01 + 02 00 " * (kind == "v"))
                + "| a gloss  \n"
            )
            lines[kind, lemmas] = text.encode()
    for kind, name in NAMES.items():
        mine = [(lemmas, line) for (k, lemmas), line in lines.items() if k == kind]
        (folder / f"data.{name}").write_bytes(licence + b"".join(line for _, line in mine))
        index = sorted(
            (word.lower(), int(line[:8])) for lemmas, line in mine for word in lemmas.split()
        )
        pointers = "1 @ " if kind in "nv" else "0 "
        (folder / f"index.{name}").write_text(
            licence.decode()
            + "".join(f"{word} {kind} 1 {pointers}1 1 {place:08}  \n" for word, place in index)
        )
        (folder / f"{name}.exc").write_text(EXCEPTIONS[kind])
    return folder
