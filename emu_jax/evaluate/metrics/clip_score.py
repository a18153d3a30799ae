"""CLIP score (arXiv 2104.08718): cosine of CLIP's features of an image and its caption.

Captions are used as they are (the paper prepends "A photo depicts "). The CLIP is a checkpoint
imported by weights/clip.py, and the network is models/clip.py. Read next: weights/clip.py.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from PIL import Image
from tqdm import tqdm

from emu_jax import checkpoint
from emu_jax.batching import pad_batch
from emu_jax.config import UserError, from_dict
from emu_jax.data import images
from emu_jax.evaluate import annotations
from emu_jax.files import one_line
from emu_jax.models import clip, module
from emu_jax.models.clip import ClipConfig
from emu_jax.tree import Tree
from emu_jax.weights.clip import PREPROCESSORS, TOKENIZER, TOKENIZER_PARTS

WHERE = (
    "--clip=DIR, a CLIP. Download a folder with config.json, model.safetensors or "
    "pytorch_model.bin, tokenizer.json and preprocessor_config.json, such as "
    "openai/clip-vit-large-patch14, and run: "
    "python -m emu_jax.weights import --family=clip FOLDER --to=DIR"
)
BATCH = 32
# OpenAI's normalization, used if the preprocessor does not have its own.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class Preprocessor(NamedTuple):
    """Resize to `size` (bicubic), crop the centre to the model's size, (x / 255 - mean) / std."""

    # Pixels of the shorter side, or (height, width).
    size: int | tuple[int, int]
    mean: Float[np.ndarray, "3"]
    std: Float[np.ndarray, "3"]


class Clip(NamedTuple):
    """An imported CLIP with its tokenizer (transformers' CLIPTokenizer) and preprocessor."""

    config: ClipConfig
    params: dict[str, Any]
    tokenizer: Any
    preprocessor: Preprocessor


def score(images: Float[np.ndarray, "n C"], texts: Float[np.ndarray, "n C"]) -> float:
    """100 * mean of max(cosine, 0) over pairs of image and text features."""
    return 100 * float(_cosines(images, texts).mean())


def score_images(
    model: Clip, images: Mapping[str, Path], captions: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """100 * max(cosine, 0) of image files with their captions, by id.

    The score of an image with several captions is the mean over them, and the score of a data set
    is the mean over its images.
    """
    paths = tqdm(images.values(), "CLIP", unit=" images", disable=None)
    by_id = dict(zip(images, image_features(model, paths), strict=True))
    pairs = [(id, caption) for id in images for caption in captions[id]]
    cosines = _cosines(
        np.stack([by_id[id] for id, _ in pairs]),
        text_features(model, [caption for _, caption in pairs]),
    )
    scores: dict[str, list[float]] = {}
    for (id, _), cosine in zip(pairs, cosines, strict=True):
        scores.setdefault(id, []).append(100 * float(cosine))
    return {id: float(np.mean(values)) for id, values in scores.items()}


def check(directory: str) -> None:
    """Raise UserError unless `directory` is a CLIP with its tokenizer."""
    if "text/tokens" not in checkpoint.param_shapes(directory):
        raise UserError(f"the checkpoint in '{directory}' is not a CLIP; {WHERE}")
    folder, config = _folder_and_config(directory)
    load_tokenizer(folder, config)
    _load_preprocessor(folder, config)


def load(directory: str) -> Clip:
    """Load what `weights import --family=clip` wrote. Raises UserError for anything else."""
    check(directory)
    folder, config = _folder_and_config(directory)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, jnp.float32), checkpoint.restore_params(directory)
    )
    return Clip(config, params, load_tokenizer(folder, config), _load_preprocessor(folder, config))


def image_features(model: Clip, paths: Iterable[Path]) -> Float[np.ndarray, "n C"]:
    """Features of image files."""
    tower = partial(_vision, model.config, model.params["vision"])
    pixels = (preprocess(model, path) for path in paths)
    return _batched(tower, pixels, model.config.features)


def text_features(model: Clip, texts: Sequence[str]) -> Float[np.ndarray, "n C"]:
    """Features of texts."""
    tower = partial(_text, model.config, model.params["text"])
    ids = (token_ids(model, text) for text in texts)
    return _batched(tower, ids, model.config.features)


@partial(jax.jit, static_argnums=0)
def _vision(
    config: ClipConfig, params: Tree, pixels: Float[Array, "n h w 3"]
) -> Float[Array, "n C"]:
    return module.bind(clip.ClipVision, config, params)(pixels)


@partial(jax.jit, static_argnums=0)
def _text(config: ClipConfig, params: Tree, ids: Int[Array, "n T"]) -> Float[Array, "n C"]:
    return module.bind(clip.ClipText, config, params)(ids)


