"""The decoder stage through its commands: precomputed arrays, resume, and one-line errors."""

import dataclasses
import json
import re
import shutil
from functools import partial

import jax
import numpy as np
import pytest
from PIL import Image

from emu_jax import checkpoint, config, sharding, train, tree
from emu_jax.checkpoint import CheckpointManager
from emu_jax.checks import check_precomputed
from emu_jax.config import UserError
from emu_jax.data import tokenizer
from emu_jax.data.loader import Loader
from emu_jax.data.precomputed import metadata_path, read_metadata
from emu_jax.generate import __main__ as generate
from emu_jax.generate import precompute
from emu_jax.stages import STAGES
from tests.support import fixtures, make
from tests.support.runs import assert_same_run, lines, mesh_of_one_device, run

CONFIG = f"""
from configs.decoder import get_config as paper

def get_config():
    c = paper("debug")
    c.model.decoder.update(dict(image=8, condition="generated"))
    c.model.decoder.vae = {make.VAE}
    c.model.decoder.unet.update(dict(
        channels_in=4, channels_out=4, patch=2, widths=(8,), resnets=(1,),
        attends_down=(True,), attends_up=(False,), depths=(1,), heads=(2,), time=16, groups=4,
        remat="none"))
    for tower in (c.model.vision, c.model.resampler, c.model.llama):
        tower.remat = "none"
    c.optim.update(dict(steps=4, warmup=0.25, boundaries=((2, 0.5),), ema=0.9))
    c.objective.encoded_share = 0.5
    c.data.update(dict(batch=8, tokens=32, num_streams=4, pack_lookahead=2, workers=2))
    c.checkpoint.every, c.eval.every = 2, 4
    c.eval.batches, c.log.pictures_every = 1, 3
    c.drawing.update(dict(sampler="ddim", steps=2))
    return c
"""


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Use one device, because eight fake devices are slow.

    tests/models/test_decoder.py and tests/test_train.py test meshes.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", mesh_of_one_device)
        patch.setattr(precompute, "inference_mesh", lambda *_: None)
        patch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with data, an Emu, an autoencoder, and the config of their decoder.

    The weights are random.
    """
    folder = tmp_path_factory.mktemp("decoder")
    fixtures.write_tiny(folder)
    (folder / "small.py").write_text(CONFIG)
    c = make.cfg(f"data.tokenizer={folder}/tokenizer.json")
    for name, params in (
        ("emu", make.random_params(make.program(c))),
        ("sd", {"vae": make.random_params(make.program(make.decoder_cfg(vae=True)))["vae"]}),
    ):
        state = dataclasses.make_dataclass("State", ("trainable", "frozen", "ema", "step"))(
            params, {}, None, jax.numpy.int32(7)
        )
        CheckpointManager(str(folder / name), keep=1, keep_every=0).save(
            7, state, {}, config.to_dict(c), wait=True
        )
    return folder


def flags(folder, *overrides):
    rows = {
        split: tuple(row for row in fixtures.mixture(folder, split) if row[0] != "stories")
        for split in ("train", "held_out")
    }
    own = (
        f"init={folder}/emu,{folder}/sd",
        f"data.tokenizer={folder}/tokenizer.json",
        f"data.mixture={rows['train']!r}",
        f"data.eval_mixture={rows['held_out']!r}",
    )
    return [
        f"--config={folder}/small.py",
        *(f"--config.{override}" for override in (*own, *overrides)),
    ]


@pytest.fixture(scope="module")
def made(folder):
    """made(workdir, *overrides) gives the flags of a run with precomputed inputs.

    One host has computed the conditions, and two hosts the latents.
    """
    assert generate.main(["precompute", *flags(folder), f"--to={folder}/conditions"]) == 0
    for host in "01":
        assert (
            generate.main(
                [
                    "precompute",
                    "--latents",
                    *flags(folder),
                    f"--to={folder}/latents",
                    "--batch=5",
                    "--hosts=2",
                    f"--host={host}",
                ]
            )
            == 0
        )
    return lambda workdir, *overrides: flags(
        folder,
        f"workdir={workdir}",
        f"data.conditions={folder}/conditions",
        f"data.latents={folder}/latents",
        *overrides,
    )


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    """The workdir of an undisturbed run."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    code, out = run(made(workdir))
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == [
        "ln_visual",
        "resampler",
        "unet",
        "vae",
        "vision",
        "total",
    ]
    return workdir


