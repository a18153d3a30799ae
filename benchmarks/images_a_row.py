"""Simulation of the paper's mixture: how many images should fit into a row of 2048 tokens?

    python -m benchmarks.images_a_row [--rows=2000]

Documents are drawn by the mixture's weights, with the lengths of their data sets (LENGTHS), and
packed by the loader's best fit: first without a limit on the images in a row, and then with several
limits, each of which costs some padding. Run from the repository's root. Results:
benchmarks/results/fit.md.
"""

import argparse
from types import SimpleNamespace
from typing import cast

import numpy as np
from ml_collections import ConfigDict

from emu_jax import config
from emu_jax.data.packing import best_fit
from emu_jax.data.sequence import Sequence

# Source -> (range of the number of images in a document, mean and standard deviation of the number
# of its text tokens, which is log-normal). Captions have about 77 characters in LAION-2B, and one
# sentence in LAION-COCO and WebVid. MMC4 gives subsequences of 1024 tokens with at most 5 images,
# and 5 images with a sentence each in 512 tokens. Storyboards have 8 frames and the words spoken
# between them; our guess is 2.5 words per second, 2 seconds per frame and 1.4 tokens per word.
LENGTHS = {
    "laion-2b": ((1, 1), 20, 14),
    "laion-coco": ((1, 1), 14, 4),
    "mmc4": ((1, 5), 500, 250),
    "mmc4-pairs": ((5, 5), 125, 50),
    "webvid": ((8, 8), 20, 10),
    "yt-storyboard": ((8, 8), 56, 30),
}
# The limits on the number of images in a row to try.
LIMITS = (8, 16, 24, 32, 40, 48)


def document(name: str, rng: np.random.Generator, n_visual: int) -> Sequence:
    """A document of a source with only its numbers of tokens and images, for `best_fit`."""
    (least, most), mean, deviation = LENGTHS[name]
    images = rng.integers(least, most + 1)
    spread = np.log(1 + (deviation / mean) ** 2)
    text = max(1, round(rng.lognormal(np.log(mean) - spread / 2, spread**0.5)))
    most_tokens = {"mmc4": 1024, "mmc4-pairs": 512}.get(name, 2048)
    # Count [IMG] and [/IMG] around each image's visual tokens, and <s> and </s> of the document.
    tokens = min(2 + text + images * (n_visual + 2), most_tokens)
    return cast(Sequence, SimpleNamespace(tokens=range(tokens), image_slots=range(images)))


def pack(c: ConfigDict, rows: int, limit: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Pack `rows` rows of at most `limit` images: (tokens, images) of each, all documents."""
    rng = np.random.default_rng(0)
    names = [source[0] for source in c.data.mixture]
    weights = np.array([source[1] for source in c.data.mixture])
    shares = weights / weights.sum()
    waiting = []
    tokens = np.zeros(rows, int)
    images = np.zeros(rows, int)
    documents = 0
    for row in range(rows):
        while True:
            while len(waiting) < c.data.pack_lookahead:
                name = rng.choice(names, p=shares)
                waiting.append(document(name, rng, c.model.resampler.tokens))
            place = best_fit(
                waiting, c.data.tokens - tokens[row], limit - images[row], c.data.tokens, limit
            )
            if place is None:
                break
            found = waiting.pop(place)
            tokens[row] += len(found.tokens)
            images[row] += len(found.image_slots)
            documents += 1
    return tokens, images, documents


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2000, help="rows to simulate (2000)")
    rows = parser.parse_args().rows
    c = config.load(["--config=configs/pretrain.py"])
    batch = c.data.batch
    _, images, documents = pack(c, rows, c.data.tokens)
    quantiles = ", ".join(
        f"{share:.0%} of rows at most {np.quantile(images, share):.0f}"
        for share in (0.5, 0.9, 0.99)
    )
    print(
        f"without a limit: {documents / rows * batch:,.0f} documents in {batch} rows; "
        f"images a row: mean {images.mean():.1f}, {quantiles}"
    )
    print("| images a row | padding | empty image slots | documents a step |")
    print("|---|---|---|---|")
    for limit in LIMITS:
        tokens, images, documents = pack(c, rows, limit)
        padding = 1 - tokens.mean() / c.data.tokens
        empty = 1 - images.mean() / limit
        print(f"| {limit} | {padding:.1%} | {empty:.0%} | {documents / rows * batch:,.0f} |")


if __name__ == "__main__":
    main()
