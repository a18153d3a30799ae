"""Weights come in and go out again bit for bit, for every family, sharded or not; and what does not
fit is said before anything is written.
"""

import json
import os
import pickle
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from emu_jax import checkpoint, config, sharding, tree
from emu_jax.config import UserError
from emu_jax.initial import load_weights
from emu_jax.loop import State
from emu_jax.models import emu, module
from emu_jax.weights import convert, files, transfer
from emu_jax.weights.__main__ import main
from emu_jax.weights.families import FAMILIES
from tests.support.foreign import CONFIG, LLAMA3, folder, random, saved, size_of, small, tensors

BF16 = ml_dtypes.bfloat16


def import_(to, *arguments):
    assert main(["import", *map(str, arguments), f"--to={to}"]) == 0
    return dict(tree.leaves(checkpoint.restore_params(str(to))))


def same(got, want):
    assert set(got) == set(want)
    for name, array in want.items():
        mine = np.asarray(got[name])
        assert (mine.dtype, mine.shape) == (
            array.dtype,
            array.shape,
        ) and mine.tobytes() == array.tobytes(), name


def error_of(capsys, *arguments):
    """The one line of error of an import that writes nothing, and what stands before it."""
    assert main(["import", *map(str, arguments)]) == 2
    *lines, error = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("error: ")
    return error, lines


# The law


@pytest.mark.parametrize(
    ("family", "overrides", "dtype"),
    [
        ("emu1", (), np.float32),
        ("emu1", ("--config.model.llama.added=6",), BF16),
        ("eva-clip", (), np.float16),
        ("llama", (), BF16),
        ("llama", LLAMA3, np.float32),
        ("t5-decoder", (), np.float32),
        ("t5-decoder", ("--config.model.resampler.width=48",), BF16),
    ],
)
def test_export_of_import_is_the_identity_and_import_of_export_too(
    tmp_path, family, overrides, dtype
):
    arrays = folder(tmp_path / "source", small(*overrides), family, dtype)
    first = import_(
        tmp_path / "ours", f"--family={family}", tmp_path / "source", CONFIG, *overrides
    )
    assert (
        main(
            [
                "export",
                f"--family={family}",
                f"--from={tmp_path / 'ours'}",
                f"--to={tmp_path / 'theirs'}",
            ]
        )
        == 0
    )
    same(files.read([str(tmp_path / "theirs")]).tensors, arrays)
    same(
        import_(tmp_path / "again", f"--family={family}", tmp_path / "theirs", CONFIG, *overrides),
        first,
    )


@pytest.mark.parametrize("family", ["emu1", "eva-clip"])
def test_pytorch_files_give_the_same_as_safetensors(tmp_path, family):
    arrays = folder(tmp_path / "source", small(), family)
    prefixed = {"emu1": "module.", "eva-clip": ""}[family]
    saved(
        tmp_path / "one.pt",
        {
            prefixed + name.removeprefix("visual." if family == "eva-clip" else ""): array
            for name, array in arrays.items()
        },
    )
    same(
        import_(tmp_path / "one", f"--family={family}", tmp_path / "one.pt", CONFIG),
        import_(tmp_path / "two", f"--family={family}", tmp_path / "source", CONFIG),
    )


def test_leaves_are_where_the_table_says(tmp_path):
    """Not only back and forth: q of layer 1 is [out, in], transposed and cut into heads."""
    arrays = folder(tmp_path / "source", small(), "llama")
    leaves = import_(tmp_path / "ours", "--family=llama", tmp_path / "source", CONFIG)
    np.testing.assert_array_equal(
        leaves["llama/blocks/attn/q/w"][1, :, 2],
        arrays["model.layers.1.self_attn.q_proj.weight"][16:24].T,
    )
    np.testing.assert_array_equal(leaves["llama/embed/base"], arrays["model.embed_tokens.weight"])
    np.testing.assert_allclose(
        leaves["llama/lm_head/added"],
        np.tile(arrays["lm_head.weight"].mean(0, np.float64), (4, 1)),
        rtol=1e-6,
    )


