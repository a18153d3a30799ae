"""Import and export are inverse bit for bit, for every family, sharded or not.

Whatever does not fit is reported before anything is written.
"""

import json
import os
import pickle
import shutil
import weakref
from functools import cache

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
from tests.support.foreign import (
    CONFIG,
    LLAMA3,
    config_of,
    export,
    folder,
    import_,
    leaves,
    random,
    saved,
    small,
    tensors,
)
from tests.support.trees import assert_bitwise_equal

BF16 = ml_dtypes.bfloat16


def error_of(capsys, *arguments):
    """(error, lines before it) of an import or export that fails."""
    assert main(list(map(str, arguments))) == 2
    *lines, error = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("error: ")
    return error, lines


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """source(family, overrides=(), dtype=float32): a foreign checkpoint (folder, arrays).

    Each is made once, and no test changes it.
    """

    @cache
    def make(family, overrides, dtype):
        path = tmp_path_factory.mktemp(family) / "source"
        return path, folder(path, small(*overrides), family, dtype)

    def source(family, overrides=(), dtype=np.float32):
        return make(family, overrides, dtype)

    return source


@pytest.fixture(scope="module")
def imported(source):
    """imported(family, overrides=(), dtype=float32): an import of `source` (folder, leaves)."""

    @cache
    def make(family, overrides, dtype):
        path, _ = source(family, overrides, dtype)
        to = path.with_name("ours")
        import_(to, f"--family={family}", path, CONFIG, *overrides)
        return to, leaves(to)

    def imported(family, overrides=(), dtype=np.float32):
        return make(family, overrides, dtype)

    return imported


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
    tmp_path, source, imported, family, overrides, dtype
):
    _, arrays = source(family, overrides, dtype)
    ours, first = imported(family, overrides, dtype)
    export(family, ours, tmp_path / "theirs")
    assert_bitwise_equal(files.read([str(tmp_path / "theirs")]).tensors, arrays)
    import_(tmp_path / "again", f"--family={family}", tmp_path / "theirs", CONFIG, *overrides)
    assert_bitwise_equal(leaves(tmp_path / "again"), first)


@pytest.mark.parametrize("family", ["emu1", "eva-clip"])
def test_pytorch_files_give_the_same_as_safetensors(tmp_path, source, imported, family):
    _, arrays = source(family)
    if family == "emu1":
        arrays = {f"module.{name}": array for name, array in arrays.items()}
    else:
        arrays = {name.removeprefix("visual."): array for name, array in arrays.items()}
    saved(tmp_path / "one.pt", arrays)
    import_(tmp_path / "ours", f"--family={family}", tmp_path / "one.pt", CONFIG)
    _, want = imported(family)
    assert_bitwise_equal(leaves(tmp_path / "ours"), want)


def test_leaves_hold_the_tensors_that_the_table_names(source, imported):
    """Their q is [out, in]; ours is transposed and split into heads."""
    _, arrays = source("llama")
    _, got = imported("llama")
    np.testing.assert_array_equal(
        got["llama/blocks/attn/q/w"][1, :, 2],
        arrays["model.layers.1.self_attn.q_proj.weight"][16:24].T,
    )
    np.testing.assert_array_equal(got["llama/embed/base"], arrays["model.embed_tokens.weight"])
    np.testing.assert_allclose(
        got["llama/lm_head/added"],
        np.tile(arrays["lm_head.weight"].mean(0, np.float64), (4, 1)),
        rtol=1e-6,
    )


def test_without_a_config_the_towers_take_their_sizes_from_the_files(tmp_path):
    c = small(*LLAMA3, "--config.model.llama.width=64")
    folder(tmp_path / "source", c, "llama")
    import_(tmp_path / "ours", "--family=llama", tmp_path / "source")
    got = checkpoint.read_config(str(tmp_path / "ours"))["model"]
    want = config.to_dict(c)["model"]["llama"]
    assert got["llama"] == want | {"rope_dtype": "float32", "remat": "full"}
    assert got["vision"]["width"] == 1408
    assert want["kv_heads"] == 2
    assert want["tied"]
    assert want["rope_scaling"] == ["llama3", 8.0, 1.0, 4.0, 64.0]


