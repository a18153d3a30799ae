"""LLaMA 1, 2 and 3 in the format of transformers' LlamaForCausalLM.

An import initialises the rows of Emu's added tokens ([PAD], [IMG], [/IMG], <image>) with the mean
row of the vocabulary. An export omits them and so is a plain LLaMA again.
"""

from typing import Any

from emu_jax.config import UserError
from emu_jax.models.emu import EmuConfig
from emu_jax.models.llama import LlamaConfig
from emu_jax.weights.convert import Row, Table
from emu_jax.weights.family import Family, Shapes, count_layers

# Fields of Llama 3's rope_scaling in config.json -> our names, in the order of our tuple.
ROPE_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low",
    "high_freq_factor": "high",
    "original_max_position_embeddings": "context",
}


def blocks(prefix: str) -> tuple[Row, ...]:
    """Rows of all weights except the embedding and the head."""
    block = prefix + "model.layers.{l}."
    return (
        Row(block + "input_layernorm.weight", "llama/blocks/norm1/scale"),
        Row(block + "self_attn.q_proj.weight", "llama/blocks/attn/q/w", "(lh d) D -> D lh d"),
        Row(block + "self_attn.k_proj.weight", "llama/blocks/attn/k/w", "(lg d) D -> D lg d"),
        Row(block + "self_attn.v_proj.weight", "llama/blocks/attn/v/w", "(lg d) D -> D lg d"),
        Row(block + "self_attn.o_proj.weight", "llama/blocks/attn/o/w", "D (lh d) -> lh d D"),
        Row(block + "post_attention_layernorm.weight", "llama/blocks/norm2/scale"),
        Row(block + "mlp.gate_proj.weight", "llama/blocks/ffn/gate/w", "o i -> i o"),
        Row(block + "mlp.up_proj.weight", "llama/blocks/ffn/up/w", "o i -> i o"),
        Row(block + "mlp.down_proj.weight", "llama/blocks/ffn/down/w", "o i -> i o"),
        Row(prefix + "model.norm.weight", "llama/norm/scale"),
    )


def vocabulary(model_config: LlamaConfig, prefix: str) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Rows of the embedding and the head: (LLaMA's vocabulary, Emu's added tokens)."""
    V = model_config.vocab
    end = model_config.vocab + model_config.added
    embed = prefix + "model.embed_tokens.weight"
    head = prefix + "lm_head.weight"
    base = [Row(embed, "llama/embed/base", cut=(0, V))]
    added = [Row(embed, "llama/embed/added", cut=(V, end), grows=True)]
    if not model_config.tied:
        base.append(Row(head, "llama/lm_head/base", cut=(0, V)))
        added.append(Row(head, "llama/lm_head/added", cut=(V, end), grows=True))
    return tuple(base), tuple(added)


def axes(model_config: LlamaConfig) -> dict[str, int]:
    """Lengths of the named axes in patterns: lh, the query heads; lg, the key-value heads."""
    return dict(lh=model_config.heads, lg=model_config.kv)


def unused(model_config: LlamaConfig, prefix: str) -> tuple[str, ...]:
    """Regexes of names to ignore: rotary frequencies in old files, and a tied head."""
    return (
        r".*rotary_emb\.inv_freq",
        *((rf"{prefix}lm_head\.weight",) if model_config.tied else ()),
    )


def table(model_config: EmuConfig) -> Table:
    """Rows in the model's reading order."""
    base, added = vocabulary(model_config.llama, "")
    return Table(
        (*base, *blocks("")),
        axes(model_config.llama),
        unused(model_config.llama, ""),
        dict(llama=model_config.llama.depth),
        import_only=added,
    )


def infer_config(shapes: Shapes, config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Infer config.model.llama except the vocabulary; None for fields that are undetermined.

    Raises UserError if config.json describes a model that our LLaMA does not support.
    """
    _check(config)
    embed = shapes.get(f"{prefix}model.embed_tokens.weight")
    gate = shapes.get(f"{prefix}model.layers.0.mlp.gate_proj.weight")
    base, scaling = rope(config)
    heads = config.get("num_attention_heads")
    kv = config.get("num_key_value_heads", heads)
    has_head = f"{prefix}lm_head.weight" in shapes
    return {
        "llama.width": embed and embed[1],
        "llama.depth": count_layers(shapes, prefix + r"model\.layers\.(\d+)\..*"),
        "llama.heads": heads,
        "llama.kv_heads": 0 if kv == heads and heads else kv,
        "llama.ffn": gate and gate[0],
        "llama.eps": config.get("rms_norm_eps"),
        "llama.rope_base": base,
        "llama.rope_scaling": scaling,
        "llama.tied": config.get("tie_word_embeddings", not has_head if embed else None),
    }


def _check(config: dict[str, Any]) -> None:
    """Raise UserError for a config.json that our LLaMA does not support."""
    if config.get("model_type", "llama") != "llama":
        raise UserError(f"config.json has model_type={config['model_type']!r}; expected 'llama'")
    if (act := config.get("hidden_act", "silu")) != "silu":
        raise UserError(f"config.json has hidden_act={act!r}; only 'silu' is supported")
    width = config.get("hidden_size")
    heads = config.get("num_attention_heads")
    if width and heads and config.get("head_dim") not in (None, width // heads):
        raise UserError(
            f"config.json has head_dim={config['head_dim']}; "
            f"expected hidden_size / num_attention_heads = {width // heads}"
        )
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise UserError("config.json has attention or MLP biases, which are not supported")


def rope(config: dict[str, Any]) -> tuple[float | None, tuple | None]:
    """Read (base, our rope_scaling) from a config.json; (None, None) if it is empty.

    Older files have rope_theta and rope_scaling, newer ones rope_parameters. Raises UserError for
    an unsupported kind of scaling.
    """
    if not config:
        return None, None
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = float(scaling.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return base, ()
    fields = {"linear": ("factor",), "llama3": tuple(ROPE_SCALING)}.get(kind)
    if fields is None or any(field not in scaling for field in fields):
        raise UserError(
            f"config.json has the rotary scaling {scaling}; 'linear' and 'llama3' are supported"
        )
    return base, (kind, *(float(scaling[field]) for field in fields))


def config_json(model: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Make the config.json of LlamaForCausalLM.

    tokens: the context length in training; the file gets a larger one if Llama 3's scaling extends
    it.
    """
    m = LlamaConfig(**model["llama"])
    scaling = dict(zip(("rope_type", *ROPE_SCALING), m.rope_scaling)) or None
    if scaling and m.rope_scaling[0] == "llama3":
        context = int(scaling["original_max_position_embeddings"])
        scaling["original_max_position_embeddings"] = context
        tokens = max(tokens, int(context * scaling["factor"]))
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


def _default_config(shapes: Shapes, config: dict[str, Any]) -> dict[str, Any]:
    """The config for an import that has none: rotary angles in float32, as in transformers."""
    return {"llama.rope_dtype": "float32"}


FAMILY = Family(
    name="llama",
    about="LLaMA 1, 2 and 3: transformers' LlamaForCausalLM",
    signature=r"model\.layers\.\d+\.self_attn\.q_proj\.weight",
    table=table,
    infer_config=_infer_config,
    config_json=config_json,
    default_config=_default_config,
)
