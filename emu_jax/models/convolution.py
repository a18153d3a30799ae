"""Layers shared by the U-Net and the autoencoder. Images have their channels last.

The layers and their sizes are those of Stable Diffusion's checkpoints (arXiv 2112.10752). Read
next: unet.py, vae.py.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange, reduce, repeat
from flax import nnx
from jaxtyping import Array, Float

from emu_jax.models import layers
from emu_jax.models.attention import platform_in_use


def numbered(modules: Iterable[nnx.Module]) -> nnx.Dict:
    """Hold modules of different shapes under the parameter paths 0, 1, ...

    `in_order` returns them as a list.
    """
    return nnx.Dict({str(number): module for number, module in enumerate(modules)})


def in_order(modules: nnx.Dict) -> list[Any]:
    """Return the modules of `numbered` as a list in their original order."""
    return [modules[str(number)] for number in range(len(modules))]


class Conv(nnx.Module):
    """A k x k convolution with a weight `w` [k, k, in, out] and a `bias`."""

    def __init__(
        self,
        width_in: int,
        width_out: int,
        *,
        rngs: layers.Rngs,
        size: int = 3,
        std: float | None = None,
    ):
        std = (size * size * width_in) ** -0.5 if std is None else std
        self.w = nnx.Param(rngs.normal(std, (size, size, width_in, width_out)))
        self.bias = nnx.Param(jnp.zeros(width_out))

    def __call__(
        self, x: Float[Array, "B h w c"], *, stride: int = 1, padding: tuple[int, int] = (1, 1)
    ) -> Float[Array, "B y x C"]:
        """`padding` is (before, after) on both axes."""
        w = self.w.get_value().astype(x.dtype)
        precision = "highest" if x.dtype == jnp.float32 else None
        y = _convolve(x, w, stride, padding, precision)
        return y + self.bias.get_value().astype(y.dtype)


def _convolve(x, w, stride: int, padding: tuple[int, int], precision: str | None):
    """Convolve with XLA, or on CPU by a matrix product over shifted copies of `x`.

    XLA's own convolution is 20 times slower on CPU inside a loop, such as a sampler's.
    """
    if platform_in_use() != "cpu":
        return jax.lax.conv_general_dilated(
            x,
            w,
            window_strides=(stride, stride),
            padding=(padding, padding),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=precision,
        )
    k = w.shape[0]
    x = jnp.pad(x, ((0, 0), padding, padding, (0, 0)))
    # The span of rows and columns from the first to the last place of the window's top left corner.
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
    width_in: int, width_out: int, *, rngs: layers.Rngs, std: float | None = None
) -> layers.Linear:
    """Make a 1 x 1 convolution, as a linear map of each pixel's channels."""
    return layers.Linear(
        "bhwi,io->bhwo",
        (width_in, width_out),
        bias=(width_out,),
        std=width_in**-0.5 if std is None else std,
        rngs=rngs,
    )


class GroupNorm(nnx.Module):
    """Normalise over the pixels and channels of each group, in float32."""

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
        """Compute the mean of each group, and repeat it for every channel of the group.

        The mean over pixels comes first, because splitting [B, h, w, C] into groups would give
        arrays whose last axis is small, which accelerators handle badly.
        """
        means = reduce(x.mean((1, 2)), "b (g c) -> b g", "mean", g=self.groups)
        return repeat(means, "b g -> b 1 1 (g c)", c=x.shape[-1] // self.groups)


class ResnetBlock(nnx.Module):
    """Two convolutions with a residual shortcut; the timestep embedding is added in between."""

    def __init__(
        self,
        width_in: int,
        width_out: int,
        groups: int,
        *,
        eps: float,
        rngs: layers.Rngs,
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
        # These weights start at zero, so that a fresh block equals its shortcut.
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
    """Double the resolution by repeating pixels."""
    return repeat(x, "b h w c -> b (h i) (w j) c", i=2, j=2)
