"""Stable Diffusion: its tables, folders, configs, and a decoder that starts from one."""

import json
import logging
from dataclasses import asdict
from functools import partial

import chex
import jax
import numpy as np
import pytest

from emu_jax import config, sharding, tree
from emu_jax.config import UserError
from emu_jax.initial import init_from_checkpoint
from emu_jax.models import module
from emu_jax.models.decoder import Decoder, DecoderConfig
from emu_jax.models.unet import UNet
from emu_jax.models.vae import Vae
from emu_jax.plan import make_program
from emu_jax.step import cast_frozen
from emu_jax.weights import convert, files
from emu_jax.weights import stable_diffusion as family
from emu_jax.weights.__main__ import main
from tests.support import foreign
from tests.support.foreign import (
    PNDM,
    UNET1,
    UNET2,
    diffusion,
    export,
    folder,
    import_,
    leaves,
    saved,
    small,
)
from tests.support.trees import assert_bitwise_equal

SD1 = dict(
    block_out_channels=[320, 640, 1280, 1280],
    down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    layers_per_block=2,
    attention_head_dim=8,
    cross_attention_dim=768,
)
SD2 = SD1 | dict(
    attention_head_dim=[5, 10, 20, 20], cross_attention_dim=1024, use_linear_projection=True
)
VAE = dict(
    block_out_channels=[128, 256, 512, 512],
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
    layers_per_block=2,
)
SMALL = dict(
    block_out_channels=[16, 24, 8],
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    layers_per_block=[1, 2, 1],
    attention_head_dim=[2, 3, 4],
    transformer_layers_per_block=[1, 2, 1],
    cross_attention_dim=12,
    norm_num_groups=4,
    in_channels=5,
    out_channels=3,
)
SMALL_VAE = VAE | dict(
    block_out_channels=[8, 12],
    down_block_types=["DownEncoderBlock2D"] * 2,
    up_block_types=["UpDecoderBlock2D"] * 2,
    norm_num_groups=4,
    latent_channels=2,
)


@pytest.fixture(scope="module")
def released_vae():
    """(config, abstract parameters) of the autoencoder that all releases share."""
    model_config = family.vae_config(VAE)
    return model_config, module.abstract(Vae, model_config)


@pytest.mark.parametrize(
    ("config", "count"), [(SD1, 859_520_964), (SD2, 865_910_724)], ids=["sd1", "sd2"]
)
def test_releases_have_their_published_sizes(released_vae, config, count):
    """Parameters as published; 686 tensors in the U-Net, 248 in the autoencoder."""
    unet = family.unet_config(config)
    vae, vae_params = released_vae
    params = {"unet": module.abstract(UNet, unet), "vae": vae_params}
    sizes = jax.tree.map(lambda leaf: leaf.size, params)
    assert sum(jax.tree.leaves(sizes["unet"])) == count
    assert sum(jax.tree.leaves(sizes["vae"])) == 83_653_863
    names = convert.uses(family.table(unet, vae), importing=False)
    assert sum(name.startswith("unet.") for name in names) == 686
    assert sum(name.startswith("vae.") for name in names) == 248
    assert sharding.specs(params)


@pytest.mark.parametrize("linear", [False, True])
def test_export_of_import_is_the_identity(linear):
    unet = family.unet_config(SMALL | {"use_linear_projection": linear})
    vae = family.vae_config(SMALL_VAE)
    table = family.table(unet, vae)
    rng = np.random.default_rng(0)
    shapes = family.shapes(family.StableDiffusionConfig(unet, vae))
    ours = {path: rng.standard_normal(shape, np.float32) for path, shape in shapes.items()}
    theirs = dict(convert.to_theirs(table, convert.reader(tree.unflatten(ours))))
    back = dict(tree.leaves(convert.from_theirs(table, family.canonical(theirs))))
    assert back.keys() == {row.ours for row in table.rows}
    assert_bitwise_equal(back, ours)
    again = dict(convert.to_theirs(table, convert.reader(tree.unflatten(back))))
    shape = theirs["unet.mid_block.attentions.0.proj_in.weight"].shape
    assert shape == ((8, 8) if linear else (8, 8, 1, 1))
    assert_bitwise_equal(again, theirs)


