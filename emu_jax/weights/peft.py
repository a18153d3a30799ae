"""PEFT's adapters of a LlamaForCausalLM: adapter_model.safetensors with the A and B of LoRA, and
adapter_config.json.

The rows of [USER] and [ASSISTANT], where they train too, are in no adapter: LLaMA's own vocabulary
has no place for them. Read next: emu1.py, whose chat model holds the same tensors;
../models/lora.py.
"""

import re
from typing import Any

from emu_jax.config import UserError
from emu_jax.models.emu import EmuConfig
from emu_jax.models.lora import LoraConfig
from emu_jax.weights import llama
from emu_jax.weights.convert import Row, Table
from emu_jax.weights.family import Family, Shapes, emu_shapes, layers

BLOCK = "base_model.model.model.layers.{l}."
MODULES = {f"self_attn.{name}_proj": f"attn/{name}" for name in "qkvo"} | {
    f"mlp.{name}_proj": f"ffn/{name}" for name in ("gate", "up", "down")
}
# Patterns of A [r, in] and B [out, r].
ATTENTION = {
    "q": ("r D -> D r", "(lh d) r -> r lh d"),
    "k": ("r D -> D r", "(lg d) r -> r lg d"),
    "v": ("r D -> D r", "(lg d) r -> r lg d"),
    "o": ("r (lh d) -> lh d r", "D r -> r D"),
}
NAME = re.compile(r"base_model\.model\.model\.layers\.\d+\.(?P<module>\w+\.\w+)\.lora_[AB]\.weight")
PLAIN = dict(
    use_rslora=False,
    use_dora=False,
    bias="none",
    fan_in_fan_out=False,
    rank_pattern={},
    alpha_pattern={},
    modules_to_save=None,
    # what of PEFT's LoRA there is with us
    layers_to_transform=None,
    trainable_token_indices=None,
)


def table(model_config: EmuConfig) -> Table:
    """Rows of the matrices that have LoRA. Raises UserError where some are not the LLM's."""
    with_lora = {
        path.removesuffix("/a") for path in emu_shapes(model_config) if path.endswith("/a")
    }
    if strange := with_lora - {f"llama/blocks/{ours}" for ours in MODULES.values()}:
        raise UserError(
            f"PEFT's adapter is of a LLaMA: there is no place in it for the LoRA of {min(strange)}"
        )
    rows = []
    for theirs, ours in MODULES.items():
        if f"llama/blocks/{ours}" in with_lora:
            for half, pattern in zip("ab", ATTENTION.get(ours[-1], ("r i -> i r", "o r -> r o"))):
                rows.append(
                    Row(
                        f"{BLOCK}{theirs}.lora_{half.upper()}.weight",
                        f"llama/blocks/{ours}/{half}",
                        pattern,
                    )
                )
    return Table(
        tuple(rows),
        axes=llama.axes(model_config.llama),
        unused=(),
        depth=dict(llama=model_config.llama.depth),
    )


def infer_config(shapes: Shapes, config: dict[str, Any]) -> dict[str, Any]:
    """Fields of config.model that an adapter fixes. Raises UserError for a kind of adapter that is
    not ours.
    """
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        raise UserError(f"its adapter_config.json is of a {kind!r}; only 'LORA' is known here")
    if strange := [name for name, value in PLAIN.items() if (config.get(name) or value) != value]:
        raise UserError(
            f"its adapter_config.json says {strange[0]}={config[strange[0]]!r}, which is not known here"
        )
    ranks = {shape[0] for name, shape in shapes.items() if ".lora_A." in name}
    if len(ranks) > 1:
        raise UserError(f"its matrices are of several ranks: {', '.join(map(str, sorted(ranks)))}")
    alpha = config.get("lora_alpha")
    return {
        "lora.rank": min(ranks, default=None),
        "lora.alpha": None if alpha is None else float(alpha),
        "llama.depth": layers(shapes, r"base_model\.model\.model\.layers\.(\d+)\..*"),
    }


def default_config(shapes: Shapes, config: dict[str, Any]) -> dict[str, Any]:
    modules = sorted(
        {
            MODULES[match["module"]]
            for name in shapes
            if (match := NAME.fullmatch(name)) and match["module"] in MODULES
        }
    )
    return {"lora.targets": ((f"llama/blocks/({'|'.join(modules)})/w", True), (".*", False))}


def config_json(model: dict[str, Any], tokens: int) -> dict[str, Any]:
    """adapter_config.json, by its name."""
    model_config = EmuConfig.of(model)
    modules = sorted(
        {row.theirs.split(".lora_")[0].rpartition(".")[2] for row in table(model_config).rows}
    )
    lora: LoraConfig = model_config.lora
    # older versions of PEFT know no such field
    plain = {name: value for name, value in PLAIN.items() if name != "trainable_token_indices"}
    said = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": modules,
    }
    return {"adapter_config.json": said | plain}


FAMILY = Family(
    "peft",
    signature=NAME.pattern,
    table=table,
    infer_config=infer_config,
    config_json=config_json,
    default_config=default_config,
    stem="adapter_model",
)
