"""The released Emu checkpoint, pretrained or chat.

Its table combines those of EVA-CLIP, T5 and LLaMA, with prefixes, and a few rows of its own. The
LoRA of a chat model is merged into its weights, or split off as a PEFT adapter; an export has no
LoRA. If our model has more added tokens than the file ([USER], [ASSISTANT]), their rows are the
mean of the others.
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
# Size of LLaMA-1's vocabulary; the rows after it are those of Emu's added tokens.
VOCAB = 32000


def table(model_config: EmuConfig) -> Table:
    """Rows in the model's reading order."""
    base, added = llama.vocabulary(model_config.llama, LM)
    rows = (
        *eva_clip.rows(model_config.vision),
        *eva_clip.norm("ln_visual", "ln_visual"),
        Row("cformer.causal_tokens", "resampler/queries", "1 n c -> n c"),
        *t5.rows(T5, "qkv"),
        *eva_clip.linear("cformer.projection", "resampler/project"),
        *(row for pair in zip(base, added) for row in pair),
        *llama.blocks(LM),
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
    """Remove the optional prefix `module.` and PEFT's wrappers from a released name."""
    return (
        re.sub(r"^module\.", "", name)
        .replace("decoder.lm.base_model.model.", LM)
        .replace(".base_layer.weight", ".weight")
    )


def canonical(foreign: Tensors, *, lora_scale: float = 1.0) -> dict[str, Any]:
    """Rename tensors to the table's names, and merge LoRA into the weights it adapts.

    A merged weight is w + lora_scale * B A, computed when it is read. lora_scale: alpha / rank.
    Raises UserError if the A, the B or the weight of an adapter is missing.
    """
    named = {rename(name): tensor for name, tensor in foreign.items()}
    merged = {name: tensor for name, tensor in named.items() if ".lora_" not in name}
    for name in named:
        if ".lora_" not in name:
            continue
        a = re.sub(r"\.lora_[AB]\.", ".lora_A.", name)
        b = re.sub(r"\.lora_[AB]\.", ".lora_B.", name)
        weight = re.sub(r"\.lora_[AB]\..*", ".weight", name)
        if missing := [other for other in (weight, a, b) if other not in named]:
            raise UserError(f"{name} needs {missing[0]}, which is missing")
        merged[weight] = _merged(named[weight], named[a], named[b], lora_scale)
    return merged


def split_lora(foreign: Tensors) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split tensors into (those of the table, LoRA with the names of a PEFT adapter)."""
    plain = {}
    adapter = {}
    for name, tensor in foreign.items():
        name = rename(name)
        if ".lora_" in name:
            name = re.sub(r"(\.lora_[AB])\..*", r"\1.weight", name)
            adapter[name.replace(LM, "base_model.model.", 1)] = tensor
        else:
            plain[name] = tensor
    return plain, adapter


def _merged(w: Any, a: Any, b: Any, scale: float) -> Tensor:
    dtype = np.promote_types(w.dtype, np.promote_types(a.dtype, b.dtype))

    def read() -> np.ndarray:
        w32, a32, b32 = (np.asarray(x).astype(np.float32) for x in (w, a, b))
        return (w32 + np.float32(scale) * (b32 @ a32)).astype(dtype)

    return Tensor(tuple(w.shape), dtype, read)


def infer_config(shapes: Shapes, config: dict[str, Any]) -> dict[str, Any]:
    """Infer config.model from the tensors, and from the config.json of our own exports."""
    queries = shapes.get("cformer.causal_tokens")
    return {
        **eva_clip.infer_config(shapes, config),
        **t5.infer_config(shapes, {}, T5),
        **llama.infer_config(shapes, config.get("llama", {}), LM),
        "llama.vocab": config.get("llama", {}).get("vocab_size"),
        "resampler.tokens": queries and queries[1],
    }


def default_config(shapes: Shapes, config: dict[str, Any]) -> dict[str, Any]:
    """Count the rows after LLaMA's vocabulary as added tokens."""
    embed = shapes.get(LM + "model.embed_tokens.weight")
    if not embed:
        return {}
    return {"llama.added": embed[0] - config.get("llama", {}).get("vocab_size", VOCAB)}


def config_json(model: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Make the release's config, with LLaMA's in it: the tensors do not show its heads."""
    N = model["resampler"]["tokens"]
    return {
        "embed_dim": 1024,
        "vision_cfg": eva_clip.vision_cfg(VisionConfig(**model["vision"])) | {"freeze": False},
        "multimodal_cfg": {"name": "llama-13B", "xattn": True, "n_causal": N, "freeze": False},
        "vladapter_cfg": {"name": "cformer", "n_causal": N},
        "llama": llama.config_json(model, tokens),
    }


FAMILY = Family(
    name="emu1",
    about="the released Emu, pretrained or chat (BAAI/Emu)",
    signature=r"decoder\.lm\.model\.layers\.\d+\.self_attn\.q_proj\.weight",
    table=table,
    infer_config=infer_config,
    default_config=default_config,
    config_json=config_json,
    canonical=canonical,
)