def test_without_a_config_the_towers_take_the_files_sizes(tmp_path):
    c = small(*LLAMA3, "--config.model.llama.width=64")
    folder(tmp_path / "source", c, "llama")
    import_(tmp_path / "ours", "--family=llama", tmp_path / "source")
    got = checkpoint.read_config(str(tmp_path / "ours"))["model"]
    want = config.to_dict(c)["model"]["llama"]
    assert (
        got["llama"] == want | {"rope_dtype": "float32", "remat": "full"}
        and got["vision"]["width"] == 1408
    )
    assert (
        want["kv_heads"] == 2
        and want["tied"]
        and want["rope_scaling"] == ["llama3", 8.0, 1.0, 4.0, 64.0]
    )


@pytest.mark.parametrize("old", [True, False])
def test_rotary_fields_old_and_new(tmp_path, old):
    folder(tmp_path / "source", small(*LLAMA3), "llama")
    path = tmp_path / "source/config.json"
    said = json.loads(path.read_text())
    scaling = said.pop("rope_scaling")
    if old:
        said["rope_scaling"] = {
            "type" if key == "rope_type" else key: value for key, value in scaling.items()
        }
    else:
        said["rope_parameters"] = scaling | {"rope_theta": said.pop("rope_theta")}
    path.write_text(json.dumps(said))
    import_(tmp_path / "ours", "--family=llama", tmp_path / "source", CONFIG, *LLAMA3)


# Partial imports compose


def test_eva_clip_and_llama_make_the_papers_start(tmp_path, capsys):
    folder(tmp_path / "llama", small(), "llama", BF16, seed=1)
    eva = tensors(small(), "eva-clip", np.float16)
    eva |= {
        "visual.head.weight": np.zeros((2, 2), np.float16),
        "text.ln_final.weight": np.zeros(2, np.float16),
        "logit_scale": np.float16(1),
    }
    saved(tmp_path / "eva.pt", eva)
    leaves = import_(
        tmp_path / "ours",
        "--family=llama",
        tmp_path / "llama",
        "--family=eva-clip",
        tmp_path / "eva.pt",
        CONFIG,
    )
    out = capsys.readouterr().out
    assert {path.split("/")[0] for path in leaves} == {"vision", "llama"}
    assert (
        leaves["vision/pos"].dtype == np.float16
        and leaves["llama/embed/base"].dtype == leaves["llama/embed/added"].dtype == BF16
    )
    assert "left out, initialised by training: resampler" in out and "not used: 3 tensors" in out
    np.testing.assert_array_equal(
        leaves["vision/blocks/attn/k/w"][0, :, 1, 3],
        eva["visual.blocks.0.attn.qkv.weight"][32 + 11],
    )

    fresh = module.init(emu.Emu, size_of(tmp_path / "ours"), jax.random.key(0))
    # what config.init does
    params = load_weights(str(tmp_path / "ours"), fresh)
    same(
        dict(tree.leaves(params)), {path: leaf.astype(np.float32) for path, leaf in leaves.items()}
    )


def test_new_rows_of_an_emu_are_the_mean_of_the_old(tmp_path):
    arrays = folder(tmp_path / "source", small(), "emu1")
    leaves = import_(
        tmp_path / "ours",
        "--family=emu1",
        tmp_path / "source",
        CONFIG,
        "--config.model.llama.added=6",
    )
    table = arrays["decoder.lm.model.embed_tokens.weight"]
    np.testing.assert_array_equal(leaves["llama/embed/added"][:4], table[512:])
    np.testing.assert_allclose(
        leaves["llama/embed/added"][4:],
        np.tile(table.astype(np.float64).mean(0), (2, 1)),
        rtol=1e-6,
    )