def test_old_names_and_shapes_of_autoencoders():
    x = np.zeros((4, 4, 1, 1), np.float32)
    old = {
        f"vae.encoder.mid_block.attentions.0.{name}.weight": x
        for name in ("query", "key", "value", "proj_attn")
    }
    new = family.canonical(old | {"unet.conv_in.weight": x})
    want = {
        f"vae.encoder.mid_block.attentions.0.{name}.weight": (4, 4)
        for name in ("to_q", "to_k", "to_v", "to_out.0")
    }
    assert {name: tensor.shape for name, tensor in new.items()} == want | {
        "unet.conv_in.weight": x.shape
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep', which is not supported"),
        (
            {"down_block_types": ["AttnDownBlock2D"] * 3},
            "down_block_types with 'AttnDownBlock2D', which is not supported",
        ),
        ({"up_block_types": ["UpBlock2D"]}, "has 1 up_block_types and 3 block_out_channels"),
        ({"cross_attention_dim": [8, 8, 16]}, "one width for all levels"),
        ({"attention_head_dim": 5}, "5 heads at level 1, which do not divide its width 24"),
        ({"attention_head_dim": [2, 3]}, "or 3 of them, one per level"),
        ({"norm_num_groups": 16}, "16 norm groups, which do not divide its width 24"),
        ({"block_out_channels": None}, "lacks block_out_channels"),
        ({"mid_block_type": None}, "mid_block_type=None, which is not supported"),
    ],
)
def test_unsupported_unet_configs_are_refused(changes, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        family.unet_config(SMALL | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_quant_conv": False}, "use_quant_conv=False, which is not supported"),
        ({"out_channels": 4}, "must be the same"),
        ({"up_block_types": ["UpBlock2D"] * 2}, "up_block_types with 'UpBlock2D'"),
    ],
)
def test_unsupported_autoencoder_configs_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        family.vae_config(SMALL_VAE | changes)


# Folders

DECODER = ("--config=configs/decoder.py:debug", "--config.model.decoder.image=16")


def overrides(unet=UNET1, **changes):
    """Flags of configs/decoder.py for a model that fits the small folders."""
    parts = {
        "unet": asdict(family.unet_config(unet)) | changes,
        "vae": asdict(family.vae_config(foreign.VAE)),
    }
    flags = list(DECODER)
    for tower, part in parts.items():
        flags += [f"--config.model.decoder.{tower}.{name}={part[name]}" for name in part]
    return flags


V = PNDM | {"prediction_type": "v_prediction"}


@pytest.mark.parametrize(
    ("unet", "schedule", "dtype", "layout"),
    [(UNET1, PNDM, np.float32, {"shard": 9000}), (UNET2, V, np.float16, {"fp16": True})],
    ids=["sd1-shards", "sd2-v-fp16"],
)
def test_export_of_import_of_a_folder_is_the_identity(tmp_path, unet, schedule, dtype, layout):
    arrays = diffusion(tmp_path / "theirs", unet, dtype, schedule=schedule, **layout)
    import_(tmp_path / "ours", "--family=stable-diffusion", tmp_path / "theirs")
    export("stable-diffusion", tmp_path / "ours", tmp_path / "back")
    back = files.read_components(str(tmp_path / "back"), ("unet", "vae"))
    assert_bitwise_equal(back.tensors, arrays)
    theirs = files.read_components(str(tmp_path / "theirs"), ("unet", "vae"))
    assert family.infer_config({}, back.config) == family.infer_config({}, theirs.config)
    assert family.default_config({}, back.config) == {"decoder.image": 16}
    written = (tmp_path / "back").rglob("*.*")
    assert {str(path.relative_to(tmp_path / "back")) for path in written} == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }


