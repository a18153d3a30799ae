"""Emu's visual decoder (section 2.3 of the paper): Stable Diffusion 1.5's U-Net learns to draw what
visual tokens say; all else is frozen.

python -m emu_jax.generate precompute --config=configs/decoder.py[:emu-7b] --config.init=EMU
--config.data.tokenizer=... --to=data/conditions python -m emu_jax.train
--config=configs/decoder.py[:emu-7b] --config.workdir=DIR --config.init=EMU,SD
--config.data.tokenizer=tokenizer.model
"""

from ml_collections import ConfigDict

from configs.base import get_config as base


def get_config(size: str = "emu-14b"):
    c = base(size)
    c.stage = "decoder"
    c.frozen_dtype = "bfloat16"
    c.model.decoder = decoder(c.model.llama.width)
    c.rules.train = (("unet/.*", True), (".*", False))
    c.rules.peak_lr = ((".*", 1e-4),)
    c.rules.decay = ((".*", 1e-2),)
    c.rules.groups = (("unet/.*/cross/.*", "condition"), (".*", "unet"))
    c.optim.steps = 15_000
    c.optim.schedule = "stepped"
    c.optim.warmup = 1 / 3
    c.optim.boundaries = ((10_000, 0.5), (14_000, 0.1))
    # eps unpublished
    c.optim.b2 = 0.999
    c.optim.eps = 1e-8
    # unpublished
    c.optim.clip = 1.0
    # unpublished
    c.optim.ema = 0.9999
    # Data sets of their own, built with --kind=pairs --max-chars=150: the paper drops longer
    # captions.
    c.data.mixture = (
        ("laion-coco", 7.0, "data/laion-coco-150:train"),
        ("laion-aesthetics", 2.0, "data/laion-aesthetics-150:train"),
    )
    c.data.batch = 1600
    c.data.num_streams = 64
    # a caption and its image
    c.data.tokens = 96
    c.data.images = 1
    # the caption says what is drawn
    c.data.image_first = 0.0
    # "" for a model.decoder.condition that is not "generated"
    c.data.conditions = "data/conditions"
    c.checkpoint.every = 500
    return c


def decoder(condition: int) -> ConfigDict:
    """The decoder of a model whose visual tokens have the width `condition`: Stable Diffusion 1.5's
    sizes.
    """
    return ConfigDict(
        dict(
            # pixels a side of what is drawn
            image=512,
            # whence the visual tokens: the LLM's prediction of each from those that it made before,
            # cached (the paper's; see data.conditions); "teacher_forced": from the true ones;
            # "encoded": the image's own, without LLM
            condition="generated",
            unet=dict(
                channels_in=4,
                channels_out=4,
                patch=1,
                widths=(320, 640, 1280, 1280),
                resnets=(2, 2, 2, 2),
                attends_down=(True, True, True, False),
                attends_up=(True, True, True, False),
                depths=(1, 1, 1, 1),
                # SD 2: (5, 10, 20, 20)
                heads=(8, 8, 8, 8),
                condition=condition,
                # the number of visual tokens: they are added to the time's embedding too. Stable
                # Diffusion: no
                pooled=0,
                # places a side of the finest level: each is told what to draw by a map of its own.
                # Stable Diffusion: no
                side=0,
                time=1280,
                cosine_first=True,
                frequency_shift=0.0,
                groups=32,
                eps=1e-5,
                # SD 2: True
                linear=False,
                remat="full",
            ),
            # {}: draw pixels
            vae=dict(
                channels=3,
                latent=4,
                widths=(128, 256, 512, 512),
                resnets=2,
                groups=32,
                scale=0.18215,
                remat="full",
            ),
            diffusion=dict(
                steps=1000,
                beta_start=0.00085,
                beta_end=0.012,
                # end the schedule in noise alone; with "v"
                zero_snr=False,
                # or "v" (SD 2.1), "flow" or "x0"
                target="epsilon",
                # cut the loss's weights at this signal-to-noise ratio (5.0 is usual); 0: all are 1
                min_snr=0.0,
            ),
        )
    )
