"""Stable Diffusion's folders and tables: every leaf and tensor once, in and out bit for bit; a
decoder that starts from one; what is not built.
"""

import json
import logging
from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emu_jax import checkpoint, config, sharding, tree
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
from tests.support.foreign import PNDM, UNET1, UNET2, diffusion, folder, saved, small

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


def shapes(unet, vae):
    def of(tower, model_config):
        return module.abstract(tower, model_config)

    return {"unet": of(UNet, unet), "vae": of(Vae, vae)}


@pytest.mark.parametrize(
    ("config", "count"), [(SD1, 859_520_964), (SD2, 865_910_724)], ids=["sd1", "sd2"]
)
def test_the_releases_sizes(config, count):
    """Parameters as published; 686 tensors in the U-Net, 248 in the autoencoder."""
    unet = family.unet_config(config)
    vae = family.vae_config(VAE)
    params = shapes(unet, vae)
    size = {
        tower: sum(leaf.size for leaf in jax.tree.leaves(part)) for tower, part in params.items()
    }
    assert size == {"unet": count, "vae": 83_653_863}
    names = convert.uses(family.table(unet, vae), importing=False)
    assert (
        sum(name.startswith("unet.") for name in names) == 686
        and sum(name.startswith("vae.") for name in names) == 248
    )
    assert sharding.specs(params)


@pytest.mark.parametrize("linear", [False, True])
def test_export_of_import_is_the_identity(linear):
    unet = family.unet_config(SMALL | {"use_linear_projection": linear})
    vae = family.vae_config(SMALL_VAE)
    table = family.table(unet, vae)
    rng = np.random.default_rng(0)
    ours = {
        path: rng.standard_normal(leaf.shape, np.float32)
        for path, leaf in tree.leaves(shapes(unet, vae))
    }
    theirs = dict(convert.to_theirs(table, convert.reader(tree.unflatten(ours))))
    back = dict(tree.leaves(convert.from_theirs(table, family.canonical(theirs))))
    assert back.keys() == ours.keys() == {row.ours for row in table.rows}
    for path, leaf in ours.items():
        np.testing.assert_array_equal(back[path], leaf, err_msg=path)
    again = dict(convert.to_theirs(table, convert.reader(tree.unflatten(back))))
    assert theirs["unet.mid_block.attentions.0.proj_in.weight"].shape == (
        (8, 8) if linear else (8, 8, 1, 1)
    )
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(again[name], tensor, err_msg=name)


def test_old_autoencoders_names_and_shapes():
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
        ({"attention_head_dim": [2, 3]}, "or 3 of them, one a level"),
        ({"norm_num_groups": 16}, "16 norm groups, which do not divide its width 24"),
        ({"block_out_channels": None}, "lacks block_out_channels"),
        ({"mid_block_type": None}, "mid_block_type=None, which is not supported"),
    ],
)
def test_what_a_unet_config_asks_in_vain(changes, message):
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
def test_what_an_autoencoder_config_asks_in_vain(changes, message):
    with pytest.raises(UserError, match=message):
        family.vae_config(SMALL_VAE | changes)


# Folders

DECODER = ("--config=configs/decoder.py:debug", "--config.model.decoder.image=16")


def import_(source, to, *arguments):
    return main(["import", "--family=stable-diffusion", str(source), f"--to={to}", *arguments])


def overrides(unet=UNET1, **changes):
    """Of configs/decoder.py, for a model that fits the small folders."""
    parts = {
        "unet": asdict(family.unet_config(unet)) | changes,
        "vae": asdict(family.vae_config(foreign.VAE)),
    }
    return [
        *DECODER,
        *(
            f"--config.model.decoder.{tower}.{name}={value}"
            for tower, part in parts.items()
            for name, value in part.items()
        ),
    ]


def same(got, want):
    assert set(got) == set(want)
    for name, array in want.items():
        mine = np.asarray(got[name])
        assert (mine.dtype, mine.shape) == (
            array.dtype,
            array.shape,
        ) and mine.tobytes() == array.tobytes(), name


