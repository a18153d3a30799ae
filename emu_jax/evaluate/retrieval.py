"""RICES (arXiv 2206.08916): few-shot examples with images similar to that of the question.

The feature of an image is the mean over its patches of the encoder's output (after ln_visual),
scaled to norm 1; that of a video is the mean over its frames. The features of all examples are
computed once and saved. Read next: predict.py.
"""

import zipfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from tqdm import tqdm

from emu_jax import cli, sharding
from emu_jax.batching import pad_batch
from emu_jax.config import UserError
from emu_jax.generate.session import Session
from emu_jax.models import emu, module
from emu_jax.models.vision import normalise
from emu_jax.processes import to_host
from emu_jax.tree import Tree

Frames = Sequence[UInt8[np.ndarray, "h w 3"]]


class Index(NamedTuple):
    """Features of images or videos, one row per name."""

    names: list[str]
    features: Float[np.ndarray, "n E"]

    def nearest(self, feature: Float[np.ndarray, "E"], count: int, exclude: str) -> list[str]:
        """The names of the `count` nearest except `exclude`, in order, with the nearest last."""
        order = np.argsort(-(self.features @ feature), kind="stable")[: count + 1]
        names = [self.names[row] for row in order]
        return [name for name in names if name != exclude][:count][::-1]


def compute_features(session: Session, items: Iterable[Frames]) -> Float[np.ndarray, "n E"]:
    """Features of images (one frame each) or videos.

    Frames are encoded in batches of one shape, `session.batch` rounded up to a multiple of the
    shards, so that the encoder is compiled once.
    """
    rows = -(-session.batch // session.shards) * session.shards
    sums: list[np.ndarray] = []
    waiting: list[np.ndarray] = []
    owners: list[int] = []

    def flush() -> None:
        """Add the features of the waiting frames to the sums of their items."""
        images = np.stack(pad_batch(waiting, rows))
        with session.mesh_context():
            features = to_host(_frame_features(session.model_config, session.params, images))
        for owner, feature in zip(owners, features, strict=False):
            sums[owner] = sums[owner] + feature
        waiting.clear()
        owners.clear()

    width = session.model_config.vision.width
    for frames in items:
        sums.append(np.zeros(width, np.float32))
        for frame in frames:
            waiting.append(frame)
            owners.append(len(sums) - 1)
            if len(waiting) == session.batch:
                flush()
    if waiting:
        flush()
    features = np.stack(sums) if sums else np.zeros((0, width), np.float32)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def load_or_build_index(
    path: Path,
    model_id: str,
    names: Sequence[str],
    session: Session,
    load_frames: Callable[[str], Frames],
) -> Index:
    """Load the index in the file `path`, or build and save it.

    An index of another model or other names is replaced. Raises UserError if the file is not an
    index.
    """
    names = list(names)
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as file:
                if str(file["of"]) == model_id and file["names"].tolist() == names:
                    return Index(names, file["features"])
        except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{path}: not an index of examples; remove it and run the command again"
            ) from error
    progress = tqdm(names, "examples", unit=" images", disable=None)
    features = compute_features(session, (load_frames(name) for name in progress))
    with cli.output_file(path, "wb") as file:
        np.savez(file, of=model_id, names=np.array(names), features=features)
    return Index(names, features)


@partial(jax.jit, static_argnums=0)
def _frame_features(
    config: emu.EmuConfig, params: Tree, images: UInt8[Array, "M h w 3"]
) -> Float[Array, "M E"]:
    model = module.bind(emu.Emu, config, params)
    pixels = normalise(sharding.constrain_images(images), config.vision, config.compute)
    patches = model.ln_visual(model.vision(pixels, kernel=config.attention))
    features = patches.astype(jnp.float32).mean(1)
    return features / jnp.linalg.norm(features, axis=1, keepdims=True)