def test_metrics_checkpoints_and_pictures_of_a_run(whole):
    told = [line for line in lines(whole) if "diffusion_loss" in line]
    assert [line["step"] for line in told] == [1, 2, 3, 4] and [
        line["step"] for line in lines(whole) if "eval/diffusion_loss" in line
    ] == [4]
    assert {"condition_variance", "grad_norm/condition", "grad_norm/unet"} < told[
        0
    ].keys() and "flops_per_second/unet" in told[1]
    # The latents are precomputed, so the autoencoder does not run.
    assert "flops_per_second/vae" not in told[1]
    # The picture shows eight rows of an image and its drawing, each 8 pixels wide.
    with Image.open(whole / "pictures/3.png") as drawn:
        assert drawn.size == (16, 64)
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["2", "4"]


def test_frozen_towers_stay_as_they_were_loaded(folder, whole):
    emu, sd, after = (
        dict(tree.leaves(checkpoint.restore_params(str(path))))
        for path in (folder / "emu", folder / "sd", whole)
    )
    before = emu | sd
    frozen = [path for path in after if not path.startswith("unet/")]
    assert len(frozen) > 10
    # Frozen matrices are held in bfloat16.
    for path in frozen:
        np.testing.assert_array_equal(
            after[path], before[path].astype(after[path].dtype), err_msg=path
        )
    averaged = checkpoint.restore_params(str(whole), ema=True)
    assert np.abs(averaged["unet"]["conv_in"]["w"] - after["unet/conv_in/w"]).max() > 0


@pytest.fixture
def copy(whole, tmp_path):
    """The same run, cut off after its first checkpoint."""
    workdir = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints/4")
    return workdir


def test_resume_is_bit_exact(made, whole, copy):
    assert run(made(copy))[0] == 0
    assert_same_run(copy, whole)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["model.decoder.image=9"],
            "model.decoder.image=9 must be divisible by 4 (2 pixels a latent, 2 in the U-Net)",
        ),
        (
            ["model.decoder.unet.condition=16"],
            "model.decoder.unet.condition=16: the model's visual tokens have the width 32",
        ),
        (["model.resampler.tokens=3"], "are visual tokens [4, 32], and the model's are [3, 32]"),
        (
            ["model.decoder.condition=encoded"],
            "only model.decoder.condition='generated' reads them",
        ),
        (
            ["data.conditions="],
            "needs data.conditions=DIR, made by: python -m emu_jax.generate precompute",
        ),
        (["data.conditions=nowhere"], "no conditions in 'nowhere'"),
        (["data.images=2"], "set data.images=1"),
        (["drawing.sampler=dim"], "unknown sampler 'dim'"),
        (["model.decoder.diffusion.target=noise"], "is not one of epsilon, v, flow, x0"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(made, overrides, told, tmp_path, capsys):
    assert train.main(made(tmp_path / "run", *overrides)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and told in error
    assert not list(tmp_path.iterdir())


# test_train.py tests a full disk in a shorter test.
@pytest.mark.long
def test_a_full_disk_is_one_line_and_earlier_checkpoints_survive(made, copy, capsys, small_disk):
    assert train.main(made(copy)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "checkpoints/4 could not be saved: " in error
    small_disk()
    assert [path.name for path in (copy / "checkpoints").iterdir() if path.name.isdigit()] == ["2"]


def test_conditions_on_a_full_disk_are_one_line_without_partial_files(
    folder, tmp_path, capsys, monkeypatch
):
    def full(file, visual):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(precompute.np, "save", full)
    assert generate.main(["precompute", *flags(folder), f"--to={tmp_path}/conditions"]) == 2
    error = capsys.readouterr().err
    shard = tmp_path / "conditions/mixture/names/00000.npy"
    assert error.splitlines()[-1] == f"error: cannot write {shard}: No space left on device"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["conditions.json"]
    assert json.loads((tmp_path / "conditions/conditions.json").read_text())["shape"] == [4, 32]


# Latents


def test_latents_give_the_loss_of_their_images_up_to_rounding(made, whole):
    c = config.load(made("", "objective.encoded_share=0.0"))
    program = make.program(c)
    params = checkpoint.restore_params(str(whole))
    loader = Loader(
        c.data,
        0,
        tokenizer.load(c.data.tokenizer, c.model.llama.vocab),
        c.model.resampler.tokens,
        program.stage.image_side(program.model_config),
    )
    batch = next(iter(loader)).batch
    loader.close()
    loss = partial(
        jax.jit(
            lambda params, batch: program.stage.loss(
                program.bind(params),
                batch,
                jax.random.key(0),
                program.stage.loss_weights(batch),
                program.objective,
            )[0]
        ),
        params,
    )
    assert batch.latents.dtype == np.float16 and loss(batch) == pytest.approx(
        float(loss(batch.replace(latents=None))), rel=1e-3
    )
    assert (
        loss(batch)
        == loss(batch.replace(images=np.zeros_like(batch.images)))
        != loss(batch.replace(latents=0 * batch.latents))
    )


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["model.decoder.image=16"],
            "than this config's: image 8, not 16; shape [4, 4, 8], not [8, 8, 8]",
        ),
        (
            [
                "model.decoder.vae.latent=2",
                "model.decoder.unet.channels_in=2",
                "model.decoder.unet.channels_out=2",
            ],
            "shape [4, 4, 8], not [4, 4, 4]",
        ),
        (["data.fit=centre"], "fit squash, not centre"),
        (["data.fit=random"], "set data.fit to squash or centre"),
        (
            ["data.latents=nowhere"],
            "no latents in 'nowhere'; make them with: "
            "python -m emu_jax.generate precompute --latents",
        ),
        (["stage=emu"], "stage='emu' has none"),
    ],
)
def test_latents_of_other_images_are_one_line(made, overrides, told):
    with pytest.raises(UserError, match=re.escape(told)):
        check_precomputed(config.load(made("", *overrides)), STAGES["decoder"])


