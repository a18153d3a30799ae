"""RICES (arXiv 2206.08916): the examples of a prompt are those whose pictures are nearest to the
question's in the encoder's space.

A picture's feature is the mean over its patches of what the LLM's side of the encoder reads, of
length 1; of a video, over its frames. The index of all examples is made once and saved. Read next:
benchmark.py.
"""

import zipfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from tqdm import tqdm

from emu_jax import sharding
from emu_jax.config import UserError
from emu_jax.generate.session import Session
from emu_jax.models import emu, module
from emu_jax.models.vision import normalise
from emu_jax.processes import to_host
from emu_jax.tree import Tree

Frames = Sequence[UInt8[np.ndarray, "h w 3"]]


class Index(NamedTuple):
    names: list[str]
    features: Float[np.ndarray, "n E"]

    def nearest(self, feature: Float[np.ndarray, "E"], count: int, but: str) -> list[str]:
        """The names of the `count` nearest, the nearest last, without the picture `but`."""
        order = np.argsort(-(self.features @ feature), kind="stable")[: count + 1]
        return [self.names[k] for k in order if self.names[k] != but][:count][::-1]


def features(session: Session, pictures: Iterable[Frames]) -> Float[np.ndarray, "n E"]:
    """Of pictures or of videos' frames, a session's batch of images at a time."""
    waiting: list[np.ndarray] = []
    owners: list[int] = []
    count = 0
    sums = {}

    def flush() -> None:
        # one shape, one compilation
        rows = np.minimum(
            np.arange(-(-session.batch // session.shards) * session.shards), len(waiting) - 1
        )
        with nullcontext() if session.mesh is None else jax.set_mesh(session.mesh):
            found = to_host(
                _features(session.model_config, session.params, np.stack(waiting)[rows])
            )
        for owner, feature in zip(owners, found, strict=False):
            sums[owner] = sums.get(owner, 0) + feature
        waiting.clear()
        owners.clear()

    for frames in pictures:
        for frame in frames:
            waiting.append(frame)
            owners.append(count)
            if len(waiting) == session.batch:
                flush()
        count += 1
    if waiting:
        flush()
    found = (
        np.stack([sums[number] for number in range(count)])
        if count
        else np.zeros((0, session.model_config.vision.width), np.float32)
    )
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)


def saved(
    path: Path, of: str, names: Sequence[str], session: Session, load: Callable[[str], Frames]
) -> Index:
    """The index of the pictures `names` in the file `path`; made and written where it is not there,
    or is `of` another model or other pictures.
    """
    names = list(names)
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as file:
                if str(file["of"]) == of and file["names"].tolist() == names:
                    return Index(names, file["features"])
        except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{path}: no index of examples; remove it, and it is made again"
            ) from error
    index = Index(
        names,
        features(
            session,
            (load(name) for name in tqdm(names, "examples", unit=" pictures", disable=None)),
        ),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        np.savez(file, of=of, names=np.array(names), features=index.features)
    part.replace(path)
    return index


@partial(jax.jit, static_argnums=0)
def _features(
    config: emu.EmuConfig, params: Tree, images: UInt8[Array, "M h w 3"]
) -> Float[Array, "M E"]:
    model = module.bind(emu.Emu, config, params)
    x = normalise(sharding.constrain_images(images), config.vision, config.compute)
    seen = model.ln_visual(model.vision(x, kernel=config.attention)).astype(jnp.float32).mean(1)
    return seen / jnp.linalg.norm(seen, axis=1, keepdims=True)
