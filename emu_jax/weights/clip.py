"""CLIP in the format of transformers' CLIPModel, such as openai/clip-vit-large-patch14.

A CLIP is not part of an Emu: its config is config.model.clip. The files of its tokenizer and
preprocessor are copied into the checkpoint's folder unchanged.
"""

import re
from math import isqrt
from typing import Any

from emu_jax import tree
from emu_jax.config import UserError
from emu_jax.models import clip, module
from emu_jax.models.clip import ACTIVATIONS, ClipConfig
from emu_jax.weights.convert import Row, Table
from emu_jax.weights.eva_clip import linear, norm
from emu_jax.weights.family import Family, Shapes, count_layers

# The tokenizer is one file, or in older releases two.
TOKENIZER = "tokenizer.json"
TOKENIZER_PARTS = ("vocab.json", "merges.txt")
# The preprocessor is one file under either name.
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")


def table(model_config: ClipConfig) -> Table:
    """Rows in the model's reading order."""
    return Table(
        (
            Row("text_model.embeddings.token_embedding.weight", "text/tokens"),
            Row("text_model.embeddings.position_embedding.weight", "text/positions"),
            *_blocks("text_model.", "text", "th"),
            *norm("text_model.final_layer_norm", "text/norm"),
            Row("text_projection.weight", "text/project/w", "o i -> i o"),
            Row("vision_model.embeddings.class_embedding", "vision/cls"),
            Row(
                "vision_model.embeddings.patch_embedding.weight",
                "vision/patch/w",
                "e c i j -> i j c e",
            ),
            Row("vision_model.embeddings.position_embedding.weight", "vision/positions"),
            # The misspelling is the library's.
            *norm("vision_model.pre_layrnorm", "vision/before"),
            *_blocks("vision_model.", "vision", "vh"),
            *norm("vision_model.post_layernorm", "vision/after"),
            Row("visual_projection.weight", "vision/project/w", "o i -> i o"),
            Row("logit_scale", "logit_scale"),
        ),
        axes=dict(th=model_config.text.heads, vh=model_config.vision.heads),
        unused=(r"(text|vision)_model\.embeddings\.position_ids",),
        depth=dict(text=model_config.text.depth, vision=model_config.vision.depth),
    )


def _blocks(theirs: str, ours: str, heads: str) -> tuple[Row, ...]:
    block = theirs + "encoder.layers.{l}."
    ours = f"{ours}/blocks"
    weight = f"({heads} d) e -> e {heads} d"
    bias = f"({heads} d) -> {heads} d"
    return (
        *norm(block + "layer_norm1", f"{ours}/norm1"),
        Row(block + "self_attn.q_proj.weight", f"{ours}/q/w", weight),
        Row(block + "self_attn.q_proj.bias", f"{ours}/q/bias", bias),
        Row(block + "self_attn.k_proj.weight", f"{ours}/k/w", weight),
        Row(block + "self_attn.k_proj.bias", f"{ours}/k/bias", bias),
        Row(block + "self_attn.v_proj.weight", f"{ours}/v/w", weight),
        Row(block + "self_attn.v_proj.bias", f"{ours}/v/bias", bias),
        Row(block + "self_attn.out_proj.weight", f"{ours}/o/w", f"e ({heads} d) -> {heads} d e"),
        Row(block + "self_attn.out_proj.bias", f"{ours}/o/bias"),
        *norm(block + "layer_norm2", f"{ours}/norm2"),
        *linear(block + "mlp.fc1", f"{ours}/up"),
        *linear(block + "mlp.fc2", f"{ours}/down"),
    )


def infer_config(shapes: Shapes, config: dict[str, Any]) -> dict[str, Any]:
    """Infer config.model.clip; None for fields that neither tensors nor config.json determine.

    Fields that config.json omits have the library's defaults.
    """
    tokens = shapes.get("text_model.embeddings.token_embedding.weight")
    text = shapes.get("text_model.embeddings.position_embedding.weight")
    patch = shapes.get("vision_model.embeddings.patch_embedding.weight")
    vision = shapes.get("vision_model.embeddings.position_embedding.weight")
    out = shapes.get("visual_projection.weight")
    found = {
        "features": out and out[0],
        "image": vision and patch and isqrt(vision[0] - 1) * patch[-1],
        "patch": patch and patch[-1],
        "vocab": tokens and tokens[0],
        "context": text and text[0],
        "eos": config.get("text_config", {}).get("eos_token_id", 49407) if config else None,
    }
    for name, heads in (("text", 8), ("vision", 12)):
        tower = _infer_tower(shapes, config, name, heads)
        found |= {f"{name}.{field}": value for field, value in tower.items()}
    return {f"clip.{field}": value for field, value in found.items()}


def _infer_tower(shapes: Shapes, config: dict[str, Any], name: str, heads: int) -> dict[str, Any]:
    block = f"{name}_model.encoder.layers."
    q = shapes.get(f"{block}0.self_attn.q_proj.weight")
    up = shapes.get(f"{block}0.mlp.fc1.weight")
    fields = {}
    if config:
        defaults = dict(num_attention_heads=heads, layer_norm_eps=1e-5, hidden_act="quick_gelu")
        fields = defaults | config.get(f"{name}_config", {})
    activation = fields.get("hidden_act")
    if activation not in (None, *ACTIVATIONS):
        raise UserError(
            f"config.json has hidden_act={activation!r}, which is not supported; "
            f"choose from {', '.join(ACTIVATIONS)}"
        )
    return {
        "width": q and q[0],
        "depth": count_layers(shapes, re.escape(block) + r"(\d+)\..*"),
        "heads": fields.get("num_attention_heads"),
        "ffn": up and up[0],
        "eps": fields.get("layer_norm_eps"),
        "activation": activation,
    }


def config_json(model: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Write the config.json of CLIPModel."""
    model_config = ClipConfig.of(model)

    def tower(one):
        return {
            "hidden_size": one.width,
            "num_hidden_layers": one.depth,
            "num_attention_heads": one.heads,
            "intermediate_size": one.ffn,
            "layer_norm_eps": one.eps,
            "hidden_act": one.activation,
            "projection_dim": model_config.features,
        }

    return {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": model_config.features,
        "text_config": tower(model_config.text)
        | {
            "vocab_size": model_config.vocab,
            "max_position_embeddings": model_config.context,
            "eos_token_id": model_config.eos,
        },
        "vision_config": tower(model_config.vision)
        | {"image_size": model_config.image, "patch_size": model_config.patch},
    }


def make_config(model: dict[str, Any]) -> ClipConfig:
    """Make the config of a CLIP. Raises UserError if config.model has no group `clip`."""
    if "clip" not in model:
        raise UserError("the config has no model.clip")
    return ClipConfig.of(model)


def shapes(model_config: ClipConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all leaves. Raises UserError if the heads do not divide the width."""
    for tower in (model_config.text, model_config.vision):
        if tower.heads < 1 or tower.width % tower.heads:
            raise UserError(f"{tower.heads} heads do not divide a width of {tower.width}")
    return {
        path: leaf.shape for path, leaf in tree.leaves(module.abstract(clip.Clip, model_config))
    }


FAMILY = Family(
    name="clip",
    about="CLIP for the CLIP score: transformers' CLIPModel, with its tokenizer",
    signature=r"vision_model\.pre_layrnorm\.weight",
    table=table,
    infer_config=infer_config,
    config_json=config_json,
    make_config=make_config,
    shapes=shapes,
    config_file="clip",
    extra_files=(TOKENIZER, *TOKENIZER_PARTS, *PREPROCESSORS),
    hint="use it for the CLIP score with --clip={to}",
)
