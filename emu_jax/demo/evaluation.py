"""What the demo's model has learnt: to name drawings, to draw, and to describe new scenes.

Single names test memory: a held-out name cannot be guessed. Scenes of held-out combinations test
understanding; their baseline is the caption of the nearest training scene in pixels. Read next:
scores.py, decoding.py, report.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, UInt8
from tqdm import tqdm

from emu_jax import checkpoint, tree
from emu_jax.config import UserError, from_dict
from emu_jax.data import sources
from emu_jax.data import tokenizer as tokenizers
from emu_jax.data.documents import pixels_of, texts_of
from emu_jax.data.sources import Source
from emu_jax.demo import decoding, history, scores
from emu_jax.demo.history import Number
from emu_jax.demo.scores import plain
from emu_jax.generate import diffusion_decoder
from emu_jax.generate.diffusion_decoder import DiffusionDecoder
from emu_jax.generate.generation_config import GenerationConfig
from emu_jax.generate.processor import Parts
from emu_jax.generate.session import Session
from emu_jax.models import emu, module

# Images or prompts in a batch.
BATCH = 128
# Of a caption; the longest name has 15.
NEW_TOKENS = 24
# Training drawings that the examples in context are taken from.
IN_CONTEXT = 400
# Elements of a prompt and its answer: more than any has here.
CONTEXT = 1024
# Drawings retrieved for a name.
TOP = 5
ENCODER = ("vision", "ln_visual", "resampler")

Pixels = UInt8[np.ndarray, "h w 3"]
Images = UInt8[np.ndarray, "M h w 3"]
Visual = Float[np.ndarray, "M N D"]


class Captioned(NamedTuple):
    """An image with its true and its predicted caption.

    nearest: the caption of the nearest training image in pixels, where that is the baseline.
    """

    id: str
    image: Pixels
    true: str
    predicted: str
    nearest: str | None = None


class Retrieved(NamedTuple):
    """The drawings whose visual tokens are nearest to those regressed from a name.

    rank: of the right drawing; 0 is the nearest. found: (name, image) of the nearest TOP.
    """

    name: str
    held_out: bool
    rank: int
    found: list[tuple[str, Pixels]]


class Target(NamedTuple):
    """A number that the demo should reach; value and reached are None if it was not measured."""

    what: str
    value: Number | None
    bound: str
    reached: bool | None


@dataclass(frozen=True)
class Result:
    """Everything the report shows; shares are between 0 and 1.

    captions, decoded: by group (names_train, names_held_out, scenes_held_out); decoded and blends
    are empty without a decoder. stories: held-out stories in which an image comes before its
    sentence. in_context: three drawings with their names, and a fourth that the model names.
    lines, warmup_lines, decoder_lines: metrics.jsonl of the runs.
    """

    config: dict[str, Any]
    numbers: dict[str, Number]
    targets: list[Target]
    captions: dict[str, list[Captioned]]
    retrieved: list[Retrieved]
    stories: list[list[Captioned]]
    in_context: list[list[Captioned]]
    decoded: dict[str, list[decoding.Decoded]]
    blends: list[decoding.Blend]
    lines: list[history.Line]
    warmup_lines: list[history.Line]
    decoder_lines: list[history.Line]


class Model:
    """A trained Emu that answers many prompts of one kind in batches."""

    def __init__(
        self, model_config: emu.EmuConfig, params: tree.Tree, tokenizer: tokenizers.Tokenizer
    ):
        self.model_config = model_config
        self.params = jax.tree.map(jax.numpy.asarray, params)
        self.tokenizer = tokenizer
        self.session = Session(model_config, self.params, tokenizer, context=CONTEXT, batch=BATCH)

    @classmethod
    def load(cls, directory: str, config: dict[str, Any], data: str) -> "Model":
        """Load the run in `directory`, with the tokenizer in `data`; config: its `read_config`."""
        model_config = emu.EmuConfig.of(from_dict(config["model"]).to_dict())
        tokenizer = tokenizers.load(f"{data}/tokenizer.json", model_config.llama.vocab)
        params = checkpoint.restore_params(directory, ema=config["optim"]["ema"] > 0)
        return cls(model_config, params, tokenizer)

    def load_decoder(self, directory: str) -> DiffusionDecoder:
        """Load the run that learnt to draw this model's visual tokens."""
        return diffusion_decoder.load(
            directory,
            self.model_config,
            empty_prompt=lambda: self.session.generate_images([[]])[0],
        )

    def encode(self, images: Images) -> Visual:
        """Visual tokens as the LLM gets them."""
        return self.session.encode_images(images, "encoding")

    def caption(self, images: Images) -> list[str]:
        return self.complete([(image,) for image in images], "captions")

    def regress(self, names: list[str]) -> Visual:
        """The visual tokens regressed from `<s> name [IMG]`, each fed back."""
        return self.session.generate_images([[name] for name in names], progress="regressing")

    def complete(self, prompts: Sequence[Parts], progress: str = "stories") -> list[str]:
        """Continue texts and images greedily."""
        config = GenerationConfig(max_new_tokens=NEW_TOKENS)
        texts = self.session.generate_texts(prompts, config, progress=progress)
        return [plain(text) for text in texts]


