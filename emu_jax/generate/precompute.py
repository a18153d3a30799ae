"""python -m emu_jax.generate precompute: inputs of decoder training, computed once.

For the first image of every document of data.mixture and data.eval_mixture, these are the visual
tokens that the LLM generates after the text before it (section 3.3 of the paper), or with --latents
the mean and variance that the autoencoder encodes it to. Existing shards are kept, so the same
command resumes; hosts share the work. Read next: ../data/precomputed.py.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict
from tqdm import tqdm

from emu_jax import checkpoint, cli, config, sharding
from emu_jax.batching import pad_batch
from emu_jax.config import UserError
from emu_jax.data import sources
from emu_jax.data.documents import images_of
from emu_jax.data.precomputed import (
    KINDS,
    SHARD,
    metadata_path,
    num_shards,
    read_metadata,
    shard_path,
)
from emu_jax.data.sequence import Document, Pair, Text
from emu_jax.data.sources import CorruptRecord, Source
from emu_jax.generate.placement import abstract_params, inference_mesh
from emu_jax.generate.processor import Parts
from emu_jax.generate.session import Session
from emu_jax.models import module
from emu_jax.models.decoder import DecoderConfig, UNetWithVae, moments
from emu_jax.models.vae import Vae
from emu_jax.plan import latent_metadata

# Prompts in a batch.
PROMPTS = 64
# Images in a batch on each device.
IMAGES = 8
# For each kind, the tower that computes it and its name in messages.
COMPUTED_BY = {"conditions": ("llama", "a language model"), "latents": ("vae", "an autoencoder")}


class Recipe(NamedTuple):
    """What has to be computed for one kind of arrays, and how."""

    # Content of DIR/KIND.json: which weights, and the shape of an array.
    metadata: dict[str, Any]
    # Height and width to which the documents' images are resized.
    image_size: int
    # Returns the input from which a document's array is computed; None if it has no image.
    input_of: Callable[[Document], Any]
    # Computes the arrays for any number of such inputs.
    compute: Callable[[list], Float[np.ndarray, "n ..."]]


class Shard(NamedTuple):
    """One file of arrays to compute."""

    source: Source
    number: int
    path: Path


def main(arguments: list[str]) -> None:
    """Run the command. Raises UserError for a user's mistake."""
    own = [argument for argument in arguments if not argument.startswith("--config")]
    flags = _parse(own)
    c = config.load([argument for argument in arguments if argument not in own])
    host, hosts = _host(flags)
    kind = "latents" if flags.latents else "conditions"
    recipe = (
        latents(c, flags.batch or IMAGES)
        if flags.latents
        else conditions(c, flags.batch or PROMPTS)
    )
    found = {
        (mixture, name): sources.open_source(path, recipe.image_size, c.data.fit)
        for mixture in ("mixture", "eval_mixture")
        for name, _, path, *_ in c.data[mixture]
    }
    if not found:
        raise UserError("data.mixture is empty; add a (name, weight, path) row for every source")
    directory = Path(flags.to)
    documents = {f"{mixture}/{name}": len(source) for (mixture, name), source in found.items()}
    _claim(directory, kind, recipe.metadata | {"documents": documents})
    shards = [
        Shard(source, number, shard_path(directory, mixture, name, number))
        for (mixture, name), source in found.items()
        for number in range(num_shards(len(source)))
    ]
    mine = shards[host::hosts]
    # A shard's .json is written last.
    missing = [shard for shard in mine if not shard.path.with_suffix(".json").exists()]
    for shard in tqdm(missing, kind, unit=" shards", disable=None):
        write_shard(recipe, shard)
    usage = f"--config.data.{kind}={directory}"
    if kind == "conditions":
        usage += " --config.model.decoder.condition=generated"
    print(f"{len(missing)} shards computed, {len(mine) - len(missing)} existed; train with {usage}")


def _host(flags: argparse.Namespace) -> tuple[int, int]:
    """(index of this host, number of hosts that share the work)."""
    if flags.batch is not None and flags.batch < 1:
        raise UserError(f"--batch={flags.batch} must be at least 1")
    if flags.hosts is None:
        return jax.process_index(), jax.process_count()
    if not 0 <= flags.host < flags.hosts:
        raise UserError(
            f"--host={flags.host} must be from 0 to {flags.hosts - 1}, for --hosts={flags.hosts}"
        )
    return flags.host, flags.hosts


def _claim(directory: Path, kind: str, metadata: dict[str, Any]) -> None:
    """Write DIR/KIND.json unless it exists with the same content.

    Raises UserError if the folder contains arrays of a different kind, model or data.
    """
    for other in KINDS:
        if not metadata_path(directory, other).exists():
            continue
        existing = read_metadata(directory, other)
        if other != kind or existing != metadata:
            raise UserError(
                f"'{directory}' contains {other} of a different model or different data "
                f"({existing}); choose a different --to"
            )
    if not metadata_path(directory, kind).exists():
        with cli.output_file(metadata_path(directory, kind)) as file:
            file.write(json.dumps(metadata, indent=1))


def conditions(c: ConfigDict, batch: int) -> Recipe:
    """The recipe of visual tokens that the config's Emu generates, `batch` prompts at once.

    Raises UserError if c.init contains no language model.
    """
    directory = checkpoint_with_tower(c, "conditions")
    session = Session.load(
        directory,
        tokenizer=c.data.tokenizer,
        mesh=inference_mesh(directory, jax.local_devices()),
        batch=batch,
        truncate="left",
    )
    model_config = session.model_config
    shape = [model_config.resampler.tokens, model_config.llama.width]
    return Recipe(
        metadata=_provenance(directory, "conditions") | {"shape": shape},
        image_size=model_config.vision.image,
        input_of=parts_before_image,
        compute=session.generate_images,
    )


