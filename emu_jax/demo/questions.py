"""Questions about the demo's scenes, as conversations of two or three turns.

Kinds of questions: what ("what is this?"), number ("how many cats are there?"), animal ("which of
the two is an animal?"), relation ("what is left of the key?"), colour ("which colour is behind?")
and there ("is there an owl?"). A third turn asks what another image shows. Read next: openmoji.py,
which writes them.
"""

import zlib
from collections.abc import Iterable, Iterator
from itertools import cycle
from typing import NamedTuple

import numpy as np

from emu_jax.demo.scenes import BACKGROUNDS, DRAWINGS, Scene, a

ANIMALS = ("cat", "pig", "frog", "bear", "whale", "penguin", "bee", "owl", "snail")
# Share of the conversations that have a third turn, with another image.
MORE = 1 / 3


class Question(NamedTuple):
    kind: str
    question: str
    answer: str


def conversations(scenes: Iterable[Scene], seed: int) -> Iterator[Scene]:
    """Yield a conversation about each scene, in the order of the scenes.

    The random choices of a conversation depend only on the seed and the scene's id.
    """
    scenes = list(scenes)
    for scene in scenes:
        rng = np.random.default_rng([seed, zlib.crc32(f"questions/{scene.id}".encode())])
        found = questions(scene, rng)
        asked = [found[k] for k in rng.permutation(len(found))[:2]]
        texts = [text for one in asked for text in one[1:]]
        images = [scene.images[0]]
        layout = "ITTTT"
        if rng.random() < MORE:
            other = scenes[rng.integers(len(scenes))]
            asked.append(Question("what", "and what is this?", other.texts[0]))
            texts += asked[-1][1:]
            images.append(other.images[0])
            layout += "ITT"
        yield Scene(
            f"questions/{scene.id}",
            "questions",
            scene.combination,
            layout,
            tuple(texts),
            tuple(images),
            _roles(layout),
            {"kinds": [one.kind for one in asked]},
        )


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """All questions about one scene; `rng` chooses the drawing in "is there ...?"."""
    words = scene.combination.split()
    caption = scene.texts[0]
    background = scene.texts[0].rpartition(" ")[2]
    shown = [word for word in words if word in DRAWINGS]
    absent = [word for word in DRAWINGS if word not in shown]
    there = rng.random() < 0.5
    among = shown if there else absent
    asked = among[rng.integers(len(among))]
    found = [
        Question("what", "what is this?", caption),
        Question("colour", "which colour is behind?", background),
        Question("there", f"is there {a(asked)}?", "yes" if there else "no"),
    ]
    assert background in BACKGROUNDS
    if scene.kind == "counts":
        return [*found, Question("number", f"how many {shown[0]}s are there?", words[0])]
    first, second = shown
    relation = caption.removeprefix(f"{a(first)} ").partition(f" {a(second)} on ")[0]
    found.append(Question("relation", f"what is {relation} the {second}?", a(first)))
    animals = [word for word in shown if word in ANIMALS]
    if len(animals) == 1:
        found.append(Question("animal", "which of the two is an animal?", f"the {animals[0]}"))
    return found


def _roles(layout: str) -> tuple[str, ...]:
    """The roles of a conversation's parts.

    Questions and answers alternate, and an image belongs to the question after it.
    """
    turns = cycle(("user", "assistant"))
    return tuple(next(turns) if letter == "T" else "user" for letter in layout)
