"""The released Emu checkpoint, pretrained or chat: EVA-CLIP's, T5's and LLaMA's tables under its
prefixes, and its own few names.

A chat model's LoRA is merged into its weights, or becomes PEFT's adapter (`parted`); exports have
none. A model with more added tokens than the file ([USER] [ASSISTANT]) gets their rows as the mean
of the others.
"""

import re
from typing import Any

import numpy as np

from emu_jax.config import UserError
from emu_jax.models.emu import EmuConfig
from emu_jax.models.vision import VisionConfig
from emu_jax.weights import eva_clip, llama, t5
from emu_jax.weights.convert import Row, Table, Tensors
from emu_jax.weights.family import Family, Shapes
from emu_jax.weights.files import Tensor

LM = "decoder.lm."
T5 = "cformer.cformer."
# rows of LLaMA-1's vocabulary; those after it are Emu's
VOCAB = 32000


def table(model_config: EmuConfig) -> Table:
    """Rows in the model's reading order, for a model of `model_config`."""
    base, added = llama.vocabulary(model_config.llama, LM)
    rows = (
        *eva_clip.rows(model_config.vision),
        *eva_clip.norm("ln_visual", "ln_visual"),
        Row("cformer.causal_tokens", "resampler/queries", "1 n c -> n c"),
        *t5.rows(model_config.resampler, T5, "qkv"),
        *eva_clip.linear("cformer.projection", "resampler/project"),
        *(row for pair in zip(base, added) for row in pair),
        *llama.blocks(model_config.llama, LM),
        Row(LM + "stu_regress_head.weight", "regress_head/w", "o i -> i o"),
    )
    return Table(
        rows,
        axes=eva_clip.axes(model_config.vision)
        | t5.axes(model_config.resampler)
        | llama.axes(model_config.llama),
        unused=(
            *eva_clip.UNUSED,
            r"cformer\.cformer\.embed_tokens\.weight",
            *llama.unused(model_config.llama, LM),
        ),
        depth=dict(
            vision=model_config.vision.depth,
            resampler=model_config.resampler.depth,
            llama=model_config.llama.depth,
        ),
    )


def rename(name: str) -> str:
    """A released name without its optional leading `module.` and without PEFT's wrapping."""
    return (
        re.sub(r"^module\.", "", name)
        .replace("decoder.lm.base_model.model.", LM)
        .replace(".base_layer.weight", ".weight")
    )


def canonical(foreign: Tensors, *, lora_scale: float = 1.0) -> dict[str, Any]:
    """The tensors under their plain names, LoRA merged into its weights when they are read: w +
    lora_scale * B A, with lora_scale = alpha / rank. Raises UserError for half a LoRA.
    """
    named = {rename(name): tensor for name, tensor in foreign.items()}
    merged = {name: tensor for name, tensor in named.items() if ".lora_" not in name}
    for name in named:
        if ".lora_" in name:
            pair = [re.sub(r"\.lora_[AB]\.", f".lora_{half}.", name) for half in "AB"]
            weight = re.sub(r"\.lora_[AB]\..*", ".weight", name)
            if lacking := [other for other in (weight, *pair) if other not in named]:
                raise UserError(f"{name} is there without {lacking[0]}")
            merged[weight] = _merged(named[weight], *(named[half] for half in pair), lora_scale)
    return merged


def parted(foreign: Tensors) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the tensors under their plain names without LoRA, its A and B as PEFT's adapter files name
    them).
    """
    named = {rename(name): tensor for name, tensor in foreign.items()}
    adapter = {
        re.sub(r"(\.lora_[AB])\..*", r"\1.weight", name).replace(LM, "base_model.model.", 1): tensor
        for name, tensor in named.items()
        if ".lora_" in name
    }
    return {name: tensor for name, tensor in named.items() if ".lora_" not in name}, adapter


def _merged(w: Any, a: Any, b: Any, scale: float) -> Tensor:
    dtype = np.promote_types(w.dtype, np.promote_types(a.dtype, b.dtype))

    def read():
        return np.asarray(w).astype(np.float32) + np.float32(scale) * (
            np.asarray(b).astype(np.float32) @ np.asarray(a).astype(np.float32)
        )

    return Tensor(tuple(w.shape), dtype, lambda: read().astype(dtype))


def infer_config(shapes: Shapes, config: dict[str, Any]) -> dict[str, Any]:
    """Fields of config.model that the tensors, and the config.json of an export of ours, fix."""
    queries = shapes.get("cformer.causal_tokens")
    return {
        **eva_clip.infer_config(shapes, config),
        **t5.infer_config(shapes, {}, T5),
        **llama.infer_config(shapes, config.get("llama", {}), LM),
        "llama.vocab": config.get("llama", {}).get("vocab_size"),
        "resampler.tokens": queries and queries[1],
    }


def default_config(shapes: Shapes, config: dict[str, Any]) -> dict[str, Any]:
    embed = shapes.get(LM + "model.embed_tokens.weight")
    return (
        {"llama.added": embed[0] - config.get("llama", {}).get("vocab_size", VOCAB)}
        if embed
        else {}
    )


def config_json(model: dict[str, Any], tokens: int) -> dict[str, Any]:
    """As the release's, and beside it LLaMA's own config, whose heads no tensor shows."""
    N = model["resampler"]["tokens"]
    return {
        "embed_dim": 1024,
        "vision_cfg": eva_clip.vision_cfg(VisionConfig(**model["vision"])) | {"freeze": False},
        "multimodal_cfg": {"name": "llama-13B", "xattn": True, "n_causal": N, "freeze": False},
        "vladapter_cfg": {"name": "cformer", "n_causal": N},
        "llama": llama.config_json(model, tokens),
    }


FAMILY = Family(
    "emu1",
    signature=r"decoder\.lm\.model\.layers\.\d+\.self_attn\.q_proj\.weight",
    table=table,
    infer_config=infer_config,
    default_config=default_config,
    config_json=config_json,
    canonical=canonical,
)
