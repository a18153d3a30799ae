"""What the demo's model has learnt, in numbers: does it name drawings, draw from names, and
describe scenes it has never seen?

Single names test memory: a name that was held out cannot be guessed. Scenes of held-out
combinations test understanding; beside them stands what needs none, the caption of the nearest
training scene in pixels. Read next: drawings.py, report.py.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int, UInt8
from tqdm import tqdm

from emu_jax import checkpoint, tree
from emu_jax.config import UserError, from_dict
from emu_jax.data import sources
from emu_jax.data import tokenizer as tokenizers
from emu_jax.data.sequence import Pair
from emu_jax.data.sources import Source
from emu_jax.demo import drawings, history
from emu_jax.demo.history import Number
from emu_jax.generate import diffusion_decoder
from emu_jax.generate.generation_config import GenerationConfig
from emu_jax.generate.session import Parts, Session
from emu_jax.models import emu, module

# images or prompts at once
BATCH = 128
# of a caption; the longest name has 15
NEW_TOKENS = 24
# drawings of the examples in context
IN_CONTEXT = 400
# elements of a prompt and its answer: more than any has here
LONGEST = 1024
TOP = 5
ENCODER = ("vision", "ln_visual", "resampler")


class Told(NamedTuple):
    """An image, its true caption, the model's, and that of the nearest training image (None where
    that is not asked).
    """

    id: str
    image: UInt8[np.ndarray, "h w 3"]
    true: str
    said: str
    nearest: str | None = None


class Drawn(NamedTuple):
    """A name, and the drawings whose visual tokens are nearest to those regressed from it: (name,
    image), the nearest first.
    """

    name: str
    held_out: bool
    # of the right drawing; 0 is the nearest
    rank: int
    found: list[tuple[str, UInt8[np.ndarray, "h w 3"]]]


class Target(NamedTuple):
    what: str
    # None: not measured
    value: Number | None
    bound: str
    reached: bool | None


@dataclass(frozen=True)
class Result:
    config: dict[str, Any]
    # shares are 0 to 1
    numbers: dict[str, Number]
    targets: list[Target]
    # by group: names_train, names_held_out, scenes_held_out
    captions: dict[str, list[Told]]
    drawn: list[Drawn]
    # the images of each held-out story that is told image by image
    stories: list[list[Told]]
    # training drawings: some with their names, and one that the model names after them
    in_context: list[list[Told]]
    # by group, as captions; {} without a decoder
    pictures: dict[str, list[drawings.Picture]]
    blends: list[drawings.Blend]
    # metrics.jsonl of the run, of its warm-up, and of the decoder
    lines: list[history.Line]
    warmup_lines: list[history.Line]
    decoder_lines: list[history.Line]


class Model:
    """A trained Emu, asked many things of one kind at once."""

    def __init__(
        self, model_config: emu.EmuConfig, params: tree.Tree, tokenizer: tokenizers.Tokenizer
    ):
        self.model_config = model_config
        self.params = jax.tree.map(jax.numpy.asarray, params)
        self.tokenizer = tokenizer
        self.session = Session(model_config, self.params, tokenizer, context=LONGEST, batch=BATCH)

    def encode(self, images: UInt8[np.ndarray, "M h w 3"]) -> Float[np.ndarray, "M N D"]:
        """Visual tokens as the LLM gets them."""
        return self.session.encode_images(images, "encoding")

    def caption(self, images: UInt8[np.ndarray, "M h w 3"]) -> list[str]:
        return self.continue_([(image,) for image in images], "captions")

    def draw(self, names: list[str]) -> Float[np.ndarray, "M N D"]:
        """The visual tokens regressed from `<s> name [IMG]`, each fed back."""
        return self.session.generate_images([[name] for name in names], progress="drawing")

    def continue_(self, prompts: Sequence[Parts], progress: str = "stories") -> list[str]:
        """What follows texts and images, greedily."""
        return [
            plain(said)
            for said in self.session.generate_texts(
                prompts, GenerationConfig(max_new_tokens=NEW_TOKENS), progress=progress
            )
        ]


def evaluate(
    directory: str, data: str, warmup: str | None = None, decoder: str | None = None
) -> Result:
    """All numbers of the run in `directory` (a workdir or one of its checkpoints) on the demo's
    data in `data`.

    warmup: the run its encoder comes from; None: where the run's config says it started, if that is
    still there. decoder: the run that learnt to draw its visual tokens; None: no pictures are
    drawn. Raises UserError for a checkpoint or data that is missing or of another kind.
    """
    config = checkpoint.read_config(directory)
    if config["stage"] != "emu":
        raise UserError(
            f"the checkpoint in '{directory}' is of the stage {config['stage']!r}; the demo is evaluated on one of 'emu'"
        )
    model_config = emu.EmuConfig.of(from_dict(config["model"]).to_dict())
    names, held_out, seen, scenes, stories = (
        sources.open_source(f"{data}/{split}", model_config.vision.image)
        for split in (
            "names:train",
            "names:held_out",
            "scenes:train",
            "scenes:held_out",
            "stories:held_out",
        )
    )
    tokenizer = tokenizers.load(f"{data}/tokenizer.json", model_config.llama.vocab)
    if warmup is None and config["init"] and Path(config["init"], "checkpoints").is_dir():
        warmup = config["init"]
    params = checkpoint.restore_params(directory, ema=config["optim"]["ema"] > 0)
    model = Model(model_config, params, tokenizer)
    before = (
        checkpoint.restore_params(warmup, {tower: params[tower] for tower in ENCODER})
        if warmup
        else None
    )
    lines, warmup_lines, decoder_lines = (
        history.read(run) if run else [] for run in (directory, warmup, decoder)
    )
    paint = (
        diffusion_decoder.load(
            decoder, model_config, empty_prompt=lambda: model.session.generate_images([[]])[0]
        )
        if decoder
        else None
    )

    captions = _captions(
        model,
        {
            "names_train": (names, None),
            "names_held_out": (held_out, names),
            "scenes_held_out": (scenes, seen),
        },
    )
    named = captions["names_train"] + captions["names_held_out"]
    visual = model.encode(np.stack([told.image for told in named]))
    drawn, numbers = _retrieval(
        named, len(names), visual, model.draw([told.true for told in named])
    )
    told = _stories(model, stories)
    in_context = _in_context(model, captions["names_train"])
    numbers |= (
        _numbers(captions)
        | _story_numbers(told)
        | _in_context_numbers(in_context)
        | history.variance(lines)
    )
    numbers |= {"visual_rank": effective_rank(visual)} | _raw_variance(
        model, before, visual, np.stack([told.image for told in named])
    )
    pictures, blends = _pictures(model, paint, captions) if paint else ({}, [])
    for group, some in pictures.items():
        numbers |= drawings.numbers(group, some)
    numbers |= {f"speed/{name}": value for name, value in history.speed(lines).items()}
    numbers |= {
        f"warmup_speed/{name}": value for name, value in history.speed(warmup_lines).items()
    }
    numbers |= {
        f"decoder_speed/{name}": value for name, value in history.speed(decoder_lines).items()
    }
    return Result(
        config,
        numbers,
        targets(numbers),
        captions,
        drawn,
        told,
        in_context,
        pictures,
        blends,
        lines,
        warmup_lines,
        decoder_lines,
    )


def targets(numbers: dict[str, Number]) -> list[Target]:
    """What the demo is to reach, and whether it did."""

    def target(what, name, bound, reached):
        value = numbers.get(name)
        return Target(what, value, bound, None if value is None else bool(reached(value)))

    nearest = numbers["scenes_held_out_nearest_exact"]
    return [
        target("training names told exactly", "names_train_exact", "≥ 80 %", lambda x: x >= 0.8),
        target(
            "name → its drawing among the five nearest",
            "retrieval_top5",
            "≥ 60 %",
            lambda x: x >= 0.6,
        ),
        target(
            "scenes of held-out combinations told exactly",
            "scenes_held_out_exact",
            "≥ 50 %",
            lambda x: x >= 0.5,
        ),
        target(
            "… and against the nearest training scene's caption",
            "scenes_held_out_exact",
            f"≥ 2 × {100 * nearest:.1f} %",
            lambda x: x >= 2 * nearest and x > 0,
        ),
        target(
            "picture of a drawing's visual tokens → the drawing among the five nearest of 200",
            "pictures_names_train_encoded_top5",
            "≥ 75 %",
            lambda x: x >= 0.75,
        ),
        target(
            "picture of a drawing's name → the drawing among the five nearest of 200",
            "pictures_names_train_regressed_top5",
            "≥ 55 %",
            lambda x: x >= 0.55,
        ),
        target(
            "least variance of the visual tokens in the run, of the first step's",
            "visual_variance_ratio",
            "≥ 10 %",
            lambda x: x >= 0.1,
        ),
        target(
            "… before standardising, at the end, of the warm-up's",
            "raw_variance_ratio",
            "≥ 10 %",
            lambda x: x >= 0.1,
        ),
        target(
            "share of the time that waits for data",
            "speed/input_wait_share",
            "< 2 %",
            lambda x: x < 0.02,
        ),
    ]


# --- scores of texts ---


def plain(caption: str) -> str:
    """With single spaces."""
    return " ".join(caption.split())


def f1(true: str, said: str) -> float:
    """Harmonic mean of precision and recall of the words, each counted as often as it occurs; their
    order does not matter.
    """
    a = Counter(true.split())
    b = Counter(said.split())
    return 2 * (a & b).total() / (a.total() + b.total()) if a or b else 1.0


def facts(caption: str) -> dict[str, str]:
    """What a scene's caption says by role: number, or relation and second drawing; first drawing,
    background. {} for another text.
    """
    drawing = r"an? (?P<{}>\w+)"
    for pattern in (
        r"(?P<number>one|two|three|four) (?P<first>\w+?)s? on (?P<background>\w+)",
        drawing.format("first")
        + r" (?P<relation>left of|above) "
        + drawing.format("second")
        + r" on (?P<background>\w+)",
    ):
        if match := re.fullmatch(pattern, caption):
            return match.groupdict()
    return {}


def facts_right(true: str, said: str) -> float:
    """Share of the facts of a scene's true caption that the other caption has too, each in its
    role.
    """
    right = facts(true)
    given = facts(said)
    return sum(given.get(role) == word for role, word in right.items()) / len(right)


def swapped(true: str, said: str) -> bool:
    """Does a spatial caption name the right two drawings in each other's place?"""
    a = facts(true)
    b = facts(said)
    return "second" in a and (a["first"], a["second"]) == (b.get("second"), b.get("first"))


