"""The decoder stage through its commands: conditions made once, a run that goes on where it was cut off, and what is wrong in one line."""
import dataclasses
import json
import re
import shutil
from functools import partial

import jax
import make
import numpy as np
import pytest
from PIL import Image
from test_checkpoint import small_disk  # noqa: F401
from test_train import assert_same_run, lines, run

from emu_jax import checkpoint, config, sharding, train, tree
from emu_jax.checkpoint import Checkpoints
from emu_jax.config import UserError
from emu_jax.generate import __main__ as generate
from emu_jax.generate import precompute
from tests.data import fixtures

pytestmark = pytest.mark.xdist_group("decoder_stage")  # one process: what its tests share is made once

CONFIG = """
from configs.decoder import get_config as paper

def get_config():
    c = paper("debug")
    c.model.decoder.update(dict(image=8, condition="generated"))
    c.model.decoder.vae = {}
    c.model.decoder.unet.update(dict(
        channels_in=3, channels_out=3, patch=2, widths=(8,), resnets=(1,), attends_down=(True,), attends_up=(False,), depths=(1,), heads=(2,),
        time=16, groups=4, remat="none"))
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

LATENT = CONFIG.replace("vae = {}", f"vae = {make.VAE}").replace("channels_in=3, channels_out=3", "channels_in=4, channels_out=4")


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Eight fake ones are slow, and the laws of meshes are held elsewhere (models/test_decoder.py, test_train.py)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", partial(sharding.make_mesh, devices=jax.devices()[:1]))
        patch.setattr(precompute, "mesh_of", lambda *_: None)
        patch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with data, an Emu and an autoencoder of random weights, and the configs of its decoders of pixels and of latents."""
    folder = tmp_path_factory.mktemp("decoder")
    fixtures.write_tiny(folder)
    (folder / "small.py").write_text(CONFIG)
    (folder / "latent.py").write_text(LATENT)
    c = make.cfg(f"data.tokenizer={folder}/tokenizer.json")
    for name, params in (("emu", make.random_params(make.program(c))),
                         ("sd", {"vae": make.random_params(make.program(make.decoder_cfg(vae=True)))["vae"]})):
        state = dataclasses.make_dataclass("State", ("trainable", "frozen", "ema", "step"))(params, {}, None, jax.numpy.int32(7))
        Checkpoints(str(folder / name), keep=1, keep_every=0).save(7, state, {}, config.to_dict(c), wait=True)
    return folder


def flags(folder, *overrides, file="small"):
    rows = {split: tuple(row for row in fixtures.mixture(folder, split) if row[0] != "stories") for split in ("train", "held_out")}
    own = (f"init={folder}/emu", f"data.tokenizer={folder}/tokenizer.json", f"data.mixture={rows['train']!r}",
           f"data.eval_mixture={rows['held_out']!r}")
    return [f"--config={folder}/{file}.py", *(f"--config.{override}" for override in (*own, *overrides))]