def test_lora_is_merged(tmp_path):
    c = small()
    rng = np.random.default_rng(5)
    arrays = tensors(c, "emu1")
    plain = "decoder.lm.model.layers.1.self_attn.q_proj"
    a = rng.standard_normal((4, 32), np.float32)
    b = rng.standard_normal((32, 4), np.float32)

    def wrap(name):
        return name.replace("decoder.lm.", "decoder.lm.base_model.model.")

    chat = {name: array for name, array in arrays.items() if name != f"{plain}.weight"}
    chat |= {
        f"{plain}.base_layer.weight": arrays[f"{plain}.weight"],
        f"{plain}.lora_A.default.weight": a,
        f"{plain}.lora_B.default.weight": b,
    }
    saved(tmp_path / "chat.pt", {wrap(name): array for name, array in chat.items()})
    got = import_(tmp_path / "ours", "--family=emu1", tmp_path / "chat.pt", CONFIG)[
        "llama/blocks/attn/q/w"
    ][1]
    np.testing.assert_allclose(
        got.reshape(32, 32), (arrays[f"{plain}.weight"] + b @ a).T, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("size", [56, 14])
def test_position_embeddings_are_interpolated_when_asked(tmp_path, size):
    arrays = folder(tmp_path / "source", small(), "eva-clip")
    leaves = import_(
        tmp_path / "ours", "--family=eva-clip", tmp_path / "source", CONFIG, f"--image-size={size}"
    )
    assert leaves["vision/pos"].shape == (1 + (size // 14) ** 2, 32)
    np.testing.assert_array_equal(leaves["vision/pos"][0], arrays["visual.pos_embed"][0, 0])
    assert checkpoint.read_config(str(tmp_path / "ours"))["model"]["vision"]["image"] == size


# Onto devices


@pytest.mark.parametrize("family", ["emu1", "llama"])
def test_sharded_over_eight_devices_equals_unsharded(tmp_path, family):
    c = config.load([CONFIG, "--config.model.llama.vocab=512", *LLAMA3])
    folder(tmp_path / "source", c, family)
    made = transfer.make_plan([(family, [str(tmp_path / "source")])], c, given=True)
    mesh = sharding.make_mesh(dict(data=1, fsdp=4, tensor=2))
    model_config = emu.EmuConfig.of(c.model.to_dict())
    specs = sharding.specs(module.abstract(emu.Emu, model_config))
    placed = dict(tree.leaves(sharding.shardings(mesh, specs)))
    sharded, whole = (
        {
            path: leaf
            for part in made.parts
            for path, leaf in tree.leaves(convert.from_theirs(part.table, part.tensors, where))
        }
        for where in (placed, None)
    )
    same(sharded, {path: np.asarray(leaf) for path, leaf in whole.items()})
    for path, leaf in sharded.items():
        assert leaf.sharding.is_equivalent_to(placed[path], leaf.ndim), path
    assert (
        sharded["llama/blocks/ffn/up/w"].addressable_shards[0].data.size * 8
        == sharded["llama/blocks/ffn/up/w"].size
    )


def test_the_host_holds_one_tensor_at_a_time(tmp_path):
    """Each foreign tensor is read once, and the one before it is free by then."""
    held = []
    reads = []

    def tensor(array, name):
        def read():
            held[:] = [other for other in held if other() is not None]
            assert not held, "an earlier tensor is still held"
            reads.append(name)
            copy = array.copy()
            held.append(weakref.ref(copy))
            return copy

        return files.Tensor(array.shape, array.dtype, read)

    c = small()
    arrays = tensors(c, "emu1")
    table = FAMILIES["emu1"].table(emu.EmuConfig.of(c.model.to_dict()))
    for _, _, piece in convert.pieces(
        table, {name: tensor(array, name) for name, array in arrays.items()}
    ):
        del piece
    assert reads == list(arrays)


# What does not fit


def test_every_tensor_that_does_not_fit_is_listed_and_nothing_is_written(tmp_path, capsys):
    arrays = tensors(small(), "llama")
    odd = {
        name: array
        for name, array in arrays.items()
        if not name.endswith(("0.mlp.up_proj.weight", "1.mlp.down_proj.weight"))
    }
    odd |= {
        "model.norm.weight": arrays["model.norm.weight"][:5],
        "model.layers.0.input_layernorm.weight": np.arange(32),
        "extra.weight": np.zeros(3, np.float32),
    }
    saved(tmp_path / "odd.bin", odd)
    for dry in ((), ("--dry-run",)):
        error, lines = error_of(
            capsys,
            "--family=llama",
            tmp_path / "odd.bin",
            CONFIG,
            f"--to={tmp_path / 'ours'}",
            *dry,
        )
        assert "2 missing, 1 unexpected, 1 misshapen, 1 not a float" in error
        assert sorted(" ".join(line.split()).split(": ", 1)[1] for line in lines) == [
            "misshapen model.norm.weight [5], expected [32]",
            "missing model.layers.0.mlp.up_proj.weight [64, 32]",
            "missing model.layers.1.mlp.down_proj.weight [32, 64]",
            "not a float model.layers.0.input_layernorm.weight int64[32]",
            "unexpected extra.weight [3]",
        ]
        assert not (tmp_path / "ours").exists()


def test_dry_run_says_what_would_be_and_writes_nothing(tmp_path, capsys):
    folder(tmp_path / "source", small(), "llama")
    assert (
        main(
            [
                "import",
                "--family=llama",
                str(tmp_path / "source"),
                CONFIG,
                "--dry-run",
                f"--to={tmp_path / 'ours'}",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert (
        "llama" in out and "float32" in out and "left out, initialised by training: vision" in out
    )
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ("llama", "emu1"),
        ("emu1", "llama"),
        ("eva-clip", "emu1"),
        ("llama", "eva-clip"),
        ("emu1", "t5-decoder"),
    ],
)
def test_another_family_is_guessed(tmp_path, capsys, asked, given):
    folder(tmp_path / "source", small(), given)
    error, _ = error_of(
        capsys, f"--family={asked}", tmp_path / "source", CONFIG, f"--to={tmp_path / 'ours'}"
    )
    assert f"is not of the family {asked}; it looks like {given}: --family={given}" in error


def test_bad_input_is_one_line(tmp_path, capsys):
    c = small()
    to = f"--to={tmp_path / 'ours'}"
    source = tmp_path / "source"
    folder(source, c, "llama")

    def says(*arguments):
        return error_of(capsys, *arguments)[0]

    assert "llama.width is 32, not 64" in says(
        "--family=llama", source, CONFIG, "--config.model.llama.width=64", to
    )
    assert "llama.eps is 1e-06, not 1e-05" in says(
        "--family=llama", source, CONFIG, "--config.model.llama.eps=1e-5", to
    )
    assert "no family 'lama'; there are emu1, llama" in says("--family=lama", source, to)
    assert "--family=llama is followed by no source" in says("--family=llama", to)
    assert "name the family of" in says(source, to)
    assert "--to=DIR is missing" in says("--family=llama", source, CONFIG)
    assert "did you mean 'model.llama.width'" in says(
        "--family=llama", source, CONFIG, "--config.model.llama.widht=3", to
    )
    assert "unknown flag --two" in says("--family=llama", source, CONFIG, "--two=3", to)
    assert "must be a multiple of the patch of 14, and a source must" in says(
        "--family=llama", source, CONFIG, "--image-size=28", to
    )
    assert "llama comes from" in says(
        "--family=llama", source, "--family=llama", source, CONFIG, to
    )
    saved(tmp_path / "other.bin", {"w": np.zeros(3)})
    none = "it looks like none of emu1, llama, peft, t5-decoder, eva-clip, stable-diffusion, inception, clip; it holds w"
    assert none in says("--family=llama", tmp_path / "other.bin", CONFIG, to)
    (tmp_path / "evil.bin").write_bytes(pickle.dumps(os.system))
    assert "names posix.system" in says("--family=llama", tmp_path / "evil.bin", CONFIG, to)
    path = source / "config.json"
    said = json.loads(path.read_text())
    for change, message in (
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2}},
            "'linear' and 'llama3' are supported",
        ),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"model_type": "mistral"}, "model_type='mistral'"),
        ({"head_dim": 5}, "head_dim=5"),
        ({"attention_bias": True}, "biases"),
        ({"num_attention_heads": "four"}, "source: "),
        ({"rope_theta": "wide"}, "source: could not convert"),
        ({"rope_scaling": [1]}, "source: "),
    ):
        path.write_text(json.dumps(said | change))
        assert message in says("--family=llama", source, CONFIG, to)
    path.write_text(
        json.dumps(said | {"num_attention_heads": 0, "num_key_value_heads": 0, "head_dim": None})
    )
    assert "source: no model of these sizes is possible: " in says("--family=llama", source, to)
    saved(
        tmp_path / "tall.bin",
        {"model.layers.999999999.self_attn.q_proj.weight": np.zeros((2, 2), np.float32)},
    )
    assert "a tensor names layer 999999999, but there are 1 tensors" in says(
        "--family=llama", tmp_path / "tall.bin", CONFIG, to
    )
    path.write_text(json.dumps(said | {"num_key_value_heads": 3}))
    assert "multiple of heads 4, and heads a multiple of kv_heads 3" in says(
        "--family=llama", source, to
    )
    path.unlink()
    assert "does not determine llama.heads, llama.kv_heads" in says("--family=llama", source, to)
    shard = sorted(source.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-4])
    assert "truncated or damaged" in says("--family=llama", source, CONFIG, to)
    assert not (tmp_path / "ours").exists()


