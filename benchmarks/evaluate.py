"""Benchmark of captioning as in an evaluation (beam 5): batched, and one by one.

    python -m benchmarks.evaluate [--images=32] [--batch=32] [--size=emu-60m] [--json=FILE]

The weights are random, so captions are nonsense, but they take as long as real ones. Images are
decoded from files, as in an evaluation. Run from the repository's root.
"""

import argparse
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from emu_jax import config
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.evaluate.annotations import Example
from emu_jax.evaluate.plan import BenchmarkPlan, BenchmarkSettings
from emu_jax.evaluate.predict import Predictor
from emu_jax.evaluate.tasks import TASKS
from emu_jax.generate.session import Session
from emu_jax.models import emu, module


def noise_images(folder: Path, count: int) -> BenchmarkPlan:
    """Write a captioning benchmark of `count` images of noise, as large as photographs."""
    rng = np.random.default_rng(0)
    examples = []
    paths = {}
    for number in range(count):
        name = f"{number}.jpg"
        paths[name] = folder / name
        Image.fromarray(rng.integers(0, 256, (480, 640, 3), np.uint8)).save(paths[name])
        examples.append(Example(str(number), name, references=("a dog",)))
    return BenchmarkPlan(examples, paths, [], [])


def captions(session: Session, planned: BenchmarkPlan, batch: int) -> tuple[float, list[str]]:
    """(seconds, captions) with `batch` images at a time, without compilation."""
    session.batch = batch
    settings = BenchmarkSettings("coco-caption", "", 0, "", "test")
    predictor = Predictor(session, settings, planned)
    starts = range(0, len(planned.examples), batch)
    batches = [planned.examples[start : start + batch] for start in starts]
    # The last batch may be smaller, and so needs a program of its own.
    for some in (batches[0], batches[-1]):
        predictor.predict(some)
    predictor.frames.cache_clear()
    began = time.perf_counter()
    said = [one.text for some in batches for one in predictor.predict(some)]
    return time.perf_counter() - began, said


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=32, help="number of images (32)")
    parser.add_argument("--batch", type=int, default=32, help="images at once (32)")
    parser.add_argument("--size", default="emu-60m", help="a name in configs/sizes.py (emu-60m)")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to this file")
    flags = parser.parse_args()
    c = config.load([f"--config=configs/base.py:{flags.size}"])
    model_config = emu.EmuConfig.of(c.model.to_dict())
    params = jax.jit(partial(module.init, emu.Emu, model_config))(jax.random.key(0))

    def encode(text: str) -> list[int]:
        return [3 + ord(letter) for letter in text]

    def decode(ids: list[int]) -> str:
        return " ".join(map(str, ids))

    letters = Tokenizer(model_config.llama.vocab, encode, decode)
    session = Session(model_config, params, letters, context=2048)
    with tempfile.TemporaryDirectory() as folder:
        planned = noise_images(Path(folder), flags.images)
        together, said = captions(session, planned, flags.batch)
        alone, said_alone = captions(session, planned, 1)
    numbers = {
        "images": flags.images,
        "batch": flags.batch,
        "task": TASKS["coco-caption"].description,
        "device": jax.devices()[0].device_kind,
        "captions_per_second": flags.images / together,
        "captions_per_second_alone": flags.images / alone,
        "ratio": alone / together,
        "alike": float(np.mean([a == b for a, b in zip(said, said_alone, strict=True)])),
    }
    print(f"{flags.images} captions, {flags.size}, {model_config.compute}, {numbers['device']}")
    print(f"  {flags.batch} at once  {numbers['captions_per_second']:8.2f} a second")
    print(
        f"  one by one  {numbers['captions_per_second_alone']:8.2f} a second; "
        f"{numbers['ratio']:.1f} times as slow, {numbers['alike']:.0%} of the captions the same"
    )
    if flags.json:
        Path(flags.json).write_text(json.dumps(numbers, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