# --- scores of visual tokens ---


def ranks(distances: Float[np.ndarray, "Q K"], right: Int[np.ndarray, "Q"]) -> Int[np.ndarray, "Q"]:
    """How many others are as near as, or nearer than, the right one: tokens that have collapsed to
    one point are found last, not first.
    """
    return (distances <= distances[np.arange(len(right)), right][:, None]).sum(1) - 1


def squared_distances(
    a: Float[np.ndarray, "Q n"], b: Float[np.ndarray, "K n"]
) -> Float[np.ndarray, "Q K"]:
    # a small number is not the difference of two large ones then
    centre = b.mean(0)
    a = a - centre
    b = b - centre
    return np.square(a).sum(1)[:, None] - 2 * a @ b.T + np.square(b).sum(1)


def r2(true: Float[np.ndarray, "M N D"], given: Float[np.ndarray, "M N D"]) -> float:
    """1 - squared error / squared distance to the mean: 1 is perfect, 0 no better than the mean of
    all, and it may be below. 0 where all are the same: then there is nothing to foretell.
    """
    total = np.square(true - true.mean(0)).sum()
    return float(1 - np.square(true - given).sum() / total) if total else 0.0


def effective_rank(z: Float[np.ndarray, "M N D"]) -> float:
    """(sum of the covariance's eigenvalues)^2 / sum of their squares: about how many directions the
    visual tokens use.
    """
    z = rearrange(z, "M N D -> M (N D)").astype(np.float64)
    values = np.linalg.eigvalsh(np.cov(z, rowvar=False))
    return float(values.sum() ** 2 / np.maximum(np.square(values).sum(), 1e-30))


