"""T5's decoder, for the resampler: its self-attention, queries' and outputs' side of the
cross-attention, ffn, norms and position bias.

The learned queries and `project` are not T5's. The cross-attention's keys and values read the
encoder's width, which is not EVA's: they come only where the two widths are equal. What does not
come is fresh where training starts.
"""

from typing import Any

from emu_jax.models.resampler import ResamplerConfig
from emu_jax.weights.convert import Row, Table
from emu_jax.weights.family import Family, Shapes, layers


def rows(model_config: ResamplerConfig, prefix: str, cross: str) -> tuple[Row, ...]:
    """Rows of the blocks, their shared position bias and the final norm; `cross`: which of the
    cross-attention's "qkv" come.
    """
    block = prefix + "block.{l}.layer."
    return (
        Row(
            prefix + "block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "resampler/relative",
        ),
        *(
            row
            for number, theirs, ours, names in (
                (0, "SelfAttention", "self", "qkv"),
                (1, "EncDecAttention", "cross", cross),
            )
            for row in (
                Row(
                    f"{block}{number}.layer_norm.weight", f"resampler/blocks/norm{number + 1}/scale"
                ),
                *(
                    Row(
                        f"{block}{number}.{theirs}.{name}.weight",
                        f"resampler/blocks/{ours}/{name}/w",
                        "(rh d) c -> c rh d",
                    )
                    for name in names
                ),
                Row(
                    f"{block}{number}.{theirs}.o.weight",
                    f"resampler/blocks/{ours}/o/w",
                    "c (rh d) -> rh d c",
                ),
            )
        ),
        Row(block + "2.layer_norm.weight", "resampler/blocks/norm3/scale"),
        Row(block + "2.DenseReluDense.wi.weight", "resampler/blocks/ffn/up/w", "f c -> c f"),
        Row(block + "2.DenseReluDense.wo.weight", "resampler/blocks/ffn/down/w", "c f -> f c"),
        Row(prefix + "final_layer_norm.weight", "resampler/norm/scale"),
    )


def axes(model_config: ResamplerConfig) -> dict[str, int]:
    return dict(rh=model_config.heads)


def table(model_config: Any) -> Table:
    alike = model_config.vision.width == model_config.resampler.width
    unused = (
        r"shared\.weight",
        r"encoder\..*",
        r"lm_head\.weight",
        r"decoder\.embed_tokens\.weight",
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
        *(() if alike else (r"decoder\.block\.\d+\.layer\.1\.EncDecAttention\.[kv]\.weight",)),
    )
    return Table(
        rows(model_config.resampler, "decoder.", "qkv" if alike else "q"),
        axes(model_config.resampler),
        unused,
        dict(resampler=model_config.resampler.depth),
    )


def infer_config(
    shapes: Shapes, config: dict[str, Any], prefix: str = "decoder."
) -> dict[str, Any]:
    """Fields of model.resampler that T5's tensors fix."""
    bias, q, ffn, norm = (
        shapes.get(f"{prefix}{name}")
        for name in (
            "block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "block.0.layer.0.SelfAttention.q.weight",
            "block.0.layer.2.DenseReluDense.wi.weight",
            "final_layer_norm.weight",
        )
    )
    return {
        "resampler.width": norm and norm[0],
        "resampler.depth": layers(shapes, prefix + r"block\.(\d+)\..*"),
        "resampler.heads": bias and bias[1],
        "resampler.head_width": bias and q and q[0] // bias[1],
        "resampler.ffn": ffn and ffn[0],
        "resampler.buckets": bias and bias[0],
        "resampler.max_distance": config.get(
            "relative_attention_max_distance", 128 if config else None
        ),
    }


def config_json(model: dict[str, Any], tokens: int) -> dict[str, Any]:
    """As T5Config has it; the decoder's part of a T5."""
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
    "t5-decoder",
    signature=r"decoder\.block\.\d+\.layer\.1\.EncDecAttention\.q\.weight",
    table=table,
    infer_config=infer_config,
    config_json=config_json,
)
