"""CLIP score (arXiv 2104.08718): the cosine between a picture's and its text's features, as a CLIP
that was imported gives them.

Nothing is put before a text (the paper's own score of captions reads "A photo depicts " first).
Read next: models/clip.py, weights/clip.py.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from PIL import Image
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from tqdm import tqdm

from emu_jax import checkpoint
from emu_jax.config import UserError, from_dict
from emu_jax.data import images
from emu_jax.evaluate import annotations
from emu_jax.models import clip, module
from emu_jax.models.clip import ClipConfig
from emu_jax.weights.clip import PREPROCESSOR, TOKENIZER, WHERE

BATCH = 32
START = "<|startoftext|>"
END = "<|endoftext|>"
SPLIT = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
# where no file says them
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class Preprocessor(NamedTuple):
    """The shorter side (or both) to `size`, bicubic; the middle, of the model's size; (x / 255 -
    mean) / std.
    """

    # or (height, width)
    size: int | tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Clip(NamedTuple):
    config: ClipConfig
    params: dict[str, Any]
    tokenizer: Tokenizer
    preprocessor: Preprocessor


def score(images: Float[np.ndarray, "n C"], texts: Float[np.ndarray, "n C"]) -> float:
    """100 * the mean over the pairs of max(cosine, 0)."""
    return 100 * float(_cosines(images, texts).mean())


def of_pictures(
    model: Clip, pictures: Mapping[str, Path], captions: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """100 * max(cosine, 0) of each picture with its caption, by its id; with several captions,
    their mean. The score of all is the mean.
    """
    paths = tqdm(pictures.values(), "CLIP", unit=" pictures", disable=None)
    seen = dict(zip(pictures, picture_features(model, paths), strict=True))
    pairs = [(key, caption) for key in pictures for caption in captions[key]]
    cosines = _cosines(
        np.stack([seen[key] for key, _ in pairs]),
        text_features(model, [caption for _, caption in pairs]),
    )
    found: dict[str, list[float]] = {}
    for (key, _), cosine in zip(pairs, cosines, strict=True):
        found.setdefault(key, []).append(100 * float(cosine))
    return {key: float(np.mean(some)) for key, some in found.items()}


def check(directory: str) -> None:
    """Raises UserError where `directory` holds no CLIP with its tokenizer."""
    if "text/tokens" not in checkpoint.param_shapes(directory):
        raise UserError(f"the checkpoint in '{directory}' is not a CLIP; {WHERE}")
    folder, config = _folder_and_config(directory)
    _tokenizer(folder, config)
    _preprocessor(folder, config)


def load(directory: str) -> Clip:
    """What `weights import --family=clip` made. Raises UserError for what is something else, or
    lacks its tokenizer.
    """
    check(directory)
    folder, config = _folder_and_config(directory)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, jnp.float32), checkpoint.restore_params(directory)
    )
    return Clip(config, params, _tokenizer(folder, config), _preprocessor(folder, config))


def picture_features(model: Clip, paths: Iterable[Path]) -> Float[np.ndarray, "n C"]:
    run = jax.jit(lambda params, x: module.bind(clip.ClipVision, model.config, params)(x))
    return _batched(
        partial(run, model.params["vision"]),
        (prepare(model, path) for path in paths),
        model.config.features,
    )


def text_features(model: Clip, texts: Sequence[str]) -> Float[np.ndarray, "n C"]:
    run = jax.jit(lambda params, ids: module.bind(clip.ClipText, model.config, params)(ids))
    return _batched(
        partial(run, model.params["text"]),
        (tokens(model, text) for text in texts),
        model.config.features,
    )


def tokens(model: Clip, text: str) -> Int[np.ndarray, "T"]:
    """Ids of a text between its start and its end, cut to the context; its end is repeated up to
    there.
    """
    ids = model.tokenizer.encode(text).ids
    ids = ids[: min(len(ids), model.config.context) - 1] + ids[-1:]
    return np.array(ids + ids[-1:] * (model.config.context - len(ids)), np.int32)


def prepare(model: Clip, path: Path) -> Float[np.ndarray, "h w 3"]:
    """The vision tower's input of a picture's file."""
    size, mean, std = model.preprocessor
    try:
        image = Image.fromarray(images.decode_full(path.read_bytes()))
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"'{path}': {error}") from error
    short = min(image.size)
    width, height = (
        [int(size * side / short) for side in image.size] if isinstance(size, int) else size[::-1]
    )
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = ((side - model.config.image) // 2 for side in image.size)
    image = image.crop((left, top, left + model.config.image, top + model.config.image))
    return ((np.asarray(image, np.float32) / 255 - np.float32(mean)) / np.float32(std)).astype(
        np.float32
    )


def _cosines(
    images: Float[np.ndarray, "n C"], texts: Float[np.ndarray, "n C"]
) -> Float[np.ndarray, "n"]:
    """max(cosine, 0) of each pair."""
    images, texts = (
        x / np.linalg.norm(x, axis=1, keepdims=True)
        for x in (np.asarray(images, np.float64), np.asarray(texts, np.float64))
    )
    return np.maximum((images * texts).sum(1), 0)


def _batched(run, rows, width: int) -> Float[np.ndarray, "n C"]:
    """A batch at a time, all of one shape: one compilation."""
    found = [np.zeros((0, width), np.float32)]
    while some := list(islice(rows, BATCH)):
        found.append(np.asarray(run(np.stack(some + some[:1] * (BATCH - len(some)))))[: len(some)])
    return np.concatenate(found)


def _folder_and_config(directory: str) -> tuple[Path, ClipConfig]:
    workdir, _ = checkpoint.split_step(Path(directory).resolve())
    config = from_dict(checkpoint.read_config(directory)["model"])
    return workdir, ClipConfig.of(config.to_dict())


def _tokenizer(folder: Path, config: ClipConfig) -> Tokenizer:
    whole, vocab, merges = (folder / name for name in TOKENIZER)
    if not (whole.is_file() or (vocab.is_file() and merges.is_file())):
        raise UserError(
            f"{folder} lacks CLIP's tokenizer: copy tokenizer.json, or vocab.json and merges.txt, from where its weights were into it"
        )
    try:
        tokenizer = Tokenizer.from_file(str(whole)) if whole.is_file() else _bpe(vocab, merges)
        # a file may say how its last text was cut and padded
        tokenizer.no_truncation()
        tokenizer.no_padding()
        ends = tokenizer.encode("").ids
    # the library raises plain Exception
    except Exception as error:
        raise UserError(
            f"{folder}: its tokenizer cannot be read: {' '.join(str(error).split())}"
        ) from error
    if (
        len(ends) != 2
        or tokenizer.get_vocab_size() > config.vocab
        or config.eos not in (clip.OLD_EOS, ends[1])
    ):
        raise UserError(
            f"{folder}: its tokenizer is not this CLIP's: it has {tokenizer.get_vocab_size()} tokens and puts {ends} around a text; the "
            f"model has {config.vocab} tokens and reads a text at {config.eos}"
        )
    return tokenizer


def _bpe(vocab: Path, merges: Path) -> Tokenizer:
    """OpenAI's tokenizer, as the transformers library makes it of these files."""
    tokenizer = Tokenizer(
        models.BPE.from_file(str(vocab), str(merges), end_of_word_suffix="</w>", unk_token=END)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.add_special_tokens([START, END])
    start, end = ((name, tokenizer.token_to_id(name)) for name in (START, END))
    tokenizer.post_processor = processors.RobertaProcessing(
        end, start, trim_offsets=False, add_prefix_space=False
    )
    return tokenizer


def _preprocessor(folder: Path, config: ClipConfig) -> Preprocessor:
    path = next((path for name in PREPROCESSOR if (path := folder / name).is_file()), None)
    said = annotations.load(path) if path else {}
    try:
        said = said.get("image_processor", said)
        to = said.get("size", config.image)
        crop = said.get("crop_size", config.image)
        if isinstance(to, dict):
            to = to["shortest_edge"] if "shortest_edge" in to else (to["height"], to["width"])
        crop = {*crop.values()} if isinstance(crop, dict) else {crop}
        mean, std = (
            tuple(map(float, said.get(name, default)))
            for name, default in (("image_mean", MEAN), ("image_std", STD))
        )
        fits = (
            min(to if isinstance(to, tuple) else (to,)) >= config.image
            and crop == {config.image}
            and len(mean) == len(std) == 3
            and min(std) > 0
        )
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"{path}: no preprocessor of a CLIP") from error
    if not fits:
        raise UserError(
            f"{path}: pictures of size {to}, cut to {said.get('crop_size')}, are not for a CLIP of {config.image} pixels a side"
        )
    return Preprocessor(to, mean, std)
