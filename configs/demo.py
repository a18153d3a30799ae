"""The demo: a small Emu learns drawings and scenes on two CPU cores, in minutes. `make demo` runs both stages.

python -m emu_jax.train --config=configs/demo.py:warmup     an encoder of our own: contrastive
python -m emu_jax.train --config=configs/demo.py            Emu's objective, from that encoder
"""
from configs.base import get_config as base


def get_config(stage: str = "emu"):
    if stage not in ("warmup", "emu"):
        raise ValueError(f"the demo's stages are 'warmup' and 'emu', not {stage!r}")
    c = base("demo")
    c.stage = {"warmup": "contrastive", "emu": "emu"}[stage]
    c.workdir = f"runs/demo/{stage}"
    c.data.tokenizer = "data/demo/tokenizer.json"
    c.data.num_streams = 8
    c.data.workers = 2
    c.data.image_first = 0.5
    c.checkpoint.every = 500
    c.checkpoint.keep = 2
    c.optim.warmup = 0.05
    (warmup if stage == "warmup" else emu)(c)
    return c


def warmup(c):
    c.data.mixture = (("names", 0.5, "data/demo/names:train"), ("scenes", 0.5, "data/demo/scenes:train"))
    c.data.batch, c.data.tokens, c.data.images = 16, 128, 8
    c.optim.steps = 900
    c.optim.b2 = 0.98
    c.objective.shift = 3
    c.rules.peak_lr = ((".*", 2e-3),)
    c.rules.groups = (("vision/.*", "vision"), ("contrast/.*", "contrast"), (".*", "resampler"))


def emu(c):
    c.init = "runs/demo/warmup"
    c.data.mixture = (("names", 0.5, "data/demo/names:train"), ("scenes", 0.4, "data/demo/scenes:train"),
                      ("stories", 0.1, "data/demo/stories:train"))
    c.data.eval_mixture = (("names", 1.0, "data/demo/names:held_out"), ("scenes", 1.0, "data/demo/scenes:held_out"),
                           ("stories", 1.0, "data/demo/stories:held_out"))
    c.data.batch, c.data.tokens, c.data.images = 8, 128, 10
    c.optim.steps = 2000
    c.eval.every = 500
    c.objective.chunk = 128
    c.rules.train = (("(vision|ln_visual|resampler)/.*", False), (".*", True))
    c.rules.peak_lr = ((".*", 3e-3),)
