"""The visual tower of EVA-01-CLIP, with or without the prefix "visual." in its names.

Linear weights are [out, in] there, and the qkv weight holds three of our leaves. Emu does not use
the final norm, the head or the text tower.
"""

from math import isqrt
from typing import Any

import numpy as np

from emu_jax.models.emu import EmuConfig
from emu_jax.models.vision import VisionConfig
from emu_jax.weights.convert import Row, Table, Tensors
from emu_jax.weights.family import Family, Shapes, count_layers
from emu_jax.weights.files import Tensor

# Width of a head in EVA-CLIP g/14, whose files do not contain it.
HEAD_WIDTH = 88
POSITIONS = "visual.pos_embed"


def rows(model_config: VisionConfig) -> tuple[Row, ...]:
    """Rows in the model's reading order."""
    E = model_config.width
    block = "visual.blocks.{l}."
    heads = "(vh d) e -> e vh d"
    return (
        Row("visual.cls_token", "vision/cls", "1 1 e -> e"),
        Row(POSITIONS, "vision/pos", "1 t e -> t e"),
        Row("visual.patch_embed.proj.weight", "vision/patch/w", "e c i j -> i j c e"),
        Row("visual.patch_embed.proj.bias", "vision/patch/bias"),
        *norm(block + "norm1", "vision/blocks/norm1"),
        Row(block + "attn.qkv.weight", "vision/blocks/attn/q/w", heads, (0, E)),
        Row(block + "attn.qkv.weight", "vision/blocks/attn/k/w", heads, (E, 2 * E)),
        Row(block + "attn.qkv.weight", "vision/blocks/attn/v/w", heads, (2 * E, 3 * E)),
        Row(block + "attn.q_bias", "vision/blocks/attn/q/bias", "(vh d) -> vh d"),
        Row(block + "attn.v_bias", "vision/blocks/attn/v/bias", "(vh d) -> vh d"),
        Row(block + "attn.proj.weight", "vision/blocks/attn/o/w", "e (vh d) -> vh d e"),
        Row(block + "attn.proj.bias", "vision/blocks/attn/o/bias"),
        *norm(block + "norm2", "vision/blocks/norm2"),
        *linear(block + "mlp.fc1", "vision/blocks/ffn/up"),
        *linear(block + "mlp.fc2", "vision/blocks/ffn/down"),
    )


def norm(theirs: str, ours: str) -> tuple[Row, Row]:
    """Rows of a LayerNorm."""
    return Row(f"{theirs}.weight", f"{ours}/scale"), Row(f"{theirs}.bias", f"{ours}/bias")


def linear(theirs: str, ours: str) -> tuple[Row, Row]:
    """Rows of a linear layer with a bias."""
    return Row(f"{theirs}.weight", f"{ours}/w", "o i -> i o"), Row(f"{theirs}.bias", f"{ours}/bias")


def axes(model_config: VisionConfig) -> dict[str, int]:
    """Lengths of the named axes in patterns: vh, the vision heads."""
    return dict(vh=model_config.heads)


UNUSED = (r"visual\.(norm|head|fc_norm)\..*", r"visual\.rope\..*", r"text\..*", r"logit_scale")


def infer_config(shapes: Shapes, config: dict[str, Any]) -> dict[str, Any]:
    """Infer config.model.vision; None for fields that the files do not determine."""
    cls = shapes.get("visual.cls_token")
    pos = shapes.get(POSITIONS)
    patch = shapes.get("visual.patch_embed.proj.weight")
    ffn = shapes.get("visual.blocks.0.mlp.fc1.weight")
    head = config.get("vision_cfg", {}).get("head_width")
    if not head and cls and cls[-1] % HEAD_WIDTH == 0:
        head = HEAD_WIDTH
    return {
        "vision.width": cls and cls[-1],
        "vision.patch": patch and patch[-1],
        "vision.image": pos and patch and isqrt(pos[1] - 1) * patch[-1],
        "vision.depth": count_layers(shapes, r"visual\.blocks\.(\d+)\..*"),
        "vision.ffn": ffn and ffn[0],
        "vision.heads": cls and head and cls[-1] // head,
    }


def config_json(model: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Make a config in the format of EVA-CLIP's repository."""
    return {"vision_cfg": vision_cfg(VisionConfig(**model["vision"]))}


def vision_cfg(model_config: VisionConfig) -> dict[str, Any]:
    """Fields of EVA-CLIP's vision_cfg."""
    # The published ratio of g/14 is rounded: int(1408 * 4.3637) is 6144.
    g14_ratio = 4.3637
    if int(model_config.width * g14_ratio) == model_config.ffn:
        ratio = g14_ratio
    else:
        ratio = model_config.ffn / model_config.width
    return {
        "image_size": model_config.image,
        "layers": model_config.depth,
        "width": model_config.width,
        "head_width": model_config.width // model_config.heads,
        "mlp_ratio": ratio,
        "patch_size": model_config.patch,
        "eva_model_name": "eva-clip-g-14-x",
        "drop_path_rate": 0,
        "xattn": True,
    }


def resized(tensors: Tensors, side: int) -> dict[str, Any]:
    """Interpolate the position embeddings to side x side patches, when they are read."""
    old = tensors[POSITIONS]
    shape = (1, 1 + side * side, old.shape[2])
    new = Tensor(shape, old.dtype, lambda: interpolate(np.asarray(old), side))
    return dict(tensors) | {POSITIONS: new}


def interpolate(positions: np.ndarray, side: int) -> np.ndarray:
    """Resize position embeddings [1, 1 + P, E] to side x side patches.

    Bicubic as in PyTorch (a = -0.75, edges repeated); the embedding of CLS is unchanged.
    """
    old = isqrt(positions.shape[1] - 1)
    square = positions[0, 1:].astype(np.float32).reshape(old, old, -1)
    weights = bicubic(old, side)
    square = np.einsum("yi,xj,ije->yxe", weights, weights, square, optimize=True)
    return np.concatenate(
        [positions[:, :1], square.reshape(1, side * side, -1).astype(positions.dtype)], 1
    )


def bicubic(old: int, new: int) -> np.ndarray:
    """Weights [new, old] of cubic convolution (Keys 1981), a = -0.75, between cell centres."""
    a = -0.75
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    weights = np.zeros((new, old), np.float64)
    for tap in range(-1, 3):
        x = np.abs(centres - np.floor(centres) - tap)
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
        sources = np.clip(np.floor(centres).astype(int) + tap, 0, old - 1)
        np.add.at(weights, (np.arange(new), sources), np.where(x <= 1, near, far))
    return weights.astype(np.float32)


def table(model_config: EmuConfig) -> Table:
    """Rows of the visual tower."""
    return Table(
        rows(model_config.vision),
        axes(model_config.vision),
        UNUSED,
        dict(vision=model_config.vision.depth),
    )


def canonical(tensors: Tensors) -> dict[str, Any]:
    """Add the prefix "visual." where a file of the tower alone has none."""
    prefix = "visual." if "cls_token" in tensors else ""
    return {prefix + name: tensor for name, tensor in tensors.items()}


FAMILY = Family(
    name="eva-clip",
    about="EVA-01-CLIP g/14, from which the visual encoder starts",
    signature=r"(visual\.)?blocks\.\d+\.attn\.q_bias",
    table=table,
    infer_config=infer_config,
    config_json=config_json,
    canonical=canonical,
)
