"""Stable Diffusion's autoencoder (arXiv 2112.10752): images to latents and back.

In Stable Diffusion, latents have an eighth of the image's height and width. Read next: unet.py,
which works on latents; diffusion.py.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from emu_jax import sharding
from emu_jax.config import UserError
from emu_jax.models import layers
from emu_jax.models.attention import attention
from emu_jax.models.convolution import (
    Conv,
    GroupNorm,
    ResnetBlock,
    in_order,
    numbered,
    pointwise,
    upsample,
)

# Epsilon of every norm.
EPS = 1e-6


@dataclass(frozen=True)
class VaeConfig:
    # Channels of the images.
    channels: int
    # c, channels of the latents.
    latent: int
    # Channels of each level, the finest first.
    widths: tuple[int, ...]
    # Number of residual blocks per level of the encoder. Levels of the decoder have one more.
    resnets: int
    groups: int
    # Factor by which latents are multiplied before the U-Net sees them.
    scale: float
    remat: str

    @property
    def factor(self) -> int:
        """Side, in pixels, of the square that one latent stands for."""
        return 2 ** (len(self.widths) - 1)


class VaeAttention(nnx.Module):
    """A residual branch of attention over all positions, with one head."""

    def __init__(self, width: int, groups: int, rngs: layers.Rngs):
        self.norm = GroupNorm(width, groups, eps=EPS)
        self.q, self.k, self.v = (pointwise(width, width, rngs=rngs) for _ in range(3))
        self.o = pointwise(width, width, rngs=rngs, std=0.0)

    def __call__(self, x: Float[Array, "B h w C"], kernel: str) -> Float[Array, "B h w C"]:
        y = self.norm(x)
        q, k, v = (
            rearrange(linear(y), "b h w c -> b (h w) 1 c") for linear in (self.q, self.k, self.v)
        )
        y = attention(q, k, v, None, scale=x.shape[-1] ** -0.5, kernel=kernel)
        return x + self.o(rearrange(y, "b (h w) 1 c -> b h w c", h=x.shape[1]))


class VaeLevel(nnx.Module):
    def __init__(
        self,
        config: VaeConfig,
        width_in: int,
        width: int,
        count: int,
        rngs: layers.Rngs,
        *,
        resample: bool,
    ):
        self.resnets = numbered(
            ResnetBlock(width_in if n == 0 else width, width, config.groups, eps=EPS, rngs=rngs)
            for n in range(count)
        )
        if resample:
            self.resample = Conv(width, width, rngs=rngs)


class VaeMiddle(nnx.Module):
    def __init__(self, config: VaeConfig, rngs: layers.Rngs):
        C = config.widths[-1]
        self.resnets = numbered(
            ResnetBlock(C, C, config.groups, eps=EPS, rngs=rngs) for _ in range(2)
        )
        self.attn = VaeAttention(C, config.groups, rngs)


class VaeHalf(nnx.Module):
    """The encoder or the decoder; levels/0 is the finest in both."""

    def __init__(self, config: VaeConfig, rngs: layers.Rngs, *, encodes: bool):
        self.config = config
        self.encodes = encodes
        widths = config.widths
        last = len(config.widths) - 1
        first, end = (
            (config.channels, 2 * config.latent) if encodes else (config.latent, config.channels)
        )
        outer, inner = (widths[0], widths[last]) if encodes else (widths[last], widths[0])
        self.conv_in = Conv(first, outer, rngs=rngs)

        def before(level):
            return widths[max(level - 1, 0)] if encodes else widths[min(level + 1, last)]

        self.levels = numbered(
            VaeLevel(
                config,
                before(level),
                C,
                config.resnets + (not encodes),
                rngs,
                resample=level < last if encodes else level > 0,
            )
            for level, C in enumerate(widths)
        )
        self.mid = VaeMiddle(config, rngs)
        self.norm_out = GroupNorm(inner, config.groups, eps=EPS)
        self.conv_out = Conv(inner, end, rngs=rngs)

    def __call__(self, x: Float[Array, "B h w i"], kernel: str) -> Float[Array, "B y x o"]:
        root = "vae/encoder" if self.encodes else "vae/decoder"

        def once(module, call, x, where):
            return layers.once(module, call, x, where=f"{root}/{where}", remat=self.config.remat)

        def plain(module, x):
            return module(x)

        def middle(x):
            x = once(self.mid.resnets["0"], plain, x, "mid/resnets/0")
            x = once(self.mid.attn, lambda attn, x: attn(x, kernel), x, "mid/attn")
            return once(self.mid.resnets["1"], plain, x, "mid/resnets/1")

        x = once(self.conv_in, plain, sharding.constrain_images(x), "conv_in")
        if not self.encodes:
            x = middle(x)
        levels = list(enumerate(in_order(self.levels)))
        for number, level in levels if self.encodes else reversed(levels):
            for place, resnet in enumerate(in_order(level.resnets)):
                x = once(resnet, plain, x, f"levels/{number}/resnets/{place}")
            if hasattr(level, "resample"):
                change = (
                    (lambda conv, x: conv(x, stride=2, padding=(0, 1)))
                    if self.encodes
                    else (lambda conv, x: conv(upsample(x)))
                )
                x = once(level.resample, change, x, f"levels/{number}/resample")
        if self.encodes:
            x = middle(x)
        return once(self.conv_out, plain, jax.nn.silu(self.norm_out(x)), "conv_out")


class Vae(nnx.Module):
    def __init__(self, config: VaeConfig, rngs: layers.Rngs):
        self.config = config
        self.encoder = VaeHalf(config, rngs, encodes=True)
        self.quant = pointwise(2 * config.latent, 2 * config.latent, rngs=rngs)
        self.post_quant = pointwise(config.latent, config.latent, rngs=rngs)
        self.decoder = VaeHalf(config, rngs, encodes=False)

    def encode(
        self, images: Float[Array, "B h w 3"], *, kernel: str = "auto"
    ) -> tuple[Float[Array, "B y x c"], Float[Array, "B y x c"]]:
        """Return the mean and log variance of the unscaled latents of images in -1..1.

        Raises UserError if height or width is not a multiple of the config's `factor`.
        """
        if images.shape[1] % self.config.factor or images.shape[2] % self.config.factor:
            raise UserError(
                f"the autoencoder takes images whose sides are multiples of {self.config.factor}, "
                f"not {images.shape[1]} x {images.shape[2]}"
            )
        mean, log_variance = jnp.split(self.quant(self.encoder(images, kernel)), 2, -1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def decode(
        self, latents: Float[Array, "B y x c"], *, kernel: str = "auto"
    ) -> Float[Array, "B h w 3"]:
        """Decode unscaled latents into images with values of about -1..1."""
        return self.decoder(self.post_quant(latents), kernel)

    def sample(
        self,
        mean: Float[Array, "B y x c"],
        log_variance: Float[Array, "B y x c"],
        key: Array | None = None,
    ) -> Float[Array, "B y x c"]:
        """Sample latents from the distribution of `encode`, and scale them for the U-Net.

        Without a key, the mean is used instead of a sample.
        """
        if key is not None:
            mean = mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape, mean.dtype)
        return self.config.scale * mean
