"""Weights that are more than one array: LoRA (arXiv 2106.09685) and quantized matrices.

Next to a matrix `q/w` are LoRA's leaves `q/a` and `q/b`. A matrix stored in 8 or 4 bits (QLoRA,
arXiv 2305.14314) has the codes `q/int8` or `q/nf4` and their scales `q/absmax` in place of `q/w`.
`apply` folds these leaves into one value, and layers.einsum multiplies by it, so that modules need
no code for LoRA. Read next: layers.py, module.py.
"""

import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import NormalDist
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int8, UInt8

from emu_jax import tree
from emu_jax.config import UserError
from emu_jax.sharding import QUANTIZED

# Paths of the matrices that `storage` quantizes. They contain nearly all parameters of the LLM.
STORED = "llama/blocks/.*/w"
# The largest count of numbers that share one scale.
BLOCK = 64

# An array on a device, or one read from a checkpoint.
Numbers = Array | np.ndarray


@dataclass(frozen=True)
class LoraConfig:
    """`config.model.lora`: a matrix w becomes w + alpha / rank * a b."""

    # 0: no LoRA.
    rank: int = 0
    alpha: float = 16.0
    # Dropout on LoRA's input.
    dropout: float = 0.05
    # Which matrices of the towers' blocks get LoRA: rows of (regex of parameter paths, bool).
    targets: tuple = ()
    # How the matrices of the LLM's blocks are stored: "int8" or "nf4", or "" for full precision.
    # Matrices in int8 or nf4 cannot be trained.
    storage: str = ""

    def __post_init__(self):
        if self.storage and self.storage not in QUANTIZED:
            raise UserError(
                f"model.lora.storage={self.storage!r} is not one of '', {', '.join(QUANTIZED)}"
            )
        if self.rank < 0 or not 0 <= self.dropout < 1:
            raise UserError(
                f"model.lora: rank={self.rank} must be at least 0, "
                f"and dropout={self.dropout} at least 0 and below 1"
            )


NO_LORA = LoraConfig()


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "absmax"], meta_fields=[])
@dataclass(frozen=True)
# JAX also builds this class with leaves that are not arrays, so its types cannot be checked.
@no_type_check
class Quantized:
    """A matrix as codes for numbers in -1..1, and one scale per block of its last axis.

    An int8 code is the number times 127. A uint8 code is a pair of indices into NF4's 16 levels.
    """

    codes: Array
    absmax: Array

    def map(self, change: Callable[[str, Array], Array]) -> "Quantized":
        """Apply `change(name, array)` to every array."""
        return Quantized(change(_name(self.codes), self.codes), change("absmax", self.absmax))

    def dequantize(self, dtype) -> Array:
        """The matrix in full precision."""
        return dequantize(self.codes, self.absmax).astype(dtype)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["w", "a", "b", "keys"],
    meta_fields=["scale", "dropout"],
)
@dataclass(frozen=True)
# JAX also builds this class with leaves that are not arrays, so its types cannot be checked.
@no_type_check
class Lora:
    """A matrix with LoRA: w [in..., out...] + scale * a [in..., r] b [r, out...].

    In a stack of layers the arrays have a leading L axis. keys: one dropout key per layer, or None.
    """

    w: Array | Quantized
    a: Array
    b: Array
    keys: Array | None
    scale: float
    dropout: float

    def map(self, change: Callable[[str, Array], Array]) -> "Lora":
        """Apply `change(name, array)` to every array except the keys."""
        w = self.w.map(change) if isinstance(self.w, Quantized) else change("w", self.w)
        return replace(self, w=w, a=change("a", self.a), b=change("b", self.b))


def split_axes(equation: str) -> tuple[str, str]:
    """Split the axes of w in "x,w->y" into summed axes and axes of the output y."""
    _, w, y = re.split(",|->", equation)
    summed = "".join(axis for axis in w if axis not in y)
    kept = "".join(axis for axis in w if axis in y)
    return summed, kept


def equations(equation: str) -> tuple[str, str]:
    """Make the two einsums that LoRA adds to "x,w->y": x times a, and the result times b.

    "btD,Dhd->bthd" gives "btD,DR->btR" and "btR,Rhd->bthd". In every matrix of a tower's blocks the
    summed axes come first, so that LoRA of w [in..., out...] is a [in..., r] and b [r, out...].
    """
    x, w, y = re.split(",|->", equation)
    summed, kept = split_axes(equation)
    assert w == summed + kept, f"{equation}: LoRA needs the summed axes of w to come first"
    rows = "".join(axis for axis in x if axis not in summed)
    return f"{x},{summed}R->{rows}R", f"{rows}R,R{kept}->{y}"


def apply(
    config: LoraConfig | None, params: dict[str, Any], key: Array | None = None, path: str = ""
) -> dict[str, Any]:
    """Fold each matrix and its LoRA or quantized parts into one value named `w`.

    key: random key of LoRA's dropout, which is off if this is None. path: path of `params` in the
    complete tree. The dropout key of a matrix is derived from `key` and the path of the matrix.
    """
    leaves: dict[str, Any] = {}
    for name, part in params.items():
        is_leaf = not isinstance(part, dict)
        leaves[name] = part if is_leaf else apply(config, part, key, f"{path}/{name}")
    for name in QUANTIZED:
        if name in leaves:
            leaves["w"] = Quantized(leaves.pop(name), leaves.pop("absmax"))
    if "a" in leaves and "b" in leaves:
        assert config is not None, "parameters with LoRA need its config"
        w = leaves.pop("w")
        a = leaves.pop("a")
        b = leaves.pop("b")
        keys = None
        if key is not None and config.dropout:
            keys = jax.random.split(_key_of(path, key), len(a))
        leaves["w"] = Lora(w, a, b, keys, config.alpha / a.shape[-1], config.dropout)
    return leaves


