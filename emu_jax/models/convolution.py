"""What the U-Net and the autoencoder share: convolution, group norm, the residual block, changes of
resolution.

Channels last. The shapes are Stable Diffusion's (arXiv 2112.10752; its released checkpoints). Read
next: unet.py, vae.py.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from einops import rearrange, reduce, repeat
from flax import nnx
from jaxtyping import Array, Float

from emu_jax.models import layers
from emu_jax.models.attention import platform_in_use


def numbered(modules: Iterable[nnx.Module]) -> nnx.Dict:
    """Modules of different shapes under the parameter paths 0, 1, ...; read them with
    `in_order`.
    """
    return nnx.Dict({str(number): module for number, module in enumerate(modules)})


def in_order(modules: nnx.Dict) -> list[nnx.Module]:
    return [modules[str(number)] for number in range(len(modules))]


class Conv(nnx.Module):
    """A k x k convolution with a weight `w` [k, k, in, out] and a `bias`."""

    def __init__(
        self,
        width_in: int,
        width_out: int,
        *,
        rngs: nnx.Rngs,
        size: int = 3,
        std: float | None = None,
    ):
        std = (size * size * width_in) ** -0.5 if std is None else std
        self.w = nnx.Param(
            std * jax.random.normal(rngs.params(), (size, size, width_in, width_out))
        )
        self.bias = nnx.Param(jnp.zeros(width_out))

    def __call__(
        self, x: Float[Array, "B h w c"], *, stride: int = 1, padding: tuple[int, int] = (1, 1)
    ) -> Float[Array, "B y x C"]:
        """`padding` is (before, after) on both axes."""
        y = _convolved(
            x,
            self.w.get_value().astype(x.dtype),
            stride,
            padding,
            precision="highest" if x.dtype == jnp.float32 else None,
        )
        return y + self.bias.get_value().astype(y.dtype)


def _convolved(x, w, stride: int, padding: tuple[int, int], precision: str | None):
    """XLA's convolution; on a CPU a product of shifted copies, for there its own is 20 times slower
    within a loop (a sampler's, or the step's).
    """
    if platform_in_use() != "cpu":
        axes = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, w, (stride, stride), (padding, padding), dimension_numbers=axes, precision=precision
        )
    k = w.shape[0]
    x = jnp.pad(x, ((0, 0), padding, padding, (0, 0)))
    height, width = ((side - k) // stride * stride + 1 for side in x.shape[1:3])
    shifted = [
        x[:, i : i + height : stride, j : j + width : stride] for i in range(k) for j in range(k)
    ]
    return jnp.einsum(
        "bhwi,io->bhwo",
        jnp.concatenate(shifted, -1),
        rearrange(w, "i j c o -> (i j c) o"),
        precision=precision,
    )


def pointwise(
    width_in: int, width_out: int, *, rngs: nnx.Rngs, std: float | None = None
) -> layers.Linear:
    """A linear map of each pixel's channels: a 1 x 1 convolution."""
    return layers.Linear(
        "bhwi,io->bhwo",
        (width_in, width_out),
        bias=(width_out,),
        std=width_in**-0.5 if std is None else std,
        rngs=rngs,
    )


class GroupNorm(nnx.Module):
    """Normalised over pixels and the channels of a group, in float32."""

    def __init__(self, width: int, groups: int, *, eps: float):
        self.groups = groups
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        x32 = x.astype(jnp.float32)
        centred = x32 - self._mean(x32)
        normed = centred * jax.lax.rsqrt(self._mean(centred * centred) + self.eps)
        return (normed * self.scale.get_value() + self.bias.get_value()).astype(x.dtype)

    def _mean(self, x: Float[Array, "B h w C"]) -> Float[Array, "B 1 1 C"]:
        """Each channel has its group's. Pixels first: a group of few channels would be a bad shape
        for an accelerator, and few are left then.
        """
        means = reduce(x.mean((1, 2)), "b (g c) -> b g", "mean", g=self.groups)
        return repeat(means, "b g -> b 1 1 (g c)", c=x.shape[-1] // self.groups)


class ResnetBlock(nnx.Module):
    """Two convolutions beside a shortcut; the embedding of the time, where there is one, is added
    between them.
    """

    def __init__(
        self,
        width_in: int,
        width_out: int,
        groups: int,
        *,
        eps: float,
        rngs: nnx.Rngs,
        time_width: int = 0,
    ):
        self.norm1 = GroupNorm(width_in, groups, eps=eps)
        self.conv1 = Conv(width_in, width_out, rngs=rngs)
        if time_width:
            self.time = layers.Linear(
                "bt,tc->bc",
                (time_width, width_out),
                bias=(width_out,),
                std=time_width**-0.5,
                rngs=rngs,
            )
        self.norm2 = GroupNorm(width_out, groups, eps=eps)
        # a fresh block changes nothing
        self.conv2 = Conv(width_out, width_out, rngs=rngs, std=0.0)
        if width_in != width_out:
            self.shortcut = pointwise(width_in, width_out, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B h w c"], time: Float[Array, "B t"] | None = None
    ) -> Float[Array, "B h w C"]:
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        if time is not None:
            h = h + self.time(jax.nn.silu(time))[:, None, None]
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (self.shortcut(x) if hasattr(self, "shortcut") else x)


def upsample(x: Float[Array, "B h w C"]) -> Float[Array, "B y x C"]:
    """Twice the resolution: each pixel four times."""
    return repeat(x, "b h w c -> b (h i) (w j) c", i=2, j=2)
