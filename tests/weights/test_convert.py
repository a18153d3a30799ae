"""The released checkpoint's conversion table: inverse laws, names, shapes, and errors."""

import json
import re
from math import prod

import numpy as np
import pytest

from emu_jax import tree
from emu_jax.config import UserError, load
from emu_jax.models import emu, module
from emu_jax.plan import parameter_table
from emu_jax.verify import golden
from emu_jax.verify.emu import read_config
from emu_jax.weights import convert, emu1
from tests.support import make
from tests.support.trees import assert_bitwise_equal


def theirs_of(table, params):
    return dict(convert.to_theirs(table, convert.reader(tree.unflatten(params))))


P = make.program(make.cfg())
TABLE = emu1.table(P.model_config)
PARAMS = {path: np.asarray(leaf) for path, leaf in make.flat(make.random_params(P))}
FOREIGN = theirs_of(TABLE, PARAMS)


def test_import_of_export_is_the_identity_bit_for_bit():
    back = dict(tree.leaves(convert.from_theirs(TABLE, FOREIGN)))
    assert_bitwise_equal(back, PARAMS)


def test_export_of_import_is_the_identity_bit_for_bit():
    rng = np.random.default_rng(1)
    theirs = {name: rng.standard_normal(array.shape, np.float32) for name, array in FOREIGN.items()}
    back = theirs_of(TABLE, dict(tree.leaves(convert.from_theirs(TABLE, theirs))))
    assert_bitwise_equal(back, theirs)


def test_leaves_hold_the_right_parts_of_tensors():
    """PyTorch's linear weights are [out, in], EVA's qkv is one tensor.

    The last four rows of the vocabulary are Emu's.
    """
    E = 32
    V = 512
    ours = dict(tree.leaves(convert.from_theirs(TABLE, FOREIGN)))
    qkv = FOREIGN["visual.blocks.1.attn.qkv.weight"]
    np.testing.assert_array_equal(
        ours["vision/blocks/attn/k/w"][1], qkv[E : 2 * E].T.reshape(E, 4, 8)
    )
    np.testing.assert_array_equal(
        ours["llama/blocks/attn/o/w"][0],
        FOREIGN["decoder.lm.model.layers.0.self_attn.o_proj.weight"].T.reshape(4, 8, E),
    )
    np.testing.assert_array_equal(
        ours["llama/blocks/ffn/down/w"][1],
        FOREIGN["decoder.lm.model.layers.1.mlp.down_proj.weight"].T,
    )
    np.testing.assert_array_equal(
        ours["llama/lm_head/added"], FOREIGN["decoder.lm.lm_head.weight"][V:]
    )
    np.testing.assert_array_equal(
        ours["vision/patch/w"][3, 5, 2], FOREIGN["visual.patch_embed.proj.weight"][:, 2, 3, 5]
    )


@pytest.mark.parametrize("name", ["emu1_pretrained", "emu1_instruct"])
def test_names_and_shapes_are_those_of_the_release(name):
    """A golden file lists the parameters of the released code.

    Names of the chat model lose PEFT's prefixes, and its LoRA is ignored.
    """
    file = golden.load(f"tests/golden/{name}.npz")
    released = {
        emu1.rename(str(name)): tuple(json.loads(str(shape)))
        for name, shape in zip(file["parameter_names"], file["parameter_shapes"])
    }
    config = read_config(file)
    abstract = module.abstract(emu.Emu, config)
    table = emu1.table(config)
    zero = np.float32(0)
    zeros = {path: np.broadcast_to(zero, leaf.shape) for path, leaf in tree.leaves(abstract)}
    ours = theirs_of(table, zeros)
    extra = {name for name in released.keys() - ours.keys() if ".lora_" not in name}
    assert {name: array.shape for name, array in ours.items()}.items() <= released.items()
    assert extra
    for name in extra:
        assert any(re.fullmatch(unused, name) for unused in table.unused), name


