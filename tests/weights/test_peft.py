"""LoRA comes and goes as PEFT's adapters, stays LoRA or is merged when a chat model comes in, and
baked it is the same model.

Where PyTorch, transformers and peft are installed, PEFT loads what we export and we load what it
saves, with the same logits.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emu_jax import checkpoint, tree
from emu_jax.config import UserError
from emu_jax.initial import load_weights
from emu_jax.models import emu, lora, module
from emu_jax.weights import files
from emu_jax.weights.__main__ import main
from tests.support import make
from tests.support.foreign import CONFIG, folder, random, saved, size_of, small, tensors

RANK = ("--config.model.lora.rank=3", "--config.model.lora.alpha=6.0")
ALL = "--config.model.lora.targets=(('llama/blocks/.*/w', True), ('.*', False))"
ROPE = "--config.model.llama.rope_dtype=float32"
IDS = np.random.default_rng(0).integers(3, 500, (2, 40))


def blank(c):
    """Parameters of a config's Emu, of nothing but zeros."""
    return zeros(emu.EmuConfig.of(c.model.to_dict()))


def zeros(config):
    shapes = module.abstract(emu.Emu, config)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def read(directory):
    return dict(tree.leaves(checkpoint.restore_params(str(directory))))


def same(got, want):
    assert set(got) == set(want)
    for name, array in want.items():
        mine = np.asarray(got[name])
        assert (mine.dtype, mine.shape) == (
            array.dtype,
            array.shape,
        ) and mine.tobytes() == np.asarray(array).tobytes(), name


def logits(directory):
    """Of our LLaMA in a checkpoint, which may lack the other towers, over its own vocabulary."""

    def run(params):
        model = module.bind(emu.Emu, config, params).llama
        at = jnp.tile(jnp.arange(IDS.shape[1]), (len(IDS), 1))
        hidden = model(
            model.embeddings(jnp.asarray(IDS), jnp.float32), at, jnp.ones_like(at), kernel="dense"
        )[0]
        return jnp.einsum("btD,vD->btv", hidden, model.head()["base"], precision="highest")

    config = size_of(directory)
    return np.asarray(
        jax.jit(run)(tree.unflatten(dict(tree.leaves(zeros(config))) | read(directory)))
    )


def error_of(capsys, *arguments):
    assert main(list(map(str, arguments))) == 2
    *_, error = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("error: ")
    return error


@pytest.mark.parametrize("targets", [(), (ALL,)], ids=["attention", "all"])
def test_adapters_are_pefts_and_come_back(tmp_path, targets):
    """Names, layout and config by hand; and import of export is the identity."""
    c = small(*RANK, *targets, "--config.model.llama.kv_heads=2")
    params = dict(tree.leaves(make.written(tmp_path / "ours", c, random(c))))
    assert (
        main(
            [
                "export",
                "--family=peft",
                f"--from={tmp_path / 'ours'}",
                f"--to={tmp_path / 'adapter'}",
            ]
        )
        == 0
    )
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    found = files.read([str(tmp_path / "adapter")])
    said = found.config
    block = "base_model.model.model.layers.1."
    modules = sorted(
        f"{name}_proj" for name in (*"qkvo", *(("gate", "up", "down") if targets else ()))
    )
    assert (
        said["peft_type"],
        said["r"],
        said["lora_alpha"],
        said["target_modules"],
        said["bias"],
    ) == ("LORA", 3, 6.0, modules, "none")
    assert len(found.tensors) == 2 * 2 * len(modules)
    for name, ours in (("self_attn.q_proj", "attn/q"), ("self_attn.o_proj", "attn/o")):
        a, b = (np.asarray(found.tensors[f"{block}{name}.lora_{half}.weight"]) for half in "AB")
        mine = lora.merge(
            lora.LoraConfig(3, 6.0), *(params[f"llama/blocks/{ours}/{leaf}"][1] for leaf in "wab")
        )
        delta = np.asarray(mine) - params[f"llama/blocks/{ours}/w"][1]
        np.testing.assert_allclose(delta.reshape(32, 32), (6 / 3 * b @ a).T, rtol=1e-4, atol=1e-5)
    base = {path: leaf for path, leaf in params.items() if not path.endswith(("/a", "/b"))}
    make.written(tmp_path / "base", small("--config.model.llama.kv_heads=2"), tree.unflatten(base))
    assert (
        main(
            [
                "export",
                "--family=llama",
                f"--from={tmp_path / 'base'}",
                f"--to={tmp_path / 'llama'}",
            ]
        )
        == 0
    )
    sources = "--family=llama", str(tmp_path / "llama"), "--family=peft", str(tmp_path / "adapter")
    assert main(["import", *sources, f"--to={tmp_path / 'again'}"]) == 0
    again = read(tmp_path / "again")
    same(
        {path: leaf for path, leaf in again.items() if path.endswith(("/a", "/b"))},
        {path: leaf for path, leaf in params.items() if path.endswith(("/a", "/b"))},
    )
    config = size_of(tmp_path / "again").lora
    assert (config.rank, config.alpha) == (3, 6.0) and again[
        "llama/blocks/attn/q/w"
    ].tobytes() == params["llama/blocks/attn/q/w"].tobytes()


