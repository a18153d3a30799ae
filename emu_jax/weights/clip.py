"""CLIP as Hugging Face's CLIPModel keeps it (openai/clip-vit-large-patch14 and others): its names
and ours.

No part of an Emu: config.model has the group `clip` for it alone. The files beside its tensors that
say how texts and pictures become numbers go into the checkpoint as they are.
"""

from math import isqrt
from typing import Any

from emu_jax import tree
from emu_jax.config import UserError
from emu_jax.models import clip, module
from emu_jax.models.clip import ACTIVATIONS, ClipConfig
from emu_jax.weights.convert import Row, Table
from emu_jax.weights.eva_clip import linear, norm
from emu_jax.weights.family import Family, Shapes, layers

# the first, or else the other two
TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt")
PREPROCESSOR = ("preprocessor_config.json", "processor_config.json")
WHERE = (
    "--clip=DIR: a CLIP, made of a folder of Hugging Face's with config.json, model.safetensors or pytorch_model.bin, tokenizer.json and "
    "preprocessor_config.json (as openai/clip-vit-large-patch14 has them) by: python -m emu_jax.weights import --family=clip FOLDER --to=DIR"
)


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
    return (
        *norm(block + "layer_norm1", f"{ours}/norm1"),
        *(
            row
            for name in "qkv"
            for row in (
                Row(
                    f"{block}self_attn.{name}_proj.weight",
                    f"{ours}/{name}/w",
                    f"({heads} d) e -> e {heads} d",
                ),
                Row(
                    f"{block}self_attn.{name}_proj.bias",
                    f"{ours}/{name}/bias",
                    f"({heads} d) -> {heads} d",
                ),
            )
        ),
        Row(block + "self_attn.out_proj.weight", f"{ours}/o/w", f"e ({heads} d) -> {heads} d e"),
        Row(block + "self_attn.out_proj.bias", f"{ours}/o/bias"),
        *norm(block + "layer_norm2", f"{ours}/norm2"),
        *linear(block + "mlp.fc1", f"{ours}/up"),
        *linear(block + "mlp.fc2", f"{ours}/down"),
    )


def infer_config(shapes: Shapes, config: dict[str, Any]) -> dict[str, Any]:
    """Fields of model.clip; None where neither tensors nor config.json say. What config.json leaves
    out is as in the library.
    """
    tokens, text, patch, vision, out = (
        shapes.get(name)
        for name in (
            "text_model.embeddings.token_embedding.weight",
            "text_model.embeddings.position_embedding.weight",
            "vision_model.embeddings.patch_embedding.weight",
            "vision_model.embeddings.position_embedding.weight",
            "visual_projection.weight",
        )
    )
    eos = config.get("text_config", {}).get("eos_token_id", 49407) if config else None
    found = {
        "features": out and out[0],
        "image": vision and patch and isqrt(vision[0] - 1) * patch[-1],
        "patch": patch and patch[-1],
        "vocab": tokens and tokens[0],
        "context": text and text[0],
        "eos": eos,
    }
    for name, heads in (("text", 8), ("vision", 12)):
        found |= {
            f"{name}.{field}": value for field, value in _tower(shapes, config, name, heads).items()
        }
    return {f"clip.{field}": value for field, value in found.items()}


def _tower(shapes: Shapes, config: dict[str, Any], name: str, heads: int) -> dict[str, Any]:
    block = rf"{name}_model.encoder.layers."
    q, up = (shapes.get(f"{block}0.{matrix}.weight") for matrix in ("self_attn.q_proj", "mlp.fc1"))
    said = (
        {"num_attention_heads": heads, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"}
        | config.get(f"{name}_config", {})
        if config
        else {}
    )
    activation = said.get("hidden_act")
    if activation not in (None, *ACTIVATIONS):
        raise UserError(
            f"its config.json asks for hidden_act={activation!r}, which is not built; there are {', '.join(ACTIVATIONS)}"
        )
    return {
        "width": q and q[0],
        "depth": layers(shapes, block.replace(".", r"\.") + r"(\d+)\..*"),
        "heads": said.get("num_attention_heads"),
        "ffn": up and up[0],
        "eps": said.get("layer_norm_eps"),
        "activation": activation,
    }


def config_json(model: dict[str, Any], tokens: int) -> dict[str, Any]:
    """As CLIPConfig has it."""
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


def model_config(model: dict[str, Any]) -> ClipConfig:
    """Of config.model. Raises UserError where it has no CLIP."""
    if "clip" not in model:
        raise UserError("its config has no model.clip")
    return ClipConfig.of(model)


def shapes(model_config: ClipConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every leaf."""
    for tower in (model_config.text, model_config.vision):
        if tower.heads < 1 or tower.width % tower.heads:
            raise UserError(f"{tower.heads} heads do not divide a width of {tower.width}")
    return {
        path: leaf.shape for path, leaf in tree.leaves(module.abstract(clip.Clip, model_config))
    }


FAMILY = Family(
    "clip",
    signature=r"vision_model\.pre_layrnorm\.weight",
    table=table,
    infer_config=infer_config,
    config_json=config_json,
    model_config=model_config,
    shapes=shapes,
    config_file="clip",
    extra_files=(*TOKENIZER, *PREPROCESSOR),
    hint="score pictures with --clip={to}",
)