def nearest(
    images: UInt8[np.ndarray, "Q h w 3"], among: UInt8[np.ndarray, "K h w 3"]
) -> Int[np.ndarray, "Q"]:
    """Of each image, the one among `among` with the least squared difference of the pixels."""

    def flat(x):
        return rearrange(x, "M h w c -> M (h w c)").astype(np.float32) / 255

    return squared_distances(flat(images), flat(among)).argmin(1)


# --- the parts ---


def _captions(
    model: Model, groups: dict[str, tuple[Source, Source | None]]
) -> dict[str, list[Told]]:
    """Each group's images told by the model and, where a second source is given, by the nearest
    image of it.
    """
    pairs = {name: _pairs(source) for name, (source, _) in groups.items()}
    every = [(pair.image, pair.text) for some in pairs.values() for _, pair in some]
    # A batch ends with its longest caption: those of about one length go together. Results do not
    # depend on it.
    order = sorted(range(len(every)), key=lambda i: len(model.tokenizer.encode(every[i][1])))
    said = dict(zip(order, model.caption(np.stack([every[i][0] for i in order])), strict=True))
    said = iter([said[i] for i in range(len(every))])
    captions = {}
    for name, (_, other) in groups.items():
        images = np.stack([pair.image for _, pair in pairs[name]])
        near: list[str | None] = [None] * len(images)
        if other is not None:
            known = _pairs(other)
            near = [
                plain(known[i][1].text)
                for i in nearest(images, np.stack([pair.image for _, pair in known]))
            ]
        captions[name] = [
            Told(id, pair.image, plain(pair.text), next(said), n)
            for (id, pair), n in zip(pairs[name], near, strict=True)
        ]
    return captions