@pytest.mark.parametrize(("kind", "directory"), [("conditions", "emu"), ("latents", "sd")])
def test_arrays_of_different_weights_are_refused(folder, made, tmp_path, kind, directory):
    """After the weights were trained again, arrays of the old weights may still be there."""
    precompute.check_weights(config.load(made("")), kind)
    told = read_metadata(folder / kind, kind)
    metadata_path(tmp_path, kind).write_text(json.dumps(told | {"weights": told["weights"] ^ 1}))
    with pytest.raises(
        UserError,
        match=f"were computed by weights .* that are not those of init, {folder}/{directory}; "
        "compute them again",
    ):
        precompute.check_weights(config.load(made("", f"data.{kind}={tmp_path}")), kind)


def test_a_decoder_of_pixels_has_no_latents(made):
    c = config.load(made(""))
    with c.unlocked():
        c.model.decoder.vae = {}
        c.model.decoder.unet.update(channels_in=3, channels_out=3)
    with pytest.raises(UserError, match="model.decoder.vae is empty, and the U-Net draws pixels"):
        check_precomputed(c, STAGES["decoder"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--config.stage=emu"], "only a decoder with an autoencoder has latents"),
        (["--config.data.fit=random"], "data.fit='random': latents are computed once"),
        (["--config.init={folder}/emu"], "emu' names no checkpoint with an autoencoder"),
        (["--batch=0"], "--batch=0 must be at least 1"),
        (
            ["--to={folder}/conditions"],
            "contains conditions of a different model or different data",
        ),
        (
            ["--to={folder}/latents", "--config.data.fit=centre"],
            "contains latents of a different model or different data",
        ),
    ],
)
def test_bad_arguments_of_precompute_are_one_line(folder, made, arguments, told, tmp_path, capsys):
    given = [argument.format(folder=folder) for argument in arguments]
    assert (
        generate.main(["precompute", "--latents", *flags(folder), f"--to={tmp_path}", *given]) == 2
    )
    error = capsys.readouterr().err
    assert (
        error.splitlines()[-1].startswith("error: ")
        and told in error
        and not list(tmp_path.iterdir())
    )
