"""Emu's pretraining (section 3 of the paper): 14B, end to end, next element of interleaved
sequences.

python -m emu_jax.train --config=configs/pretrain.py[:emu-7b] --config.workdir=DIR
--config.data.tokenizer=tokenizer.model
"""

from configs.base import get_config as base


def get_config(size: str = "emu-14b"):
    c = base(size)
    # The paper's batch of each set is its weight here: one mixture, packed, in place of one set a
    # step (unpublished). 256 rows of 2048 tokens hold about 3,450 documents
    # (benchmarks/images_a_row.py). Paths are FOLDER:SPLIT of what `python -m emu_jax.data build`
    # writes. Of MMC4 half is subsequences with at most 5 images, half is 5 images with their
    # sentences (how they were mixed is unpublished). --kind=pairs
    c.data.mixture = (
        ("laion-2b", 128.0, "data/laion-2b:train"),
        # --kind=pairs
        ("laion-coco", 128.0, "data/laion-coco:train"),
        ("mmc4", 32.0, "data/mmc4:train", dict(tokens=1024, images=5, start="random")),
        ("mmc4-pairs", 32.0, "data/mmc4:train", dict(tokens=512, pairs=5)),
        # --kind=videos
        ("webvid", 16.0, "data/webvid:train"),
        # --kind=storyboards
        ("yt-storyboard", 16.0, "data/yt-storyboard:train"),
    )
    # padding and empty image slots: benchmarks/data.py
    c.data.packing = "best_fit"
    c.data.pack_lookahead = 32
    c.checkpoint.every = 500
    # Over a part of the devices the TPU's compiler reduce-scatters gradients, over all of them it
    # sums them whole (benchmarks/results/fit.md).
    c.mesh.data = 4
    return c
