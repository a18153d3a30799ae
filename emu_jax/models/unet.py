"""Stable Diffusion's U-Net (arXiv 2112.10752), versions 1 and 2, with a condition of any width:
Emu's visual decoder.

Residual blocks at falling, then rising resolution; at most levels each is followed by a transformer
over the pixels that looks at the condition (for Emu: the N visual tokens). With `patch` > 1 it
works on pixels, without an autoencoder. Read next: diffusion.py for what it predicts, vae.py for
what it works on.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
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
    Resnet,
    doubled,
    in_order,
    numbered,
    pointwise,
)

# the leaves that read the condition: [its width, heads, width of a head]
CONDITIONED = "unet/.*/cross/(k|v)/w"


@dataclass(frozen=True)
class UNetConfig:
    """Tuples have an entry a level, the finest first."""

    # of what is denoised: latents, or pixels
    channels_in: int
    channels_out: int
    # so many pixels a side are one place; 1 for latents
    patch: int
    # C
    widths: tuple[int, ...]
    # on the way down; one more on the way up
    resnets: tuple[int, ...]
    # is each followed by a transformer?
    attends_down: tuple[bool, ...]
    attends_up: tuple[bool, ...]
    # blocks of a transformer
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    # D, width of the condition
    condition: int
    # N, if the condition's tokens, side by side, are added to the time's embedding too; 0: they are
    # only looked at
    pooled: int
    # places a side of the finest level, if each has a map of that embedding of its own; 0: all have
    # the same ones
    side: int
    # width of the time's embedding
    time: int
    # in the time's sinusoids; both releases: yes
    cosine_first: bool
    frequency_shift: float
    groups: int
    eps: float
    # stored as linear maps (SD 2), not as 1 x 1 convolutions (SD 1): the arithmetic is the same
    linear: bool
    remat: str

    @property
    def divisor(self) -> int:
        """What a side of the input must be divisible by."""
        return self.patch * 2 ** (len(self.widths) - 1)


class Attention(nnx.Module):
    """Of C-wide places at keys of any width, without biases but the output's."""

    def __init__(self, width: int, heads: int, keys_width: int, rngs: nnx.Rngs):
        H = heads
        d = width // heads
        self.q = layers.Linear("btc,chd->bthd", (width, H, d), std=width**-0.5, rngs=rngs)
        self.k = layers.Linear("bsD,Dhd->bshd", (keys_width, H, d), std=keys_width**-0.5, rngs=rngs)
        self.v = layers.Linear("bsD,Dhd->bshd", (keys_width, H, d), std=keys_width**-0.5, rngs=rngs)
        self.o = layers.Linear(
            "bthd,hdc->btc", (H, d, width), bias=(width,), std=width**-0.5, rngs=rngs
        )

    def __call__(self, x, keys, kernel: str):
        q = self.q(x)
        return self.o(
            attention(q, self.k(keys), self.v(keys), None, scale=q.shape[-1] ** -0.5, kernel=kernel)
        )