def read_config(directory: str) -> dict[str, Any]:
    """The config of a run or checkpoint; raises UserError if its stage is not `emu`."""
    config = checkpoint.read_config(directory)
    if config["stage"] != "emu":
        raise UserError(
            f"the checkpoint in '{directory}' is of the stage {config['stage']!r}; "
            "the demo is evaluated on one of 'emu'"
        )
    return config


def evaluate(
    directory: str, data: str, warmup: str | None = None, decoder: str | None = None
) -> Result:
    """All numbers of the run in `directory` (a workdir or one of its checkpoints).

    data: the folder that `build` wrote. warmup: the run that the encoder comes from; None: where
    the run's config says it started, if that is still there. decoder: the run that learnt to draw
    its visual tokens; None: nothing is decoded. Raises UserError for a checkpoint or data that is
    missing or of another kind.
    """
    config = read_config(directory)

    def source(split: str) -> Source:
        return sources.open_source(f"{data}/{split}", config["model"]["vision"]["image"])

    names = source("names:train")
    names_held_out = source("names:held_out")
    scenes = source("scenes:train")
    scenes_held_out = source("scenes:held_out")
    stories_held_out = source("stories:held_out")
    if warmup is None and config["init"] and Path(config["init"], "checkpoints").is_dir():
        warmup = config["init"]
    model = Model.load(directory, config, data)
    warmup_params = None
    if warmup:
        like = {tower: model.params[tower] for tower in ENCODER}
        warmup_params = checkpoint.restore_params(warmup, like)
    diffusion = model.load_decoder(decoder) if decoder else None
    lines = history.read(directory)
    warmup_lines = history.read(warmup) if warmup else []
    decoder_lines = history.read(decoder) if decoder else []

    captions = caption_groups(
        model,
        {
            "names_train": (names, None),
            "names_held_out": (names_held_out, names),
            "scenes_held_out": (scenes_held_out, scenes),
        },
    )
    drawings = captions["names_train"] + captions["names_held_out"]
    images = np.stack([drawing.image for drawing in drawings])
    visual = model.encode(images)
    regressed = model.regress([drawing.true for drawing in drawings])
    retrieved, numbers = retrieve(drawings, len(names), visual, regressed)
    stories = caption_stories(model, stories_held_out)
    in_context = name_in_context(model, captions["names_train"])
    numbers |= caption_numbers(captions)
    sentences = [sentence for story in stories for sentence in story]
    numbers |= _exact("stories_held_out", sentences)
    numbers |= _exact("in_context", [four[3] for four in in_context])
    numbers |= history.variance(lines)
    numbers["visual_rank"] = scores.effective_rank(visual)
    numbers |= raw_variance(model, warmup_params, visual, images)
    decoded = {}
    blends = []
    if diffusion:
        decoded, blends = _decode(model, diffusion, captions)
    for group, some in decoded.items():
        numbers |= decoding.retrieval_numbers(group, some)
    stages = {"speed": lines, "warmup_speed": warmup_lines, "decoder_speed": decoder_lines}
    for prefix, some in stages.items():
        numbers |= {f"{prefix}/{name}": value for name, value in history.speed(some).items()}
    return Result(
        config=config,
        numbers=numbers,
        targets=targets(numbers),
        captions=captions,
        retrieved=retrieved,
        stories=stories,
        in_context=in_context,
        decoded=decoded,
        blends=blends,
        lines=lines,
        warmup_lines=warmup_lines,
        decoder_lines=decoder_lines,
    )


