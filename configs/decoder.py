"""Emu's visual decoder (section 3.3 of the paper): visual tokens to pixels.

Stable Diffusion 1.5's U-Net trains; everything else is frozen.

python -m emu_jax.generate precompute --config=configs/decoder.py[:emu-7b] \\
    --config.init=EMU --config.data.tokenizer=tokenizer.model --to=data/conditions
python -m emu_jax.train --config=configs/decoder.py[:emu-7b] --config.workdir=DIR \\
    --config.init=EMU,SD --config.data.tokenizer=tokenizer.model
"""

from ml_collections import ConfigDict

from configs.base import get_config as base


def get_config(size: str = "emu-14b"):
    c = base(size)
    c.stage = "decoder"
    c.frozen_dtype = "bfloat16"
    # Visual decoder: Stable Diffusion 1.5, conditioned on visual tokens.
    c.model.decoder = decoder(c.model.llama.width)
    c.rules.train = (("unet/.*", True), (".*", False))
    c.rules.peak_lr = ((".*", 1e-4),)
    c.rules.decay = ((".*", 1e-2),)
    c.rules.groups = (("unet/.*/cross/.*", "condition"), (".*", "unet"))
    c.optim.steps = 15_000
    c.optim.schedule = "stepped"
    # 5,000 of the 15,000 steps.
    c.optim.warmup = 1 / 3
    c.optim.boundaries = ((10_000, 0.5), (14_000, 0.1))
    c.optim.b2 = 0.999
    # Epsilon, clipping and the average of the parameters are unpublished.
    c.optim.eps = 1e-8
    c.optim.clip = 1.0
    c.optim.ema = 0.9999
    # These data sets are built for this stage, with --kind=pairs --max-chars=150: the paper drops
    # longer captions.
    c.data.mixture = (
        ("laion-coco", 7.0, "data/laion-coco-150:train"),
        ("laion-aesthetics", 2.0, "data/laion-aesthetics-150:train"),
    )
    c.data.batch = 1600
    c.data.num_streams = 64
    # Room for one caption and its image, which takes 34 tokens with [IMG] and [/IMG].
    c.data.tokens = 96
    c.data.images = 1
    # The caption comes first, since the image is generated from it.
    c.data.image_first = 0.0
    # Set it to "" if model.decoder.condition is not "generated".
    c.data.conditions = "data/conditions"
    c.checkpoint.every = 500
    return c


def decoder(condition: int) -> ConfigDict:
    """Stable Diffusion 1.5's sizes, for visual tokens of width `condition`."""
    return ConfigDict(
        dict(
            # Side of the generated image, in pixels.
            image=512,
            # Which visual tokens are the condition. "generated": those that the LLM generates one
            # by one, precomputed (as in the paper; see data.conditions); "teacher_forced": the
            # LLM's prediction of each token from the true ones before it; "encoded": the encoder's
            # tokens of the image, without the LLM.
            condition="generated",
            # The denoising network; a tuple has an entry for each level, the finest first.
            unet=dict(
                # Channels of its input: the VAE's latent, or 3 for pixels.
                channels_in=4,
                # Channels of its output.
                channels_out=4,
                # Side, in pixels, of the square that is folded into one position; 1: latents.
                patch=1,
                # Channels of the hidden states.
                widths=(320, 640, 1280, 1280),
                # Residual blocks on the way down; the way up has one more.
                resnets=(2, 2, 2, 2),
                # Whether a transformer follows each residual block on the way down.
                attends_down=(True, True, True, False),
                # Whether a transformer follows each residual block on the way up. The finest level
                # is the first here, too.
                attends_up=(True, True, True, False),
                # Blocks of each transformer.
                depths=(1, 1, 1, 1),
                # Attention heads; Stable Diffusion 2 has (5, 10, 20, 20).
                heads=(8, 8, 8, 8),
                # Width of the condition: D, that of the visual tokens.
                condition=condition,
                # Number of condition tokens to project, concatenated, into the time embedding (N or
                # 0); 0: cross-attention only, as in Stable Diffusion.
                pooled=0,
                # Side of the finest level, if each of its positions gets its own projection of the
                # time embedding; 0: all share one, as in Stable Diffusion.
                side=0,
                # Width of the time embedding.
                time=1280,
                # Whether the time's sinusoids begin with the cosines, as in Stable Diffusion 1 and
                # 2.
                cosine_first=True,
                # Shift of the time's frequencies; 0.0 in Stable Diffusion 1 and 2.
                frequency_shift=0.0,
                # Groups of the group norms.
                groups=32,
                # Epsilon of the group norms.
                eps=1e-5,
                # Whether the transformers' projections are stored as linear maps (Stable Diffusion
                # 2) and not as 1 x 1 convolutions; the arithmetic is the same.
                linear=False,
                # What a block saves for the backward pass, as in model.vision.remat.
                remat="full",
            ),
            # The autoencoder between pixels and latents; {}: the U-Net works on pixels.
            vae=dict(
                # Channels of an image.
                channels=3,
                # Channels of a latent.
                latent=4,
                # Channels of the hidden states at each level, the finest first.
                widths=(128, 256, 512, 512),
                # Residual blocks of each level of the encoder; the decoder has one more.
                resnets=2,
                # Groups of the group norms.
                groups=32,
                # Factor by which latents are multiplied before the U-Net sees them.
                scale=0.18215,
                # What a block saves for the backward pass, as in model.vision.remat.
                remat="full",
            ),
            # Noise schedule and training target.
            diffusion=dict(
                # Number of timesteps of the schedule in training.
                steps=1000,
                # Noise variance of the first step.
                beta_start=0.00085,
                # Noise variance of the last step.
                beta_end=0.012,
                # Rescale the schedule to end in pure noise (arXiv 2305.08891); not with target
                # "epsilon".
                zero_snr=False,
                # What the U-Net predicts: "epsilon" (noise), "v" (Stable Diffusion 2.1), "flow" or
                # "x0".
                target="epsilon",
                # Signal-to-noise ratio at which the loss weights are capped (arXiv 2303.09556; 5.0
                # is usual); 0.0: all weights are 1.
                min_snr=0.0,
            ),
        )
    )
