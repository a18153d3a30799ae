"""The image decoder, the command that saves its images, and precomputed conditions."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from emu_jax import config, sharding
from emu_jax.checkpoint import CheckpointManager
from emu_jax.config import UserError
from emu_jax.data import precomputed, tokenizer
from emu_jax.data.precomputed import Precomputed
from emu_jax.data.sequence import Document, Pair
from emu_jax.generate import __main__ as command
from emu_jax.generate import diffusion_decoder, precompute
from emu_jax.generate.session import Session
from tests.support import make

# A multiple of the eight devices of the tests.
VOCAB = 104
WORDS = ["a dog", "a cat", "red and blue", "one two three four"] * 9


def save(c, folder):
    p = make.program(c)
    state = dataclasses.make_dataclass("State", ("trainable", "frozen", "ema", "step"))(
        make.random_params(p), {}, None, jax.numpy.int32(7)
    )
    CheckpointManager(str(folder), keep=1, keep_every=0).save(
        7, state, {}, config.to_dict(c), wait=True
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with an Emu, decoders of it and of another width, and a picture."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer.train(WORDS, VOCAB, folder / "tokenizer.json")
    model = (
        f"model.llama.vocab={VOCAB}",
        f"data.tokenizer={folder}/tokenizer.json",
        "data.tokens=96",
    )
    save(make.cfg(*model), folder / "emu")
    drawing = (
        "drawing.sampler=ddim",
        "drawing.steps=2",
        "model.decoder.condition=encoded",
        "optim.ema=0.0",
    )
    save(make.decoder_cfg(*model, *drawing), folder / "decoder")
    save(
        make.decoder_cfg(
            *model, *drawing, "model.llama.width=64", "model.decoder.unet.condition=64"
        ),
        folder / "wide",
    )
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)).save(
        folder / "x.png"
    )
    (folder / "bad.png").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def session(run):
    return Session.load(str(run / "emu"))


@pytest.fixture(scope="module")
def visual():
    return np.random.default_rng(0).standard_normal((3, 4, 32)).astype(np.float32)


def call(run, *arguments):
    return command.main([f"--checkpoint={run}/emu", *map(str, arguments)])


def painter(run, session, **options):
    return diffusion_decoder.load(str(run / "decoder"), session.model_config, **options)


# The decoder


def test_an_image_is_a_function_of_its_condition_and_its_seed(run, session, visual):
    paint = painter(run, session, seed=5)
    first = paint(visual)
    again = paint(visual)
    assert (
        first.shape == (3, 8, 8, 3)
        and first.dtype == np.uint8
        and (first != again).any((1, 2, 3)).all()
    )
    alone = painter(run, session, seed=6)(visual[1:2])
    assert np.abs(alone[0].astype(int) - first[1]).max() <= 1
    assert painter(run, session)(visual[:0]).shape == (0, 8, 8, 3)


def test_images_are_the_same_on_a_mesh(run, session, visual):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4, "tensor": 1})
    spread = painter(run, session, mesh=mesh)(visual).astype(int)
    assert np.abs(spread - painter(run, session)(visual)).max() <= 1


def test_guidance_leads_away_from_the_empty_prompt_or_from_zeros(run, session, visual):
    def empty():
        return session.generate_images([[]])[0]

    away, zeros, plain = (
        painter(run, session, overrides=given, empty_prompt=empty)(visual)
        for given in ({"guidance": 3.0}, {"guidance": 3.0, "negative": "zeros"}, {"guidance": 1.0})
    )
    assert (away != zeros).any() and (away != plain).any()
    np.testing.assert_array_equal(
        painter(
            run,
            session,
            overrides={"guidance": 3.0},
            empty_prompt=lambda: np.zeros((4, 32), np.float32),
        )(visual),
        zeros,
    )


def test_images_that_the_safety_checker_rejects_are_black(run, session, visual):
    paint = painter(run, session)
    whole = paint(visual)
    paint.seed = 0
    paint.safety_checker = lambda pictures: np.array([True, False, True])
    checked = paint(visual)
    assert not checked[1].any() and (checked[[0, 2]] == whole[[0, 2]]).all() and whole[1].any()


@pytest.mark.parametrize(
    ("decoder", "given", "told"),
    [
        ("emu", {}, "of the stage 'emu', not a decoder's"),
        ("wide", {}, r"takes visual tokens \[4, 64\], but the model makes \[4, 32\]"),
        ("decoder", {"sampler": "dim"}, "unknown sampler 'dim'; choose one of ddim"),
        ("decoder", {"steps": 0}, "a sampler takes 1 to 1000 steps"),
        ("decoder", {"negative": "nothing"}, "is not one of empty, zeros"),
    ],
)
def test_unusable_decoders_are_one_line(run, session, decoder, given, told):
    with pytest.raises(UserError, match=told):
        diffusion_decoder.load(str(run / decoder), session.model_config, overrides=given)


# The command


def test_an_image_from_a_prompt(run, session, capsys, tmp_path):
    assert (
        call(
            run,
            f"--decoder={run}/decoder",
            "--image",
            "--seed=3",
            "--count=2",
            f"--out={tmp_path}/new/apple.png",
            "a red",
            "apple",
        )
        == 0
    )
    assert "apple.png]" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "apple-2.png",
        "apple.png",
    ]
    visual = session.generate_images([["a red", "apple"]])
    want = painter(run, session, seed=3, empty_prompt=lambda: session.generate_images([[]])[0])(
        visual
    )[0]
    with (
        Image.open(tmp_path / "new/apple.png") as picture,
        Image.open(tmp_path / "new/apple-2.png") as second,
    ):
        assert np.abs(np.asarray(picture).astype(int) - want).max() <= 1
        text = picture.text  # ty: ignore[missing-attribute]
        assert text == dict(
            prompt="a red apple",
            seed="3",
            sampler="ddim",
            steps="2",
            guidance="7.5",
            rescale="0.0",
            software="emu_jax",
            checkpoint=f"{run}/emu",
            decoder=f"{run}/decoder",
        )
        text = second.text  # ty: ignore[missing-attribute]
        assert text["seed"] == "4" and (np.asarray(second) != np.asarray(picture)).any()


def test_blends_and_reconstructions(run, capsys, tmp_path):
    assert (
        call(
            run,
            f"--decoder={run}/decoder",
            "--image",
            f"--out={tmp_path}",
            run / "x.png",
            run / "x.png",
        )
        == 0
    )
    assert (
        call(
            run,
            f"--decoder={run}/decoder",
            "--reconstruct",
            f"--out={tmp_path}/again.png",
            run / "x.png",
        )
        == 0
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "again.png",
        "image-1.npy",
        "image-1.png",
    ]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--image", " "], "the prompt is empty"),
        (["--image", "", "--decoder={run}/decoder"], "the prompt is empty"),
        (["--image", "{run}/bad.png", "--decoder={run}/decoder"], "bad.png': not a usable image"),
        (
            ["--reconstruct", "{run}/bad.png", "--decoder={run}/decoder"],
            "bad.png': not a usable image",
        ),
        (["--image", "a", "--out=x.png"], "need a decoder"),
        (["--reconstruct", "a"], "need a decoder"),
        (["--image", "a", "--count=0", "--decoder={run}/decoder"], "--count=0 must be at least 1"),
        (
            ["--reconstruct", "a", "--decoder={run}/decoder"],
            "--reconstruct takes existing image files",
        ),
        (["--image", "a", "--decoder={run}/none"], "no directory"),
        (["--image", "a", "--decoder={run}/wide"], "takes visual tokens"),
        (["--image", "a", "--decoder={run}/decoder", "--out=/dev/full/x.png"], "/dev/full"),
        (["--image", "a", "--decoder={run}/decoder", "--sampler=dim"], "unknown sampler 'dim'"),
    ],
)
def test_bad_input_is_one_line(run, capsys, arguments, told):
    assert call(run, *(argument.format(run=run) for argument in arguments)) == 2
    shown = capsys.readouterr()
    assert told in shown.err and shown.err.splitlines()[-1].startswith("error: ") and not shown.out


def test_a_full_disk_leaves_nothing_behind(run, tmp_path, capsys, monkeypatch):
    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert call(run, f"--decoder={run}/decoder", "--image", f"--out={tmp_path}/x.png", "a") == 2
    assert (
        f"error: cannot write {tmp_path}/x.png: No space left on device\n"
        in capsys.readouterr().err
        and not list(tmp_path.iterdir())
    )


# Precomputed conditions


class Memory:
    def __init__(self, documents):
        self.documents = documents

    def __len__(self):
        return len(self.documents)

    def __getitem__(self, index):
        return self.documents[index]


def test_conditions_are_generated_images_and_hosts_share_the_work(
    run, session, tmp_path, monkeypatch, capsys
):
    image = np.zeros((28, 28, 3), np.uint8)
    said = ["a dog", "a cat", "red", "blue", "one two"]
    documents = [
        Document(f"d{n}", parts)
        for n, parts in enumerate(
            [
                (Pair(image, said[0]),),
                (said[1], image),
                (said[2],),
                (image, said[3]),
                (Pair(image, said[4]),),
            ]
        )
    ]
    monkeypatch.setattr(
        precompute.sources, "open_source", lambda path, size, fit: Memory(documents)
    )
    # Eight fake devices are slow, and the tests of the command cover them.
    monkeypatch.setattr(precompute, "inference_mesh", lambda *_: None)
    for module in (precompute, precomputed):
        monkeypatch.setattr(module, "SHARD", 2)
    arguments = [
        "precompute",
        "--config=configs/decoder.py:debug",
        f"--config.init={run}/emu",
        f"--config.data.tokenizer={run}/tokenizer.json",
        "--config.data.mixture=(('a', 1.0, 'x:train'),)",
        f"--to={tmp_path}",
    ]
    assert command.main([*arguments, "--hosts=2", "--host=1"]) == 0
    with pytest.raises(UserError, match="are incomplete"):
        Precomputed(str(tmp_path), "conditions", "mixture", {"a": 5})
    made = {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("0*")}
    assert (
        command.main(arguments) == 0 and "2 shards computed, 1 existed" in capsys.readouterr().out
    )
    assert all(
        path.stat().st_mtime_ns == made.get(path.name, path.stat().st_mtime_ns)
        for path in tmp_path.rglob("0*")
    )
    stored = Precomputed(str(tmp_path), "conditions", "mixture", {"a": 5})
    for number, parts in ((0, ["a dog"]), (1, ["a cat"]), (3, []), (4, ["one two"])):
        np.testing.assert_allclose(
            stored.lookup(f"a/d{number}"), session.generate_images([parts])[0], rtol=2e-3, atol=2e-3
        )
    assert (
        command.main([*(a for a in arguments if "init" not in a), f"--config.init={run}/decoder"])
        == 2
    )
    assert "names no checkpoint with a language model" in capsys.readouterr().err
    (tmp_path / "conditions.json").write_text(json.dumps({"shape": [1, 1]}))
    assert (
        command.main(arguments) == 2
        and "of a different model or different data" in capsys.readouterr().err
    )
    assert not list(tmp_path.rglob("*.part"))