class Ffn(nnx.Module):
    """GEGLU (arXiv 2002.05202): a linear half times the exact GELU of the other."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        C = width
        F = 4 * width
        self.up = layers.Linear("btc,cf->btf", (C, F), bias=(F,), std=C**-0.5, rngs=rngs)
        self.gate = layers.Linear("btc,cf->btf", (C, F), bias=(F,), std=C**-0.5, rngs=rngs)
        self.down = layers.Linear("btf,fc->btc", (F, C), bias=(C,), std=F**-0.5, rngs=rngs)

    def __call__(self, x):
        return self.down(self.up(x) * jax.nn.gelu(self.gate(x), approximate=False))


class Block(nnx.Module):
    def __init__(self, width: int, heads: int, condition: int, rngs: nnx.Rngs):
        self.norm1 = layers.LayerNorm(width, eps=1e-5)
        self.self = Attention(width, heads, width, rngs)
        self.norm2 = layers.LayerNorm(width, eps=1e-5)
        self.cross = Attention(width, heads, condition, rngs)
        self.norm3 = layers.LayerNorm(width, eps=1e-5)
        self.ffn = Ffn(width, rngs)

    def __call__(self, x, condition, kernel: str):
        y = self.norm1(x)
        x = x + self.self(y, y, kernel)
        x = x + self.cross(self.norm2(x), condition, kernel)
        return x + self.ffn(self.norm3(x))


class Transformer(nnx.Module):
    """Blocks over all places of a level, beside a shortcut."""

    def __init__(self, config: UNetConfig, level: int, rngs: nnx.Rngs):
        C = config.widths[level]
        self.norm = GroupNorm(C, config.groups, eps=1e-6)
        self.into = pointwise(C, C, rngs=rngs)
        self.blocks = numbered(
            Block(C, config.heads[level], config.condition, rngs)
            for _ in range(config.depths[level])
        )
        self.out = pointwise(C, C, rngs=rngs, std=0.0)

    def __call__(
        self, x: Float[Array, "B h w C"], condition: Float[Array, "B N D"], kernel: str
    ) -> Float[Array, "B h w C"]:
        y = rearrange(self.into(self.norm(x)), "b h w c -> b (h w) c")
        for block in in_order(self.blocks):
            y = block(y, condition, kernel)
        return x + self.out(rearrange(y, "b (h w) c -> b h w c", h=x.shape[1]))


class Level(nnx.Module):
    """One resolution: residual blocks, of which the first `attentions` are each followed by a
    transformer, and a change of resolution.
    """

    def __init__(
        self,
        config: UNetConfig,
        level: int,
        widths_in: list[int],
        rngs: nnx.Rngs,
        *,
        attentions: int,
        resample: bool = False,
    ):
        C = config.widths[level]
        self.resnets = numbered(
            Resnet(width, C, config.groups, eps=config.eps, time_width=config.time, rngs=rngs)
            for width in widths_in
        )
        self.attentions = numbered(Transformer(config, level, rngs) for _ in range(attentions))
        if resample:
            self.resample = Conv(C, C, rngs=rngs)


class Time(nnx.Module):
    """The embedding of the time from its sinusoids."""

    def __init__(self, config: UNetConfig, rngs: nnx.Rngs):
        C = config.widths[0]
        t = config.time
        self.up = layers.Linear("bc,ct->bt", (C, t), bias=(t,), std=C**-0.5, rngs=rngs)
        self.down = layers.Linear("bt,tu->bu", (t, t), bias=(t,), std=t**-0.5, rngs=rngs)

    def __call__(self, x: Float[Array, "B C"]) -> Float[Array, "B t"]:
        return self.down(jax.nn.silu(self.up(x)))


class UNet(nnx.Module):
    def __init__(self, config: UNetConfig, rngs: nnx.Rngs):
        self.config = config
        C = config.widths
        last = len(config.widths) - 1
        places = config.patch**2
        self.time = Time(config, rngs)
        if config.pooled:
            side_by_side = config.pooled * config.condition
            self.pooled = layers.Linear(
                "bk,kt->bt", (side_by_side, config.time), std=side_by_side**-0.5, rngs=rngs
            )
        self.conv_in = Conv(places * config.channels_in, C[0], rngs=rngs)
        if config.side:
            self.places = layers.Linear(
                "bt,hwct->bhwc",
                (config.side, config.side, C[0], config.time),
                std=config.time**-0.5,
                rngs=rngs,
            )
        down = []
        skips = [C[0]]
        for level, count in enumerate(config.resnets):
            widths_in = [skips[-1]] + [C[level]] * (count - 1)
            down.append(
                Level(
                    config,
                    level,
                    widths_in,
                    rngs,
                    attentions=count * config.attends_down[level],
                    resample=level < last,
                )
            )
            skips += [C[level]] * (count + (level < last))
        self.down = numbered(down)
        self.mid = Level(config, last, [C[last]] * 2, rngs, attentions=1)
        up = []
        width = C[last]
        for level, count in reversed(list(enumerate(config.resnets))):
            widths_in = [before + skips.pop() for before in [width] + [C[level]] * count]
            up.append(
                Level(
                    config,
                    level,
                    widths_in,
                    rngs,
                    attentions=(count + 1) * config.attends_up[level],
                    resample=level > 0,
                )
            )
            width = C[level]
        # up/0 is the finest, as down/0 is
        self.up = numbered(reversed(up))
        self.norm_out = GroupNorm(C[0], config.groups, eps=config.eps)
        self.conv_out = Conv(C[0], places * config.channels_out, rngs=rngs, std=0.0)

    def __call__(
        self,
        x: Float[Array, "B h w i"],
        times: Float[Array, "B"],
        condition: Float[Array, "B N D"],
        *,
        kernel: str = "auto",
    ) -> Float[Array, "B h w o"]:
        """The prediction for what is noised at `times` (0 to 1000), in x's dtype. Raises UserError
        where h or w does not divide.
        """
        config = self.config
        p = self.config.patch
        if x.shape[1] % config.divisor or x.shape[2] % config.divisor:
            raise UserError(
                f"the U-Net takes heights and widths that {config.divisor} divides (patches of {p}, halved {len(config.widths) - 1} "
                f"times), not {x.shape[1]} x {x.shape[2]}"
            )

        def once(module, call, x, *inputs, where):
            return layers.once(module, call, x, *inputs, where=f"unet/{where}", remat=config.remat)

        def plain(module, *inputs):
            return module(*inputs)

        def looking(module, *inputs):
            return module(*inputs, kernel)

        waves = sinusoids(
            times, config.widths[0], config.frequency_shift, cosine_first=config.cosine_first
        ).astype(x.dtype)
        time = once(self.time, plain, waves, where="time")
        condition = condition.astype(x.dtype)
        if config.pooled:
            time = time + once(
                self.pooled, plain, rearrange(condition, "b n D -> b (n D)"), where="pooled"
            )

        def step(level, place, x, where):
            x = once(level.resnets[str(place)], plain, x, time, where=f"{where}/resnets/{place}")
            if place < len(level.attentions):
                x = once(
                    level.attentions[str(place)],
                    looking,
                    x,
                    condition,
                    where=f"{where}/attentions/{place}",
                )
            return x

        x = rearrange(sharding.constrain_images(x), "b (h i) (w j) c -> b h w (i j c)", i=p, j=p)
        x = once(self.conv_in, plain, x, where="conv_in")
        if config.side:
            x = x + once(self.places, plain, jax.nn.silu(time), where="places")
        skips = [x]
        for number, level in enumerate(in_order(self.down)):
            for place in range(len(level.resnets)):
                skips.append(x := step(level, place, x, f"down/{number}"))
            if hasattr(level, "resample"):
                skips.append(
                    x := once(
                        level.resample,
                        lambda conv, x: conv(x, stride=2),
                        x,
                        where=f"down/{number}/resample",
                    )
                )
        for place in range(len(self.mid.resnets)):
            x = step(self.mid, place, x, "mid")
        for number, level in reversed(list(enumerate(in_order(self.up)))):
            for place in range(len(level.resnets)):
                x = step(level, place, jnp.concatenate([x, skips.pop()], -1), f"up/{number}")
            if hasattr(level, "resample"):
                x = once(
                    level.resample,
                    lambda conv, x: conv(doubled(x)),
                    x,
                    where=f"up/{number}/resample",
                )
        x = once(self.conv_out, plain, jax.nn.silu(self.norm_out(x)), where="conv_out")
        return rearrange(x, "b h w (i j c) -> b (h i) (w j) c", i=p, j=p)


def sinusoids(
    times: Float[Array, "B"], width: int, shift: float, *, cosine_first: bool
) -> Float[Array, "B C"]:
    """Sines and cosines of the times at wavelengths from 2 pi to about 20000 pi (arXiv 1706.03762),
    in float32.
    """
    half = width // 2
    angles = times.astype(jnp.float32)[:, None] * jnp.asarray(
        10000.0 ** (-np.arange(half) / (half - shift)), jnp.float32
    )
    waves = jnp.concatenate(
        [jnp.cos(angles), jnp.sin(angles)] if cosine_first else [jnp.sin(angles), jnp.cos(angles)],
        -1,
    )
    return jnp.pad(waves, ((0, 0), (0, width % 2)))