def test_a_directory_in_use_is_left_alone(tmp_path, capsys):
    folder(tmp_path / "source", small(), "eva-clip")
    arguments = ["--family=eva-clip", tmp_path / "source", CONFIG, f"--to={tmp_path / 'ours'}"]
    assert main(["import", *map(str, arguments)]) == 0
    capsys.readouterr()
    assert "holds a checkpoint already" in error_of(capsys, *arguments)[0]
    assert (
        main(
            [
                "export",
                "--family=eva-clip",
                f"--from={tmp_path / 'ours'}",
                f"--to={tmp_path / 'source'}",
            ]
        )
        == 2
    )
    assert "exists and is not empty" in capsys.readouterr().err
    assert (
        main(
            [
                "export",
                "--family=llama",
                f"--from={tmp_path / 'ours'}",
                f"--to={tmp_path / 'theirs'}",
            ]
        )
        == 2
    )
    assert (
        "does not hold a complete llama: no parameter 'llama/" in capsys.readouterr().err
        and not (tmp_path / "theirs").exists()
    )


def test_a_damaged_checkpoint_is_not_exported(tmp_path, capsys):
    folder(tmp_path / "source", small(), "eva-clip")
    import_(tmp_path / "ours", "--family=eva-clip", tmp_path / "source", CONFIG)
    array = max(
        (tmp_path / "ours/checkpoints/0/params/d").iterdir(), key=lambda path: path.stat().st_size
    )
    content = bytearray(array.read_bytes())
    content[len(content) // 2] ^= 4
    array.write_bytes(content)
    assert (
        main(
            [
                "export",
                "--family=eva-clip",
                f"--from={tmp_path / 'ours'}",
                f"--to={tmp_path / 'theirs'}",
            ]
        )
        == 2
    )
    assert "is damaged" in capsys.readouterr().err.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "source"]


