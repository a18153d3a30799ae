"""Hugging Face's LLaMA 1, 2 and 3: LlamaForCausalLM's names and config.json.

An import makes the rows of Emu's added tokens ([PAD] [IMG] [/IMG] <image>) as the mean of the
vocabulary's; an export leaves them out, and is a LLaMA again.
"""

from typing import Any

from emu_jax.config import UserError
from emu_jax.models.llama import LlamaConfig
from emu_jax.weights.convert import Row, Table
from emu_jax.weights.family import Family, Shapes, layers

SCALED = {
    "factor": "factor",
    "low_freq_factor": "low",
    "high_freq_factor": "high",
    "original_max_position_embeddings": "context",
}


def blocks(model_config: LlamaConfig, prefix: str) -> tuple[Row, ...]:
    """The rows of everything but the vocabulary."""
    block = prefix + "model.layers.{l}."
    return (
        Row(block + "input_layernorm.weight", "llama/blocks/norm1/scale"),
        Row(block + "self_attn.q_proj.weight", "llama/blocks/attn/q/w", "(lh d) D -> D lh d"),
        *(
            Row(
                f"{block}self_attn.{name}_proj.weight",
                f"llama/blocks/attn/{name}/w",
                "(lg d) D -> D lg d",
            )
            for name in "kv"
        ),
        Row(block + "self_attn.o_proj.weight", "llama/blocks/attn/o/w", "D (lh d) -> lh d D"),
        Row(block + "post_attention_layernorm.weight", "llama/blocks/norm2/scale"),
        *(
            Row(f"{block}mlp.{name}_proj.weight", f"llama/blocks/ffn/{name}/w", "o i -> i o")
            for name in ("gate", "up", "down")
        ),
        Row(prefix + "model.norm.weight", "llama/norm/scale"),
    )


def vocabulary(model_config: LlamaConfig, prefix: str) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """The rows of the vocabulary's tables, LLaMA's own and Emu's added."""
    V = model_config.vocab
    end = model_config.vocab + model_config.added
    tables = (
        (prefix + "model.embed_tokens.weight", "llama/embed"),
        *(() if model_config.tied else ((prefix + "lm_head.weight", "llama/lm_head"),)),
    )
    return (
        tuple(Row(theirs, f"{ours}/base", cut=(0, V)) for theirs, ours in tables),
        tuple(Row(theirs, f"{ours}/added", cut=(V, end), grows=True) for theirs, ours in tables),
    )


def axes(model_config: LlamaConfig) -> dict[str, int]:
    return dict(lh=model_config.heads, lg=model_config.kv)


def unused(model_config: LlamaConfig, prefix: str) -> tuple[str, ...]:
    """Frequencies that old files hold; and the head where it is the input table again."""
    return (
        r".*rotary_emb\.inv_freq",
        *((rf"{prefix}lm_head\.weight",) if model_config.tied else ()),
    )


def table(model_config: Any) -> Table:
    base, added = vocabulary(model_config.llama, "")
    return Table(
        (*base, *blocks(model_config.llama, "")),
        axes(model_config.llama),
        unused(model_config.llama, ""),
        dict(llama=model_config.llama.depth),
        import_only=added,
    )


def infer_config(shapes: Shapes, config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Fields of model.llama, without the vocabulary's; None where neither tensors nor config.json
    say.
    """
    if config.get("model_type", "llama") != "llama":
        raise UserError(f"its config.json is of a {config['model_type']!r}, not of a 'llama'")
    if (act := config.get("hidden_act", "silu")) != "silu":
        raise UserError(f"its config.json says hidden_act={act!r}; a LLaMA has 'silu'")
    width, heads = (config.get(name) for name in ("hidden_size", "num_attention_heads"))
    if width and heads and config.get("head_dim") not in (None, width // heads):
        raise UserError(
            f"its config.json says head_dim={config['head_dim']}; ours is hidden_size / num_attention_heads = {width // heads}"
        )
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise UserError("its config.json says that there are biases; a LLaMA has none")
    embed, gate = (
        shapes.get(f"{prefix}model.{name}")
        for name in ("embed_tokens.weight", "layers.0.mlp.gate_proj.weight")
    )
    base, scaling = rope(config)
    kv = config.get("num_key_value_heads", heads)
    return {
        "llama.width": embed and embed[1],
        "llama.depth": layers(shapes, prefix + r"model\.layers\.(\d+)\..*"),
        "llama.heads": heads,
        "llama.kv_heads": 0 if kv == heads and heads else kv,
        "llama.ffn": gate and gate[0],
        "llama.eps": config.get("rms_norm_eps"),
        "llama.rope_base": base,
        "llama.rope_scaling": scaling,
        "llama.tied": config.get(
            "tie_word_embeddings", f"{prefix}lm_head.weight" not in shapes if embed else None
        ),
    }


def rope(config: dict[str, Any]) -> tuple[float | None, tuple | None]:
    """(base, our rope_scaling) of a config.json, old (rope_theta, rope_scaling) or new
    (rope_parameters); None without one.
    """
    if not config:
        return None, None
    scaled = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = float(scaled.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = scaled.get("rope_type", scaled.get("type", "default"))
    if kind == "default":
        return base, ()
    fields = {"linear": ("factor",), "llama3": tuple(SCALED)}.get(kind)
    if fields is None or any(field not in scaled for field in fields):
        raise UserError(
            f"its config.json scales rotary positions by {scaled}; 'linear' and 'llama3' are known"
        )
    return base, (kind, *(float(scaled[field]) for field in fields))


def config_json(model: dict[str, Any], tokens: int) -> dict[str, Any]:
    """The config.json of LlamaForCausalLM; its longest row is the one trained on, or the one that
    rope_scaling stretches to.
    """
    m = LlamaConfig(**model["llama"])
    scaling = dict(zip(("rope_type", *SCALED), m.rope_scaling)) or None
    if scaling and m.rope_scaling[0] == "llama3":
        scaling["original_max_position_embeddings"] = int(
            scaling["original_max_position_embeddings"]
        )
        tokens = max(tokens, int(scaling["original_max_position_embeddings"] * scaling["factor"]))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": m.vocab,
        "hidden_size": m.width,
        "intermediate_size": m.ffn,
        "num_hidden_layers": m.depth,
        "num_attention_heads": m.heads,
        "num_key_value_heads": m.kv,
        "head_dim": m.width // m.heads,
        "hidden_act": "silu",
        "rms_norm_eps": m.eps,
        "rope_theta": m.rope_base,
        "rope_scaling": scaling,
        "tie_word_embeddings": m.tied,
        "max_position_embeddings": tokens,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attention_bias": False,
        "mlp_bias": False,
    }


def _infer_config(shapes: Shapes, config: dict[str, Any]) -> dict[str, Any]:
    embed = shapes.get("model.embed_tokens.weight")
    return infer_config(shapes, config) | {"llama.vocab": embed and embed[0]}


FAMILY = Family(
    "llama",
    signature=r"model\.layers\.\d+\.self_attn\.q_proj\.weight",
    table=table,
    infer_config=_infer_config,
    config_json=config_json,
    default_config=lambda shapes, config: {"llama.rope_dtype": "float32"},
)