@pytest.mark.parametrize(
    "schedule",
    [
        PNDM,
        V,
        V | {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True},
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000},
    ],
    ids=["epsilon", "v", "zero-snr", "flow"],
)
@pytest.mark.parametrize(
    "unet",
    [UNET1, UNET2, SMALL, SD1, SD2 | {"sample_size": 96, "time_embedding_dim": 777}],
    ids=range(5),
)
def test_written_configs_infer_the_same_model(unet, schedule):
    theirs = {"unet": unet, "vae": VAE, "scheduler": schedule}
    diffusion = dict(beta_start=0.1, beta_end=0.2, zero_snr=False, min_snr=0.0)
    fields = family.schedule(schedule)
    diffusion |= {name: value for name, value in fields.items() if value is not None}
    ours = {
        "decoder": {
            "image": 64,
            "unet": asdict(family.unet_config(unet)),
            "vae": asdict(family.vae_config(VAE)),
            "diffusion": diffusion,
        }
    }
    contents = json.loads(json.dumps(family.config_json(ours, 0)))
    written = {path.split("/")[0]: fields for path, fields in contents.items()}
    assert family.infer_config({}, written) == family.infer_config({}, theirs)
    assert family.default_config({}, written) == {"decoder.image": 64}


def test_pickles_and_old_names_of_a_folder_give_the_same(tmp_path):
    """Stable Diffusion 1.5 is published as .bin files with old names in the autoencoder."""
    want = diffusion(tmp_path)
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for component in ("unet", "vae"):
        path = tmp_path / component / "diffusion_pytorch_model.safetensors"
        arrays = {}
        for name, tensor in files.read([str(path)]).tensors.items():
            if component == "vae":
                for new, old in old_names.items():
                    attention = "mid_block.attentions.0"
                    name = name.replace(f"{attention}.{new}", f"{attention}.{old}")
            arrays[name] = np.asarray(tensor)
        saved(path.with_suffix(".bin"), arrays)
        path.unlink()
    foreign_files = files.read_components(str(tmp_path), ("unet", "vae"))
    assert_bitwise_equal(family.canonical(foreign_files.tensors), want)


def test_a_decoder_starts_from_stable_diffusion_and_from_an_emu(tmp_path, capsys, caplog):
    """Only the cross-attention's keys and values are fresh, and all of them are reported.

    The condition's width is not that of Stable Diffusion's text encoder.
    """
    diffusion(tmp_path / "sd")
    folder(tmp_path / "emu", small(), "emu1")
    sd = ("--family=stable-diffusion", tmp_path / "sd")
    import_(tmp_path / "from-sd", *sd, *overrides(condition=32))
    fresh = [
        f"unet/{place}/attentions/{n}/blocks/0/cross/{name}/w"
        for place, count in (("down/0", 1), ("mid", 1), ("up/0", 2))
        for n in range(count)
        for name in "kv"
    ]
    notice = "decoder.unet.condition is 12 in the files and 32 in the config"
    lines = capsys.readouterr().out.splitlines()
    (report,) = (line for line in lines if line.startswith(notice))
    assert sorted(report.split(": ")[-1].split(", ")) == fresh
    import_(tmp_path / "from-emu", "--family=emu1", tmp_path / "emu", *overrides(condition=32))

    init = f"--config.init={tmp_path / 'from-emu'},{tmp_path / 'from-sd'}"
    c = config.load([*overrides(condition=32), init])
    model_config = DecoderConfig.of(c.model.to_dict())
    rng = np.random.default_rng(1)
    shapes = module.abstract(Decoder, model_config)
    start = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes)
    program = make_program(c, start)
    held = jax.jit(partial(cast_frozen, program))(start)
    with caplog.at_level(logging.WARNING):
        params, loaded = init_from_checkpoint(c.init, held)
    reason = "because its width is 12 there and 32 here"
    assert f"8 projections of the condition stay fresh, {reason}: {', '.join(fresh)}" in caplog.text
    got = dict(tree.leaves(params))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, held)
    assert set(loaded) == set(got) - set(fresh)
    theirs = leaves(tmp_path / "from-emu") | leaves(tmp_path / "from-sd")
    initial = dict(tree.leaves(start))
    start_of = theirs | {path: initial[path] for path in fresh}
    want = {path: np.asarray(start_of[path]).astype(leaf.dtype) for path, leaf in got.items()}
    chex.assert_trees_all_equal(got, want)