def targets(numbers: dict[str, Number]) -> list[Target]:
    """What the demo should reach, and whether it did."""
    nearest = numbers["scenes_held_out_nearest_exact"]
    exact = numbers["scenes_held_out_exact"]

    def at_least(what: str, name: str, share: float) -> Target:
        value = numbers.get(name)
        reached = None if value is None else value >= share
        return Target(what, value, f"≥ {100 * share:.0f} %", reached)

    waiting = numbers.get("speed/input_wait_share")
    return [
        at_least("training names predicted exactly", "names_train_exact", 0.8),
        at_least("name → its drawing among the five nearest", "retrieval_top5", 0.6),
        at_least("scenes of held-out combinations described exactly", "scenes_held_out_exact", 0.5),
        Target(
            "… and compared with the caption of the nearest training scene",
            exact,
            f"≥ 2 × {100 * nearest:.1f} %",
            exact >= 2 * nearest and exact > 0,
        ),
        at_least(
            "decoded from a drawing's visual tokens → the drawing among the five nearest of 200",
            "pictures_names_train_encoded_top5",
            0.75,
        ),
        at_least(
            "decoded from a drawing's name → the drawing among the five nearest of 200",
            "pictures_names_train_regressed_top5",
            0.55,
        ),
        at_least(
            "least variance of the visual tokens during the run, over the first step's",
            "visual_variance_ratio",
            0.1,
        ),
        at_least(
            "… before standardising, at the end, over the warm-up's", "raw_variance_ratio", 0.1
        ),
        Target(
            "share of the time spent waiting for data",
            waiting,
            "< 2 %",
            None if waiting is None else waiting < 0.02,
        ),
    ]


# --- captions ---


def caption_groups(
    model: Model, groups: dict[str, tuple[Source, Source | None]]
) -> dict[str, list[Captioned]]:
    """Caption every image of each group's source.

    Where a group has a second source, the caption of its nearest image in pixels comes with it.
    """
    pairs = {name: _pairs(source) for name, (source, _) in groups.items()}
    every = [pair for some in pairs.values() for pair in some]
    # A batch ends with its longest caption, so captions of about one length share a batch. The
    # results do not depend on it.
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
    """The documents of a source in which each holds one image with its caption."""
    pairs = []
    for document in (source[i] for i in range(len(source))):
        (image,) = pixels_of(document)
        (text,) = texts_of(document)
        pairs.append(_Pair(document.id, image, plain(text.text)))
    return pairs


def caption_numbers(captions: dict[str, list[Captioned]]) -> dict[str, Number]:
    """Exact match and mean F1 of each group; for scenes the right facts too, and by kind.

    The same of the nearest images' captions, where there are some.
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


def _exact(prefix: str, captions: list[Captioned]) -> dict[str, Number]:
    """Number and exact match of some captions; {} for none."""
    if not captions:
        return {}
    exact = float(np.mean([one.true == one.predicted for one in captions]))
    return {f"{prefix}_count": len(captions), f"{prefix}_exact": exact}


def caption_stories(model: Model, source: Source) -> list[list[Captioned]]:
    """Predict each sentence of the stories in which an image comes before its sentence.

    The prompt is everything before it. What the model writes after the sentence is cut off:
    nothing teaches it where a sentence inside a story ends.
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
    """Drawings in fours: three with their names, and a fourth that the model names after them."""
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