def latents(c: ConfigDict, batch: int) -> Recipe:
    """The recipe of the autoencoder's moments, `batch` images at once on each local device.

    The autoencoder's weights have the dtype that they have in training. Raises UserError if c.init
    contains no autoencoder, and for configs that `latent_metadata` refuses.
    """
    metadata = latent_metadata(c)
    model_config = DecoderConfig.of(c.model.to_dict())
    directory = checkpoint_with_tower(c, "latents")
    mesh = sharding.make_mesh(dict(data=-1, fsdp=1, tensor=1), devices=jax.local_devices())
    shapes = abstract_params(module.abstract(UNetWithVae, model_config), mesh, c.frozen_dtype)
    params = checkpoint.restore_params(directory, {"vae": shapes["vae"]})["vae"]

    @jax.jit
    def encode(params, images):
        vae: Any = module.bind(Vae, model_config.vae, params)
        return moments(model_config, vae, images)

    rows = batch * mesh.size

    def compute(images: list[np.ndarray]) -> Float[np.ndarray, "n y x m"]:
        found = []
        for start in range(0, len(images), rows):
            padded = np.stack(pad_batch(images[start : start + rows], rows))
            with jax.set_mesh(mesh):
                found.append(np.asarray(encode(params, padded), np.float32))
        return np.concatenate(found)[: len(images)]

    return Recipe(
        metadata=metadata | _provenance(directory, "latents"),
        image_size=model_config.loader_image,
        input_of=lambda document: next(images_of(document), None),
        compute=compute,
    )


def checkpoint_with_tower(c: ConfigDict, kind: str) -> str:
    """The checkpoint of c.init from which to compute arrays of a kind.

    If several have the tower, it is the last one, as in training. Raises UserError if none has it.
    """
    tower, in_words = COMPUTED_BY[kind]
    found = [
        directory
        for directory in filter(None, c.init.split(","))
        if any(path.startswith(f"{tower}/") for path in checkpoint.param_shapes(directory))
    ]
    if not found:
        raise UserError(f"init={c.init!r} names no checkpoint with {in_words}: --config.init=DIR")
    return found[-1]


def check_weights(c: ConfigDict, kind: str) -> None:
    """Raise UserError if data.KIND was computed by weights that are not in c.init."""
    directory = checkpoint_with_tower(c, kind)
    existing = read_metadata(Path(c.data[kind]), kind)
    if _provenance(directory, kind)["weights"] != existing.get("weights"):
        raise UserError(
            f"data.{kind}={c.data[kind]!r} were computed by weights "
            f"({existing.get('checkpoint')}) that are not those of init, {directory}; compute them "
            f"again: python -m emu_jax.generate precompute{KINDS[kind]} --config=FILE --to=DIR"
        )


def _provenance(directory: str, kind: str) -> dict[str, Any]:
    """Path and fingerprint of the weights that compute a kind."""
    tower, _ = COMPUTED_BY[kind]
    return {
        "checkpoint": str(Path(directory).resolve()),
        "weights": checkpoint.fingerprint(directory, tower),
    }


def write_shard(recipe: Recipe, shard: Shard) -> None:
    """Compute and write the arrays of one shard (float16), then the ids of their documents.

    Corrupt records and documents without an image have no array, and training skips them.
    """
    ids = []
    inputs = []
    first = shard.number * SHARD
    for index in range(first, min(first + SHARD, len(shard.source))):
        try:
            document = shard.source[index]
        except CorruptRecord:
            continue
        value = recipe.input_of(document)
        if value is not None:
            ids.append(document.id)
            inputs.append(value)
    arrays = recipe.compute(inputs) if inputs else np.zeros((0, *recipe.metadata["shape"]))
    with cli.output_file(shard.path, "wb") as file:
        np.save(file, arrays.astype(np.float16))
    with cli.output_file(shard.path.with_suffix(".json")) as file:
        file.write(json.dumps(ids))


def parts_before_image(document: Document) -> Parts | None:
    """The prompt after which the first image is generated, or None without an image.

    It consists of the parts before the image, or of the text of its pair.
    """
    parts: list[Any] = []
    for part in document.parts:
        if isinstance(part, np.ndarray):
            return parts
        text = part.text if isinstance(part, Pair) else part
        parts.append(text.text if isinstance(text, Text) else text)
        if isinstance(part, Pair):
            return parts
    return None


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m emu_jax.generate precompute",
        usage="python -m emu_jax.generate precompute --config=FILE --to=DIR [--latents] "
        "[--batch=N] [--host=K --hosts=N] [--config.FIELD=VALUE ...]",
        description="Compute inputs of decoder training once for all epochs: the visual tokens "
        "that the LLM generates for each document's first image (then train with "
        "data.conditions=DIR and model.decoder.condition=generated), or its latents (then train "
        "with data.latents=DIR). Run the same command again to resume.",
        epilog="--config=FILE and --config.FIELD=VALUE are those of python -m emu_jax.train.",
    )
    parser.add_argument("--to", required=True, metavar="DIR", help="where the arrays are written")
    parser.add_argument(
        "--latents",
        action="store_true",
        help="compute the autoencoder's latents of the images instead of the LLM's visual tokens",
    )
    parser.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help=f"prompts at once ({PROMPTS}); with --latents, images on each device ({IMAGES})",
    )
    parser.add_argument(
        "--host", type=int, default=0, metavar="K", help="index of this host, from 0 (default: 0)"
    )
    parser.add_argument(
        "--hosts",
        type=int,
        metavar="N",
        help="number of hosts that share the work (default: JAX's processes)",
    )
    return parser.parse_args(arguments)
