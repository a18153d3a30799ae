"""Emu's pretraining (section 3 of the paper).

The 14B model trains end to end to predict the next element of interleaved sequences.

python -m emu_jax.train --config=configs/pretrain.py[:emu-7b] --config.workdir=DIR \\
    --config.data.tokenizer=tokenizer.model
"""

from configs.base import get_config as base


def get_config(size: str = "emu-14b"):
    c = base(size)
    # The paper gives a batch size for each data set; here it is the weight of the set in one packed
    # mixture (whether the paper mixes sets within a step is unpublished). 256 rows of 2048 tokens
    # hold about 3,450 documents (benchmarks/images_a_row.py). `python -m emu_jax.data build` writes
    # each folder, with the --kind given above the row.
    c.data.mixture = (
        # --kind=pairs
        ("laion-2b", 128.0, "data/laion-2b:train"),
        # --kind=pairs
        ("laion-coco", 128.0, "data/laion-coco:train"),
        # --kind=mmc4. Half of the documents are subsequences with at most 5 images, half are 5
        # images with their sentences (the shares are unpublished).
        ("mmc4", 32.0, "data/mmc4:train", dict(tokens=1024, images=5, start="random")),
        ("mmc4-pairs", 32.0, "data/mmc4:train", dict(tokens=512, pairs=5)),
        # --kind=videos
        ("webvid", 16.0, "data/webvid:train"),
        # --kind=storyboards
        ("yt-storyboard", 16.0, "data/yt-storyboard:train"),
    )
    # Keeps padding under 3 % and empty image slots under 10 % (benchmarks/data.py).
    c.data.packing = "best_fit"
    c.data.pack_lookahead = 32
    c.checkpoint.every = 500
    # If fsdp spans only some of the devices, the TPU compiler reduce-scatters gradients. If fsdp
    # spans all devices, it uses all-reduce, with twice the traffic (benchmarks/results/fit.md).
    c.mesh.data = 4
    return c