def init(
    config: LoraConfig | None, params: tree.Tree, inputs: dict[str, int], key: Array
) -> tree.Tree:
    """Add fresh LoRA leaves to `params`, and quantize matrices if `config.storage` is set.

    LoRA's a is initialised as in PEFT, and b is zero. inputs: maps the path of each matrix of a
    block to the number of its axes that are summed over. Raises UserError for a target that is not
    in `inputs`.
    """
    if config is None:
        return params
    leaves = dict(tree.leaves(params))
    for path in _targets(config, params):
        if path not in inputs:
            raise UserError(f"model.lora.targets: {path} is not a matrix of a tower's blocks")
        shape = leaves[path].shape
        # The first `cut` axes are L and those that are summed over.
        cut = 1 + inputs[path]
        bound = math.prod(shape[1:cut]) ** -0.5
        a_shape = (*shape[:cut], config.rank)
        where = path.removesuffix("/w")
        leaves[f"{where}/a"] = jax.random.uniform(
            _key_of(path, key), a_shape, minval=-bound, maxval=bound
        )
        leaves[f"{where}/b"] = jnp.zeros((shape[0], config.rank, *shape[cut:]))
    if config.storage:
        for path in [path for path in leaves if re.fullmatch(STORED, path)]:
            leaves |= quantize_leaf(path, leaves.pop(path), config.storage)
    return tree.unflatten(leaves)


def _targets(config: LoraConfig, params: tree.Tree) -> list[str]:
    """List the paths of the matrices that get LoRA."""
    if not config.rank:
        return []
    try:
        chosen = tree.by_rule(config.targets, params, "model.lora.targets")
    except ValueError as error:
        raise UserError(str(error)) from error
    return [path for path, is_target in tree.leaves(chosen) if is_target]


def _key_of(path: str, key: Array) -> Array:
    """Derive the key of the parameter at `path`, which does not depend on other parameters."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


@partial(jax.jit, static_argnums=0)
def merge(
    config: LoraConfig, w: Numbers | Quantized, a: Numbers, b: Numbers
) -> Float[Array, "..."]:
    """Merge one layer's LoRA into its matrix: w + alpha / rank * a b, in float32."""
    w = w.dequantize(jnp.float32) if isinstance(w, Quantized) else jnp.asarray(w, jnp.float32)
    product = jnp.tensordot(
        jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), 1, precision="highest"
    )
    return w + config.alpha / a.shape[-1] * product


# Storage in 8 or 4 bits


def quantize_leaf(path: str, w: Float[Numbers, "..."], storage: str) -> dict[str, Array]:
    """Quantize the matrix at `path`, and return the leaves that replace it by path."""
    where = path.removesuffix("/w")
    codes, absmax = quantize(w, storage)
    return {f"{where}/{storage}": codes, f"{where}/absmax": absmax}


@partial(jax.jit, static_argnums=1)
def quantize(
    w: Float[Numbers, "..."], storage: str
) -> tuple[Int8[Array, "..."] | UInt8[Array, "..."], Float[Array, "..."]]:
    """Scale each block of the last axis to -1..1 and quantize it: return (codes, scales)."""
    blocks = rearrange(
        jnp.asarray(w, jnp.float32), "... (n k) -> ... n k", k=math.gcd(BLOCK, w.shape[-1])
    )
    absmax = jnp.abs(blocks).max(-1)
    scaled = rearrange(blocks / jnp.maximum(absmax, 1e-30)[..., None], "... n k -> ... (n k)")
    if storage == "int8":
        return jnp.round(127 * scaled).astype(jnp.int8), absmax
    if w.shape[-1] % 2:
        raise UserError(
            f"model.lora.storage={storage!r} packs two numbers into a byte, "
            f"but a matrix {list(w.shape)} has an odd last axis"
        )
    levels = jnp.asarray(nf4())
    codes = jnp.searchsorted((levels[1:] + levels[:-1]) / 2, scaled).astype(jnp.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, absmax


@jax.jit
def dequantize(
    codes: Int8[Numbers, "..."] | UInt8[Numbers, "..."], absmax: Float[Numbers, "..."]
) -> Float[Array, "..."]:
    """Invert `quantize`, up to rounding, in float32."""
    codes = jnp.asarray(codes)
    absmax = jnp.asarray(absmax)
    if _name(codes) == "int8":
        scaled = codes.astype(jnp.float32) / 127
    else:
        scaled = jnp.asarray(nf4())[jnp.stack([codes & 15, codes >> 4], -1).astype(jnp.int32)]
        scaled = rearrange(scaled, "... m two -> ... (m two)")
    blocks = rearrange(scaled, "... (n k) -> ... n k", n=absmax.shape[-1])
    return rearrange(blocks * absmax[..., None], "... n k -> ... (n k)")


def nf4() -> Float[np.ndarray, "16"]:
    """Compute NF4's 16 levels: quantiles of a normal distribution, scaled to -1..1.

    Eight levels are above 0 and seven below (QLoRA, section 3).
    """

    def quantiles(count):
        return [NormalDist().inv_cdf(p) for p in np.linspace(0.9677083, 0.5, count)[:-1]]

    levels = np.array(sorted([*quantiles(9), 0.0, *(-x for x in quantiles(8))]))
    return (levels / levels.max()).astype(np.float32)


def _name(codes: Numbers) -> str:
    return "int8" if codes.dtype == jnp.int8 else "nf4"