# --- visual tokens ---


def retrieve(
    drawings: list[Captioned], trained: int, visual: Visual, regressed: Visual
) -> tuple[list[Retrieved], dict[str, Number]]:
    """Find drawings by the visual tokens regressed from their names, among all drawings.

    The first `trained` drawings were seen in training.
    """

    def flat(tokens):
        return rearrange(tokens, "M N D -> M (N D)")

    distances = scores.squared_distances(flat(regressed), flat(visual))
    ranks = scores.ranks(distances, np.arange(len(drawings)))
    nearest = np.argsort(distances, 1)[:, :TOP]
    retrieved = []
    for number, drawing in enumerate(drawings):
        found = [(drawings[other].true, drawings[other].image) for other in nearest[number]]
        retrieved.append(Retrieved(drawing.true, number >= trained, int(ranks[number]), found))
    numbers: dict[str, Number] = {"retrieval_among": len(drawings)}
    for suffix, part in (("", slice(trained)), ("_held_out", slice(trained, None))):
        numbers |= {
            f"retrieval{suffix}_top1": float((ranks[part] < 1).mean()),
            f"retrieval{suffix}_top5": float((ranks[part] < TOP).mean()),
            f"free_run_r2{suffix}": scores.r2(visual[part], regressed[part]),
        }
    return retrieved, numbers


def raw_variance(
    model: Model, warmup_params: tree.Tree | None, visual: Visual, images: Images
) -> dict[str, Number]:
    """Variance of the visual tokens before they are standardised, across images.

    And its ratio to the variance under the warm-up's encoder, if that is still there.
    """
    std = 1.0
    if model.model_config.standardise:
        std = np.asarray(model.params["visual_stats"]["std"])

    def variance(tokens):
        return float(tokens.var(0, dtype=np.float64).mean())

    numbers = {"raw_variance": variance(visual * std)}
    if warmup_params is None:
        return numbers

    @jax.jit
    def encode(params, images):
        encoder: Any = module.bind(emu.Encoder, model.model_config, params)
        return encoder.encode(images).astype(np.float32)

    before = in_batches("the warm-up's encoder", partial(encode, warmup_params), images)
    numbers["raw_variance_warmup"] = variance(before)
    numbers["raw_variance_ratio"] = numbers["raw_variance"] / numbers["raw_variance_warmup"]
    return numbers


def in_batches(what: str, call: Callable[..., Array], *arrays: np.ndarray) -> np.ndarray:
    """call(*rows) in batches of one shape; copies of the last row fill the last batch."""
    count = len(arrays[0])
    size = min(BATCH, count)
    parts = []
    for start in tqdm(range(0, count, size), what, unit=" batches", disable=None):
        rows = np.minimum(np.arange(start, start + size), count - 1)
        parts.append(np.asarray(call(*(array[rows] for array in arrays))))
    return np.concatenate(parts)[:count]


def _decode(
    model: Model, diffusion: DiffusionDecoder, captions: dict[str, list[Captioned]]
) -> tuple[dict[str, list[decoding.Decoded]], list[decoding.Blend]]:
    """Decode each group's first images, and blends of training drawings.

    The order decides the seeds.
    """
    decoded = {}
    for group, some in captions.items():
        images = np.stack([one.image for one in some])
        texts = [one.true for one in some]
        decoded[group] = decoding.decode_images(model.session, diffusion, texts, images)
    drawings = captions["names_train"]
    images = np.stack([one.image for one in drawings])
    texts = [one.true for one in drawings]
    return decoded, decoding.blend_images(model.session, diffusion, texts, images)
