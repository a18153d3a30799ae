"""Kinds of weight that are more than one array: LoRA (arXiv 2106.09685), and matrices stored in 8
or 4 bits (QLoRA, arXiv 2305.14314).

Beside a matrix `q/w` lie the leaves `q/a` and `q/b`; in its place, codes `q/int8` or `q/nf4` and
their scales `q/absmax`. `apply` makes of them what layers.einsum multiplies by, so no module knows
of it. Read next: layers.py, emu.py.
"""

import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import NormalDist
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int8, UInt8

from emu_jax import tree
from emu_jax.config import UserError
from emu_jax.sharding import QUANTIZED

# the matrices that `storage` is about: nearly all of the LLM
STORED = "llama/blocks/.*/w"
# numbers that share a scale, at most
BLOCK = 64

# on a device, or as a checkpoint is read
Numbers = Array | np.ndarray


@dataclass(frozen=True)
class LoraConfig:
    """`config.model.lora`. The product with w becomes that with w + alpha / rank * a b."""

    # 0: no LoRA
    rank: int = 0
    alpha: float = 16.0
    # of the input of a
    dropout: float = 0.05
    # (regex, bool) rows over parameter paths: beside which matrices of blocks
    targets: tuple = ()
    # of the matrices of the LLM's blocks, which cannot train then: "int8" or "nf4"; "" as any other
    storage: str = ""

    def __post_init__(self):
        if self.storage and self.storage not in QUANTIZED:
            raise UserError(
                f"model.lora.storage={self.storage!r} is not one of '', {', '.join(QUANTIZED)}"
            )
        if self.rank < 0 or not 0 <= self.dropout < 1:
            raise UserError(
                f"model.lora: rank={self.rank} is at least 0, and dropout={self.dropout} at least 0 and below 1"
            )


NO_LORA = LoraConfig()


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "absmax"], meta_fields=[])
@dataclass(frozen=True)
# JAX rebuilds it with what are no arrays
@no_type_check
class Quantized:
    """A matrix whose numbers are codes times the scale of their block; blocks lie along the last
    axis. int8: -127 to 127 stand for -1 to 1; uint8: two of the 16 levels of NF4.
    """

    codes: Array
    absmax: Array

    def map(self, change: Callable[[str, Array], Array]) -> "Quantized":
        """Of every array, by its name."""
        return Quantized(change(_name(self.codes), self.codes), change("absmax", self.absmax))

    def dequantize(self, dtype) -> Array:
        """The matrix."""
        return dequantize(self.codes, self.absmax).astype(dtype)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["w", "a", "b", "keys"],
    meta_fields=["scale", "dropout"],
)
@dataclass(frozen=True)
# JAX rebuilds it with what are no arrays
@no_type_check
class Lora:
    """w + scale * a b: [in..., out...], [in..., r] and [r, out...], in a stack with a leading L.
    keys: of the dropout, a layer each; None: none.
    """

    w: Array | Quantized
    a: Array
    b: Array
    keys: Array | None
    scale: float
    dropout: float

    def map(self, change: Callable[[str, Array], Array]) -> "Lora":
        """Of every array of numbers, by its name."""
        w = self.w.map(change) if isinstance(self.w, Quantized) else change("w", self.w)
        return replace(self, w=w, a=change("a", self.a), b=change("b", self.b))


def equations(equation: str) -> tuple[str, str]:
    """The two products through r that go beside a product with w: "btD,Dhd->bthd" is "btD,DR->btR"
    and "btR,Rhd->bthd".
    """
    x, w, y = re.fullmatch(r"(\w+),(\w+)->(\w+)", equation).groups()
    summed = "".join(axis for axis in w if axis not in y)
    kept = "".join(axis for axis in w if axis in y)
    rows = "".join(axis for axis in x if axis not in summed)
    return f"{x},{summed}R->{rows}R", f"{rows}R,R{kept}->{y}"


def apply(
    config: LoraConfig | None, params: tree.Tree, key: Array | None = None, path: str = ""
) -> tree.Tree:
    """Parameters in which each matrix stands as one value under the name `w`. key: of the dropout;
    None: none.
    """
    found = {
        name: apply(config, part, key, f"{path}/{name}") if isinstance(part, dict) else part
        for name, part in params.items()
    }
    for name in QUANTIZED:
        if name in found:
            found["w"] = Quantized(found.pop(name), found.pop("absmax"))
    if "a" in found and "b" in found:
        w, a, b = (found.pop(name) for name in ("w", "a", "b"))
        keys = (
            jax.random.split(jax.random.fold_in(key, zlib.crc32(path.encode())), len(a))
            if key is not None and config.dropout
            else None
        )
        found["w"] = Lora(w, a, b, keys, config.alpha / a.shape[-1], config.dropout)
    return found