@pytest.mark.parametrize("old", [True, False])
def test_old_and_new_rotary_fields_are_read(tmp_path, old):
    folder(tmp_path / "source", small(*LLAMA3), "llama")
    path = tmp_path / "source/config.json"
    fields = json.loads(path.read_text())
    scaling = fields.pop("rope_scaling")
    if old:
        kind = scaling.pop("rope_type")
        fields["rope_scaling"] = scaling | {"type": kind}
    else:
        fields["rope_parameters"] = scaling | {"rope_theta": fields.pop("rope_theta")}
    path.write_text(json.dumps(fields))
    # The import fails if the config does not match the file's fields.
    import_(tmp_path / "ours", "--family=llama", tmp_path / "source", CONFIG, *LLAMA3, "--dry-run")


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
    sources = ["--family=llama", tmp_path / "llama", "--family=eva-clip", tmp_path / "eva.pt"]
    import_(tmp_path / "ours", *sources, CONFIG)
    got = leaves(tmp_path / "ours")
    out = capsys.readouterr().out
    assert {path.split("/")[0] for path in got} == {"vision", "llama"}
    assert got["vision/pos"].dtype == np.float16
    assert got["llama/embed/base"].dtype == got["llama/embed/added"].dtype == BF16
    assert "left out, initialised by training: resampler" in out
    assert "not used: 3 tensors" in out
    np.testing.assert_array_equal(
        got["vision/blocks/attn/k/w"][0, :, 1, 3],
        eva["visual.blocks.0.attn.qkv.weight"][32 + 11],
    )

    shapes = module.abstract(emu.Emu, config_of(tmp_path / "ours"))
    fresh = jax.device_put(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))
    # config.init loads weights like this.
    params = load_weights(str(tmp_path / "ours"), fresh)
    want = {path: leaf.astype(np.float32) for path, leaf in got.items()}
    assert_bitwise_equal(dict(tree.leaves(params)), want)


def test_new_rows_of_an_emu_are_the_mean_of_the_old(tmp_path, source):
    path, arrays = source("emu1")
    added = "--config.model.llama.added=6"
    import_(tmp_path / "ours", "--family=emu1", path, CONFIG, added)
    got = leaves(tmp_path / "ours")
    table = arrays["decoder.lm.model.embed_tokens.weight"]
    np.testing.assert_array_equal(got["llama/embed/added"][:4], table[512:])
    np.testing.assert_allclose(
        got["llama/embed/added"][4:],
        np.tile(table.astype(np.float64).mean(0), (2, 1)),
        rtol=1e-6,
    )