def token_ids(model: Clip, text: str) -> Int[np.ndarray, "T"]:
    """Ids of a text with start and end token, truncated to the context T or padded to it."""
    ids = model.tokenizer(text, max_length=model.config.context, truncation=True)["input_ids"]
    return np.array(pad_batch(ids, model.config.context), np.int32)


def preprocess(model: Clip, path: Path) -> Float[np.ndarray, "h w 3"]:
    """Pixels [h, w, 3] of an image file for the vision tower. Raises UserError if unreadable."""
    try:
        image = Image.fromarray(images.decode_full(path.read_bytes()))
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"'{path}': {error}") from error
    size, mean, std = model.preprocessor
    if isinstance(size, int):
        width, height = (int(size * side / min(image.size)) for side in image.size)
    else:
        height, width = size
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    side = model.config.image
    left = (width - side) // 2
    top = (height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return ((np.asarray(image, np.float32) / 255 - mean) / std).astype(np.float32)


def _cosines(
    images: Float[np.ndarray, "n C"], texts: Float[np.ndarray, "n C"]
) -> Float[np.ndarray, "n"]:
    """max(cosine, 0) of each pair, in double precision."""
    return np.maximum((_unit(images) * _unit(texts)).sum(1), 0)


def _unit(x: Float[np.ndarray, "n C"]) -> Float[np.ndarray, "n C"]:
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _batched(
    tower: Callable[[np.ndarray], Array], rows: Iterator[np.ndarray], width: int
) -> Float[np.ndarray, "n C"]:
    """Features of rows, computed in batches of one shape so that the tower is compiled once."""
    features = [np.zeros((0, width), np.float32)]
    while batch := list(islice(rows, BATCH)):
        features.append(np.asarray(tower(np.stack(pad_batch(batch, BATCH))))[: len(batch)])
    return np.concatenate(features)


def _folder_and_config(directory: str) -> tuple[Path, ClipConfig]:
    workdir, _ = checkpoint.split_step(Path(directory).resolve())
    config = from_dict(checkpoint.read_config(directory)["model"])
    return workdir, ClipConfig.of(config.to_dict())


def load_tokenizer(folder: Path, config: ClipConfig) -> Any:
    """Load the CLIPTokenizer of a folder with tokenizer.json, or vocab.json and merges.txt.

    Raises UserError if there is none, or if it does not fit the model.
    """
    parts = all((folder / name).is_file() for name in TOKENIZER_PARTS)
    if not (folder / TOKENIZER).is_file() and not parts:
        raise UserError(
            f"{folder} lacks CLIP's tokenizer: copy tokenizer.json, or vocab.json and merges.txt, "
            "into it from the folder of the original weights"
        )
    # Importing transformers takes seconds, and without PyTorch it prints advice to install that.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        ends = tokenizer("")["input_ids"]
    # The library raises plain Exception for damaged files.
    except Exception as error:
        raise UserError(f"{folder}: its tokenizer cannot be read: {one_line(error)}") from error
    fits = len(ends) == 2 and len(tokenizer) <= config.vocab
    if not fits or config.eos not in (clip.OLD_EOS, ends[1]):
        raise UserError(
            f"{folder}: its tokenizer is not this CLIP's: it has {len(tokenizer)} tokens and puts "
            f"{ends} around a text; the model has {config.vocab} tokens and reads a text's feature "
            f"at token {config.eos}"
        )
    return tokenizer


def _load_preprocessor(folder: Path, config: ClipConfig) -> Preprocessor:
    paths = [folder / name for name in PREPROCESSORS if (folder / name).is_file()]
    if not paths:
        return Preprocessor(config.image, np.array(MEAN, np.float32), np.array(STD, np.float32))
    path = paths[0]
    fields = annotations.read_json(path)
    try:
        fields = fields.get("image_processor", fields)
        size = _parse_size(fields.get("size", config.image))
        shortest = min(size) if isinstance(size, tuple) else size
        crop = fields.get("crop_size", config.image)
        crops = set(crop.values()) if isinstance(crop, dict) else {crop}
        mean = np.array([float(value) for value in fields.get("image_mean", MEAN)], np.float32)
        std = np.array([float(value) for value in fields.get("image_std", STD)], np.float32)
        fits = shortest >= config.image and crops == {config.image}
        fits = fits and len(mean) == len(std) == 3 and min(std) > 0
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a CLIP's preprocessor") from error
    if not fits:
        raise UserError(
            f"{path}: images of size {size}, cropped to {fields.get('crop_size')}, do not fit a "
            f"CLIP of {config.image} pixels a side"
        )
    return Preprocessor(size, mean, std)


def _parse_size(size: Any) -> int | tuple[int, int]:
    """The shorter side, or (height, width), of a preprocessor's field `size`."""
    if not isinstance(size, dict):
        return size
    if "shortest_edge" in size:
        return size["shortest_edge"]
    return size["height"], size["width"]
