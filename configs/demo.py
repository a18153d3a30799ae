"""The demo: a small Emu that learns to caption and to draw on two CPU cores: `make demo`.

python -m emu_jax.train --config=configs/demo.py:warmup     contrastive pretraining of an encoder
python -m emu_jax.train --config=configs/demo.py            Emu's objective, from that encoder
python -m emu_jax.train --config=configs/demo.py:decoder    a U-Net on pixels, from visual tokens
python -m emu_jax.train --config=configs/demo.py:instruct   LoRA on questions: `make demo-chat`
"""

from configs.base import get_config as base
from configs.decoder import decoder as sd15


def get_config(stage: str = "emu"):
    stages = {"warmup": warmup, "emu": emu, "decoder": decoder, "instruct": instruct}
    if stage not in stages:
        raise ValueError(f"the demo's stages are {', '.join(stages)}, not {stage!r}")
    c = base("demo")
    c.workdir = f"runs/demo/{stage}"
    c.data.tokenizer = "data/demo/tokenizer.json"
    c.data.num_streams = 8
    c.data.workers = 2
    c.data.image_first = 0.5
    c.checkpoint.every = 500
    c.checkpoint.keep = 2
    c.optim.warmup = 0.05
    stages[stage](c)
    return c


def warmup(c):
    c.stage = "contrastive"
    c.data.mixture = (
        ("names", 0.5, "data/demo/names:train"),
        ("scenes", 0.5, "data/demo/scenes:train"),
    )
    # About 128 images per step, and each is contrasted with all others.
    c.data.batch = 16
    c.data.tokens = 128
    c.data.images = 8
    # A probe of the visual tokens classifies 54 to 65 % of held-out scenes correctly after 400
    # steps, and 71 % after 900.
    c.optim.steps = 900
    c.optim.b2 = 0.98
    # Without shifts, the 1,881 drawings would be memorised.
    c.objective.shift = 3
    # A small model that starts from scratch needs a higher learning rate: 20 to 50 times the rates
    # of the paper, whose towers are large and pretrained.
    c.rules.peak_lr = ((".*", 2e-3),)
    c.rules.groups = (("vision/.*", "vision"), ("contrast/.*", "contrast"), (".*", "resampler"))


def emu(c):
    c.init = "runs/demo/warmup"
    c.data.mixture = (
        ("names", 0.5, "data/demo/names:train"),
        ("scenes", 0.4, "data/demo/scenes:train"),
        ("stories", 0.1, "data/demo/stories:train"),
    )
    c.data.eval_mixture = (
        ("names", 1.0, "data/demo/names:held_out"),
        ("scenes", 1.0, "data/demo/scenes:held_out"),
        ("stories", 1.0, "data/demo/stories:held_out"),
    )
    # A row holds ten images, of 6 elements each, with their names.
    c.data.batch = 8
    c.data.tokens = 128
    c.data.images = 10
    # Each name occurs about 34 times, half of them before its drawing. The share of names that find
    # their own drawing among the nearest five was 61 % after 1,700 steps, then 71 % (1,800), 69 %
    # (1,900) and 78 % (2,000).
    c.optim.steps = 1900
    c.eval.every = 500
    # Compute the logits of all 128 tokens of a row at once: with 8 rows they are small.
    c.objective.chunk = 128
    # With a weight of 1, captions are as good, but only 31 % of the names find their own drawing
    # among the nearest five, instead of 79 %.
    c.objective.image_weight = 4.0
    # The encoder is frozen. Trained end to end (learning rate 5e-4), the visual tokens' variance
    # held at 0.36 to 0.48, but a step took 1.7 times as long and captions were no better.
    c.rules.train = (("(vision|ln_visual|resampler)/.*", False), (".*", True))
    c.rules.peak_lr = ((".*", 3e-3),)


def instruct(c):
    c.init = "runs/demo/emu"
    c.model.llama.added = 6
    c.model.lora.rank = 16
    c.rules.train = ((".*/(a|b)", True), ("llama/(embed|lm_head)/added", (4, 6)), (".*", False))
    c.rules.peak_lr = ((".*", 5e-3),)
    c.rules.decay = ((".*", 0.0),)
    c.data.mixture = (("questions", 1.0, "data/demo/questions:train"),)
    c.data.eval_mixture = (("questions", 1.0, "data/demo/questions:held_out"),)
    # The release's system message would make up two thirds of a conversation.
    c.data.system = "none"
    c.data.batch = 8
    c.data.tokens = 192
    c.data.images = 4
    c.objective.chunk = 192
    c.optim.steps = 600
    c.eval.every = 200
    c.log.pictures_every = 0


def decoder(c):
    c.stage = "decoder"
    c.init = "runs/demo/emu"
    c.model.decoder = sd15(c.model.llama.width)
    # As in the paper. `make demo` precomputes the conditions first.
    c.model.decoder.update(dict(image=32, condition="generated"))
    c.data.conditions = "runs/demo/conditions"
    # For half of the images, the condition is the encoder's tokens, so that the decoder can also
    # draw from the tokens of real images.
    c.objective.encoded_share = 0.5
    # Diffusion on pixels, without a VAE.
    c.model.decoder.vae = {}
    # `pooled` adds a projection of the concatenated visual tokens to the time embedding, which
    # distinguishes the tokens from the first step on; attention starts by averaging them. `side`
    # gives each of the 8 x 8 positions its own projection of that embedding; without it all
    # positions get the same. It costs an eighth of the FLOPs and halves the number of steps needed.
    # There is one level only: a second one, of 4 x 4 positions, cost a fifth of the FLOPs and drew
    # no better.
    c.model.decoder.unet.update(
        dict(
            channels_in=3,
            channels_out=3,
            patch=4,
            widths=(64,),
            resnets=(1,),
            attends_down=(False,),
            attends_up=(False,),
            depths=(1,),
            heads=(4,),
            pooled=c.model.resampler.tokens,
            side=8,
            time=1536,
            groups=8,
            remat="none",
        )
    )
    # With target x0, what is not learnt yet comes out blurred. With the velocity as the target,
    # only noise was visible after 300 steps.
    c.model.decoder.diffusion.update(dict(target="x0", zero_snr=True))
    c.rules.train = (("unet/.*", True), (".*", False))
    c.rules.peak_lr = ((".*", 3e-3),)
    c.rules.groups = (("unet/.*/cross/.*", "condition"), (".*", "unet"))
    c.optim.ema = 0.99
    c.optim.clip = 1.0
    c.data.mixture = (
        ("names", 0.8, "data/demo/names:train"),
        ("scenes", 0.2, "data/demo/scenes:train"),
    )
    c.data.eval_mixture = (
        ("names", 1.0, "data/demo/names:held_out"),
        ("scenes", 1.0, "data/demo/scenes:held_out"),
    )
    c.data.batch = 64
    c.data.tokens = 32
    c.data.images = 1
    c.data.image_first = 0.0
    # Each drawing occurs about 26 times.
    c.optim.steps = 950
    c.eval.every = 950
    c.log.pictures_every = 0
    # Few sampling steps are best: in minutes of training the decoder learns where the parts are,
    # and each further step adds specks. The mean error per pixel, of 255, was 18.4 with 2 steps and
    # guidance 1.5, 18.8 with 4 steps, and 19.6 with 8 steps and guidance 2.
    c.drawing.update(dict(sampler="ddim", steps=3, guidance=1.5, negative="zeros"))
