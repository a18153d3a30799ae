"""Inception-v3 as FID defines it: Google's graph of 2015, with 2048 pool3 features.

This graph differs from later versions of Inception-v3: average pooling excludes padding, the last
block uses max pooling, there are 1008 classes, and images are resized as in TensorFlow 1. Read
next: weights/inception.py, evaluate/metrics/fid.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from emu_jax.models import layers, module

# Height and width of the network's input, in pixels.
SIDE = 299
CLASSES = 1008


class Conv(NamedTuple):
    """A convolution with batch norm.

    Its input is padded if the stride is 1 and the name is not in UNPADDED.
    """

    name: str
    outputs: int
    h: int = 1
    w: int = 1
    stride: int = 1


class Block(NamedTuple):
    """Parallel branches and a pooling branch, concatenated.

    A branch is a sequence of steps, and a step is a tuple of parallel convolutions.
    """

    name: str
    branches: tuple[tuple[tuple[Conv, ...], ...], ...]
    # Kind of pooling: "average" or "max".
    pool: str
    # Convolution after the pooling. None: no convolution, and the pooling has stride 2.
    project: Conv | None


STEM = (
    Conv("Conv2d_1a_3x3", 32, 3, 3, 2),
    Conv("Conv2d_2a_3x3", 32, 3, 3),
    Conv("Conv2d_2b_3x3", 64, 3, 3),
    Conv("Conv2d_3b_1x1", 80),
    Conv("Conv2d_4a_3x3", 192, 3, 3),
)
# Convolutions of stride 1 without padding.
UNPADDED = {"Conv2d_2a_3x3", "Conv2d_4a_3x3"}


def _chain(*convs: Conv) -> tuple[tuple[Conv, ...], ...]:
    return tuple((conv,) for conv in convs)


def _mixed_5(name: str, pool: int) -> Block:
    return Block(
        name,
        (
            _chain(Conv("branch1x1", 64)),
            _chain(Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, 5, 5)),
            _chain(
                Conv("branch3x3dbl_1", 64),
                Conv("branch3x3dbl_2", 96, 3, 3),
                Conv("branch3x3dbl_3", 96, 3, 3),
            ),
        ),
        "average",
        Conv("branch_pool", pool),
    )


def _mixed_6(name: str, c: int) -> Block:
    return Block(
        name,
        (
            _chain(Conv("branch1x1", 192)),
            _chain(
                Conv("branch7x7_1", c), Conv("branch7x7_2", c, 1, 7), Conv("branch7x7_3", 192, 7, 1)
            ),
            _chain(
                Conv("branch7x7dbl_1", c),
                Conv("branch7x7dbl_2", c, 7, 1),
                Conv("branch7x7dbl_3", c, 1, 7),
                Conv("branch7x7dbl_4", c, 7, 1),
                Conv("branch7x7dbl_5", 192, 1, 7),
            ),
        ),
        "average",
        Conv("branch_pool", 192),
    )


def _mixed_7(name: str, pool: str) -> Block:
    def fork(stem, first, second):
        return (Conv(f"{stem}{first}", 384, 1, 3), Conv(f"{stem}{second}", 384, 3, 1))

    return Block(
        name,
        (
            _chain(Conv("branch1x1", 320)),
            ((Conv("branch3x3_1", 384),), fork("branch3x3_", "2a", "2b")),
            (
                (Conv("branch3x3dbl_1", 448),),
                (Conv("branch3x3dbl_2", 384, 3, 3),),
                fork("branch3x3dbl_", "3a", "3b"),
            ),
        ),
        pool,
        Conv("branch_pool", 192),
    )


BLOCKS = (
    _mixed_5("Mixed_5b", 32),
    _mixed_5("Mixed_5c", 64),
    _mixed_5("Mixed_5d", 64),
    Block(
        "Mixed_6a",
        (
            _chain(Conv("branch3x3", 384, 3, 3, 2)),
            _chain(
                Conv("branch3x3dbl_1", 64),
                Conv("branch3x3dbl_2", 96, 3, 3),
                Conv("branch3x3dbl_3", 96, 3, 3, 2),
            ),
        ),
        "max",
        None,
    ),
    _mixed_6("Mixed_6b", 128),
    _mixed_6("Mixed_6c", 160),
    _mixed_6("Mixed_6d", 160),
    _mixed_6("Mixed_6e", 192),
    Block(
        "Mixed_7a",
        (
            _chain(Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, 3, 3, 2)),
            _chain(
                Conv("branch7x7x3_1", 192),
                Conv("branch7x7x3_2", 192, 1, 7),
                Conv("branch7x7x3_3", 192, 7, 1),
                Conv("branch7x7x3_4", 192, 3, 3, 2),
            ),
        ),
        "max",
        None,
    ),
    _mixed_7("Mixed_7b", "average"),
    _mixed_7("Mixed_7c", "max"),
)


class ConvNorm(nnx.Module):
    """relu(batch norm(convolution)); the norm uses running statistics and epsilon 1e-3."""

    def __init__(self, conv: Conv, inputs: int, rngs: layers.Rngs):
        self.stride = conv.stride
        self.padding = "SAME" if conv.stride == 1 and conv.name not in UNPADDED else "VALID"
        std = (conv.h * conv.w * inputs) ** -0.5
        self.w = nnx.Param(rngs.normal(std, (conv.h, conv.w, inputs, conv.outputs)))
        self.scale = nnx.Param(jnp.ones(conv.outputs))
        self.bias = nnx.Param(jnp.zeros(conv.outputs))
        self.mean = nnx.Param(jnp.zeros(conv.outputs))
        self.var = nnx.Param(jnp.ones(conv.outputs))

    def __call__(self, x: Float[Array, "M h w c"]) -> Float[Array, "M H W C"]:
        y = jax.lax.conv_general_dilated(
            x,
            self.w.get_value(),
            (self.stride,) * 2,
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision="highest",
        )
        y = (y - self.mean.get_value()) * jax.lax.rsqrt(self.var.get_value() + 1e-3)
        return jax.nn.relu(y * self.scale.get_value() + self.bias.get_value())


class Mixed(nnx.Module):
    def __init__(self, block: Block, inputs: int, rngs: layers.Rngs):
        self.block = block
        for branch in block.branches:
            width = inputs
            for step in branch:
                for conv in step:
                    setattr(self, conv.name, ConvNorm(conv, width, rngs))
                width = sum(conv.outputs for conv in step)
        if block.project:
            self.branch_pool = ConvNorm(block.project, inputs, rngs)

    def __call__(self, x: Float[Array, "M h w c"]) -> Float[Array, "M H W C"]:
        parts = []
        for branch in self.block.branches:
            y = x
            for step in branch:
                y = jnp.concatenate([getattr(self, conv.name)(y) for conv in step], -1)
            parts.append(y)
        if self.block.project:
            pooled = self.branch_pool(
                (_average if self.block.pool == "average" else _maximum)(x, stride=1)
            )
        else:
            pooled = _maximum(x, stride=2)
        return jnp.concatenate([*parts, pooled], -1)


class Logits(nnx.Module):
    def __init__(self, inputs: int, rngs: layers.Rngs):
        self.w = nnx.Param(rngs.normal(inputs**-0.5, (inputs, CLASSES)))
        # The graph has this bias, but the logits that FID defines leave it out.
        self.bias = nnx.Param(jnp.zeros(CLASSES))


class Inception(nnx.Module):
    def __init__(self, config: None, rngs: layers.Rngs):
        width = 3
        for conv in STEM:
            setattr(self, conv.name, ConvNorm(conv, width, rngs))
            width = conv.outputs
        for block in BLOCKS:
            setattr(self, block.name, Mixed(block, width, rngs))
            width = (block.project.outputs if block.project else width) + sum(
                conv.outputs for branch in block.branches for conv in branch[-1]
            )
        self.fc = Logits(width, rngs)

    def __call__(self, images: Float[Array, "M h w 3"]) -> dict[str, Float[Array, "M _"]]:
        """Compute the features of images from `prepare`.

        The keys "64", "192", "768" and "2048" are spatial means of layers with so many channels;
        FID uses "2048". The key "logits_unbiased" is the logits without their bias.
        """
        out = {}
        x = images
        for conv in STEM:
            x = getattr(self, conv.name)(x)
            if conv.name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                x = _maximum(x, stride=2)
                out[str(conv.outputs)] = x.mean((1, 2))
        for block in BLOCKS:
            x = getattr(self, block.name)(x)
            if block.name in ("Mixed_6e", "Mixed_7c"):
                out[str(x.shape[-1])] = x.mean((1, 2))
        return out | {
            "logits_unbiased": jnp.einsum(
                "mc,ck->mk", out["2048"], self.fc.w.get_value(), precision="highest"
            )
        }


def prepare(images: UInt8[Array, "M h w 3"]) -> Float[Array, "M 299 299 3"]:
    """Make the network's input from RGB images of any size.

    Resizes them as TensorFlow 1 did (bilinear, no aligned corners, no half pixels), then scales to
    (x - 128) / 128.
    """
    rows, columns = (jnp.asarray(_bilinear(size)) for size in images.shape[1:3])
    x = jnp.einsum(
        "yh,mhwc,xw->myxc", rows, images.astype(jnp.float32), columns, precision="highest"
    )
    return (x - 128) / 128


def apply(params: dict, images: Float[Array, "M 299 299 3"]) -> dict[str, Float[Array, "M _"]]:
    """Run `Inception` with a plain dict of parameters on images from `prepare`."""
    return module.bind(Inception, None, params)(images)


def _bilinear(size: int) -> np.ndarray:
    """Compute the weights [SIDE, size] that resize one axis by bilinear interpolation."""
    place = np.arange(SIDE, dtype=np.float32) * np.float32(size / SIDE)
    low = place.astype(int)
    weights = np.zeros((SIDE, size), np.float32)
    np.add.at(weights, (np.arange(SIDE), low), 1 - (place - low))
    np.add.at(weights, (np.arange(SIDE), np.minimum(low + 1, size - 1)), place - low)
    return weights


def _maximum(x, *, stride: int):
    return jax.lax.reduce_window(
        x,
        -jnp.inf,
        jax.lax.max,
        (1, 3, 3, 1),
        (1, stride, stride, 1),
        "SAME" if stride == 1 else "VALID",
    )


def _average(x, *, stride: int):
    """Average each 3 x 3 window over the pixels that are inside the image."""

    def total(x):
        return jax.lax.reduce_window(
            x, 0.0, jax.lax.add, (1, 3, 3, 1), (1, stride, stride, 1), "SAME"
        )

    return total(x) / total(jnp.ones((1, *x.shape[1:3], 1), x.dtype))
