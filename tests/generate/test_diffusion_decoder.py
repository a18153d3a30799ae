"""The image decoder, the command that saves its images, and precomputed conditions."""

import json

import numpy as np
import pytest
from PIL import Image

from emu_jax import sharding
from emu_jax.config import UserError
from emu_jax.data import precomputed
from emu_jax.data.precomputed import Precomputed
from emu_jax.data.sequence import Document, Pair
from emu_jax.generate import __main__ as command
from emu_jax.generate import diffusion_decoder, precompute
from tests.support import make

# Sampling of the decoders below.
SAMPLING = (
    "drawing.sampler=ddim",
    "drawing.steps=2",
    "model.decoder.condition=encoded",
    "optim.ema=0.0",
)


@pytest.fixture(scope="module", autouse=True)
def decoders(run, save):
    """Add two decoder checkpoints to `run`: one that fits, and one for a wider model."""
    model = ("model.llama.vocab=110", "model.llama.added=6", f"data.tokenizer={run}/tokenizer.json")
    c = make.decoder_cfg(*model, *SAMPLING)
    save(c, make.random_params(make.program(c)), run / "decoder")
    width = ("model.llama.width=64", "model.decoder.unet.condition=64")
    c = make.decoder_cfg(*model, *SAMPLING, *width)
    save(c, make.random_params(make.program(c)), run / "wide")


@pytest.fixture(scope="module")
def visual():
    return np.random.default_rng(0).standard_normal((3, 4, 32)).astype(np.float32)


def call(run, *arguments):
    return command.main([f"--checkpoint={run}/emu", *map(str, arguments)])


def zeros():
    return np.zeros((4, 32), np.float32)


def load_decoder(run, loaded, empty_prompt=zeros, **options):
    """Load the decoder, by default with a negative condition: most tests share its program."""
    return diffusion_decoder.load(
        str(run / "decoder"), loaded.model_config, empty_prompt=empty_prompt, **options
    )


# The decoder


def test_an_image_is_a_function_of_its_condition_and_its_seed(run, loaded, visual):
    decoder = load_decoder(run, loaded, seed=5)
    first = decoder(visual)
    second = decoder(visual)
    assert first.shape == (3, 8, 8, 3) and first.dtype == np.uint8
    assert (first != second).any((1, 2, 3)).all()
    alone = load_decoder(run, loaded, seed=6)(visual[1:2])
    assert np.abs(alone[0].astype(int) - first[1]).max() <= 1
    assert load_decoder(run, loaded)(visual[:0]).shape == (0, 8, 8, 3)


def test_images_are_the_same_on_a_mesh(run, loaded, visual):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4, "tensor": 1})
    sharded = load_decoder(run, loaded, mesh=mesh)(visual).astype(int)
    assert np.abs(sharded - load_decoder(run, loaded)(visual)).max() <= 1


def test_guidance_leads_away_from_the_empty_prompt_or_from_zeros(run, loaded, visual):
    def decode(empty_prompt, **overrides):
        decoder = load_decoder(run, loaded, overrides=overrides, empty_prompt=empty_prompt)
        return decoder(visual)

    def empty():
        return loaded.generate_images([[]])[0]

    from_empty = decode(empty)
    from_zeros = decode(empty, negative="zeros")
    assert (from_empty != from_zeros).any()
    assert (from_empty != decode(empty, guidance=1.0)).any()
    np.testing.assert_array_equal(decode(zeros), from_zeros)


def test_images_that_the_safety_checker_rejects_are_black(run, loaded, visual):
    decoder = load_decoder(run, loaded)
    images = decoder(visual)
    decoder.seed = 0
    decoder.safety_checker = lambda images: np.array([True, False, True])
    checked = decoder(visual)
    assert images[1].any() and not checked[1].any()
    np.testing.assert_array_equal(checked[[0, 2]], images[[0, 2]])


@pytest.mark.parametrize(
    ("decoder", "overrides", "message"),
    [
        ("emu", {}, "of the stage 'emu', not a decoder's"),
        ("wide", {}, r"takes visual tokens \[4, 64\], but the model makes \[4, 32\]"),
        ("decoder", {"sampler": "dim"}, "unknown sampler 'dim'; choose one of ddim"),
        ("decoder", {"steps": 0}, "a sampler takes 1 to 1000 steps"),
        ("decoder", {"negative": "nothing"}, "is not one of empty, zeros"),
    ],
)
def test_unusable_decoders_are_one_line(run, loaded, decoder, overrides, message):
    with pytest.raises(UserError, match=message):
        diffusion_decoder.load(str(run / decoder), loaded.model_config, overrides=overrides)


