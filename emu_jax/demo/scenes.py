"""Scenes of a few drawings, with some combinations held out to test understanding.

An image is a grid of 2 x 2 cells on a plain background, with drawings slightly off the centres of
their cells, and has exactly one right caption. There are three kinds: counts ("three cats on
blue"), spatial ("a cat left of a pig on green"), and stories ("one cat on blue", "a pig comes",
"the cat leaves", each with an image). Every number, drawing, relation and background of a held-out
scene occurs in training in other combinations. Read next: openmoji.py, which draws and writes them.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import permutations, product
from typing import Any

import numpy as np
from jaxtyping import UInt8

# Word in the captions -> name of the drawing. The drawings differ in colour and outline even at 26
# pixels, and the words have regular plurals. 28 drawings give 1,512 spatial triples. With 16
# drawings (480 triples) a small Emu memorised the triples it had seen, and described unseen ones
# with the two drawings swapped.
DRAWINGS = {
    "cat": "cat face",
    "pig": "pig face",
    "frog": "frog",
    "bear": "bear",
    "whale": "whale",
    "car": "automobile",
    "tree": "evergreen tree",
    "star": "star",
    "heart": "red heart",
    "ball": "soccer ball",
    "house": "house",
    "hat": "top hat",
    "robot": "robot",
    "penguin": "penguin",
    "shirt": "t-shirt",
    "umbrella": "umbrella",
    "apple": "red apple",
    "banana": "banana",
    "bee": "honeybee",
    "cactus": "cactus",
    "carrot": "carrot",
    "crown": "crown",
    "guitar": "guitar",
    "key": "key",
    "mushroom": "mushroom",
    "owl": "owl",
    "rocket": "rocket",
    "snail": "snail",
}
# The colours are pale, so that every drawing stands out, and differ by more than 30 levels in some
# channel, so that a linear readout can distinguish them.
BACKGROUNDS = {
    "blue": (186, 220, 255),
    "green": (204, 240, 196),
    "yellow": (255, 246, 178),
    "pink": (255, 208, 224),
}
NUMBERS = ("one", "two", "three", "four")
RELATIONS = ("left of", "above")

# How often each combination is rendered in the (training, held-out) split. Renders differ in
# placement, jitter and, if the caption does not fix it, background. There are 1416 x 2 spatial
# scenes, 424 x 2 counts and 736 x 1 stories to train on, which is as much as the demo's time
# allows, and 96 x 2, 24 x 2 and 20 x 2 held-out ones.
RENDERS = {"counts": (2, 2), "spatial": (2, 2), "stories": (1, 2)}
# Number of held-out combinations.
HELD_OUT = {"counts": 24, "spatial": 96, "stories": 20}

Pixels = UInt8[np.ndarray, "h w 3"]
# RGBA, cropped to the drawing; both sides are at most `drawing_size`.
Drawing = UInt8[np.ndarray, "h w 4"]
# A cell of the grid: (row, column).
Cell = tuple[int, int]


@dataclass(frozen=True)
class Scene:
    """Texts and images in order; `layout` says how they become a document's parts.

    data/sources/records.py explains the letters of `layout`. roles: those of the parts, if this is
    a conversation.
    """

    id: str
    kind: str
    combination: str
    layout: str
    texts: tuple[str, ...]
    images: tuple[Pixels, ...]
    roles: tuple[str, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)


def drawing_size(image: int) -> int:
    """Side of the square that a drawing fits in: 26 of a cell's 32 pixels.

    The rest of the cell is room for jitter, so that a drawing never reaches into another cell.
    """
    return image // 2 * 13 // 16


def scenes(
    kind: str, held_out: bool, seed: int, image: int, draw: Callable[[str], Drawing]
) -> Iterator[Scene]:
    """Yield the scenes of one kind and split, in a fixed order.

    draw: returns the drawing of a word in DRAWINGS. The random choices in a scene depend only on
    the seed and its id, and not on which other scenes are made.
    """
    compose = {"counts": _count, "spatial": _spatial, "stories": _story}[kind]
    renders = RENDERS[kind][held_out]
    for words in combinations(kind, seed)[held_out]:
        combination = " ".join(words)
        for render in range(renders):
            id = f"{kind}/{combination}/{render}"
            rng = np.random.default_rng([seed, zlib.crc32(id.encode())])
            layout, texts, images = compose(words, render, image, draw, rng)
            yield Scene(id, kind, combination, layout, tuple(texts), tuple(images))


def combinations(kind: str, seed: int) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """(for training, held out): the words of each combination; `seed` decides the split."""
    every: list[tuple[str, ...]]
    if kind == "counts":
        every = list(product(NUMBERS, DRAWINGS, BACKGROUNDS))
        # Combinations with "one" are not held out, because the first images of stories show them.
        free = [words for words in every if words[0] != "one"]
    elif kind == "spatial":
        pairs = permutations(DRAWINGS, 2)
        every = free = [(a, relation, b) for a, b in pairs for relation in RELATIONS]
    else:
        every = free = list(permutations(DRAWINGS, 2))
    rng = np.random.default_rng([seed, zlib.crc32(kind.encode())])
    chosen = {free[i] for i in rng.permutation(len(free))[: HELD_OUT[kind]]}
    train = [words for words in every if words not in chosen]
    held_out = [words for words in every if words in chosen]
    return train, held_out


def _count(words, render, image, draw, rng):
    number, word, background = words
    cells = _cells(rng)[: NUMBERS.index(number) + 1]
    placed = [(word, cell) for cell in cells]
    caption = _how_many(number, word, background)
    return "P", [caption], [_paint(image, background, placed, draw, rng)]


def _spatial(words, render, image, draw, rng):
    first, relation, second = words
    background = _turn(words, render)
    row, column = _cells(rng)[0]
    cells = [(row, 0), (row, 1)] if relation == "left of" else [(0, column), (1, column)]
    caption = f"{a(first)} {relation} {a(second)} on {background}"
    placed = list(zip((first, second), cells, strict=True))
    return "P", [caption], [_paint(image, background, placed, draw, rng)]


def _story(words, render, image, draw, rng):
    first, second = words
    background = _turn(words, render)
    row, column = _cells(rng)[0]
    # The two are placed diagonally: side by side or one above the other, they would show a spatial
    # triple that may be held out.
    here = (first, (row, column))
    there = (second, (1 - row, 1 - column))
    texts = [_how_many("one", first, background), f"{a(second)} comes"]
    steps = [[here], [here, there]]
    # Either the first leaves, or the second, or neither.
    leaving = rng.integers(3)
    if leaving < 2:
        texts.append(f"the {words[leaving]} leaves")
        steps.append([(there, here)[leaving]])
    # Each drawing has one jitter, so that what stays does not move.
    shift = {place: _shift(image, rng) for place in (here, there)}
    images = [_paint(image, background, step, draw, rng, shift) for step in steps]
    # With the image first, the model learns to describe; with the text first, to imagine.
    order = "IT" if (render + zlib.crc32(second.encode())) % 2 else "TI"
    return order * len(images), texts, images


def _paint(image, background, placed, draw, rng, shift=None) -> Pixels:
    """Paint the drawings `placed`, (word, cell) pairs, on a background.

    shift: the jitter of each pair; None: draw one at random.
    """
    canvas = np.empty((image, image, 3), np.float32)
    canvas[:] = BACKGROUNDS[background]
    cell = image // 2
    for word, (row, column) in placed:
        drawing = draw(word)
        h, w = drawing.shape[:2]
        dy, dx = shift[word, (row, column)] if shift else _shift(image, rng)
        y = row * cell + (cell - h) // 2 + dy
        x = column * cell + (cell - w) // 2 + dx
        alpha = drawing[..., 3:] / np.float32(255)
        spot = canvas[y : y + h, x : x + w]
        # `spot` is a view of the canvas, so this paints on the canvas.
        spot += alpha * (drawing[..., :3] - spot)
    return canvas.round().astype(np.uint8)


def _shift(image, rng):
    """A random jitter in rows and columns, within the room around a drawing (3 pixels)."""
    room = (image // 2 - drawing_size(image)) // 2
    return rng.integers(-room, room + 1, 2)


def _cells(rng) -> list[Cell]:
    """The four cells in random order."""
    cells = [(0, 0), (0, 1), (1, 0), (1, 1)]
    return [cells[i] for i in rng.permutation(4)]


def _turn(words, render) -> str:
    """The background of a render; the renders of a combination cycle through them."""
    first = zlib.crc32(" ".join(words).encode())
    return list(BACKGROUNDS)[(first + render) % len(BACKGROUNDS)]


def _how_many(number, word, background) -> str:
    return f"{number} {word}{'s' * (number != 'one')} on {background}"


def a(word: str) -> str:
    """The word with its article: "a cat", "an owl"."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