def test_lora_is_merged(tmp_path):
    rng = np.random.default_rng(5)
    arrays = tensors(small(), "emu1")
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
    import_(tmp_path / "ours", "--family=emu1", tmp_path / "chat.pt", CONFIG)
    q = leaves(tmp_path / "ours")["llama/blocks/attn/q/w"][1]
    np.testing.assert_allclose(
        q.reshape(32, 32), (arrays[f"{plain}.weight"] + b @ a).T, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("size", [56, 14])
def test_image_size_interpolates_position_embeddings(tmp_path, source, size):
    path, arrays = source("eva-clip")
    import_(tmp_path / "ours", "--family=eva-clip", path, CONFIG, f"--image-size={size}")
    positions = leaves(tmp_path / "ours")["vision/pos"]
    assert positions.shape == (1 + (size // 14) ** 2, 32)
    np.testing.assert_array_equal(positions[0], arrays["visual.pos_embed"][0, 0])
    assert checkpoint.read_config(str(tmp_path / "ours"))["model"]["vision"]["image"] == size


# Onto devices


@pytest.mark.parametrize("family", ["emu1", "llama"])
def test_sharded_over_eight_devices_equals_unsharded(tmp_path, family):
    c = config.load([CONFIG, "--config.model.llama.vocab=512", *LLAMA3])
    folder(tmp_path / "source", c, family)
    plan = transfer.make_plan([(family, [str(tmp_path / "source")])], c, given=True)
    mesh = sharding.make_mesh(dict(data=1, fsdp=4, tensor=2))
    model_config = emu.EmuConfig.of(c.model.to_dict())
    specs = sharding.specs(module.abstract(emu.Emu, model_config))
    placed = dict(tree.leaves(sharding.shardings(mesh, specs)))
    (part,) = plan.parts
    sharded = dict(tree.leaves(convert.from_theirs(part.table, part.tensors, placed)))
    whole = dict(tree.leaves(convert.from_theirs(part.table, part.tensors)))
    assert_bitwise_equal(sharded, whole)
    for path, leaf in sharded.items():
        assert leaf.sharding.is_equivalent_to(placed[path], leaf.ndim), path
    up = sharded["llama/blocks/ffn/up/w"]
    assert up.addressable_shards[0].data.size * 8 == up.size


def test_the_host_holds_one_tensor_at_a_time(tmp_path):
    """Each foreign tensor is read once, after the one before it is freed."""
    held = []
    reads = []

    def tensor(array, name):
        def read():
            assert not any(other() is not None for other in held), "an earlier tensor is held"
            reads.append(name)
            copy = array.copy()
            held.append(weakref.ref(copy))
            return copy

        return files.Tensor(array.shape, array.dtype, read)

    c = small()
    arrays = tensors(c, "emu1")
    table = FAMILIES["emu1"].table(emu.EmuConfig.of(c.model.to_dict()))
    foreign = {name: tensor(array, name) for name, array in arrays.items()}
    for _, _, piece in convert.pieces(table, foreign):
        del piece
    assert reads == list(arrays)


# What does not fit


def test_every_tensor_that_does_not_fit_is_listed_and_nothing_is_written(tmp_path, capsys):
    arrays = tensors(small(), "llama")
    lost = ("0.mlp.up_proj.weight", "1.mlp.down_proj.weight")
    odd = {name: array for name, array in arrays.items() if not name.endswith(lost)}
    odd |= {
        "model.norm.weight": arrays["model.norm.weight"][:5],
        "model.layers.0.input_layernorm.weight": np.arange(32),
        "extra.weight": np.zeros(3, np.float32),
    }
    saved(tmp_path / "odd.bin", odd)
    for dry in ((), ("--dry-run",)):
        error, lines = error_of(
            capsys,
            "import",
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


def test_dry_run_lists_what_it_would_import_and_writes_nothing(tmp_path, capsys, source):
    path, _ = source("llama")
    import_(tmp_path / "ours", "--family=llama", path, CONFIG, "--dry-run")
    out = capsys.readouterr().out
    assert "llama" in out
    assert "float32" in out
    assert "left out, initialised by training: vision" in out
    assert not (tmp_path / "ours").exists()


def test_an_import_works_in_any_folder(tmp_path, capsys, monkeypatch, source):
    """Without --config, the default config is found even from a folder without configs."""
    path, _ = source("llama")
    monkeypatch.chdir(tmp_path)
    import_(tmp_path / "ours", "--family=llama", path, "--dry-run")
    assert "llama" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("named", "given"),
    [
        ("llama", "emu1"),
        ("emu1", "llama"),
        ("eva-clip", "emu1"),
        ("llama", "eva-clip"),
        ("emu1", "t5-decoder"),
    ],
)
def test_another_family_is_guessed(tmp_path, capsys, source, named, given):
    path, _ = source(given)
    error, _ = error_of(capsys, "import", f"--family={named}", path, CONFIG, f"--to={tmp_path}/x")
    assert f"is not of the family {named}; it looks like {given}: --family={given}" in error


def test_bad_input_is_one_line(tmp_path, capsys):
    to = f"--to={tmp_path / 'ours'}"
    source = tmp_path / "source"
    folder(source, small(), "llama")

    def says(*arguments):
        return error_of(capsys, "import", *arguments)[0]

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
    none = f"it looks like none of {', '.join(FAMILIES)}; it holds w"
    assert none in says("--family=llama", tmp_path / "other.bin", CONFIG, to)
    (tmp_path / "evil.bin").write_bytes(pickle.dumps(os.system))
    assert "names posix.system" in says("--family=llama", tmp_path / "evil.bin", CONFIG, to)
    path = source / "config.json"
    fields = json.loads(path.read_text())
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
        path.write_text(json.dumps(fields | change))
        assert message in says("--family=llama", source, CONFIG, to)
    no_heads = {"num_attention_heads": 0, "num_key_value_heads": 0, "head_dim": None}
    path.write_text(json.dumps(fields | no_heads))
    assert "source: no model of these sizes is possible: " in says("--family=llama", source, to)
    tall = {"model.layers.999999999.self_attn.q_proj.weight": np.zeros((2, 2), np.float32)}
    saved(tmp_path / "tall.bin", tall)
    assert "a tensor names layer 999999999, but there are 1 tensors" in says(
        "--family=llama", tmp_path / "tall.bin", CONFIG, to
    )
    path.write_text(json.dumps(fields | {"num_key_value_heads": 3}))
    assert "multiple of heads 4, and heads a multiple of kv_heads 3" in says(
        "--family=llama", source, to
    )
    path.unlink()
    assert "does not determine llama.heads, llama.kv_heads" in says("--family=llama", source, to)
    shard = sorted(source.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-4])
    assert "truncated or damaged" in says("--family=llama", source, CONFIG, to)
    assert not (tmp_path / "ours").exists()


def test_a_directory_in_use_is_left_alone(tmp_path, capsys, source, imported):
    path, _ = source("eva-clip")
    ours, _ = imported("eva-clip")
    before = sorted(ours.rglob("*"))
    error, _ = error_of(capsys, "import", "--family=eva-clip", path, CONFIG, f"--to={ours}")
    assert "holds a checkpoint already" in error
    assert sorted(ours.rglob("*")) == before
    error, _ = error_of(capsys, "export", "--family=eva-clip", f"--from={ours}", f"--to={path}")
    assert "exists and is not empty" in error


def test_a_checkpoint_without_the_familys_parameters_is_not_exported(tmp_path, capsys, imported):
    ours, _ = imported("eva-clip")
    error, _ = error_of(
        capsys, "export", "--family=llama", f"--from={ours}", f"--to={tmp_path / 'theirs'}"
    )
    assert "does not hold a complete llama: it has no parameter 'llama/" in error
    assert not (tmp_path / "theirs").exists()


def test_a_damaged_checkpoint_is_not_exported(tmp_path, capsys, imported):
    shutil.copytree(imported("eva-clip")[0], tmp_path / "ours")
    arrays = (tmp_path / "ours/checkpoints/0/params/d").iterdir()
    array = max(arrays, key=lambda path: path.stat().st_size)
    content = bytearray(array.read_bytes())
    content[len(content) // 2] ^= 4
    array.write_bytes(content)
    error, _ = error_of(
        capsys,
        "export",
        "--family=eva-clip",
        f"--from={tmp_path / 'ours'}",
        f"--to={tmp_path / 'theirs'}",
    )
    assert "is damaged" in error
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_a_source_truncated_during_the_import_leaves_nothing(tmp_path):
    c = small()
    folder(tmp_path / "source", c, "eva-clip")
    plan = transfer.make_plan([("eva-clip", [str(tmp_path / "source")])], c, given=True)
    for shard in sorted((tmp_path / "source").glob("*.safetensors"))[1:]:
        shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(UserError, match="ends within a tensor"):
        transfer.write(plan, str(tmp_path / "ours"))
    assert not (tmp_path / "ours").exists()


def test_dtype_casts_an_export(tmp_path, source, imported):
    _, arrays = source("llama")
    ours, _ = imported("llama")
    export("llama", ours, tmp_path / "theirs", "--dtype=bfloat16")
    theirs = files.read([str(tmp_path / "theirs")])
    assert_bitwise_equal(
        theirs.tensors, {name: array.astype(BF16) for name, array in arrays.items()}
    )
    assert theirs.config["torch_dtype"] == "bfloat16"


def test_a_trained_checkpoint_is_exported(tmp_path):
    """A sharded state, saved by the training loop's own manager."""
    c = small()
    params = random(c)
    mesh = sharding.make_mesh(dict(data=1, fsdp=8, tensor=1))
    placed = jax.device_put(params, sharding.shardings(mesh, sharding.specs(params)))
    average = {"llama": jax.tree.map(lambda x: x / 2, placed["llama"])}
    state = State(jnp.int32(7), placed, {}, (jnp.zeros(2),), average, jnp.int32(0), jnp.zeros(()))
    run = tmp_path / "run"
    manager = checkpoint.CheckpointManager(str(run), keep=1, keep_every=0)
    manager.save(7, state, {}, config.to_dict(c), wait=True)
    export("emu1", run, tmp_path / "theirs")
    arrays = tensors(c, "emu1")
    assert_bitwise_equal(files.read([str(tmp_path / "theirs")]).tensors, arrays)
    export("emu1", run, tmp_path / "averaged", "--ema")
    halved = {
        name: array / 2 if ".model." in name or "lm_head" in name else array
        for name, array in arrays.items()
    }
    assert_bitwise_equal(files.read([str(tmp_path / "averaged")]).tensors, halved)
