"""python -m emu_jax.generate precompute --config=configs/decoder.py --to=DIR: what a decoder's
training reads, made once for all epochs.

For every document of data.mixture and data.eval_mixture: the conditions, which are the visual
tokens of its first image that the LLM regresses from what stands before it (section 2.3 of the
paper); or with --latents the moments that the autoencoder finds in that image. Shards that are
there are kept, so the same command goes on; hosts take turns. The training reads them with
data.conditions=DIR and model.decoder.condition=generated, or with data.latents=DIR. Read next:
../data/precomputed.py.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict
from tqdm import tqdm

from emu_jax import checkpoint, config, sharding
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
from emu_jax.generate import diffusion_decoder
from emu_jax.generate.session import Parts, Session, mesh_of
from emu_jax.models import module
from emu_jax.models.decoder import DecoderConfig, moments
from emu_jax.models.vae import Vae

# at once; images on each device
PROMPTS = 64
IMAGES = 8
# a tower, and what it is
MADE_BY = {"conditions": ("llama", "a language model"), "latents": ("vae", "an autoencoder")}


class Maker(NamedTuple):
    """What makes arrays of one kind: `part(document)` is what a document's array is made of, None
    where it has none; `arrays([part, ...])` are theirs; `told`, JSON-able, says by what; `side`:
    pixels a side of the documents' images.
    """

    told: dict[str, Any]
    side: int
    part: Callable[[Document], Any]
    arrays: Callable[[list], Float[np.ndarray, "n ..."]]


def main(arguments: list[str]) -> None:
    """Raises UserError for what the user can put right."""
    own = [argument for argument in arguments if not argument.startswith("--config")]
    flags = _parse(own)
    c = config.load([argument for argument in arguments if argument not in own])
    processes, process = (
        (jax.process_count(), jax.process_index())
        if flags.hosts is None
        else (flags.hosts, flags.host)
    )
    if not 0 <= process < processes:
        raise UserError(
            f"--host={process} must be from 0 to {processes - 1}, for --hosts={processes}"
        )
    if flags.batch is not None and flags.batch < 1:
        raise UserError(f"--batch={flags.batch} must be at least 1")
    kind, maker = (
        ("latents", latents(c, flags.batch or IMAGES))
        if flags.latents
        else ("conditions", conditions(c, flags.batch or PROMPTS))
    )
    found = {
        (mixture, name): sources.open_source(path, maker.side, c.data.fit)
        for mixture in ("mixture", "eval_mixture")
        for name, _, path, *_ in c.data[mixture]
    }
    if not found:
        raise UserError(
            "data.mixture is empty; give it a (name, weight, path) row for every source"
        )
    told = maker.told | {
        "documents": {f"{mixture}/{name}": len(source) for (mixture, name), source in found.items()}
    }
    directory = Path(flags.to)
    for other in KINDS:
        if metadata_path(directory, other).exists() and (
            other != kind or read_metadata(directory, kind) != told
        ):
            raise UserError(
                f"'{directory}' holds {other} of another model or other data ({read_metadata(directory, other)}); choose another --to"
            )
    if not metadata_path(directory, kind).exists():
        write(
            metadata_path(directory, kind),
            lambda file: file.write(json.dumps(told, indent=1).encode()),
        )
    work = [
        (mixture, name, shard)
        for (mixture, name), source in found.items()
        for shard in range(num_shards(len(source)))
    ]
    todo = [
        (*row, path)
        for row in work[process::processes]
        if not (path := shard_path(directory, *row)).with_suffix(".json").exists()
    ]
    for mixture, name, shard, path in tqdm(todo, kind, unit=" shards", disable=None):
        make(maker, found[mixture, name], shard, path)
    print(
        f"{len(todo)} shards made, {len(work[process::processes]) - len(todo)} were there; train with --config.data.{kind}={directory}"
        + (" --config.model.decoder.condition=generated" if kind == "conditions" else "")
    )


def conditions(c: ConfigDict, batch: int) -> Maker:
    """Of the visual tokens that the config's Emu regresses, `batch` prompts at once. Raises
    UserError where c.init names no Emu.
    """
    directory = checkpoint_with_tower(c, "conditions")
    session = Session.load(
        directory,
        tokenizer=c.data.tokenizer,
        mesh=mesh_of(directory, jax.local_devices()),
        batch=batch,
        truncate="left",
    )
    model_config = session.model_config
    told = _by(directory, "conditions") | {
        "shape": [model_config.resampler.tokens, model_config.llama.width]
    }
    return Maker(told, model_config.vision.image, parts_before_image, session.generate_images)


def latents(c: ConfigDict, batch: int) -> Maker:
    """Of the moments that the config's autoencoder finds in images, `batch` at once on each of this
    process's devices, held as the training would hold it. Raises UserError where c.init names no
    autoencoder, and as `latent_metadata`.
    """
    told = latent_metadata(c)
    model_config = DecoderConfig.of(c.model.to_dict())
    directory = checkpoint_with_tower(c, "latents")
    mesh = sharding.make_mesh(dict(data=-1, fsdp=1, tensor=1), devices=jax.local_devices())
    params = checkpoint.restore_params(
        directory,
        {"vae": diffusion_decoder.abstract_params(model_config, mesh, c.frozen_dtype)["vae"]},
    )["vae"]
    encode = jax.jit(
        lambda params, images: moments(
            model_config, module.bind(Vae, model_config.vae, params), images
        )
    )
    rows = batch * mesh.size

    def arrays(images: list[np.ndarray]) -> Float[np.ndarray, "n y x m"]:
        found = []
        for start in range(0, len(images), rows):
            # one shape for every batch
            some = [*images[start : start + rows], *images[:1] * (start + rows - len(images))]
            with jax.set_mesh(mesh):
                found.append(np.asarray(encode(params, np.stack(some)), np.float32))
        return np.concatenate(found)[: len(images)]

    return Maker(
        told | _by(directory, "latents"),
        model_config.loaded,
        lambda document: next(images_of(document), None),
        arrays,
    )


def latent_metadata(c: ConfigDict) -> dict[str, Any]:
    """What the latents of a config's images depend on beside the autoencoder: pixels a side as they
    are loaded and as they are drawn, how they become square; and their shape. Raises UserError for
    a config without an autoencoder, and for one whose images are other ones in every epoch.
    """
    model_config = DecoderConfig.of(c.model.to_dict()) if c.stage == "decoder" else None
    if model_config is None or model_config.vae is None:
        raise UserError(
            "only a decoder with an autoencoder has latents (data.latents): "
            + (
                f"stage={c.stage!r} has none"
                if model_config is None
                else "model.decoder.vae is empty, and the U-Net draws pixels"
            )
        )
    if c.data.fit not in ("squash", "centre"):
        raise UserError(
            f"data.fit={c.data.fit!r}: latents are made once, of images that never change; set data.fit to squash or centre"
        )
    return {
        "loaded": model_config.loaded,
        "image": model_config.image,
        "fit": c.data.fit,
        "shape": list(model_config.moments),
    }


def checkpoint_with_tower(c: ConfigDict, kind: str) -> str:
    """The checkpoint of c.init whose weights make arrays of a kind: of two the later counts, as in
    the training. Raises UserError where none does.
    """
    tower, what = MADE_BY[kind]
    found = [
        directory
        for directory in filter(None, c.init.split(","))
        if any(path.startswith(f"{tower}/") for path in checkpoint.param_shapes(directory))
    ]
    if not found:
        raise UserError(f"init={c.init!r} names no checkpoint with {what}: --config.init=DIR")
    return found[-1]


def check_weights(c: ConfigDict, kind: str) -> None:
    """Raises UserError where a training that begins from c.init reads arrays that other weights
    made.
    """
    directory = checkpoint_with_tower(c, kind)
    there = read_metadata(Path(c.data[kind]), kind)
    if _by(directory, kind)["weights"] != there.get("weights"):
        raise UserError(
            f"data.{kind}={c.data[kind]!r} were made by other weights ({there.get('checkpoint')}) than those of init, {directory}; make "
            f"them again: python -m emu_jax.generate precompute{KINDS[kind]} --config=FILE --to=ANOTHER"
        )


def _by(directory: str, kind: str) -> dict[str, Any]:
    return {
        "checkpoint": str(Path(directory).resolve()),
        "weights": checkpoint.fingerprint(directory, MADE_BY[kind][0]),
    }


def make(maker: Maker, source: Source, shard: int, path: Path) -> None:
    """One shard's files. A record that is corrupt, and a document without an image, have no array:
    training does not see them.
    """
    ids = []
    parts = []
    for index in range(shard * SHARD, min((shard + 1) * SHARD, len(source))):
        try:
            document = source[index]
        except CorruptRecord:
            continue
        if (part := maker.part(document)) is not None:
            ids.append(document.id)
            parts.append(part)
    made = maker.arrays(parts) if parts else np.zeros((0, *maker.told["shape"]))
    write(path, lambda file: np.save(file, made.astype(np.float16)))
    write(path.with_suffix(".json"), lambda file: file.write(json.dumps(ids).encode()))


def parts_before_image(document: Document) -> Parts | None:
    """The parts before its first image; of a pair of both, the text. None without an image."""
    parts: list[str] = []

    def said(part):
        return part.text if isinstance(part, Text) else part

    for part in document.parts:
        if isinstance(part, np.ndarray):
            return parts
        parts.append(said(part.text if isinstance(part, Pair) else part))
        if isinstance(part, Pair):
            return parts
    return None


def write(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """A file, whole or not at all. Raises UserError where it cannot be written."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            fill(file)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m emu_jax.generate precompute",
        description=__doc__.splitlines()[0].partition(": ")[2],
        allow_abbrev=False,
    )
    # one line, as everywhere
    parser.error = _fail
    parser.add_argument(
        "--to", required=True, metavar="DIR", help="where they are written, or go on being written"
    )
    parser.add_argument(
        "--latents",
        action="store_true",
        help="the autoencoder's latents of the images instead of the LLM's conditions",
    )
    parser.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help=f"prompts at once ({PROMPTS}), or with --latents images on each device ({IMAGES})",
    )
    parser.add_argument(
        "--host", type=int, default=0, metavar="K", help="which of --hosts this is, from 0 (0)"
    )
    parser.add_argument(
        "--hosts",
        type=int,
        metavar="N",
        help="how many share the work; by default the processes that JAX knows of",
    )
    return parser.parse_args(arguments)


def _fail(message: str) -> None:
    raise UserError(message)
