"""python -m emu_jax.generate precompute --config=configs/decoder.py --to=DIR: a decoder's conditions, drawn by the LLM once for all epochs.

For every document of data.mixture and data.eval_mixture, what stands before its first image is the prompt, and the image's visual
tokens are regressed from it (section 2.3 of the paper). Shards that are there are kept, so the same command goes on; hosts take
turns. The training reads them with data.conditions=DIR and model.decoder.condition=generated. Read next: ../data/conditions.py.
"""
import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

import jax
import numpy as np
from tqdm import tqdm

from emu_jax import checkpoint, config
from emu_jax.config import UserError
from emu_jax.data import sources
from emu_jax.data.conditions import NOTES, SHARD, notes, path_of, shards
from emu_jax.data.sequence import Document, Pair, Text
from emu_jax.data.sources import Corrupt, Source
from emu_jax.generate.session import Parts, Session, mesh_of

BATCH = 64


def main(arguments: list[str]) -> None:
    """Raises UserError for what the user can put right."""
    own = [argument for argument in arguments if not argument.startswith("--config")]
    flags = _parse(own)
    c = config.load([argument for argument in arguments if argument not in own])
    processes, process = (jax.process_count(), jax.process_index()) if flags.hosts is None else (flags.hosts, flags.host)
    if not 0 <= process < processes:
        raise UserError(f"--host={process} must be from 0 to {processes - 1}, for --hosts={processes}")
    speaks = lambda directory: any(path.startswith("llama/") for path in checkpoint.param_shapes(directory))
    checkpoints = list(filter(speaks, filter(None, c.init.split(","))))
    if not checkpoints:
        raise UserError(f"init={c.init!r} names no checkpoint with a language model: --config.init=DIR")
    session = Session.load(checkpoints[0], tokenizer=c.data.tokenizer, mesh=mesh_of(checkpoints[0], jax.local_devices()), batch=flags.batch,
                           truncate="left")
    size = session.size
    found = {(mixture, name): sources.open(path, size.vision.image) for mixture in ("mixture", "eval_mixture") for name, _, path in c.data[mixture]}
    if not found:
        raise UserError("data.mixture is empty; give it a (name, weight, path) row for every source")
    told = {"checkpoint": str(Path(checkpoints[0]).resolve()), "shape": [size.resampler.tokens, size.llama.width],
            "documents": {f"{mixture}/{name}": len(source) for (mixture, name), source in found.items()}}
    directory = Path(flags.to)
    if (directory / NOTES).exists():
        if (before := notes(directory)) != told:
            raise UserError(f"'{directory}' holds conditions of another model or other data ({before}); choose another --to")
    else:
        write(directory / NOTES, lambda file: file.write(json.dumps(told, indent=1).encode()))
    work = [(mixture, name, shard) for (mixture, name), source in found.items() for shard in range(shards(len(source)))]
    todo = [(*row, path) for row in work[process::processes] if not (path := path_of(directory, *row)).with_suffix(".json").exists()]
    for mixture, name, shard, path in tqdm(todo, "conditions", unit=" shards", disable=None):
        make(session, found[mixture, name], shard, path)
    print(f"{len(todo)} shards made, {len(work[process::processes]) - len(todo)} were there; train with --config.data.conditions={directory} "
          "--config.model.decoder.condition=generated")


def make(session: Session, source: Source, shard: int, path: Path) -> None:
    """One shard's files. A record that is corrupt, and a document without an image, have no condition: training does not see them."""
    ids, prompts = [], []
    for index in range(shard * SHARD, min((shard + 1) * SHARD, len(source))):
        try:
            document = source[index]
        except Corrupt:
            continue
        if (parts := before_image(document)) is not None:
            ids.append(document.id)
            prompts.append(parts)
    visual = session.images(prompts) if prompts else np.zeros((0, session.size.resampler.tokens, session.size.llama.width))
    write(path, lambda file: np.save(file, visual.astype(np.float16)))
    write(path.with_suffix(".json"), lambda file: file.write(json.dumps(ids).encode()))


def before_image(document: Document) -> Parts | None:
    """The parts before its first image; of a pair of both, the text. None without an image."""
    parts: list[str] = []
    said = lambda part: part.text if isinstance(part, Text) else part
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
    parser = argparse.ArgumentParser(prog="python -m emu_jax.generate precompute", description=__doc__.splitlines()[0].partition(": ")[2],
                                     allow_abbrev=False)
    parser.error = _fail                            # one line, as everywhere
    parser.add_argument("--to", required=True, metavar="DIR", help="where the conditions are written, or go on being written")
    parser.add_argument("--batch", type=int, default=BATCH, metavar="N", help=f"prompts at once ({BATCH})")
    parser.add_argument("--host", type=int, default=0, metavar="K", help="which of --hosts this is, from 0 (0)")
    parser.add_argument("--hosts", type=int, metavar="N", help="how many share the work; by default the processes that JAX knows of")
    return parser.parse_args(arguments)


def _fail(message: str) -> None:
    raise UserError(message)