V = PNDM | {"prediction_type": "v_prediction"}


@pytest.mark.parametrize(
    ("unet", "schedule", "dtype", "layout"),
    [(UNET1, PNDM, np.float32, {"shard": 9000}), (UNET2, V, np.float16, {"fp16": True})],
    ids=["sd1-shards", "sd2-v-fp16"],
)
def test_export_of_import_of_a_folder_is_the_identity(tmp_path, unet, schedule, dtype, layout):
    arrays = diffusion(tmp_path / "theirs", unet, dtype, schedule=schedule, **layout)
    assert import_(tmp_path / "theirs", tmp_path / "ours") == 0
    assert (
        main(
            [
                "export",
                "--family=stable-diffusion",
                f"--from={tmp_path / 'ours'}",
                f"--to={tmp_path / 'back'}",
            ]
        )
        == 0
    )
    back = files.read_components(str(tmp_path / "back"), ("unet", "vae"))
    same(back.tensors, arrays)
    theirs = files.read_components(str(tmp_path / "theirs"), ("unet", "vae"))
    assert family.infer_config({}, back.config) == family.infer_config(
        {}, theirs.config
    ) and family.default_config({}, back.config) == {"decoder.image": 16}
    assert {
        str(path.relative_to(tmp_path / "back")) for path in (tmp_path / "back").rglob("*.*")
    } == {
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
def test_the_configs_that_are_written_say_what_was_read(unet, schedule):
    theirs = {"unet": unet, "vae": VAE, "scheduler": schedule}
    diffusion = dict(beta_start=0.1, beta_end=0.2, zero_snr=False, min_snr=0.0)
    diffusion |= {
        name: value for name, value in family.schedule(schedule).items() if value is not None
    }
    ours = {
        "decoder": {
            "image": 64,
            "unet": asdict(family.unet_config(unet)),
            "vae": asdict(family.vae_config(VAE)),
            "diffusion": diffusion,
        }
    }
    written = {
        path.split("/")[0]: said
        for path, said in json.loads(json.dumps(family.config_json(ours, 0))).items()
    }
    assert family.infer_config({}, written) == family.infer_config(
        {}, theirs
    ) and family.default_config({}, written) == {"decoder.image": 64}


def test_pickles_and_old_names_of_a_folder_give_the_same(tmp_path):
    """As Stable Diffusion 1.5 is still to be had: .bin files, and an autoencoder whose attention
    has its old names.
    """
    want = diffusion(tmp_path)
    for component in ("unet", "vae"):
        path = tmp_path / component / "diffusion_pytorch_model.safetensors"
        arrays = {
            name: np.asarray(tensor) for name, tensor in files.read([str(path)]).tensors.items()
        }
        for new, old in (
            ("to_q", "query"),
            ("to_k", "key"),
            ("to_v", "value"),
            ("to_out.0", "proj_attn"),
        ):
            arrays = {
                name.replace(f"mid_block.attentions.0.{new}", f"mid_block.attentions.0.{old}")
                if component == "vae"
                else name: array
                for name, array in arrays.items()
            }
        saved(path.with_suffix(".bin"), arrays)
        path.unlink()
    same(family.canonical(files.read_components(str(tmp_path), ("unet", "vae")).tensors), want)


def test_a_decoder_starts_from_it_and_from_an_emu(tmp_path, capsys, caplog):
    """Cross-attention's keys and values are fresh, for the condition has another width: said, one
    by one, and nothing else is.
    """
    diffusion(tmp_path / "sd")
    folder(tmp_path / "emu", small(), "emu1")
    assert import_(tmp_path / "sd", tmp_path / "from-sd", *overrides(condition=32)) == 0
    fresh = [
        f"unet/{place}/attentions/{n}/blocks/0/cross/{name}/w"
        for place, count in (("down/0", 1), ("mid", 1), ("up/0", 2))
        for n in range(count)
        for name in "kv"
    ]
    (said,) = (
        line
        for line in capsys.readouterr().out.splitlines()
        if "decoder.unet.condition is 12 in the files and 32 in the config" in line
    )
    assert sorted(said.split(": ")[-1].split(", ")) == fresh
    assert (
        main(
            [
                "import",
                "--family=emu1",
                str(tmp_path / "emu"),
                f"--to={tmp_path / 'from-emu'}",
                *overrides(condition=32),
            ]
        )
        == 0
    )

    c = config.load(
        [*overrides(condition=32), f"--config.init={tmp_path / 'from-emu'},{tmp_path / 'from-sd'}"]
    )
    model_config = DecoderConfig.of(c.model.to_dict())
    rng = np.random.default_rng(1)
    shapes = module.abstract(Decoder, model_config)
    start = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)), shapes)
    program = make_program(c, start)
    with caplog.at_level(logging.WARNING):
        params, loaded = init_from_checkpoint(c.init, cast_frozen(program, start))
    assert (
        f"8 maps of the condition stay fresh, because its width is 12 there and 32 here: {', '.join(fresh)}"
        in caplog.text
    )
    begun = dict(tree.leaves(start))
    got = dict(tree.leaves(params))
    held = cast_frozen(program, start)
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in got.items()} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in tree.leaves(held)
    }
    assert set(loaded) == set(got) - set(fresh)
    theirs = {
        path: leaf
        for name in ("from-emu", "from-sd")
        for path, leaf in tree.leaves(checkpoint.restore_params(str(tmp_path / name)))
    }
    for path, leaf in got.items():
        np.testing.assert_array_equal(
            leaf,
            np.asarray(begun[path] if path in fresh else theirs[path]).astype(leaf.dtype),
            err_msg=path,
        )