@pytest.fixture(scope="module")
def made(folder):
    """The flags of a run, its conditions made."""
    assert generate.main(["precompute", *flags(folder), f"--to={folder}/conditions"]) == 0
    return lambda workdir, *overrides: flags(folder, f"workdir={workdir}", f"data.conditions={folder}/conditions", *overrides)


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    """The workdir of an undisturbed run."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    code, out = run(made(workdir))
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == ["ln_visual", "resampler", "unet", "vision", "total"]
    return workdir


def test_a_run_tells_its_loss_saves_and_draws(whole):
    told = [line for line in lines(whole) if "diffusion_loss" in line]
    assert [line["step"] for line in told] == [1, 2, 3, 4] and [line["step"] for line in lines(whole) if "eval/diffusion_loss" in line] == [4]
    assert {"condition_variance", "grad_norm/condition", "grad_norm/unet"} < told[0].keys() and "flops_per_second/unet" in told[1]
    with Image.open(whole / "pictures/3.png") as drawn:     # the image and its drawing, each 8 wide, for eight rows
        assert drawn.size == (16, 64)
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["2", "4"]


def test_frozen_towers_come_out_as_they_went_in(folder, whole):
    before, after = (dict(tree.leaves(checkpoint.restore_params(str(path)))) for path in (folder / "emu", whole))
    frozen = [path for path in after if not path.startswith("unet/")]
    assert len(frozen) > 10
    for path in frozen:         # matrices are held in bfloat16
        np.testing.assert_array_equal(after[path], before[path].astype(after[path].dtype), err_msg=path)
    averaged = checkpoint.restore_params(str(whole), ema=True)
    assert np.abs(averaged["unet"]["conv_in"]["w"] - after["unet/conv_in/w"]).max() > 0


@pytest.fixture
def copy(whole, tmp_path):
    """The same run, cut off after its first checkpoint."""
    workdir = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints/4")
    return workdir


def test_two_steps_a_cut_and_two_more_are_four(made, whole, copy):
    assert run(made(copy))[0] == 0
    assert_same_run(copy, whole)


@pytest.mark.parametrize(("overrides", "told"), [
    (["model.decoder.image=9"], "model.decoder.image=9 must be divisible by 2 (2 in the U-Net)"),
    (["model.decoder.unet.condition=16"], "model.decoder.unet.condition=16: the model's visual tokens have the width 32"),
    (["model.resampler.tokens=3"], "are visual tokens [4, 32], and the model's are [3, 32]"),
    (["model.decoder.condition=encoded"], "nothing draws from them but model.decoder.condition='generated'"),
    (["data.conditions="], "needs data.conditions=DIR, made by: python -m emu_jax.generate precompute"),
    (["data.conditions=nowhere"], "no conditions in 'nowhere'"),
    (["data.images=2"], "set data.images=1"),
    (["data.latents=anywhere"], "model.decoder.vae is empty, and the U-Net draws pixels"),
    (["drawing.sampler=dim"], "no sampler 'dim'"),
    (["model.decoder.diffusion.target=noise"], "is not one of epsilon, v, flow, x0")])
def test_bad_input_is_one_line_and_leaves_nothing(made, overrides, told, tmp_path, capsys):
    assert train.main(made(tmp_path / "run", *overrides)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and told in error
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line_and_earlier_checkpoints_survive(made, copy, capsys, small_disk):  # noqa: F811
    assert train.main(made(copy)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "checkpoints/4 could not be saved: " in error
    small_disk()
    assert [path.name for path in (copy / "checkpoints").iterdir() if path.name.isdigit()] == ["2"]


def test_conditions_on_a_full_disk_are_one_line_and_nothing_half_written(folder, tmp_path, capsys, monkeypatch):
    def full(file, visual):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(precompute.np, "save", full)
    assert generate.main(["precompute", *flags(folder), f"--to={tmp_path}/conditions"]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1] == f"error: cannot write {tmp_path}/conditions/mixture/names/00000.npy: No space left on device"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["conditions.json"]
    assert json.loads((tmp_path / "conditions/conditions.json").read_text())["shape"] == [4, 32]


# Latents

@pytest.fixture(scope="module")
def encoded(folder, made):
    """The flags of a run on latents that two hosts made, and on conditions."""
    arguments = ["precompute", "--latents", "--batch=5", *flags(folder, f"init={folder}/sd", file="latent"), f"--to={folder}/latents"]
    for host in "01":
        assert generate.main([*arguments, "--hosts=2", f"--host={host}"]) == 0
    return lambda workdir, *overrides: flags(
        folder, f"workdir={workdir}", f"init={folder}/emu,{folder}/sd", f"data.conditions={folder}/conditions", f"data.latents={folder}/latents",
        *overrides, file="latent")


def test_a_run_on_latents_is_the_run_on_images_but_for_rounding(folder, encoded, tmp_path, capsys):
    assert generate.main(["precompute", "--latents", *flags(folder, f"init={folder}/sd", file="latent"), f"--to={folder}/latents"]) == 0
    assert f"0 shards made, 4 were there; train with --config.data.latents={folder}/latents\n" in capsys.readouterr().out
    short = ("optim.steps=2", "data.eval_mixture=()", "log.pictures_every=0", "objective.encoded_share=0.0")
    for name, latents in (("latents", f"{folder}/latents"), ("images", "")):
        assert run(encoded(tmp_path / name, f"data.latents={latents}", *short))[0] == 0
    (first, second), (like, then) = lines(tmp_path / "latents"), lines(tmp_path / "images")
    assert first["diffusion_loss"] == pytest.approx(like["diffusion_loss"], rel=1e-3)
    assert second["diffusion_loss"] == pytest.approx(then["diffusion_loss"], rel=1e-2)      # Adam's first step is the gradient's sign
    assert "flops_per_second/vae" in then and "flops_per_second/vae" not in second


@pytest.mark.parametrize(("overrides", "told"), [
    (["model.decoder.image=16"], "than this config's: image 8, not 16; shape [4, 4, 8], not [8, 8, 8]"),
    (["model.decoder.vae.latent=2", "model.decoder.unet.channels_in=2", "model.decoder.unet.channels_out=2"], "shape [4, 4, 8], not [4, 4, 4]"),
    (["data.fit=centre"], "fit squash, not centre"), (["data.fit=random"], "set data.fit to squash or centre"),
    (["data.latents=nowhere"], "no latents in 'nowhere'; they are made by: python -m emu_jax.generate precompute --latents"),
    (["stage=emu"], "stage='emu' has none")])
def test_latents_of_other_images_are_one_line(encoded, overrides, told):
    with pytest.raises(UserError, match=re.escape(told)):
        train.check_precomputed(config.load(encoded("", *overrides)), {"unet": {}})


@pytest.mark.parametrize(("file", "arguments", "told"), [
    ("small", ["--to={to}"], "only a decoder with an autoencoder has latents"),
    ("latent", ["--to={to}", "--config.data.fit=random"], "data.fit='random': latents are made once"),
    ("latent", ["--to={to}"], "emu' names no checkpoint with an autoencoder"),
    ("latent", ["--to={to}", "--config.init={folder}/sd", "--batch=0"], "--batch=0 must be at least 1"),
    ("latent", ["--to={to}/conditions", "--config.init={folder}/sd"], "holds conditions of another model or other data")])
def test_latents_that_cannot_be_made_are_one_line(folder, file, arguments, told, tmp_path, capsys):
    (tmp_path / "conditions").mkdir()
    (tmp_path / "conditions/conditions.json").write_text("{}")
    given = [argument.format(to=tmp_path, folder=folder) for argument in arguments]
    assert generate.main(["precompute", "--latents", *flags(folder, file=file), *given]) == 2
    assert told in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["conditions.json"]