# The command


def test_an_image_from_a_prompt(run, loaded, one_device, capsys, tmp_path):
    out = tmp_path / "new/apple.png"
    flags = (f"--decoder={run}/decoder", "--image", "--seed=3", "--count=2", f"--out={out}")
    assert call(run, *flags, "a red", "apple") == 0
    assert "apple.png]" in capsys.readouterr().err
    assert {path.name for path in out.parent.iterdir()} == {"apple-2.png", "apple.png"}
    decoder = load_decoder(
        run, loaded, seed=3, empty_prompt=lambda: loaded.generate_images([[]])[0]
    )
    expected = decoder(loaded.generate_images([["a red", "apple"]]))[0]
    with Image.open(out) as image:
        pixels = np.asarray(image)
        metadata = image.text  # ty: ignore[missing-attribute]
    assert np.abs(pixels.astype(int) - expected).max() <= 1
    assert metadata == dict(
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
    with Image.open(out.with_name("apple-2.png")) as second:
        assert second.text["seed"] == "4"  # ty: ignore[missing-attribute]
        assert (np.asarray(second) != pixels).any()


def test_blends_and_reconstructions(run, one_device, tmp_path):
    decoder = f"--decoder={run}/decoder"
    image = run / "x.png"
    assert call(run, decoder, "--image", f"--out={tmp_path}", image, image) == 0
    assert call(run, decoder, "--reconstruct", f"--out={tmp_path}/again.png", image) == 0
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"again.png", "image-1.npy", "image-1.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
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
def test_bad_input_is_one_line(run, one_device, capsys, arguments, message):
    assert call(run, *(argument.format(run=run) for argument in arguments)) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.splitlines()[-1].startswith("error: ")
    assert not shown.out


def test_a_full_disk_leaves_nothing_behind(run, one_device, tmp_path, capsys, monkeypatch):
    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert call(run, f"--decoder={run}/decoder", "--image", f"--out={tmp_path}/x.png", "a") == 2
    message = f"error: cannot write {tmp_path}/x.png: No space left on device\n"
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# Precomputed conditions


class InMemory:
    """A source of documents in memory."""

    def __init__(self, documents):
        self.documents = documents

    def __len__(self):
        return len(self.documents)

    def __getitem__(self, index):
        return self.documents[index]


def test_conditions_are_generated_images_and_hosts_share_the_work(
    run, loaded, tmp_path, monkeypatch, capsys
):
    image = np.zeros((28, 28, 3), np.uint8)
    contents = [
        (Pair(image, "a dog"),),
        ("a cat", image),
        ("red",),
        (image, "blue"),
        (Pair(image, "one two"),),
    ]
    documents = [Document(f"d{number}", parts) for number, parts in enumerate(contents)]
    monkeypatch.setattr(
        precompute.sources, "open_source", lambda path, size, fit: InMemory(documents)
    )
    # Use no mesh, because eight fake devices are slow.
    monkeypatch.setattr(precompute, "inference_mesh", lambda *_: None)
    for module in (precompute, precomputed):
        monkeypatch.setattr(module, "SHARD", 2)

    def precompute_from(checkpoint, *flags):
        return command.main(
            [
                "precompute",
                "--config=configs/decoder.py:debug",
                f"--config.init={run}/{checkpoint}",
                f"--config.data.tokenizer={run}/tokenizer.json",
                "--config.data.mixture=(('a', 1.0, 'x:train'),)",
                f"--to={tmp_path}",
                *flags,
            ]
        )

    assert precompute_from("emu", "--hosts=2", "--host=1") == 0
    with pytest.raises(UserError, match="are incomplete"):
        Precomputed(str(tmp_path), "conditions", "mixture", {"a": 5})
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("0*")}
    assert precompute_from("emu") == 0
    assert "2 shards computed, 1 existed" in capsys.readouterr().out
    assert written == {path: path.stat().st_mtime_ns for path in written}
    stored = Precomputed(str(tmp_path), "conditions", "mixture", {"a": 5})
    for number, parts in ((0, ["a dog"]), (1, ["a cat"]), (3, []), (4, ["one two"])):
        expected = loaded.generate_images([parts])[0]
        np.testing.assert_allclose(stored.lookup(f"a/d{number}"), expected, rtol=2e-3, atol=2e-3)
    assert precompute_from("decoder") == 2
    assert "names no checkpoint with a language model" in capsys.readouterr().err
    (tmp_path / "conditions.json").write_text(json.dumps({"shape": [1, 1]}))
    assert precompute_from("emu") == 2
    assert "of a different model or different data" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.part"))
