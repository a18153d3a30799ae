"""T5's decoder, from which the resampler may start.

A T5 has neither the learned queries nor the projection, and the keys and values of its
cross-attention are imported only if it is as wide as our visual encoder. Training initialises the
rest.
"""

from typing import Any

from emu_jax.models.emu import EmuConfig
from emu_jax.models.resampler import ResamplerConfig
from emu_jax.weights.convert import Row, Table
from emu_jax.weights.family import Family, Shapes, count_layers


def rows(prefix: str, cross: str) -> tuple[Row, ...]:
    """Rows of the blocks, their shared position bias and the final norm.

    cross: which of "q", "k" and "v" of the cross-attention to include.
    """
    block = prefix + "block.{l}.layer."
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return (
        Row(prefix + bias, "resampler/relative"),
        Row(block + "0.layer_norm.weight", "resampler/blocks/norm1/scale"),
        *_attention(block + "0.SelfAttention", "resampler/blocks/self", "qkv"),
        Row(block + "1.layer_norm.weight", "resampler/blocks/norm2/scale"),
        *_attention(block + "1.EncDecAttention", "resampler/blocks/cross", cross),
        Row(block + "2.layer_norm.weight", "resampler/blocks/norm3/scale"),
        Row(block + "2.DenseReluDense.wi.weight", "resampler/blocks/ffn/up/w", "f c -> c f"),
        Row(block + "2.DenseReluDense.wo.weight", "resampler/blocks/ffn/down/w", "c f -> f c"),
        Row(prefix + "final_layer_norm.weight", "resampler/norm/scale"),
    )


def _attention(theirs: str, ours: str, names: str) -> tuple[Row, ...]:
    heads = "(rh d) c -> c rh d"
    return (
        *(Row(f"{theirs}.{name}.weight", f"{ours}/{name}/w", heads) for name in names),
        Row(f"{theirs}.o.weight", f"{ours}/o/w", "c (rh d) -> rh d c"),
    )


def axes(model_config: ResamplerConfig) -> dict[str, int]:
    """Lengths of the named axes in patterns: rh, the resampler's heads."""
    return dict(rh=model_config.heads)


def table(model_config: EmuConfig) -> Table:
    """Rows in the model's reading order."""
    same_width = model_config.vision.width == model_config.resampler.width
    unused = (
        r"shared\.weight",
        r"encoder\..*",
        r"lm_head\.weight",
        r"decoder\.embed_tokens\.weight",
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
        *(() if same_width else (r"decoder\.block\.\d+\.layer\.1\.EncDecAttention\.[kv]\.weight",)),
    )
    return Table(
        rows("decoder.", "qkv" if same_width else "q"),
        axes(model_config.resampler),
        unused,
        dict(resampler=model_config.resampler.depth),
    )


def infer_config(
    shapes: Shapes, config: dict[str, Any], prefix: str = "decoder."
) -> dict[str, Any]:
    """Infer config.model.resampler; None for fields that the files do not determine."""
    attention = f"{prefix}block.0.layer.0.SelfAttention"
    bias = shapes.get(f"{attention}.relative_attention_bias.weight")
    q = shapes.get(f"{attention}.q.weight")
    ffn = shapes.get(f"{prefix}block.0.layer.2.DenseReluDense.wi.weight")
    norm = shapes.get(f"{prefix}final_layer_norm.weight")
    # 128 is the library's default if config.json does not have the field.
    distance = config.get("relative_attention_max_distance", 128 if config else None)
    return {
        "resampler.width": norm and norm[0],
        "resampler.depth": count_layers(shapes, prefix + r"block\.(\d+)\..*"),
        "resampler.heads": bias and bias[1],
        "resampler.head_width": bias and q and q[0] // bias[1],
        "resampler.ffn": ffn and ffn[0],
        "resampler.buckets": bias and bias[0],
        "resampler.max_distance": distance,
    }


def config_json(model: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Make the config.json of a T5 from the config of its decoder."""
    r = ResamplerConfig(**model["resampler"])
    return {
        "model_type": "t5",
        "d_model": r.width,
        "d_kv": r.head_width,
        "d_ff": r.ffn,
        "num_layers": r.depth,
        "num_decoder_layers": r.depth,
        "num_heads": r.heads,
        "relative_attention_num_buckets": r.buckets,
        "relative_attention_max_distance": r.max_distance,
        "feed_forward_proj": "relu",
        "layer_norm_epsilon": 1e-6,
        "dropout_rate": r.dropout,
        "is_encoder_decoder": True,
    }


FAMILY = Family(
    name="t5-decoder",
    about="the decoder of a T5, from which the resampler may start",
    signature=r"decoder\.block\.\d+\.layer\.1\.EncDecAttention\.q\.weight",
    table=table,
    infer_config=infer_config,
    config_json=config_json,
)
