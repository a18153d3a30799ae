"""LoRA as PEFT's adapters, in chat models, stored in few bits, and merged.

Where PyTorch, transformers and peft are installed, PEFT and we load each other's adapters and
compute the same logits.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emu_jax import tree
from emu_jax.config import UserError
from emu_jax.initial import load_weights
from emu_jax.models import emu, lora, module
from emu_jax.weights import files, transfer
from emu_jax.weights.__main__ import main
from tests.support import make
from tests.support.foreign import (
    CONFIG,
    config_of,
    export,
    folder,
    import_,
    leaves,
    merge,
    random,
    saved,
    small,
    tensors,
)
from tests.support.trees import assert_bitwise_equal

RANK = ("--config.model.lora.rank=3", "--config.model.lora.alpha=6.0")
ALL = "--config.model.lora.targets=(('llama/blocks/.*/w', True), ('.*', False))"
ROPE = "--config.model.llama.rope_dtype=float32"
IDS = np.random.default_rng(0).integers(3, 500, (2, 40))


def blank(c):
    """Parameters of a config's Emu, all zero."""
    return zeros(emu.EmuConfig.of(c.model.to_dict()))


def zeros(config):
    shapes = module.abstract(emu.Emu, config)
    return jax.device_put(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))


def lora_of(params):
    """The entries of {path: leaf} that belong to LoRA."""
    return {path: leaf for path, leaf in params.items() if path.endswith(("/a", "/b"))}


def logits(directory):
    """Logits over LLaMA's vocabulary; the checkpoint may lack the other towers."""

    def run(params):
        model = module.bind(emu.Emu, config, params).llama
        at = jnp.tile(jnp.arange(IDS.shape[1]), (len(IDS), 1))
        hidden = model(
            model.embeddings(jnp.asarray(IDS), jnp.float32), at, jnp.ones_like(at), kernel="dense"
        )[0]
        return jnp.einsum("btD,vD->btv", hidden, model.head()["base"], precision="highest")

    config = config_of(directory)
    params = dict(tree.leaves(zeros(config))) | leaves(directory)
    return np.asarray(jax.jit(run)(tree.unflatten(params)))


def error_of(capsys, *arguments):
    """The error of a command that fails."""
    assert main(list(map(str, arguments))) == 2
    *_, error = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("error: ")
    return error