def error_of(capsys, *arguments):
    """The one line of error of an import that fails."""
    assert main(["import", *map(str, arguments)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "\n" not in error
    return error


def test_faults_of_a_folder_are_one_line(tmp_path, capsys):
    sd = tmp_path / "sd"
    to = f"--to={tmp_path / 'ours'}"
    diffusion(sd)
    folder(tmp_path / "llama", small(), "llama")

    def says(source, *arguments):
        return error_of(capsys, "--family=stable-diffusion", source, to, *arguments)

    assert "it looks like stable-diffusion: --family=stable-diffusion" in error_of(
        capsys, "--family=llama", sd, to
    )
    expected = "a diffusers folder with unet and vae in it"
    assert f"{expected}; it looks like llama: --family=llama" in says(tmp_path / "llama")
    assert f"{expected}; it looks like none" in says(sd / "unet")
    assert "no file or folder" in says(tmp_path / "nothing")
    assert "takes one folder" in error_of(capsys, "--family=stable-diffusion", sd, sd, to)
    flag = "'--config.model.decoder.unet.heads=(2, 2)'"
    heads = f"decoder.unet.heads is (2, 2), not (4, 4) ({flag}"
    assert heads in says(sd, *overrides(heads=(4, 4)))
    assert "the config has no model.decoder" in says(sd, "--config=configs/pretrain.py:debug")
    path = sd / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(PNDM | {"prediction_type": "v_prediction"}))
    assert "decoder.diffusion.target is 'v', not 'epsilon'" in says(sd, *overrides())
    for change, message in (
        ({"beta_schedule": "linear"}, "beta_schedule='linear', which is not supported"),
        ({"prediction_type": "sample"}, "prediction_type='sample', which is not supported"),
        (
            {"rescale_betas_zero_snr": True},
            "the scheduler's config: diffusion.zero_snr=True leaves nothing",
        ),
    ):
        path.write_text(json.dumps(PNDM | change))
        assert message in says(sd)
    path.write_text(json.dumps(PNDM))
    unet = sd / "unet/config.json"
    for change, message in (
        ({"act_fn": "gelu"}, "act_fn='gelu', which is not supported"),
        ({"block_out_channels": "wide"}, "sd: "),
        ({"num_class_embeds": 7}, "num_class_embeds=7, which is not supported"),
    ):
        unet.write_text(json.dumps(UNET1 | change))
        assert message in says(sd)
    unet.unlink()
    assert "the U-Net's config lacks block_out_channels" in says(sd)
    unet.write_text(json.dumps(UNET1))
    weights = sd / "vae/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    assert "truncated or damaged" in says(sd)
    weights.rename(sd / "elsewhere")
    assert "vae holds no .safetensors" in says(sd)
    (sd / "vae").rename(sd / "autoencoder")
    assert "has no folder vae; stable-diffusion needs unet and vae" in says(sd)
    assert not (tmp_path / "ours").exists()


def test_tensors_of_another_size_are_listed(tmp_path, capsys):
    diffusion(tmp_path / "sd")
    path = tmp_path / "sd/unet/config.json"
    path.write_text(json.dumps(UNET1 | {"layers_per_block": 2}))
    to = f"--to={tmp_path / 'ours'}"
    assert main(["import", "--family=stable-diffusion", str(tmp_path / "sd"), to]) == 2
    *lines, error = capsys.readouterr().err.strip().splitlines()
    first = "missing     unet.down_blocks.0.resnets.1.conv1.weight [16, 16, 3, 3]"
    assert any(first in line for line in lines)
    assert "missing" in error
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        ({}, "has no image decoder; configs/decoder.py"),
        ({"decoder": {"vae": {}}}, "works on pixels, without an autoencoder"),
        ({"decoder": {"vae": {"latent": 4}, "unet": {"patch": 2}}}, "works on patches of 2"),
    ],
)
def test_other_image_decoders_are_refused(decoder, message):
    with pytest.raises(UserError, match=message):
        family.make_config(decoder)