def init(
    config: LoraConfig | None, params: tree.Tree, inputs: dict[str, int], key: Array
) -> tree.Tree:
    """Fresh parameters with what `config` adds to them: a as PEFT makes it, b zero; and the stored
    matrices as codes.

    inputs: how many axes the matrices of blocks, by path, are multiplied over. Raises UserError for
    a target that is none of them.
    """
    leaves = dict(tree.leaves(params))
    if config is not None and config.rank:
        try:
            targets = dict(tree.leaves(tree.by_rule(config.targets, params, "model.lora.targets")))
        except ValueError as error:
            raise UserError(str(error)) from error
        for path in [path for path, chosen in targets.items() if chosen]:
            if path not in inputs:
                raise UserError(f"model.lora.targets: {path} is no matrix of a tower's blocks")
            shape = leaves[path].shape
            cut = 1 + inputs[path]
            where = path.removesuffix("/w")
            reach = math.prod(shape[1:cut]) ** -0.5
            a = jax.random.uniform(
                jax.random.fold_in(key, zlib.crc32(path.encode())),
                (*shape[:cut], config.rank),
                minval=-reach,
                maxval=reach,
            )
            leaves |= {
                f"{where}/a": a,
                f"{where}/b": jnp.zeros((shape[0], config.rank, *shape[cut:])),
            }
    if config is not None and config.storage:
        for path in [path for path in leaves if re.fullmatch(STORED, path)]:
            leaves |= quantize_leaf(path, leaves.pop(path), config.storage)
    return tree.unflatten(leaves)


@partial(jax.jit, static_argnums=0)
def merge(
    config: LoraConfig, w: Numbers | Quantized, a: Numbers, b: Numbers
) -> Float[Array, "..."]:
    """w + alpha / rank * a b in float32, of one layer."""
    w = w.dequantize(jnp.float32) if isinstance(w, Quantized) else jnp.asarray(w, jnp.float32)
    product = jnp.tensordot(
        jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), 1, precision="highest"
    )
    return w + config.alpha / a.shape[-1] * product


# Storage


def quantize_leaf(path: str, w: Float[Numbers, "..."], storage: str) -> dict[str, Array]:
    """The leaves that stand for the matrix at `path`."""
    where = path.removesuffix("/w")
    codes, absmax = quantize(w, storage)
    return {f"{where}/{storage}": codes, f"{where}/absmax": absmax}


@partial(jax.jit, static_argnums=1)
def quantize(
    w: Float[Numbers, "..."], storage: str
) -> tuple[Int8[Array, "..."] | UInt8[Array, "..."], Float[Array, "..."]]:
    """(codes, scales) of a matrix by blocks of its last axis, each scaled to -1..1."""
    blocks = rearrange(
        jnp.asarray(w, jnp.float32), "... (n k) -> ... n k", k=math.gcd(BLOCK, w.shape[-1])
    )
    absmax = jnp.abs(blocks).max(-1)
    scaled = rearrange(blocks / jnp.maximum(absmax, 1e-30)[..., None], "... n k -> ... (n k)")
    if storage == "int8":
        return jnp.round(127 * scaled).astype(jnp.int8), absmax
    if w.shape[-1] % 2:
        raise UserError(
            f"model.lora.storage={storage!r} holds two numbers a byte: a matrix {list(w.shape)} is odd"
        )
    levels = jnp.asarray(nf4())
    codes = jnp.searchsorted((levels[1:] + levels[:-1]) / 2, scaled).astype(jnp.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, absmax


@jax.jit
def dequantize(
    codes: Int8[Numbers, "..."] | UInt8[Numbers, "..."], absmax: Float[Numbers, "..."]
) -> Float[Array, "..."]:
    """Inverse of `quantize`, but for what it rounded; float32."""
    codes = jnp.asarray(codes)
    absmax = jnp.asarray(absmax)
    if _name(codes) == "int8":
        scaled = codes.astype(jnp.float32) / 127
    else:
        scaled = jnp.asarray(nf4())[jnp.stack([codes & 15, codes >> 4], -1).astype(jnp.int32)]
        scaled = rearrange(scaled, "... m two -> ... (m two)")
    return rearrange(
        rearrange(scaled, "... (n k) -> ... n k", n=absmax.shape[-1]) * absmax[..., None],
        "... n k -> ... (n k)",
    )


def nf4() -> Float[np.ndarray, "16"]:
    """NF4's levels: quantiles of a normal distribution, scaled to -1..1, eight of them above 0 and
    seven below (QLoRA, section 3).
    """

    def quantiles(count):
        return [NormalDist().inv_cdf(p) for p in np.linspace(0.9677083, 0.5, count)[:-1]]

    levels = np.array(sorted([*quantiles(9), 0.0, *(-x for x in quantiles(8))]))
    return (levels / levels.max()).astype(np.float32)


def _name(codes: Numbers) -> str:
    return "int8" if codes.dtype == jnp.int8 else "nf4"
