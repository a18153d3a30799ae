"""Captions that the demo's model writes: of drawings, scenes and stories, and in context.

The baseline of a caption is that of the nearest training image in pixels. Read next: scores.py,
evaluation.py.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from emu_jax.data.documents import pixels_of, texts_of
from emu_jax.data.sources import Source
from emu_jax.demo import scores
from emu_jax.demo.history import Number
from emu_jax.demo.model import Model
from emu_jax.demo.scores import plain
from emu_jax.generate.processor import Parts

# Number of training drawings that the examples in context are taken from.
IN_CONTEXT = 400

Pixels = UInt8[np.ndarray, "h w 3"]


class Captioned(NamedTuple):
    """An image with its true and its predicted caption.

    nearest: the caption of the nearest training image in pixels, if that is the baseline.
    """

    id: str
    image: Pixels
    true: str
    predicted: str
    nearest: str | None = None


def caption_groups(
    model: Model, groups: dict[str, tuple[Source, Source | None]]
) -> dict[str, list[Captioned]]:
    """Caption every image of each group's first source.

    The second source of a group, if not None, has the images that the baseline searches for the
    nearest in pixels.
    """
    pairs = {name: _pairs(source) for name, (source, _) in groups.items()}
    every = [pair for some in pairs.values() for pair in some]
    # A batch takes as long as its longest caption, so captions of similar length are put together.
    # The results do not depend on this order.
    order = sorted(range(len(every)), key=lambda i: len(model.tokenizer.encode(every[i].caption)))
    texts = model.caption(np.stack([every[i].image for i in order]))
    by_index = dict(zip(order, texts, strict=True))
    predicted = iter([by_index[i] for i in range(len(every))])
    captions = {}
    for name, (_, baseline) in groups.items():
        nearest: list[str | None] = [None] * len(pairs[name])
        if baseline is not None:
            known = _pairs(baseline)
            images = np.stack([pair.image for pair in pairs[name]])
            found = scores.nearest(images, np.stack([pair.image for pair in known]))
            nearest = [known[i].caption for i in found]
        captions[name] = [
            Captioned(pair.id, pair.image, pair.caption, next(predicted), near)
            for pair, near in zip(pairs[name], nearest, strict=True)
        ]
    return captions


class _Pair(NamedTuple):
    id: str
    image: Pixels
    caption: str


def _pairs(source: Source) -> list[_Pair]:
    """The images and captions of a source whose documents are one captioned image each."""
    pairs = []
    for document in (source[i] for i in range(len(source))):
        (image,) = pixels_of(document)
        (text,) = texts_of(document)
        pairs.append(_Pair(document.id, image, plain(text.text)))
    return pairs


def caption_numbers(captions: dict[str, list[Captioned]]) -> dict[str, Number]:
    """The shares of exact matches and the mean F1 of each group.

    For scenes also the share of right facts, and all scores by kind; for groups with a baseline
    also the scores of the baseline.
    """
    scenes = captions["scenes_held_out"]
    groups = dict(captions)
    for kind in ("counts", "spatial"):
        of_kind = [one for one in scenes if one.id.startswith(f"{kind}/")]
        groups[f"scenes_held_out_{kind}"] = of_kind
    numbers: dict[str, Number] = {}
    for group, some in groups.items():
        numbers[f"{group}_count"] = len(some)
        if not some:
            continue
        true = [one.true for one in some]
        numbers |= _scores(group, true, [one.predicted for one in some])
        nearest = [one.nearest for one in some if one.nearest is not None]
        if nearest:
            numbers |= _scores(f"{group}_nearest", true, nearest)
    if spatial := groups["scenes_held_out_spatial"]:
        swapped = [scores.swapped(one.true, one.predicted) for one in spatial]
        numbers["scenes_held_out_spatial_swapped"] = float(np.mean(swapped))
    return numbers


def _scores(prefix: str, true: list[str], predicted: list[str]) -> dict[str, Number]:
    metrics = {"exact": str.__eq__, "f1": scores.f1}
    if prefix.startswith("scenes"):
        metrics["facts"] = scores.facts_right
    return {
        f"{prefix}_{name}": float(np.mean(list(map(metric, true, predicted))))
        for name, metric in metrics.items()
    }


def exact_numbers(prefix: str, captions: list[Captioned]) -> dict[str, Number]:
    """The number of captions and the share of exact matches; {} without captions."""
    if not captions:
        return {}
    exact = float(np.mean([one.true == one.predicted for one in captions]))
    return {f"{prefix}_count": len(captions), f"{prefix}_exact": exact}


def caption_stories(model: Model, source: Source) -> list[list[Captioned]]:
    """Predict each sentence of those stories in which images come before their sentences.

    The prompt is everything before the sentence. The prediction is cut to the length of the true
    sentence, because training does not teach the model where a sentence inside a story ends.
    """
    prompts: list[Parts] = []
    sentences: list[Captioned] = []
    for story in (source[i] for i in range(len(source))):
        if not isinstance(story.parts[0], np.ndarray):
            continue
        prompt: list[str | np.ndarray] = []
        for image, text in zip(pixels_of(story), texts_of(story), strict=True):
            prompts.append([*prompt, image])
            sentences.append(Captioned(story.id, image, plain(text.text), ""))
            prompt += [image, text.text]
    if not prompts:
        return []
    stories: dict[str, list[Captioned]] = {}
    for sentence, text in zip(sentences, model.complete(prompts), strict=True):
        cut = " ".join(text.split()[: len(sentence.true.split())])
        stories.setdefault(sentence.id, []).append(sentence._replace(predicted=cut))
    return list(stories.values())


def name_in_context(model: Model, drawings: list[Captioned]) -> list[list[Captioned]]:
    """Let the model name every fourth drawing after it has read three with their names."""
    count = min(len(drawings), IN_CONTEXT)
    fours = [drawings[start : start + 4] for start in range(0, count - 3, 4)]
    prompts = []
    for four in fours:
        given = [part for one in four[:3] for part in (one.image, one.true)]
        prompts.append([*given, four[3].image])
    names = model.complete(prompts, "in context")
    return [
        [*four[:3], four[3]._replace(predicted=name)]
        for four, name in zip(fours, names, strict=True)
    ]