def _pairs(source: Source) -> list[tuple[str, Pair]]:
    return [
        (document.id, document.parts[0]) for document in (source[i] for i in range(len(source)))
    ]


def _numbers(captions: dict[str, list[Told]]) -> dict[str, Number]:
    """Exact share and mean F1 of each group, for scenes also the right facts, and by kind; the same
    of the nearest images' captions.
    """
    scenes = captions["scenes_held_out"]
    kinds = {
        f"scenes_held_out_{kind}": [told for told in scenes if told.id.startswith(f"{kind}/")]
        for kind in ("counts", "spatial")
    }
    numbers: dict[str, Number] = {}
    for group, some in (captions | kinds).items():
        numbers[f"{group}_count"] = len(some)
        for who, said in (("", lambda told: told.said), ("nearest_", lambda told: told.nearest)):
            if not some or said(some[0]) is None:
                continue

            def mean(score):
                return float(np.mean([score(told.true, said(told)) for told in some]))

            numbers |= {f"{group}_{who}exact": mean(str.__eq__), f"{group}_{who}f1": mean(f1)}
            if group.startswith("scenes"):
                numbers[f"{group}_{who}facts"] = mean(facts_right)
    if spatial := kinds["scenes_held_out_spatial"]:
        numbers["scenes_held_out_spatial_swapped"] = float(
            np.mean([swapped(told.true, told.said) for told in spatial])
        )
    return numbers


def _retrieval(
    drawings: list[Told],
    trained: int,
    visual: Float[np.ndarray, "M N D"],
    regressed: Float[np.ndarray, "M N D"],
) -> tuple[list[Drawn], dict[str, Number]]:
    """Names to drawings by their visual tokens, among all; the first `trained` drawings were seen
    in training.
    """

    def flat(z):
        return rearrange(z, "M N D -> M (N D)")

    distances = squared_distances(flat(regressed), flat(visual))
    rank = ranks(distances, np.arange(len(drawings)))
    best = np.argsort(distances, 1)[:, :TOP]
    drawn = [
        Drawn(
            told.true,
            i >= trained,
            int(rank[i]),
            [(drawings[j].true, drawings[j].image) for j in best[i]],
        )
        for i, told in enumerate(drawings)
    ]
    numbers: dict[str, Number] = {"retrieval_among": len(drawings)}
    for suffix, part in (("", slice(trained)), ("_held_out", slice(trained, None))):
        numbers |= {
            f"retrieval{suffix}_top1": float((rank[part] < 1).mean()),
            f"retrieval{suffix}_top5": float((rank[part] < TOP).mean()),
            f"free_run_r2{suffix}": r2(visual[part], regressed[part]),
        }
    return drawn, numbers