def test_a_source_that_ends_while_it_is_read_leaves_nothing(tmp_path, monkeypatch):
    c = small()
    folder(tmp_path / "source", c, "eva-clip")
    made = transfer.make_plan([("eva-clip", [str(tmp_path / "source")])], c, given=True)
    for shard in sorted((tmp_path / "source").glob("*.safetensors"))[1:]:
        shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(UserError, match="ends within a tensor"):
        transfer.write(made, str(tmp_path / "ours"))
    assert not (tmp_path / "ours").exists()


def test_a_dtype_is_cast_to(tmp_path):
    arrays = folder(tmp_path / "source", small(), "llama")
    import_(tmp_path / "ours", "--family=llama", tmp_path / "source", CONFIG)
    assert (
        main(
            [
                "export",
                "--family=llama",
                f"--from={tmp_path / 'ours'}",
                f"--to={tmp_path / 'theirs'}",
                "--dtype=bfloat16",
            ]
        )
        == 0
    )
    same(
        files.read([str(tmp_path / "theirs")]).tensors,
        {name: array.astype(BF16) for name, array in arrays.items()},
    )
    assert json.loads((tmp_path / "theirs/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_trained_checkpoint_is_exported(tmp_path):
    """Written by the training loop's own way, sharded."""
    c = small()
    params = random(c)
    mesh = sharding.make_mesh(dict(data=1, fsdp=8, tensor=1))
    placed = jax.device_put(params, sharding.shardings(mesh, sharding.specs(params)))
    average = {"llama": jax.tree.map(lambda x: x / 2, placed["llama"])}
    state = State(jnp.int32(7), placed, {}, (jnp.zeros(2),), average, jnp.int32(0), jnp.zeros(()))
    checkpoint.CheckpointManager(str(tmp_path / "run"), keep=1, keep_every=0).save(
        7, state, {}, config.to_dict(c), wait=True
    )
    assert (
        main(
            ["export", "--family=emu1", f"--from={tmp_path / 'run'}", f"--to={tmp_path / 'theirs'}"]
        )
        == 0
    )
    arrays = tensors(c, "emu1")
    same(files.read([str(tmp_path / "theirs")]).tensors, arrays)
    assert (
        main(
            [
                "export",
                "--family=emu1",
                f"--from={tmp_path / 'run'}",
                f"--to={tmp_path / 'averaged'}",
                "--ema",
            ]
        )
        == 0
    )
    halved = {
        name: array / 2 if ".model." in name or "lm_head" in name else array
        for name, array in arrays.items()
    }
    same(files.read([str(tmp_path / "averaged")]).tensors, halved)
