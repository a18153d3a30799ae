"""The data path on this machine's CPU.

    python -m benchmarks.data [--json=FILE] [--steps=20000]

Decoding, the loader with threads and processes, sequences and packing, padding of the paper's
mixture, state of the iterator, memory. All data is synthetic: photographs are filtered noise,
captions have the lengths of the sets they stand for. Exits 1 if a bound is violated. Run from the
repository's root. Results: benchmarks/results/data.md.
"""

import argparse
import io
import json
import os
import resource
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
import numpy as np
from PIL import Image

from configs.pretrain import get_config
from emu_jax.data import images, sources
from emu_jax.data.builders import build
from emu_jax.data.documents import Document, Pair
from emu_jax.data.loader import Loader
from emu_jax.data.mixture import Mixture, Stream
from emu_jax.data.packing import best_fit, first_fit
from emu_jax.data.sequence import SequenceBuilder, SourceRule
from emu_jax.data.sources.options import SourceOptions
from emu_jax.data.tokenizer import Tokenizer

# the bounds: tokens and image slots that hold nothing; memory over the steps
PADDING = 0.03
EMPTY_SLOTS = 0.10
GROWTH = 0.05
# visual tokens of an image, tokens and images of a row
N = 32
T = 2048
I = 32
ROWS = 400
# side of the synthetic images of the packing trials: their pixels are not the matter
SMALL = 4