def chat_model(path, c):
    """A released chat model: PEFT's names around its LLM's attention; the arrays of its own
    names.
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
    saved(
        path,
        {
            name.replace("decoder.lm.", "decoder.lm.base_model.model."): array
            for name, array in out.items()
        },
    )
    return out


def test_a_chat_model_keeps_its_lora_or_has_it_merged(tmp_path):
    arrays = chat_model(tmp_path / "chat.pt", small())
    # the release's: alpha = rank
    scale = "--config.model.lora.alpha=3.0"
    for to, flags in (("kept", ("--config.model.lora.rank=3", scale)), ("merged", ())):
        assert (
            main(
                [
                    "import",
                    "--family=emu1",
                    str(tmp_path / "chat.pt"),
                    CONFIG,
                    ROPE,
                    *flags,
                    f"--to={tmp_path / to}",
                ]
            )
            == 0
        )
    kept = read(tmp_path / "kept")
    merged = read(tmp_path / "merged")
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
    assert main(["bake", f"--from={tmp_path / 'kept'}", f"--to={tmp_path / 'baked'}"]) == 0
    baked = read(tmp_path / "baked")
    assert baked.keys() == merged.keys()
    for path, leaf in merged.items():
        np.testing.assert_allclose(
            baked[path], leaf, rtol=1e-4, atol=1e-4 * np.abs(leaf).max(), err_msg=path
        )
    # what is exported is the tuned model, not its base
    for family in ("emu1", "llama"):
        assert (
            main(
                [
                    "export",
                    f"--family={family}",
                    f"--from={tmp_path / 'kept'}",
                    f"--to={tmp_path / family}",
                ]
            )
            == 0
        )
        name = {"emu1": "decoder.lm.", "llama": ""}[
            family
        ] + "model.layers.1.self_attn.v_proj.weight"
        got = np.asarray(files.read([str(tmp_path / family)]).tensors[name])
        np.testing.assert_allclose(
            got, baked["llama/blocks/attn/v/w"][1].reshape(32, 32).T, rtol=1e-6
        )


def test_a_run_that_stores_in_few_bits_starts_from_plain_matrices_and_is_baked_to_what_they_say(
    tmp_path, caplog
):
    c = small("--config.model.llama.added=6", ROPE)
    # 4 added rows: two are to be made
    plain = make.written(tmp_path / "plain", c, random(small(ROPE)))
    stored = small(*RANK, "--config.model.llama.added=6", "--config.model.lora.storage=nf4", ROPE)
    fresh = blank(stored)
    with caplog.at_level("INFO"):
        loaded = dict(tree.leaves(load_weights(str(tmp_path / "plain"), fresh)))
    params = dict(tree.leaves(fresh)) | loaded
    told = next(
        record.getMessage() for record in caplog.records if "stored as" in record.getMessage()
    )
    w = plain["llama"]["blocks"]["attn"]["q"]["w"]
    codes, absmax = lora.quantize(w, "nf4")
    np.testing.assert_array_equal(params["llama/blocks/attn/q/nf4"], codes)
    off = float(np.sqrt(np.square(lora.dequantize(codes, absmax) - w).mean() / np.square(w).mean()))
    assert 0 < off < 0.12 and "7 matrices stored as nf4, off by " in told
    table = np.concatenate([plain["llama"]["embed"][part] for part in ("base", "added")])
    np.testing.assert_allclose(
        params["llama/embed/added"], [*table[-4:], *[table.mean(0)] * 2], rtol=1e-5, atol=1e-6
    )
    rng = np.random.default_rng(1)
    params = {
        path: 0.3 * rng.standard_normal(leaf.shape, np.float32)
        if path.endswith(("/a", "/b"))
        else leaf
        for path, leaf in params.items()
    }
    make.written(tmp_path / "stored", stored, tree.unflatten(params))
    assert main(["bake", f"--from={tmp_path / 'stored'}", f"--to={tmp_path / 'baked'}"]) == 0
    baked = read(tmp_path / "baked")
    a, b = (params[f"llama/blocks/attn/q/{half}"] for half in "ab")
    want = [
        lora.merge(lora.LoraConfig(3, 6.0), lora.Quantized(codes[k], absmax[k]), a[k], b[k])
        for k in range(2)
    ]
    np.testing.assert_allclose(baked["llama/blocks/attn/q/w"], want, rtol=1e-5, atol=1e-6)


# Bad input


def test_another_rank_another_kind_and_lora_without_a_place(tmp_path, capsys):
    c = small(*RANK)
    make.written(tmp_path / "ours", c, random(c))
    assert (
        main(
            [
                "export",
                "--family=peft",
                f"--from={tmp_path / 'ours'}",
                f"--to={tmp_path / 'adapter'}",
            ]
        )
        == 0
    )
    told = error_of(
        capsys,
        "import",
        "--family=peft",
        tmp_path / "adapter",
        CONFIG,
        "--config.model.lora.rank=8",
        f"--to={tmp_path / 'new'}",
    )
    assert (
        "does not match the config: lora.rank is 3, not 8, lora.alpha is 6.0, not 16.0 (--config.model.lora.rank=3"
        in told
    )
    with pytest.raises(
        UserError,
        match=r"a' is float32\[2, 32, 3\] in .*, but float32\[2, 32, 8\] in this run's config",
    ):
        load_weights(str(tmp_path / "ours"), blank(small("--config.model.lora.rank=8")))
    with pytest.raises(
        UserError,
        match=r"has llama/blocks/attn/k/a, which this model does not: .* python -m emu_jax\.weights merge --from=",
    ):
        load_weights(str(tmp_path / "ours"), blank(small()))
    path = tmp_path / "adapter/adapter_config.json"
    for change, told in (
        (dict(peft_type="IA3"), "has peft_type='IA3'; only 'LORA' is supported"),
        (dict(use_dora=True), "has use_dora=True, which is not "),
    ):
        said = json.loads(path.read_text())
        path.write_text(json.dumps(said | change))
        assert told in error_of(
            capsys, "import", "--family=peft", path.parent, f"--to={tmp_path / 'new'}"
        )
        path.write_text(json.dumps(said))
    assert not (tmp_path / "new").exists()
    make.written(tmp_path / "base", small(), random(small()))
    assert "base holds no LoRA" in error_of(
        capsys, "export", "--family=peft", f"--from={tmp_path / 'base'}", f"--to={tmp_path / 'x'}"
    )


# PEFT


def test_what_we_export_has_the_same_logits_in_peft_and_what_it_saves_here(tmp_path):
    torch, transformers, peft = (
        pytest.importorskip(name) for name in ("torch", "transformers", "peft")
    )
    c = small(*RANK, ROPE)
    arrays = folder(tmp_path / "llama", small(), "llama")
    assert (
        main(
            [
                "import",
                "--family=llama",
                str(tmp_path / "llama"),
                CONFIG,
                ROPE,
                f"--to={tmp_path / 'base'}",
            ]
        )
        == 0
    )
    params = read(tmp_path / "base") | {
        path: leaf for path, leaf in tree.leaves(random(c)) if path.endswith(("/a", "/b"))
    }
    make.written(tmp_path / "ours", c, tree.unflatten(params))
    assert (
        main(
            [
                "export",
                "--family=peft",
                f"--from={tmp_path / 'ours'}",
                f"--to={tmp_path / 'adapter'}",
            ]
        )
        == 0
    )
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
    with torch.no_grad():
        base = model(torch.tensor(IDS)).logits.numpy()
        tuned = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
        want = tuned(torch.tensor(IDS)).logits.numpy()
    assert len(arrays) > 15 and np.abs(want - base).max() > 0.1 * np.abs(want).max()
    np.testing.assert_allclose(logits(tmp_path / "ours"), want, atol=2e-4 * np.abs(want).max())
    tuned.save_pretrained(tmp_path / "theirs")
    assert (
        main(
            [
                "import",
                "--family=llama",
                str(tmp_path / "llama"),
                "--family=peft",
                str(tmp_path / "theirs"),
                CONFIG,
                *RANK,
                ROPE,
                f"--to={tmp_path / 'again'}",
            ]
        )
        == 0
    )
    same(read(tmp_path / "again"), read(tmp_path / "ours"))
