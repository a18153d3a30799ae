"""Emu's pretraining (section 3 of the paper): 14B, end to end, next element of interleaved sequences.

python -m emu_jax.train --config=configs/pretrain.py[:emu-7b] --config.workdir=DIR --config.data.tokenizer=tokenizer.model
"""
from configs.base import get_config as base


def get_config(size: str = "emu-14b"):
    c = base(size)
    # The paper's batch of each set is its weight here: one mixture, packed, in place of one set a step (unpublished).
    # 256 rows of 2048 tokens hold about 8,200 documents. Paths are FOLDER:SPLIT of tensorflow-datasets datasets.
    c.data.mixture = (("laion-2b", 128.0, "data/laion-2b:train"),
                      ("laion-coco", 128.0, "data/laion-coco:train"),
                      ("mmc4", 64.0, "data/mmc4:train"),
                      ("webvid", 16.0, "data/webvid:train"),
                      ("yt-storyboard", 16.0, "data/yt-storyboard:train"))
    c.checkpoint.every = 500
    # Over a part of the devices the TPU's compiler reduce-scatters gradients, over all of them it sums them whole (benchmarks/results/fit.md).
    c.mesh.data = 4
    return c