def test_the_14b_has_the_releases_tensors_and_parameters():
    """Names and shapes of the 14B, written by hand from the description of the model.

    The table that training prints has the same counts, tower by tower.
    """
    config = emu.EmuConfig.of(load(["--config=configs/pretrain.py"]).model.to_dict())
    E = 1408
    C = 768
    D = 5120
    F = 13824
    V = 32004
    want = {
        "visual.cls_token": (1, 1, E),
        "visual.pos_embed": (1, 257, E),
        "visual.patch_embed.proj.weight": (E, 3, 14, 14),
        "visual.patch_embed.proj.bias": (E,),
        "ln_visual.weight": (E,),
        "ln_visual.bias": (E,),
        "cformer.causal_tokens": (1, 32, C),
        "cformer.cformer.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 12),
        "cformer.cformer.final_layer_norm.weight": (C,),
        "cformer.projection.weight": (D, C),
        "cformer.projection.bias": (D,),
        "decoder.lm.model.embed_tokens.weight": (V, D),
        "decoder.lm.lm_head.weight": (V, D),
        "decoder.lm.model.norm.weight": (D,),
        "decoder.lm.stu_regress_head.weight": (D, D),
    }
    for layer in range(40):
        block = {
            "norm1.weight": (E,),
            "norm1.bias": (E,),
            "attn.qkv.weight": (3 * E, E),
            "attn.q_bias": (E,),
            "attn.v_bias": (E,),
            "attn.proj.weight": (E, E),
            "attn.proj.bias": (E,),
            "norm2.weight": (E,),
            "norm2.bias": (E,),
            "mlp.fc1.weight": (6144, E),
            "mlp.fc1.bias": (6144,),
            "mlp.fc2.weight": (E, 6144),
            "mlp.fc2.bias": (E,),
        }
        want |= {f"visual.blocks.{layer}.{name}": shape for name, shape in block.items()}
        block = {
            "input_layernorm": (D,),
            "post_attention_layernorm": (D,),
            **{f"self_attn.{name}_proj": (D, D) for name in "qkvo"},
            "mlp.gate_proj": (F, D),
            "mlp.up_proj": (F, D),
            "mlp.down_proj": (D, F),
        }
        want |= {
            f"decoder.lm.model.layers.{layer}.{name}.weight": shape for name, shape in block.items()
        }
    for layer in range(12):
        block = {
            "0.layer_norm": (C,),
            "1.layer_norm": (C,),
            "2.layer_norm": (C,),
            "2.DenseReluDense.wi": (3072, C),
            "2.DenseReluDense.wo": (C, 3072),
            **{
                f"{number}.{kind}.{name}": (C, E if number and name in "kv" else C)
                for number, kind in enumerate(("SelfAttention", "EncDecAttention"))
                for name in "qkvo"
            },
        }
        want |= {
            f"cformer.cformer.block.{layer}.layer.{name}.weight": shape
            for name, shape in block.items()
        }
    assert set(convert.uses(emu1.table(config), importing=False)) == set(want)
    prefix = {
        "vision": "visual.",
        "ln_visual": "ln_visual.",
        "resampler": "cformer.",
        "regress_head": "decoder.lm.stu_regress_head.",
    }
    counts = dict.fromkeys((*prefix, "llama", "total"), 0)
    for name, shape in want.items():
        towers = (tower for tower, start in prefix.items() if name.startswith(start))
        counts[next(towers, "llama")] += prod(shape)
        counts["total"] += prod(shape)
    printed = parameter_table(module.abstract(emu.Emu, config)).splitlines()
    assert {line.split()[0]: int(line.split()[1].replace(",", "")) for line in printed} == counts


# Bad input


def test_missing_and_unexpected_tensors_are_listed():
    """visual.head.weight is one of the names that the table ignores."""
    changed = {
        name: array for name, array in FOREIGN.items() if not name.startswith("visual.blocks")
    }
    changed |= dict.fromkeys(("a.b", "visual.head", "visual.head.weight"), np.zeros(1))
    missing = r"26 tensors missing: visual\.blocks\.0\.norm1\.w.*, \.\.\."
    unexpected = r"2 tensors unexpected: a\.b, visual\.head"
    with pytest.raises(UserError, match=f"^{missing}; {unexpected}$"):
        convert.from_theirs(TABLE, changed)


def test_a_tensor_of_another_shape_is_named():
    wrong = {"visual.blocks.1.attn.qkv.weight": np.zeros((96, 32, 1), np.float32)}
    tensor = r"'visual\.blocks\.\S+\.attn\.qkv\.weight' of shape \(32, 32, 1\)"
    with pytest.raises(UserError, match=f"{tensor} does not fit 'vision/blocks/attn/q/w'"):
        convert.from_theirs(TABLE, FOREIGN | wrong)


# LoRA


def test_lora_is_merged_into_its_weight():
    rng = np.random.default_rng(0)
    w, a, b = (rng.standard_normal(shape, np.float32) for shape in ((6, 5), (2, 5), (6, 2)))
    stem = "module.decoder.lm.base_model.model.model.layers.0.self_attn.q_proj"
    plain = "decoder.lm.model.layers.0.self_attn.q_proj.weight"
    half = {f"{stem}.base_layer.weight": w, f"{stem}.lora_A.default.weight": a}
    merged = emu1.canonical(half | {f"{stem}.lora_B.default.weight": b}, lora_scale=0.5)
    assert merged.keys() == {plain}
    np.testing.assert_allclose(merged[plain], w + 0.5 * b @ a, rtol=1e-5)
    with pytest.raises(
        UserError,
        match=r"q_proj\.lora_A\.default\.weight needs .*lora_B\.default\.weight, which is missing",
    ):
        emu1.canonical(half)
