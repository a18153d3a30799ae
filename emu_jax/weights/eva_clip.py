"""EVA-01-CLIP's visual tower, under its own names, with or without their leading "visual.".

PyTorch's linear weights are [out, in]; its qkv holds three of our leaves. The final norm, the head
and the text tower are not Emu's.
"""

from math import isqrt
from typing import Any

import numpy as np

from emu_jax.models.vision import VisionConfig
from emu_jax.weights.convert import Row, Table, Tensors
from emu_jax.weights.family import Family, Shapes, layers
from emu_jax.weights.files import Tensor

# width of a head in g/14, whose files do not say it
HEAD = 88
POSITIONS = "visual.pos_embed"


def rows(model_config: VisionConfig) -> tuple[Row, ...]:
    """Rows in the model's reading order."""
    E = model_config.width
    block = "visual.blocks.{l}."
    return (
        Row("visual.cls_token", "vision/cls", "1 1 e -> e"),
        Row(POSITIONS, "vision/pos", "1 t e -> t e"),
        Row("visual.patch_embed.proj.weight", "vision/patch/w", "e c i j -> i j c e"),
        Row("visual.patch_embed.proj.bias", "vision/patch/bias"),
        *norm(block + "norm1", "vision/blocks/norm1"),
        *(
            Row(
                block + "attn.qkv.weight",
                f"vision/blocks/attn/{name}/w",
                "(vh d) e -> e vh d",
                (i * E, (i + 1) * E),
            )
            for i, name in enumerate("qkv")
        ),
        Row(block + "attn.q_bias", "vision/blocks/attn/q/bias", "(vh d) -> vh d"),
        Row(block + "attn.v_bias", "vision/blocks/attn/v/bias", "(vh d) -> vh d"),
        Row(block + "attn.proj.weight", "vision/blocks/attn/o/w", "e (vh d) -> vh d e"),
        Row(block + "attn.proj.bias", "vision/blocks/attn/o/bias"),
        *norm(block + "norm2", "vision/blocks/norm2"),
        *linear(block + "mlp.fc1", "vision/blocks/ffn/up"),
        *linear(block + "mlp.fc2", "vision/blocks/ffn/down"),
    )


def norm(theirs: str, ours: str) -> tuple[Row, Row]:
    return Row(f"{theirs}.weight", f"{ours}/scale"), Row(f"{theirs}.bias", f"{ours}/bias")


def linear(theirs: str, ours: str) -> tuple[Row, Row]:
    return Row(f"{theirs}.weight", f"{ours}/w", "o i -> i o"), Row(f"{theirs}.bias", f"{ours}/bias")


def axes(model_config: VisionConfig) -> dict[str, int]:
    return dict(vh=model_config.heads)


UNUSED = (r"visual\.(norm|head|fc_norm)\..*", r"visual\.rope\..*", r"text\..*", r"logit_scale")


def infer_config(shapes: Shapes, config: dict[str, Any]) -> dict[str, Any]:
    """Fields of model.vision; None where neither tensors nor config.json say."""
    cls, pos, patch, ffn = (
        shapes.get(f"visual.{name}")
        for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
    )
    head = config.get("vision_cfg", {}).get("head_width") or (
        HEAD if cls and cls[-1] % HEAD == 0 else None
    )
    return {
        "vision.width": cls and cls[-1],
        "vision.patch": patch and patch[-1],
        "vision.image": pos and patch and isqrt(pos[1] - 1) * patch[-1],
        "vision.depth": layers(shapes, r"visual\.blocks\.(\d+)\..*"),
        "vision.ffn": ffn and ffn[0],
        "vision.heads": cls and head and cls[-1] // head,
    }


def config_json(model: dict[str, Any], tokens: int) -> dict[str, Any]:
    """As in EVA-CLIP's own configs."""
    return {"vision_cfg": vision_cfg(VisionConfig(**model["vision"]))}


def vision_cfg(model_config: VisionConfig) -> dict[str, Any]:
    return {
        "image_size": model_config.image,
        "layers": model_config.depth,
        "width": model_config.width,
        "head_width": model_config.width // model_config.heads,
        "mlp_ratio": 4.3637
        if int(model_config.width * 4.3637) == model_config.ffn
        else model_config.ffn / model_config.width,
        "patch_size": model_config.patch,
        "eva_model_name": "eva-clip-g-14-x",
        "drop_path_rate": 0,
        "xattn": True,
    }


def resized(tensors: Tensors, side: int) -> dict[str, Any]:
    """The tensors, with position embeddings for side x side patches."""
    old = tensors[POSITIONS]
    return dict(tensors) | {
        POSITIONS: Tensor(
            (1, 1 + side * side, old.shape[2]),
            old.dtype,
            lambda: interpolate(np.asarray(old), side),
        )
    }


def interpolate(positions: np.ndarray, side: int) -> np.ndarray:
    """Position embeddings [1, 1 + P, E] of a square of patches on a square of `side`, bicubic as
    PyTorch's (a = -0.75, edges repeated); that of CLS stays.
    """
    old = isqrt(positions.shape[1] - 1)
    square = positions[0, 1:].astype(np.float32).reshape(old, old, -1)
    weights = bicubic(old, side)
    square = np.einsum("yi,xj,ije->yxe", weights, weights, square, optimize=True)
    return np.concatenate(
        [positions[:, :1], square.reshape(1, side * side, -1).astype(positions.dtype)], 1
    )


def bicubic(old: int, new: int) -> np.ndarray:
    """Weights [new, old] of cubic convolution (Keys 1981) with a = -0.75 between the centres of
    cells.
    """
    a = -0.75
    places = (np.arange(new) + 0.5) * old / new - 0.5
    weights = np.zeros((new, old), np.float64)
    for tap in range(-1, 3):
        x = np.abs(places - np.floor(places) - tap)
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
        np.add.at(
            weights,
            (np.arange(new), np.clip(np.floor(places).astype(int) + tap, 0, old - 1)),
            np.where(x <= 1, near, far),
        )
    return weights.astype(np.float32)


def table(model_config: Any) -> Table:
    return Table(
        rows(model_config.vision),
        axes(model_config.vision),
        UNUSED,
        dict(vision=model_config.vision.depth),
    )


def canonical(tensors: Tensors) -> dict[str, Any]:
    """All under "visual.": a file of the tower alone has its names without."""
    bare = "cls_token" in tensors
    return {f"visual.{name}" if bare else name: tensor for name, tensor in tensors.items()}


FAMILY = Family(
    "eva-clip",
    signature=r"(visual\.)?blocks\.\d+\.attn\.q_bias",
    table=table,
    infer_config=infer_config,
    config_json=config_json,
    canonical=canonical,
)
