"""Benchmark of reading data on this machine's CPU.

    python -m benchmarks.data [--json=FILE] [--steps=20000]

Measures decoding, the loader with threads and processes, making and packing of sequences, padding
with the paper's mixture, size of the iterator's state, and memory. All data is synthetic:
photographs are filtered noise, and captions have the lengths of those in the paper's data sets. The
exit status is 1 if a bound is violated. Run from the repository's root. Results:
benchmarks/results/data.md.
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
from unittest import mock

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

# Bounds on the shares of empty tokens and of empty image slots, and on the growth of memory.
PADDING = 0.03
EMPTY_SLOTS = 0.10
GROWTH = 0.05
# Visual tokens per image, tokens and images per row, and number of rows to pack.
N = 32
T = 2048
I = 32
ROWS = 400
# Side of synthetic images in measurements where pixels do not matter.
SMALL = 4


def photo(seed: int, width: int = 500, height: int = 375) -> bytes:
    """A JPEG with roughly the spectrum of a photograph: noise at several scales."""
    rng = np.random.default_rng(seed)

    total = np.zeros((height, width, 3), np.float32)
    for step, weight in ((100, 2), (25, 4), (6, 8), (1, 16)):
        coarse = (height // step + 1, width // step + 1, 3)
        noise = Image.fromarray(rng.integers(0, 256, coarse, np.uint8))
        layer = noise.resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(layer, np.float32) / weight
    file = io.BytesIO()
    pixels = np.clip(total, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def plain_pillow(data: bytes) -> np.ndarray:
    """A JPEG's pixels at 224 x 224, decoded at full size and then resized."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC))


def pillow_draft(data: bytes) -> np.ndarray:
    """A JPEG's pixels at 224 x 224, decoded at a lower resolution where JPEG can."""
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (448, 448))
    return np.asarray(image.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC))


def rate(work: Callable, items: list, threads: int = 1, seconds: float = 3.0) -> float:
    """Items per second in the best of three rounds; other programs may slow down the others."""
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
    """Images per second decoded to 224 x 224.

    One thread decodes 500-px JPEGs (the common case in web data) and 2000-px ones; two threads
    decode the small ones.
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
    """A source of documents shaped like those of one of the paper's sets, made from an index."""

    def __init__(self, name: str, documents: int = 1_000_000):
        self.name = name
        self.documents = documents

    def __len__(self) -> int:
        return self.documents

    def __getitem__(self, index: int) -> Document:
        rng = np.random.default_rng(index)
        image = np.full((SMALL, SMALL, 3), index % 256, np.uint8)

        def text(mean: int) -> str:
            return "x" * int(np.clip(rng.lognormal(np.log(mean), 0.6), 1, 1500))

        parts = []
        if self.name == "laion":
            parts = [Pair(image, text(14))]
        elif self.name == "mmc4":
            for _ in range(rng.integers(2, 12)):
                parts += [text(22), text(22), Pair(image, text(22))]
        elif self.name == "webvid":
            parts = [*[image] * 8, text(20)]
        elif self.name == "yt-storyboard":
            for _ in range(rng.integers(8, 33)):
                parts += [text(18), image]
        elif self.name == "text":
            parts = [text(700)]
        return Document(f"{index}", tuple(parts))


def letters() -> Tokenizer:
    """A tokenizer with one token per letter, which is too fast to affect the measurement."""

    def encode(text: str) -> list[int]:
        return [3 + ord(letter) for letter in text]

    return Tokenizer(32000, encode, lambda ids: "")


def synthetic_mixture() -> Mixture:
    """The mixture of configs/pretrain.py, over synthetic sources."""
    names = []
    weights = []
    synthetic = []
    rules = []
    for name, weight, _, *rest in get_config().data.mixture:
        names.append(name)
        weights.append(weight)
        kind = "laion" if name.startswith("laion") else name.removesuffix("-pairs")
        synthetic.append(Synthetic(kind))
        rules.append(SourceRule(**(rest[0] if rest else {})))
    return Mixture(tuple(names), tuple(weights), tuple(synthetic), 1, 0, tuple(rules))


def packing(lookahead: int, fit: Callable) -> dict[str, float]:
    """Documents per second through SequenceBuilder and packing, and the share of empty space.

    One stream packs ROWS rows.
    """
    to_sequence = SequenceBuilder(
        tokenizer=letters(),
        n_visual=N,
        max_tokens=T,
        max_images=I,
        image_first=0.5,
        labels=("text", "</s>"),
    )
    stream = Stream(synthetic_mixture(), 0, to_sequence, lookahead, fit=fit)
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
    """Images per second of a loader, for several numbers of threads and reader processes.

    It reads `photos` 500-px JPEGs from ArrayRecord again and again, and decodes them to 224 x 224
    each time. The first step, in which processes start, is not timed.
    """
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(f"{folder}/0.tar", "w") as tar:
            for number in range(photos):
                add_file(tar, f"{number}.jpg", photo(number))
                add_file(tar, f"{number}.txt", b"a photo of noise")
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
            batches = iter(loader)
            next(batches)
            start = time.perf_counter()
            count = 0
            for _ in range(steps):
                batch = next(batches).batch
                count += int((batch.image_slots < data.tokens).sum())
            results[f"{workers} threads, {readers} readers"] = count / (time.perf_counter() - start)
            loader.close()
    return results


def add_file(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def memory(steps: int) -> dict[str, float]:
    """Resident memory of a loader with small batches, and milliseconds per step.

    Memory is measured after a tenth of the steps and after all of them.
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

    def open_source(path: str, _image_size: int, _fit: str = "squash") -> Synthetic:
        return Synthetic(path)

    with mock.patch.object(sources, "open_source", open_source):
        loader = Loader(data, 0, letters(), N, SMALL)
    resident = []
    start = time.perf_counter()
    for step, _ in enumerate(loader, 1):
        if step in (steps // 10, steps):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident.append(pages * resource.getpagesize())
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to this file")
    parser.add_argument(
        "--steps", type=int, default=20_000, help="steps of the memory test (20000)"
    )
    flags = parser.parse_args()
    results = {"decoding, images a second a core": decoding()}
    # Without a cache, every image that is read is also decoded.
    with mock.patch.object(sources, "CACHE_BYTES", 0):
        results["loader, images a second"] = loading()
    evenly = partial(best_fit, row_tokens=T, row_images=I)
    for lookahead in (16, 32, 64):
        for name, fit in (("first", first_fit), ("best", evenly)):
            results[f"packing, {name} fit, {lookahead} waiting"] = packing(lookahead, fit)
    results["memory"] = memory(flags.steps)
    for title, numbers in results.items():
        print(title)
        for name, value in numbers.items():
            decimals = 4 if value < 1 else 1
            print(f"  {name:24}{value:14,.{decimals}f}")
    if flags.json:
        Path(flags.json).write_text(json.dumps(results, indent=1) + "\n")

    violated = []
    packed = results[f"packing, best fit, {get_config().data.pack_lookahead} waiting"]
    if packed["padding"] > PADDING:
        violated.append(f"padding is {packed['padding']:.3f} of the tokens")
    if packed["empty_slots"] > EMPTY_SLOTS:
        violated.append(f"{packed['empty_slots']:.3f} of the image slots are empty")
    early = results["memory"]["mib_early"]
    late = results["memory"]["mib_late"]
    if late > (1 + GROWTH) * early:
        violated.append(f"memory grew from {early:.0f} to {late:.0f} MiB")
    for what in violated:
        print(f"bound violated: {what}", file=sys.stderr)
    return 1 if violated else 0


if __name__ == "__main__":
    sys.exit(main())
