"""The released Emu checkpoint: its names and ours (shared by its pretrained and chat models).

PyTorch's linear weights are [out, in]; EVA's qkv and LLaMA's vocabulary each hold several of our leaves.
"""
import re
from collections.abc import Mapping

import numpy as np

from emu_jax.config import UserError
from emu_jax.models.emu import EmuSize
from emu_jax.weights.convert import Row, Table


def table(size: EmuSize) -> Table:
    """Rows in the model's reading order, for a model of `size`."""
    E, V, end = size.vision.width, size.llama.vocab, size.llama.vocab + size.llama.added
    vision, t5, llama = "visual.blocks.{l}.", "cformer.cformer.block.{l}.layer.", "decoder.lm.model.layers.{l}."
    norm = lambda theirs, ours: (Row(f"{theirs}.weight", f"{ours}/scale"), Row(f"{theirs}.bias", f"{ours}/bias"))
    linear = lambda theirs, ours: (Row(f"{theirs}.weight", f"{ours}/w", "o i -> i o"), Row(f"{theirs}.bias", f"{ours}/bias"))
    rows = (
        Row("visual.cls_token", "vision/cls", "1 1 e -> e"),
        Row("visual.pos_embed", "vision/pos", "1 t e -> t e"),
        Row("visual.patch_embed.proj.weight", "vision/patch/w", "e c i j -> i j c e"),
        Row("visual.patch_embed.proj.bias", "vision/patch/bias"),
        *norm(vision + "norm1", "vision/blocks/norm1"),
        *(Row(vision + "attn.qkv.weight", f"vision/blocks/attn/{name}/w", "(vh d) e -> e vh d", (i * E, (i + 1) * E))
          for i, name in enumerate("qkv")),
        Row(vision + "attn.q_bias", "vision/blocks/attn/q/bias", "(vh d) -> vh d"),
        Row(vision + "attn.v_bias", "vision/blocks/attn/v/bias", "(vh d) -> vh d"),
        Row(vision + "attn.proj.weight", "vision/blocks/attn/o/w", "e (vh d) -> vh d e"),
        Row(vision + "attn.proj.bias", "vision/blocks/attn/o/bias"),
        *norm(vision + "norm2", "vision/blocks/norm2"),
        *linear(vision + "mlp.fc1", "vision/blocks/ffn/up"),
        *linear(vision + "mlp.fc2", "vision/blocks/ffn/down"),
        *norm("ln_visual", "ln_visual"),
        Row("cformer.causal_tokens", "resampler/queries", "1 n c -> n c"),
        Row("cformer.cformer.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "resampler/relative"),
        *(row for number, theirs, ours in ((0, "SelfAttention", "self"), (1, "EncDecAttention", "cross")) for row in (
            Row(f"{t5}{number}.layer_norm.weight", f"resampler/blocks/norm{number + 1}/scale"),
            *(Row(f"{t5}{number}.{theirs}.{name}.weight", f"resampler/blocks/{ours}/{name}/w", "(rh d) c -> c rh d") for name in "qkv"),
            Row(f"{t5}{number}.{theirs}.o.weight", f"resampler/blocks/{ours}/o/w", "c (rh d) -> rh d c"))),
        Row(t5 + "2.layer_norm.weight", "resampler/blocks/norm3/scale"),
        Row(t5 + "2.DenseReluDense.wi.weight", "resampler/blocks/ffn/up/w", "f c -> c f"),
        Row(t5 + "2.DenseReluDense.wo.weight", "resampler/blocks/ffn/down/w", "c f -> f c"),
        Row("cformer.cformer.final_layer_norm.weight", "resampler/norm/scale"),
        *linear("cformer.projection", "resampler/project"),
        Row("decoder.lm.model.embed_tokens.weight", "llama/embed/base", cut=(0, V)),
        Row("decoder.lm.model.embed_tokens.weight", "llama/embed/added", cut=(V, end)),
        Row(llama + "input_layernorm.weight", "llama/blocks/norm1/scale"),
        *(Row(f"{llama}self_attn.{name}_proj.weight", f"llama/blocks/attn/{name}/w", "(lh d) D -> D lh d") for name in "qkv"),
        Row(llama + "self_attn.o_proj.weight", "llama/blocks/attn/o/w", "D (lh d) -> lh d D"),
        Row(llama + "post_attention_layernorm.weight", "llama/blocks/norm2/scale"),
        *(Row(f"{llama}mlp.{name}_proj.weight", f"llama/blocks/ffn/{name}/w", "o i -> i o") for name in ("gate", "up", "down")),
        Row("decoder.lm.model.norm.weight", "llama/norm/scale"),
        Row("decoder.lm.lm_head.weight", "llama/lm_head/base", cut=(0, V)),
        Row("decoder.lm.lm_head.weight", "llama/lm_head/added", cut=(V, end)),
        Row("decoder.lm.stu_regress_head.weight", "regress_head/w", "o i -> i o"),
    )
    return Table(rows, axes=dict(vh=size.vision.heads, rh=size.resampler.heads, lh=size.llama.heads),
                 unused=(r"visual\.(norm|head|fc_norm)\..*", r"cformer\.cformer\.embed_tokens\.weight", r".*rotary_emb\.inv_freq"),
                 depth=dict(vision=size.vision.depth, resampler=size.resampler.depth, llama=size.llama.depth))


def rename(name: str) -> str:
    """A released name without its optional leading `module.` and without PEFT's wrapping."""
    return re.sub(r"^module\.", "", name).replace("decoder.lm.base_model.model.", "decoder.lm.").replace(".base_layer.weight", ".weight")


def canonical(foreign: Mapping[str, np.ndarray], *, lora_scale: float = 1.0) -> dict[str, np.ndarray]:
    """The tensors under their plain names, LoRA merged into its weights: w + lora_scale * B A, with lora_scale = alpha / rank.
    Raises UserError for half a LoRA."""
    named = {rename(name): array for name, array in foreign.items()}
    merged = {name: array for name, array in named.items() if ".lora_" not in name}
    for name, a in named.items():
        if ".lora_A." in name:
            weight, other = re.sub(r"\.lora_A\..*", ".weight", name), name.replace(".lora_A.", ".lora_B.")
            if weight not in merged or other not in named:
                raise UserError(f"{name} is there without {other if weight in merged else weight}")
            merged[weight] = merged[weight] + np.float32(lora_scale) * (named[other] @ a)
    return merged