def photo(seed: int, width: int = 500, height: int = 375) -> bytes:
    """A JPEG with the spectrum of a photograph, roughly: noise at several scales."""
    rng = np.random.default_rng(seed)

    def noise(step):
        return Image.fromarray(
            rng.integers(0, 256, (height // step + 1, width // step + 1, 3), np.uint8)
        )

    layers = [
        np.asarray(noise(step).resize((width, height), Image.Resampling.BICUBIC), np.float32)
        / weight
        for step, weight in ((100, 2), (25, 4), (6, 8), (1, 16))
    ]
    file = io.BytesIO()
    Image.fromarray(np.clip(sum(layers), 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def plain_pillow(data: bytes) -> np.ndarray:
    return np.asarray(
        Image.open(io.BytesIO(data)).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
    )


def pillow_draft(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (448, 448))
    return np.asarray(image.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC))


def rate(work: Callable, items: list, threads: int = 1, seconds: float = 3.0) -> float:
    """Items a second, the best of three rounds (on a busy machine the others tell of the
    others).
    """
    with ThreadPoolExecutor(threads) as pool:
        rounds = []
        for _ in range(3):
            done = 0
            start = time.perf_counter()
            while time.perf_counter() - start < seconds / 3:
                list(pool.map(work, items))
                done += len(items)
            rounds.append(done / (time.perf_counter() - start))
    return max(rounds)


def decoding() -> dict[str, float]:
    """Images a second a core, to 224: 500-px JPEGs (the common case of web sets) and 2000-px ones;
    and by two threads.
    """
    small = [photo(seed) for seed in range(8)]
    large = [photo(seed, 2000, 1500) for seed in range(2)]
    ours = partial(images.decode, size=224)
    return {
        "ours_500": rate(ours, small),
        "pillow_500": rate(plain_pillow, small),
        "pillow_draft_500": rate(pillow_draft, small),
        "ours_2000": rate(ours, large),
        "pillow_2000": rate(plain_pillow, large),
        "pillow_draft_2000": rate(pillow_draft, large),
        "ours_500_two_threads": rate(ours, small, threads=2),
    }


class Synthetic:
    """A source of documents with the shape of one of the paper's sets, made from their numbers."""

    def __init__(self, name: str, documents: int = 1_000_000):
        self.name = name
        self.documents = documents

    def __len__(self) -> int:
        return self.documents

    def __getitem__(self, index: int) -> Document:
        rng = np.random.default_rng(index)
        image = np.full((SMALL, SMALL, 3), index % 256, np.uint8)

        def text(mean):
            return "x" * int(np.clip(rng.lognormal(np.log(mean), 0.6), 1, 1500))

        parts = {
            "laion": lambda: [Pair(image, text(14))],
            "mmc4": lambda: [
                part
                for _ in range(rng.integers(2, 12))
                for part in (text(22), text(22), Pair(image, text(22)))
            ],
            "webvid": lambda: [*[image] * 8, text(20)],
            "yt-storyboard": lambda: [
                part for _ in range(rng.integers(8, 33)) for part in (text(18), image)
            ],
            "text": lambda: [text(700)],
        }[self.name]
        return Document(f"{index}", tuple(parts()))


def letters() -> Tokenizer:
    """A letter is a token: what is measured is ours, not a tokenizer's."""
    return Tokenizer(32000, lambda text: [3 + ord(letter) for letter in text], lambda ids: "")


def paper() -> tuple[tuple, ...]:
    """configs/pretrain.py's mixture over synthetic sources."""
    return tuple(
        (
            name,
            weight,
            Synthetic("laion" if name.startswith("laion") else name.removesuffix("-pairs")),
            SourceRule(**(rest[0] if rest else {})),
        )
        for name, weight, _, *rest in get_config().data.mixture
    )


def packing(lookahead: int, fit: Callable) -> dict[str, float]:
    """Documents a second through sequence and packing, and what is left empty, over ROWS rows of
    one stream.
    """
    names, weights, sources, rules = zip(*paper())
    to_sequence = SequenceBuilder(
        tokenizer=letters(),
        n_visual=N,
        max_tokens=T,
        max_images=I,
        image_first=0.5,
        labels=("text", "</s>"),
    )
    stream = Stream(
        Mixture(names, weights, sources, 1, 0, rules), 0, to_sequence, lookahead, fit=fit
    )
    start = time.perf_counter()
    for _ in range(ROWS):
        stream.row(T, I)
    seconds = time.perf_counter() - start
    counts = stream.counts
    return {
        "documents_per_second": counts["documents"] / seconds,
        "padding": 1 - counts["tokens"] / (ROWS * T),
        "empty_slots": 1 - counts["images"] / (ROWS * I),
        "state_bytes": len(json.dumps(stream.state())),
    }


def loading(photos: int = 200, steps: int = 60) -> dict[str, float]:
    """Images a second of a loader that reads `photos` 500-px JPEGs from ArrayRecord, again and
    again without keeping them, to 224, by who reads; the first step, in which processes start, is
    not counted.
    """
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(f"{folder}/0.tar", "w") as tar:
            for number in range(photos):
                for name, content in (
                    (f"{number}.jpg", photo(number)),
                    (f"{number}.txt", b"a photo of noise"),
                ):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        build.build(
            "pairs", [Path(folder, "0.tar")], Path(folder, "set"), SourceOptions(), workers=1
        )
        data = get_config().data
        data.unlock()
        for workers, readers in ((1, 0), (2, 0), (1, 1), (2, 2)):
            data.update(
                dict(
                    batch=8,
                    tokens=512,
                    images=8,
                    num_streams=4,
                    workers=workers,
                    readers=readers,
                    mixture=(("web", 1.0, f"{folder}/set:train"),),
                )
            )
            loader = Loader(data, 0, letters(), N, 224)
            count = 0
            start = 0.0
            for step, item in enumerate(loader):
                start = start or time.perf_counter()
                count += step and int((item.batch.image_slots < data.tokens).sum())
                if step == steps:
                    break
            results[f"{workers} threads, {readers} readers"] = count / (time.perf_counter() - start)
            loader.close()
    return results


def memory(steps: int) -> dict[str, float]:
    """Resident memory of a loader of small batches, after a tenth of the steps and at their end,
    and seconds a step.
    """
    data = get_config().data
    data.unlock()
    data.update(
        dict(
            batch=4,
            tokens=512,
            images=8,
            num_streams=4,
            workers=2,
            mixture=(("web", 1.0, "laion"), ("pages", 0.2, "mmc4"), ("plain", 0.1, "text")),
        )
    )
    sources.open_source = lambda path, image_size, fit: Synthetic(path)
    loader = Loader(data, 0, letters(), N, SMALL)
    resident = []
    start = time.perf_counter()
    for step, _ in enumerate(loader, 1):
        if step in (steps // 10, steps):
            resident.append(
                int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
            )
        if step == steps:
            break
    loader.close()
    return {
        "steps": steps,
        "mib_early": resident[0] / 2**20,
        "mib_late": resident[1] / 2**20,
        "ms_a_step": 1000 * (time.perf_counter() - start) / steps,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", default="")
    parser.add_argument("--steps", type=int, default=20_000)
    flags = parser.parse_args()
    results = {"decoding, images a second a core": decoding()}
    # what is read is decoded, every time
    sources.CACHE_BYTES = 0
    results["loader, images a second"] = loading()
    evenly = partial(best_fit, row_tokens=T, row_images=I)
    for lookahead in (16, 32, 64):
        for name, fit in (("first", first_fit), ("best", evenly)):
            results[f"packing, {name} fit, {lookahead} waiting"] = packing(lookahead, fit)
    results["memory"] = memory(flags.steps)
    for title, numbers in results.items():
        print(title)
        for name, value in numbers.items():
            print(f"  {name:24}{value:14,.4f}" if value < 1 else f"  {name:24}{value:14,.1f}")
    if flags.json:
        Path(flags.json).write_text(json.dumps(results, indent=1) + "\n")
    packed = results[f"packing, best fit, {get_config().data.pack_lookahead} waiting"]
    held = results["memory"]
    broken = [
        what
        for wrong, what in (
            (packed["padding"] > PADDING, f"padding {packed['padding']:.3f} of the tokens"),
            (
                packed["empty_slots"] > EMPTY_SLOTS,
                f"{packed['empty_slots']:.3f} of the image slots are empty",
            ),
            (
                held["mib_late"] > (1 + GROWTH) * held["mib_early"],
                f"memory grew from {held['mib_early']:.0f} to {held['mib_late']:.0f} MiB",
            ),
        )
        if wrong
    ]
    for what in broken:
        print(f"bound violated: {what}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
