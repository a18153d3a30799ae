"""Stable Diffusion's U-Net (arXiv 2112.10752), versions 1 and 2: Emu's visual decoder.

The U-Net is a chain of residual blocks at falling, then rising resolution. At most resolutions, a
transformer over the positions follows each block. The transformer attends to the condition, which
in Emu is the N visual tokens. With `patch` > 1 the U-Net works on pixels, without an autoencoder.
Read next: diffusion.py for the prediction targets, vae.py for the latents.
"""

from dataclasses import dataclass
from typing import NamedTuple

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
    ResnetBlock,
    in_order,
    numbered,
    pointwise,
    upsample,
)

# Paths of the matrices that multiply the condition. Their shape is [width of the condition, heads,
# head width].
CONDITIONED = "unet/.*/cross/(k|v)/w"


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a U-Net. Tuples have one entry per level, and the finest level comes first."""

    # Channels of the latents or pixels that are denoised.
    channels_in: int
    channels_out: int
    # Side, in pixels, of the square that is folded into one position; 1 for latents.
    patch: int
    # C, channels of the hidden states.
    widths: tuple[int, ...]
    # Number of residual blocks on the way down. On the way up, each level has one more.
    resnets: tuple[int, ...]
    # Whether a transformer follows each residual block.
    attends_down: tuple[bool, ...]
    attends_up: tuple[bool, ...]
    # Number of blocks in each transformer.
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    # D, width of the condition.
    condition: int
    # Number of condition tokens (N) if a projection of all of them is added to the time embedding;
    # 0 if only cross-attention reads the condition.
    pooled: int
    # Side of the finest level if a projection of the time embedding that differs by position is
    # added to its input; 0 if the time embedding affects all positions alike.
    side: int
    # Width of the time embedding.
    time: int
    # Order and frequencies of the timestep's sinusoids. In Stable Diffusion, cosines come first.
    cosine_first: bool
    frequency_shift: float
    groups: int
    eps: float
    # Whether checkpoints store the transformers' projections as linear maps (Stable Diffusion 2)
    # or as 1 x 1 convolutions (Stable Diffusion 1). The arithmetic is the same.
    linear: bool
    remat: str

    @property
    def divisor(self) -> int:
        """Height and width of the input must be multiples of this number."""
        return self.patch * 2 ** (len(self.widths) - 1)


class LevelSpec(NamedTuple):
    """The layers of one level.

    UNet builds them, flops.py counts their FLOPs, and weights/ names their tensors.
    """

    level: int
    # Input channels of each residual block.
    widths_in: list[int]
    # Number of residual blocks, counted from the first, that a transformer follows.
    attentions: int
    # Whether the level ends with a change of resolution.
    resample: bool


def level_specs(config: UNetConfig) -> tuple[list[LevelSpec], LevelSpec, list[LevelSpec]]:
    """List the levels on the way down, in the middle and on the way up, as they run.

    Each block on the way up also reads the output of its counterpart on the way down.
    """
    last = len(config.widths) - 1
    down = []
    skips = [config.widths[0]]
    for level, (C, count) in enumerate(zip(config.widths, config.resnets, strict=True)):
        widths_in = [skips[-1]] + [C] * (count - 1)
        down.append(LevelSpec(level, widths_in, count * config.attends_down[level], level < last))
        skips += [C] * (count + (level < last))

    width = config.widths[last]
    mid = LevelSpec(last, [width] * 2, 1, False)

    up = []
    for level in range(last, -1, -1):
        C = config.widths[level]
        count = config.resnets[level] + 1
        widths_in = [below + skips.pop() for below in [width] + [C] * (count - 1)]
        up.append(LevelSpec(level, widths_in, count * config.attends_up[level], level > 0))
        width = C
    return down, mid, up


class UNetAttention(nnx.Module):
    """Attention from positions of width C to keys of any width; only `o` has a bias."""

    def __init__(self, width: int, heads: int, keys_width: int, rngs: layers.Rngs):
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


class UNetFfn(nnx.Module):
    """GEGLU (arXiv 2002.05202): a linear map times the exact GELU of another one."""

    def __init__(self, width: int, rngs: layers.Rngs):
        C = width
        F = 4 * width
        self.up = layers.Linear("btc,cf->btf", (C, F), bias=(F,), std=C**-0.5, rngs=rngs)
        self.gate = layers.Linear("btc,cf->btf", (C, F), bias=(F,), std=C**-0.5, rngs=rngs)
        self.down = layers.Linear("btf,fc->btc", (F, C), bias=(C,), std=F**-0.5, rngs=rngs)

    def __call__(self, x):
        return self.down(self.up(x) * jax.nn.gelu(self.gate(x), approximate=False))


class UNetBlock(nnx.Module):
    def __init__(self, width: int, heads: int, condition: int, rngs: layers.Rngs):
        self.norm1 = layers.LayerNorm(width, eps=1e-5)
        self.self = UNetAttention(width, heads, width, rngs)
        self.norm2 = layers.LayerNorm(width, eps=1e-5)
        self.cross = UNetAttention(width, heads, condition, rngs)
        self.norm3 = layers.LayerNorm(width, eps=1e-5)
        self.ffn = UNetFfn(width, rngs)

    def __call__(self, x, condition, kernel: str):
        y = self.norm1(x)
        x = x + self.self(y, y, kernel)
        x = x + self.cross(self.norm2(x), condition, kernel)
        return x + self.ffn(self.norm3(x))


class UNetTransformer(nnx.Module):
    """A residual branch of transformer blocks over all positions of a level."""

    def __init__(self, config: UNetConfig, level: int, rngs: layers.Rngs):
        C = config.widths[level]
        self.norm = GroupNorm(C, config.groups, eps=1e-6)
        self.into = pointwise(C, C, rngs=rngs)
        self.blocks = numbered(
            UNetBlock(C, config.heads[level], config.condition, rngs)
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


class UNetLevel(nnx.Module):
    """Residual blocks and transformers of one resolution, and the change of resolution."""

    def __init__(self, config: UNetConfig, spec: LevelSpec, rngs: layers.Rngs):
        C = config.widths[spec.level]
        self.resnets = numbered(
            ResnetBlock(width, C, config.groups, eps=config.eps, time_width=config.time, rngs=rngs)
            for width in spec.widths_in
        )
        self.attentions = numbered(
            UNetTransformer(config, spec.level, rngs) for _ in range(spec.attentions)
        )
        if spec.resample:
            self.resample = Conv(C, C, rngs=rngs)


class TimeEmbedding(nnx.Module):
    """Embed a timestep, given as sinusoids."""

    def __init__(self, config: UNetConfig, rngs: layers.Rngs):
        C = config.widths[0]
        t = config.time
        self.up = layers.Linear("bc,ct->bt", (C, t), bias=(t,), std=C**-0.5, rngs=rngs)
        self.down = layers.Linear("bt,tu->bu", (t, t), bias=(t,), std=t**-0.5, rngs=rngs)

    def __call__(self, x: Float[Array, "B C"]) -> Float[Array, "B t"]:
        return self.down(jax.nn.silu(self.up(x)))


class UNet(nnx.Module):
    def __init__(self, config: UNetConfig, rngs: layers.Rngs):
        self.config = config
        C = config.widths[0]
        pixels = config.patch**2
        self.time = TimeEmbedding(config, rngs)
        if config.pooled:
            K = config.pooled * config.condition
            self.pooled = layers.Linear("bk,kt->bt", (K, config.time), std=K**-0.5, rngs=rngs)
        self.conv_in = Conv(pixels * config.channels_in, C, rngs=rngs)
        if config.side:
            self.places = layers.Linear(
                "bt,hwct->bhwc",
                (config.side, config.side, C, config.time),
                std=config.time**-0.5,
                rngs=rngs,
            )
        down, mid, up = level_specs(config)
        self.down = numbered(UNetLevel(config, spec, rngs) for spec in down)
        self.mid = UNetLevel(config, mid, rngs)
        rising = [UNetLevel(config, spec, rngs) for spec in up]
        # Reversed, so that up/0 is the finest level like down/0.
        self.up = numbered(reversed(rising))
        self.norm_out = GroupNorm(C, config.groups, eps=config.eps)
        self.conv_out = Conv(C, pixels * config.channels_out, rngs=rngs, std=0.0)

    def __call__(
        self,
        x: Float[Array, "B h w i"],
        timesteps: Float[Array, "B"],
        condition: Float[Array, "B N D"],
        *,
        kernel: str = "auto",
    ) -> Float[Array, "B h w o"]:
        """Predict from the noisy x at `timesteps` (0 to 1000), in the dtype of x.

        Raises UserError if h or w is not a multiple of `config.divisor`.
        """
        config = self.config
        p = self.config.patch
        if x.shape[1] % config.divisor or x.shape[2] % config.divisor:
            raise UserError(
                f"the U-Net takes heights and widths that are multiples of {config.divisor} "
                f"(patches of {p}, halved {len(config.widths) - 1} times), "
                f"not {x.shape[1]} x {x.shape[2]}"
            )

        def once(module, call, x, *inputs, where):
            return layers.once(module, call, x, *inputs, where=f"unet/{where}", remat=config.remat)

        def plain(module, *inputs):
            return module(*inputs)

        def attending(module, *inputs):
            return module(*inputs, kernel)

        embedding = sinusoids(
            timesteps, config.widths[0], config.frequency_shift, cosine_first=config.cosine_first
        )
        time = once(self.time, plain, embedding.astype(x.dtype), where="time")
        condition = condition.astype(x.dtype)
        if config.pooled:
            flat = rearrange(condition, "b n D -> b (n D)")
            time = time + once(self.pooled, plain, flat, where="pooled")

        def layer(level, index, x, where):
            resnet = level.resnets[str(index)]
            x = once(resnet, plain, x, time, where=f"{where}/resnets/{index}")
            if index < len(level.attentions):
                transformer = level.attentions[str(index)]
                name = f"{where}/attentions/{index}"
                x = once(transformer, attending, x, condition, where=name)
            return x

        def halve(conv, x):
            return conv(x, stride=2)

        def double(conv, x):
            return conv(upsample(x))

        x = rearrange(sharding.constrain_images(x), "b (h i) (w j) c -> b h w (i j c)", i=p, j=p)
        x = once(self.conv_in, plain, x, where="conv_in")
        if config.side:
            x = x + once(self.places, plain, jax.nn.silu(time), where="places")
        skips = [x]
        for number, level in enumerate(in_order(self.down)):
            for index in range(len(level.resnets)):
                x = layer(level, index, x, f"down/{number}")
                skips.append(x)
            if hasattr(level, "resample"):
                x = once(level.resample, halve, x, where=f"down/{number}/resample")
                skips.append(x)
        for index in range(len(self.mid.resnets)):
            x = layer(self.mid, index, x, "mid")
        for number, level in reversed(list(enumerate(in_order(self.up)))):
            for index in range(len(level.resnets)):
                x = layer(level, index, jnp.concatenate([x, skips.pop()], -1), f"up/{number}")
            if hasattr(level, "resample"):
                x = once(level.resample, double, x, where=f"up/{number}/resample")
        x = once(self.conv_out, plain, jax.nn.silu(self.norm_out(x)), where="conv_out")
        return rearrange(x, "b h w (i j c) -> b (h i) (w j) c", i=p, j=p)


def sinusoids(
    timesteps: Float[Array, "B"], width: int, shift: float, *, cosine_first: bool
) -> Float[Array, "B C"]:
    """Embed timesteps by sines and cosines (arXiv 1706.03762), in float32.

    Their wavelengths are from 2 pi to about 20000 pi.
    """
    half = width // 2
    frequencies = 10000.0 ** (-np.arange(half) / (half - shift))
    angles = timesteps.astype(jnp.float32)[:, None] * jnp.asarray(frequencies, jnp.float32)
    parts = [jnp.sin(angles), jnp.cos(angles)]
    if cosine_first:
        parts.reverse()
    embedding = jnp.concatenate(parts, -1)
    return jnp.pad(embedding, ((0, 0), (0, width % 2)))
