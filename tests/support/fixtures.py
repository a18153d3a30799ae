"""A tiny data set for other tests, made once per process by the demo's own code."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from emu_jax.data import tokenizer
from emu_jax.demo import openmoji

# Image size and vocabulary of the config "debug".
IMAGE = 28
VOCAB = 512
MIXTURE = (("names", 1.0, "names"), ("scenes", 2.0, "scenes"), ("stories", 1.0, "stories"))


def write_tiny(to: Path) -> None:
    """Write splits "train" and "held_out" of 24 captioned images and 8 stories each.

    Images are IMAGE pixels wide. The captioned ones are the data sets names and scenes.
    tokenizer.json has VOCAB pieces.
    """
    shutil.copytree(_tiny(), to, dirs_exist_ok=True)


@cache
def _tiny() -> Path:
    to = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, to, ignore_errors=True)
    openmoji.write(to, seed=0, image=IMAGE, first=8)
    tokenizer.train(sorted(openmoji.files()), VOCAB, to / "tokenizer.json")
    return to


def shard(dataset: Path, split: str = "train") -> Path:
    """The file of one split of a data set such as DIR/names."""
    return next(dataset.glob(f"*/*/*-{split}.array_record*"))


def mixture(to: Path, split: str) -> tuple[tuple[str, float, str], ...]:
    """Rows for config.data.mixture (split "train") or config.data.eval_mixture ("held_out")."""
    return tuple((name, weight, f"{to}/{folder}:{split}") for name, weight, folder in MIXTURE)