@pytest.mark.parametrize("targets", [(), (ALL,)], ids=["attention", "all"])
def test_adapters_have_pefts_format_and_import_of_export_is_the_identity(tmp_path, targets):
    """Names, layout and config are checked by hand."""
    c = small(*RANK, *targets, "--config.model.llama.kv_heads=2")
    params = dict(tree.leaves(make.written(tmp_path / "ours", c, random(c))))
    export("peft", tmp_path / "ours", tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    found = files.read([str(tmp_path / "adapter")])
    block = "base_model.model.model.layers.1."
    names = [*"qkvo", *(("gate", "up", "down") if targets else ())]
    modules = sorted(f"{name}_proj" for name in names)
    fields = dict(peft_type="LORA", r=3, lora_alpha=6.0, target_modules=modules, bias="none")
    assert found.config.items() >= fields.items()
    assert len(found.tensors) == 2 * 2 * len(modules)
    for name, ours in (("self_attn.q_proj", "attn/q"), ("self_attn.o_proj", "attn/o")):
        a, b = (np.asarray(found.tensors[f"{block}{name}.lora_{half}.weight"]) for half in "AB")
        w, *halves = (params[f"llama/blocks/{ours}/{leaf}"][1] for leaf in "wab")
        delta = np.asarray(lora.merge(lora.LoraConfig(3, 6.0), w, *halves)) - w
        np.testing.assert_allclose(delta.reshape(32, 32), (6 / 3 * b @ a).T, rtol=1e-4, atol=1e-5)
    base = {path: leaf for path, leaf in params.items() if not path.endswith(("/a", "/b"))}
    make.written(tmp_path / "base", small("--config.model.llama.kv_heads=2"), tree.unflatten(base))
    export("llama", tmp_path / "base", tmp_path / "llama")
    sources = "--family=llama", str(tmp_path / "llama"), "--family=peft", str(tmp_path / "adapter")
    import_(tmp_path / "again", *sources)
    again = leaves(tmp_path / "again")
    assert_bitwise_equal(lora_of(again), lora_of(params))
    q = "llama/blocks/attn/q/w"
    assert_bitwise_equal({q: again[q]}, {q: params[q]})
    config = config_of(tmp_path / "again").lora
    assert (config.rank, config.alpha) == (3, 6.0)


def chat_model(path, c):
    """Write a chat model like the released one; returns {name: array} without PEFT's prefix.

    Its LLM's attention has LoRA, under the names of PEFT.
    """
    arrays = tensors(c, "emu1")
    rng = np.random.default_rng(5)
    out = {}
    for name, array in arrays.items():
        plain = name.removesuffix(".weight")
        if not plain.endswith(("q_proj", "k_proj", "v_proj", "o_proj")):
            out[name] = array
            continue
        out |= {
            f"{plain}.base_layer.weight": array,
            f"{plain}.lora_A.default.weight": rng.standard_normal((3, 32), np.float32),
            f"{plain}.lora_B.default.weight": 0.1 * rng.standard_normal((32, 3), np.float32),
        }
    prefix = "decoder.lm.base_model.model."
    saved(path, {name.replace("decoder.lm.", prefix): array for name, array in out.items()})
    return out


def test_a_chat_model_keeps_its_lora_or_has_it_merged(tmp_path):
    arrays = chat_model(tmp_path / "chat.pt", small())
    # In the release, alpha = rank.
    scale = "--config.model.lora.alpha=3.0"
    for to, flags in (("kept", ("--config.model.lora.rank=3", scale)), ("merged", ())):
        import_(tmp_path / to, "--family=emu1", tmp_path / "chat.pt", CONFIG, ROPE, *flags)
    kept = leaves(tmp_path / "kept")
    merged = leaves(tmp_path / "merged")
    assert kept.keys() - merged.keys() == {
        f"llama/blocks/attn/{name}/{half}" for name in "qkvo" for half in "ab"
    }
    name = "decoder.lm.model.layers.1.self_attn.q_proj"
    np.testing.assert_array_equal(
        kept["llama/blocks/attn/q/a"][1], arrays[f"{name}.lora_A.default.weight"].T
    )
    np.testing.assert_array_equal(
        kept["llama/blocks/attn/q/w"][1].reshape(32, 32), arrays[f"{name}.base_layer.weight"].T
    )
    merge(tmp_path / "kept", tmp_path / "later")
    later = leaves(tmp_path / "later")
    assert later.keys() == merged.keys()
    for path, leaf in merged.items():
        atol = 1e-4 * np.abs(leaf).max()
        np.testing.assert_allclose(later[path], leaf, rtol=1e-4, atol=atol, err_msg=path)
    # An export holds the tuned model, not its base.
    v = later["llama/blocks/attn/v/w"][1].reshape(32, 32).T
    for family, prefix in (("emu1", "decoder.lm."), ("llama", "")):
        export(family, tmp_path / "kept", tmp_path / family)
        tensors_ = files.read([str(tmp_path / family)]).tensors
        got = np.asarray(tensors_[f"{prefix}model.layers.1.self_attn.v_proj.weight"])
        np.testing.assert_allclose(got, v, rtol=1e-6)


def test_a_quantised_run_starts_from_plain_matrices_and_merges_to_their_dequantised_values(
    tmp_path, caplog
):
    c = small("--config.model.llama.added=6", ROPE)
    # The parameters have 4 added rows; 2 more will be initialised.
    plain = make.written(tmp_path / "plain", c, random(small(ROPE)))
    stored = small(*RANK, "--config.model.llama.added=6", "--config.model.lora.storage=nf4", ROPE)
    fresh = blank(stored)
    with caplog.at_level("INFO"):
        loaded = dict(tree.leaves(load_weights(str(tmp_path / "plain"), fresh)))
    params = dict(tree.leaves(fresh)) | loaded
    messages = [record.getMessage() for record in caplog.records]
    (message,) = (message for message in messages if "stored as" in message)
    w = plain["llama"]["blocks"]["attn"]["q"]["w"]
    codes, absmax = lora.quantize(w, "nf4")
    np.testing.assert_array_equal(params["llama/blocks/attn/q/nf4"], codes)
    error = np.asarray(lora.dequantize(codes, absmax)) - w
    assert 0 < np.sqrt(np.square(error).mean() / np.square(w).mean()) < 0.12
    assert "7 matrices stored as nf4; error relative to their root mean square: " in message
    table = np.concatenate([plain["llama"]["embed"][part] for part in ("base", "added")])
    np.testing.assert_allclose(
        params["llama/embed/added"], [*table[-4:], *[table.mean(0)] * 2], rtol=1e-5, atol=1e-6
    )
    rng = np.random.default_rng(1)
    params |= {
        path: 0.3 * rng.standard_normal(leaf.shape, np.float32)
        for path, leaf in lora_of(params).items()
    }
    make.written(tmp_path / "stored", stored, tree.unflatten(params))
    # `bake` is the former name of `merge`.
    ours = f"--from={tmp_path / 'stored'}", f"--to={tmp_path / 'merged'}"
    assert main(["bake", *ours]) == 0
    merged = leaves(tmp_path / "merged")
    a, b = (params[f"llama/blocks/attn/q/{half}"] for half in "ab")
    want = [
        lora.merge(lora.LoraConfig(3, 6.0), lora.Quantized(codes[k], absmax[k]), a[k], b[k])
        for k in range(2)
    ]
    np.testing.assert_allclose(merged["llama/blocks/attn/q/w"], want, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="merged has no LoRA and no quantized matrices: nothing is"):
        transfer.merge(str(tmp_path / "merged"), str(tmp_path / "again"))


# Bad input


def test_other_ranks_other_adapters_and_models_without_lora_are_refused(tmp_path, capsys):
    c = small(*RANK)
    make.written(tmp_path / "ours", c, random(c))
    export("peft", tmp_path / "ours", tmp_path / "adapter")
    error = error_of(
        capsys,
        "import",
        "--family=peft",
        tmp_path / "adapter",
        CONFIG,
        "--config.model.lora.rank=8",
        f"--to={tmp_path / 'new'}",
    )
    differences = "lora.rank is 3, not 8, lora.alpha is 6.0, not 16.0"
    assert f"does not match the config: {differences} (--config.model.lora.rank=3" in error
    with pytest.raises(
        UserError,
        match=r"a' is float32\[2, 32, 3\] in .*, but float32\[2, 32, 8\] in this run's config",
    ):
        load_weights(str(tmp_path / "ours"), blank(small("--config.model.lora.rank=8")))
    lora_here = r"has llama/blocks/attn/k/a, which this model does not: "
    with pytest.raises(UserError, match=lora_here + r".* python -m emu_jax\.weights merge --from="):
        load_weights(str(tmp_path / "ours"), blank(small()))
    path = tmp_path / "adapter/adapter_config.json"
    fields = json.loads(path.read_text())
    for change, message in (
        (dict(peft_type="IA3"), "has peft_type='IA3'; only 'LORA' is supported"),
        (dict(use_dora=True), "has use_dora=True, which is not "),
    ):
        path.write_text(json.dumps(fields | change))
        assert message in error_of(
            capsys, "import", "--family=peft", path.parent, f"--to={tmp_path / 'new'}"
        )
    assert not (tmp_path / "new").exists()
    make.written(tmp_path / "base", small(), random(small()))
    assert "base holds no LoRA" in error_of(
        capsys, "export", "--family=peft", f"--from={tmp_path / 'base'}", f"--to={tmp_path / 'x'}"
    )


# PEFT


def test_peft_loads_our_export_and_we_load_its_adapter_with_the_same_logits(tmp_path):
    torch, transformers, peft = (
        pytest.importorskip(name) for name in ("torch", "transformers", "peft")
    )
    c = small(*RANK, ROPE)
    arrays = folder(tmp_path / "llama", small(), "llama")
    import_(tmp_path / "base", "--family=llama", tmp_path / "llama", CONFIG, ROPE)
    params = leaves(tmp_path / "base") | lora_of(dict(tree.leaves(random(c))))
    make.written(tmp_path / "ours", c, tree.unflatten(params))
    export("peft", tmp_path / "ours", tmp_path / "adapter")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
    with torch.no_grad():
        base = model(torch.tensor(IDS)).logits.numpy()
        tuned = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
        want = tuned(torch.tensor(IDS)).logits.numpy()
    assert len(arrays) > 15
    assert np.abs(want - base).max() > 0.1 * np.abs(want).max()
    np.testing.assert_allclose(logits(tmp_path / "ours"), want, atol=2e-4 * np.abs(want).max())
    tuned.save_pretrained(tmp_path / "theirs")
    import_(
        tmp_path / "again",
        "--family=llama",
        tmp_path / "llama",
        "--family=peft",
        tmp_path / "theirs",
        CONFIG,
        *RANK,
        ROPE,
    )
    assert_bitwise_equal(leaves(tmp_path / "again"), leaves(tmp_path / "ours"))