def _stories(model: Model, source: Source) -> list[list[Told]]:
    """Of the stories in which an image comes before its sentence: each sentence, told from all that
    is before it.

    What follows the sentence is not judged, and cut off: nothing teaches the model where a sentence
    inside a story ends.
    """
    stories = [
        story
        for story in (source[i] for i in range(len(source)))
        if isinstance(story.parts[0], np.ndarray)
    ]
    places = [(story, at) for story in stories for at in range(1, len(story.parts), 2)]
    if not places:
        return []
    said = model.continue_([story.parts[:at] for story, at in places])
    told = [
        Told(
            story.id,
            story.parts[at - 1],
            plain(story.parts[at]),
            " ".join(words.split()[: len(story.parts[at].split())]),
        )
        for (story, at), words in zip(places, said, strict=True)
    ]
    return [[sentence for sentence in told if sentence.id == story.id] for story in stories]


def _story_numbers(stories: list[list[Told]]) -> dict[str, Number]:
    sentences = [told for story in stories for told in story]
    return (
        {
            "stories_held_out_count": len(sentences),
            "stories_held_out_exact": float(
                np.mean([told.true == told.said for told in sentences])
            ),
        }
        if sentences
        else {}
    )


def _in_context(model: Model, drawings: list[Told]) -> list[list[Told]]:
    """Drawings by fours: three with their names, and a fourth that the model names after having
    read them.
    """
    fours = [
        drawings[start : start + 4] for start in range(0, min(len(drawings), IN_CONTEXT) - 3, 4)
    ]
    said = model.continue_(
        [
            [*(part for told in four[:3] for part in (told.image, told.true)), four[3].image]
            for four in fours
        ],
        "in context",
    )
    return [
        [*four[:3], four[3]._replace(said=words)] for four, words in zip(fours, said, strict=True)
    ]


def _in_context_numbers(fours: list[list[Told]]) -> dict[str, Number]:
    return (
        {
            "in_context_count": len(fours),
            "in_context_exact": float(np.mean([four[3].true == four[3].said for four in fours])),
        }
        if fours
        else {}
    )


def _pictures(
    model: Model, paint: diffusion_decoder.DiffusionDecoder, captions: dict[str, list[Told]]
) -> tuple[dict[str, list[drawings.Picture]], list[drawings.Blend]]:
    """Of each group's first images, and blends of the training drawings'."""
    parts = {
        group: ([told.true for told in some], np.stack([told.image for told in some]))
        for group, some in captions.items()
    }
    return (
        {group: drawings.pictures(model.session, paint, *part) for group, part in parts.items()},
        drawings.blends(model.session, paint, *parts["names_train"]),
    )


def _raw_variance(
    model: Model,
    before: tree.Tree | None,
    visual: Float[np.ndarray, "M N D"],
    images: UInt8[np.ndarray, "M h w 3"],
) -> dict[str, Number]:
    """Variance of the drawings' visual tokens before they are standardised, and its share of what
    the encoder `before` gives them.
    """
    std = np.asarray(model.params["visual_stats"]["std"]) if model.model_config.standardise else 1.0

    def spread(z):
        return float(z.var(0, dtype=np.float64).mean())

    numbers = {"raw_variance": spread(visual * std)}
    if before is None:
        return numbers
    call = jax.jit(
        lambda params, images: (
            module.bind(emu.Encoder, model.model_config, params).encode(images).astype(np.float32)
        )
    )
    numbers["raw_variance_warmup"] = spread(
        _batched("the warm-up's encoder", partial(call, before), images)
    )
    return numbers | {
        "raw_variance_ratio": numbers["raw_variance"] / numbers["raw_variance_warmup"]
    }


def _batched(what: str, call: Callable[..., Array], *arrays: np.ndarray) -> np.ndarray:
    """call(*rows) in batches of one shape, the last filled up with copies of its last row."""
    count = len(arrays[0])
    size = min(BATCH, count)
    parts = []
    for start in tqdm(range(0, count, size), what, unit=" batches", disable=None):
        rows = np.minimum(np.arange(start, start + size), count - 1)
        parts.append(np.asarray(call(*(array[rows] for array in arrays))))
    return np.concatenate(parts)[:count]
