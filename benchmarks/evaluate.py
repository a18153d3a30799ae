"""Captions a second as in a benchmark (beam 5, 8 to 20 tokens): in batches and one by one.

    python -m benchmarks.evaluate [--images=32] [--batch=32] [--size=emu-60m] [--json=FILE]

Weights are random: the captions are nonsense, but take as long. Images are decoded from files, as
in an evaluation. Run from the repository's root.
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
from emu_jax.evaluate import benchmark
from emu_jax.evaluate.annotations import Example
from emu_jax.evaluate.tasks import TASKS
from emu_jax.generate.session import Session
from emu_jax.models import emu, module


def pictures(folder: Path, count: int) -> benchmark.Plan:
    """A benchmark of `count` photographs' size, of noise."""
    rng = np.random.default_rng(0)
    examples = [Example(str(k), f"{k}.jpg", answers=("a dog",)) for k in range(count)]
    for example in examples:
        Image.fromarray(rng.integers(0, 256, (480, 640, 3), np.uint8)).save(
            folder / example.picture
        )
    return benchmark.Plan(
        examples, {example.picture: folder / example.picture for example in examples}, [], []
    )


def captions(session: Session, planned: benchmark.Plan, batch: int) -> tuple[float, list[str]]:
    """(seconds, what was said); everything is compiled before."""
    session.batch = batch
    settings = benchmark.Settings("coco-caption", "", 0, "", "test")
    asker = benchmark.Asker(session, settings, planned)
    batches = [
        planned.examples[start : start + batch] for start in range(0, len(planned.examples), batch)
    ]
    # which may be smaller
    for some in (batches[0], batches[-1]):
        asker.predict(some)
    asker.frames.cache_clear()
    began = time.perf_counter()
    said = [one.said for some in batches for one in asker.predict(some)]
    return time.perf_counter() - began, said


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=32, help="pictures (32)")
    parser.add_argument("--batch", type=int, default=32, help="pictures at once (32)")
    parser.add_argument("--size", default="emu-60m", help="of configs/sizes.py (emu-60m)")
    parser.add_argument("--json", metavar="FILE", help="the numbers, as JSON")
    flags = parser.parse_args()
    model_config = emu.EmuConfig.of(
        config.load([f"--config=configs/base.py:{flags.size}"]).model.to_dict()
    )
    params = jax.jit(partial(module.init, emu.Emu, model_config))(jax.random.key(0))
    letters = Tokenizer(
        model_config.llama.vocab,
        lambda text: [3 + ord(letter) for letter in text],
        lambda ids: " ".join(map(str, ids)),
    )
    session = Session(model_config, params, letters, context=2048)
    with tempfile.TemporaryDirectory() as folder:
        planned = pictures(Path(folder), flags.images)
        together, said = captions(session, planned, flags.batch)
        alone, said_alone = captions(session, planned, 1)
    numbers = {
        "images": flags.images,
        "batch": flags.batch,
        "task": TASKS["coco-caption"].what,
        "device": jax.devices()[0].device_kind,
        "captions_per_second": flags.images / together,
        "captions_per_second_alone": flags.images / alone,
        "ratio": alone / together,
        "alike": float(np.mean([a == b for a, b in zip(said, said_alone, strict=True)])),
    }
    print(f"{flags.images} captions, {flags.size}, {model_config.compute}, {numbers['device']}")
    print(f"  {flags.batch} at once  {numbers['captions_per_second']:8.2f} a second")
    print(
        f"  one by one  {numbers['captions_per_second_alone']:8.2f} a second; {numbers['ratio']:.1f} times as slow, "
        f"{numbers['alike']:.0%} of the captions the same"
    )
    if flags.json:
        Path(flags.json).write_text(json.dumps(numbers, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
