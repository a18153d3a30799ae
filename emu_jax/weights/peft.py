"""A PEFT LoRA adapter of a LlamaForCausalLM.

It is a folder with adapter_model.safetensors, which holds the LoRA matrices A and B, and
adapter_config.json. It does not include the rows of [USER] and [ASSISTANT], which are not in
LLaMA's vocabulary. Read next: emu1.py, whose chat model has the same tensors; ../models/lora.py.
"""

import re
from typing import Any

from emu_jax.config import UserError
from emu_jax.models.emu import EmuConfig
from emu_jax.weights import llama
from emu_jax.weights.convert import Row, Table
from emu_jax.weights.family import Family, Shapes, count_layers, emu_shapes

BLOCK = "base_model.model.model.layers.{l}."
MODULES = {f"self_attn.{name}_proj": f"attn/{name}" for name in "qkvo"} | {
    f"mlp.{name}_proj": f"ffn/{name}" for name in ("gate", "up", "down")
}
# Patterns of the attention's A [r, in] and B [out, r]. They split the heads; those of the MLP have
# no heads.
ATTENTION = {
    "q": ("r D -> D r", "(lh d) r -> r lh d"),
    "k": ("r D -> D r", "(lg d) r -> r lg d"),
    "v": ("r D -> D r", "(lg d) r -> r lg d"),
    "o": ("r (lh d) -> lh d r", "D r -> r D"),
}
NAME = re.compile(r"base_model\.model\.model\.layers\.\d+\.(?P<module>\w+\.\w+)\.lora_[AB]\.weight")
# Fields of adapter_config.json, with the only value that we support.
PLAIN = dict(
    use_rslora=False,
    use_dora=False,
    bias="none",
    fan_in_fan_out=False,
    rank_pattern={},
    alpha_pattern={},
    modules_to_save=None,
    layers_to_transform=None,
    trainable_token_indices=None,
)


def table(model_config: EmuConfig) -> Table:
    """Rows of the matrices with LoRA. Raises UserError if one is outside the LLM."""
    leaves = emu_shapes(model_config)
    with_lora = {path.removesuffix("/a") for path in leaves if path.endswith("/a")}
    if other := with_lora - {f"llama/blocks/{ours}" for ours in MODULES.values()}:
        raise UserError(
            f"a PEFT adapter holds the LoRA of a LLaMA only; this model has it on {min(other)} too"
        )
    rows = []
    for theirs, ours in MODULES.items():
        matrix = f"llama/blocks/{ours}"
        if matrix not in with_lora:
            continue
        a, b = ATTENTION.get(ours[-1], ("r i -> i r", "o r -> r o"))
        rows.append(Row(f"{BLOCK}{theirs}.lora_A.weight", f"{matrix}/a", a))
        rows.append(Row(f"{BLOCK}{theirs}.lora_B.weight", f"{matrix}/b", b))
    return Table(
        tuple(rows),
        axes=llama.axes(model_config.llama),
        unused=(),
        depth=dict(llama=model_config.llama.depth),
    )


def infer_config(shapes: Shapes, config: dict[str, Any]) -> dict[str, Any]:
    """Infer config.model from an adapter. Raises UserError unless it is plain LoRA."""
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        raise UserError(f"adapter_config.json has peft_type={kind!r}; only 'LORA' is supported")
    for name, value in PLAIN.items():
        if (config.get(name) or value) != value:
            raise UserError(
                f"adapter_config.json has {name}={config[name]!r}, which is not supported"
            )
    ranks = {shape[0] for name, shape in shapes.items() if ".lora_A." in name}
    if len(ranks) > 1:
        raise UserError(
            f"the adapter's ranks differ: {', '.join(map(str, sorted(ranks)))}; "
            "one rank for all matrices is supported"
        )
    alpha = config.get("lora_alpha")
    return {
        "lora.rank": min(ranks, default=None),
        "lora.alpha": None if alpha is None else float(alpha),
        "llama.depth": count_layers(shapes, r"base_model\.model\.model\.layers\.(\d+)\..*"),
    }


def default_config(shapes: Shapes, config: dict[str, Any]) -> dict[str, Any]:
    """Set LoRA's targets to the matrices that the adapter covers."""
    matches = [NAME.fullmatch(name) for name in shapes]
    named = {match["module"] for match in matches if match}
    modules = sorted(MODULES[module] for module in named & MODULES.keys())
    return {"lora.targets": ((f"llama/blocks/({'|'.join(modules)})/w", True), (".*", False))}


def config_json(model: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Make adapter_config.json."""
    model_config = EmuConfig.of(model)
    # Take "q_proj" out of "base_model....self_attn.q_proj.lora_A.weight".
    modules = {row.theirs.split(".lora_")[0].rpartition(".")[2] for row in table(model_config).rows}
    lora = model_config.lora
    # Older versions of PEFT do not accept this field.
    plain = {name: value for name, value in PLAIN.items() if name != "trainable_token_indices"}
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(modules),
    }
    return {"adapter_config.json": fields | plain}


FAMILY = Family(
    name="peft",
    about="a PEFT LoRA adapter of a LlamaForCausalLM; give --family=llama too",
    signature=NAME.pattern,
    table=table,
    infer_config=infer_config,
    config_json=config_json,
    default_config=default_config,
    stem="adapter_model",
)
