"""Evaluation of the demo's model: it names drawings, draws, and describes new scenes.

Single drawings test memory, because the name of an unseen drawing cannot be guessed. Scenes of
held-out combinations test understanding; their baseline is the caption of the nearest training
scene in pixels. Read next: captions.py, scores.py, decoding.py, report.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from einops import rearrange
from jaxtyping import Array
from tqdm import tqdm

from emu_jax import checkpoint, tree
from emu_jax.data import sources
from emu_jax.data.sources import Source
from emu_jax.demo import decoding, history, scores
from emu_jax.demo.captions import (
    Captioned,
    Pixels,
    caption_groups,
    caption_numbers,
    caption_stories,
    exact_numbers,
    name_in_context,
)
from emu_jax.demo.history import Number
from emu_jax.demo.model import BATCH, Images, Model, Visual, read_config
from emu_jax.generate.diffusion_decoder import DiffusionDecoder
from emu_jax.models import emu, module

# Number of drawings retrieved for a name.
TOP = 5
# Towers of the image encoder.
ENCODER = ("vision", "ln_visual", "resampler")


class Retrieved(NamedTuple):
    """The drawings whose visual tokens are nearest to those regressed from a name.

    rank: that of the right drawing; 0 is the nearest. found: (name, image) of the TOP nearest.
    """

    name: str
    held_out: bool
    rank: int
    found: list[tuple[str, Pixels]]


class Target(NamedTuple):
    """A number that the demo should reach; `value` and `reached` are None if not measured."""

    what: str
    value: Number | None
    bound: str
    reached: bool | None


@dataclass(frozen=True)
class Result:
    """Everything the report shows; shares are between 0 and 1.

    captions, decoded: by group (names_train, names_held_out, scenes_held_out). decoded and blends
    are empty without a decoder. stories: those held-out stories in which each image comes before
    its sentence. in_context: in each list, three drawings with their names and a fourth that the
    model names. lines, warmup_lines, decoder_lines: the lines of metrics.jsonl of the runs.
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


def evaluate(
    directory: str, data: str, warmup: str | None = None, decoder: str | None = None
) -> Result:
    """Evaluate the run in `directory` (a workdir or one of its checkpoints).

    data: the folder that `build` wrote. warmup: the run that trained the encoder; None: the
    config.init of the run, if it still exists. decoder: the run whose decoder draws the visual
    tokens; None: nothing is drawn. Raises UserError if a checkpoint or the data is missing or of
    another kind.
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
    numbers |= exact_numbers("stories_held_out", sentences)
    numbers |= exact_numbers("in_context", [four[3] for four in in_context])
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
    """The targets of the demo, and whether `numbers` reach them."""
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
            "least variance of the visual tokens during the run, as a share of the first step's",
            "visual_variance_ratio",
            0.1,
        ),
        at_least(
            "… before standardising, at the end, as a share of the warm-up's",
            "raw_variance_ratio",
            0.1,
        ),
        Target(
            "share of the time spent waiting for data",
            waiting,
            "< 2 %",
            None if waiting is None else waiting < 0.02,
        ),
    ]


def retrieve(
    drawings: list[Captioned], trained: int, visual: Visual, regressed: Visual
) -> tuple[list[Retrieved], dict[str, Number]]:
    """Search all drawings by the visual tokens regressed from each name: (results, scores).

    trained: the number of drawings, from the first, that were seen in training. visual: the visual
    tokens of the drawings. regressed: those regressed from their names.
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
    """Variance of the visual tokens across images, before they are standardised.

    With `warmup_params`, also that of the warm-up's encoder, and the ratio of the two.
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
    """Apply `call` to rows of the arrays in batches of one shape.

    Copies of the last row fill the last batch; their results are dropped. what: label of the
    progress bar.
    """
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
    """Decode the first images of each group, and blends of training drawings.

    The order of the calls decides the random seeds.
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