def error_of(capsys, *arguments):
    assert main(["import", *map(str, arguments)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    return error


def test_what_is_wrong_with_a_folder_is_one_line(tmp_path, capsys):
    sd = tmp_path / "sd"
    to = f"--to={tmp_path / 'ours'}"
    diffusion(sd)
    folder(tmp_path / "llama", small(), "llama")

    def says(source, *arguments):
        return error_of(capsys, "--family=stable-diffusion", source, to, *arguments)

    assert "it looks like stable-diffusion: --family=stable-diffusion" in error_of(
        capsys, "--family=llama", sd, to
    )
    assert (
        "a folder of diffusers' with unet and vae in it; it looks like llama: --family=llama"
        in says(tmp_path / "llama")
    )
    assert "a folder of diffusers' with unet and vae in it; it looks like none" in says(sd / "unet")
    assert "no file or folder" in says(tmp_path / "nothing")
    assert "takes one folder" in error_of(capsys, "--family=stable-diffusion", sd, sd, to)
    assert (
        "decoder.unet.heads is (2, 2), not (4, 4) ('--config.model.decoder.unet.heads=(2, 2)'"
        in says(sd, *overrides(heads=(4, 4)))
    )
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
    for config_, message in (
        ({"act_fn": "gelu"}, "act_fn='gelu', which is not supported"),
        ({"block_out_channels": "wide"}, "sd: "),
        ({"num_class_embeds": 7}, "num_class_embeds=7, which is not supported"),
    ):
        unet.write_text(json.dumps(UNET1 | config_))
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
    assert import_(tmp_path / "sd", tmp_path / "ours") == 2
    *lines, error = capsys.readouterr().err.strip().splitlines()
    assert (
        any(
            "missing     unet.down_blocks.0.resnets.1.conv1.weight [16, 16, 3, 3]" in line
            for line in lines
        )
        and "missing" in error
    )
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        ({}, "has no image decoder; configs/decoder.py"),
        ({"decoder": {"vae": {}}}, "works on pixels, without an autoencoder"),
        ({"decoder": {"vae": {"latent": 4}, "unet": {"patch": 2}}}, "works on patches of 2"),
    ],
)
def test_what_is_no_stable_diffusion(decoder, message):
    with pytest.raises(UserError, match=message):
        family.make_config(decoder)
