"""CLIP comes in and goes out bit for bit, and is what the transformers library computes where that
and PyTorch are installed.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emu_jax import checkpoint, config
from emu_jax.evaluate.metrics import clip_score
from emu_jax.models import module
from emu_jax.models.clip import ClipConfig, ClipText, ClipVision
from emu_jax.weights import families, files
from emu_jax.weights.__main__ import main
from tests.support.clips import CLIP1, CLIP2, folder
from tests.support.foreign import saved

VITL14 = {
    "text_config": {"num_attention_heads": 12, "eos_token_id": 2},
    "vision_config": {"num_attention_heads": 16},
}
TEXTS = [
    "the dog sat at the mat",
    "",
    "A  Dog\tat THE\nthe",
    "It's 39 dogs!!! ... \u00e9t\u00e9 \u72ac \U0001f415 don't",
    "the dog " * 30,
    "<|endoftext|> the",
    "I'll the\u00a0dog",
    "\u0130stanbul \ufb01 1\u00bd 2024-01",
]


def size_of(directory):
    return ClipConfig.of(
        config.from_dict(checkpoint.read_config(str(directory))["model"]).to_dict()
    )


def imported(path, to, capsys=None):
    assert main(["import", "--family=clip", str(path), f"--to={to}"]) == 0
    return to


@pytest.mark.parametrize(
    ("said", "dtype"), [(CLIP1, np.float32), (CLIP2, np.float16)], ids=["quick-gelu", "gelu-fp16"]
)
def test_export_of_import_is_the_identity(tmp_path, said, dtype):
    arrays = folder(tmp_path / "theirs", said, dtype)
    imported(tmp_path / "theirs", tmp_path / "ours")
    assert (
        main(
            ["export", "--family=clip", f"--from={tmp_path / 'ours'}", f"--to={tmp_path / 'back'}"]
        )
        == 0
    )
    back = files.read([str(tmp_path / "back")])
    assert back.tensors.keys() == arrays.keys() and len(arrays) == 14 + 16 * 5
    for name, array in arrays.items():
        got = np.asarray(back.tensors[name])
        assert (got.dtype, got.shape, got.tobytes()) == (
            array.dtype,
            array.shape,
            array.tobytes(),
        ), name
    for tower in ("text_config", "vision_config"):
        assert back.config[tower] == said[tower]
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == [
        "checkpoints",
        "merges.txt",
        "vocab.json",
    ]


def test_older_files_and_sizes_of_the_first_release(tmp_path, capsys):
    """pytorch_model.bin with the buffers of older versions; ViT-L/14's 427,616,513 parameters."""
    arrays = folder(tmp_path / "new", CLIP1)
    (tmp_path / "old").mkdir()
    saved(
        tmp_path / "old/pytorch_model.bin",
        arrays | {"text_model.embeddings.position_ids": np.arange(20)[None]},
    )
    (tmp_path / "old/config.json").write_text((tmp_path / "new/config.json").read_text())
    for name in ("new", "old"):
        imported(tmp_path / name, tmp_path / f"{name}-ours")
    new, old = (
        checkpoint.restore_params(str(tmp_path / f"{name}-ours")) for name in ("new", "old")
    )
    jax.tree.map(np.testing.assert_array_equal, new, old)
    large = config.load(["--config=configs/clip.py"]).model.to_dict()
    assert (
        sum(
            int(np.prod(shape))
            for shape in families.FAMILIES["clip"].shapes(ClipConfig.of(large)).values()
        )
        == 427_616_513
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            dict(hidden_act="swish"),
            "has hidden_act='swish', which is not supported; choose from quick_gelu, gelu",
        ),
        (dict(num_attention_heads=5), "5 heads do not divide a width of 16"),
        (None, "does not determine clip.eos, clip.text.heads"),
    ],
)
def test_what_a_config_asks_in_vain(tmp_path, capsys, change, told):
    folder(tmp_path / "theirs")
    path = tmp_path / "theirs/config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"text_config": said["text_config"] | (change or {})}))
    if change is None:
        path.unlink()
    assert main(["import", "--family=clip", str(tmp_path / "theirs"), f"--to={tmp_path}/x"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and told in error[0] and not (tmp_path / "x").exists()


def test_a_clip_is_no_emu(tmp_path, capsys):
    folder(tmp_path / "theirs")
    imported(tmp_path / "theirs", tmp_path / "ours")
    for arguments, told in (
        (
            ["import", "--family=llama", str(tmp_path / "theirs")],
            "it looks like clip: --family=clip",
        ),
        (
            ["export", "--family=llama", f"--from={tmp_path / 'ours'}"],
            "does not hold a complete llama",
        ),
    ):
        assert main([*arguments, f"--to={tmp_path}/x"]) == 2 and told in capsys.readouterr().err


@pytest.mark.parametrize("said", [CLIP1, CLIP2], ids=["quick-gelu", "gelu"])
def test_features_are_those_of_the_transformers_library(tmp_path, said):
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    folder(tmp_path / "theirs", said)
    model = clip_score.load(str(imported(tmp_path / "theirs", tmp_path / "ours")))
    theirs = transformers.CLIPModel.from_pretrained(tmp_path / "theirs").eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "theirs")
    ids = np.array(
        tokenizer(TEXTS, padding="max_length", truncation=True, max_length=20)["input_ids"]
    )
    np.testing.assert_array_equal(np.stack([clip_score.token_ids(model, text) for text in TEXTS]), ids)
    images = np.random.default_rng(0).standard_normal((3, 16, 16, 3), np.float32)
    with torch.no_grad():
        out = theirs(
            input_ids=torch.tensor(ids),
            pixel_values=torch.tensor(images.transpose(0, 3, 1, 2).copy()),
        )
    params = jax.tree.map(jnp.asarray, checkpoint.restore_params(str(tmp_path / "ours")))
    model_config = size_of(tmp_path / "ours")

    def unit(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    np.testing.assert_allclose(
        unit(module.bind(ClipText, model_config, params["text"])(jnp.asarray(ids))),
        out.text_embeds.numpy(),
        atol=1e-5,
    )
    np.testing.assert_allclose(
        unit(module.bind(ClipVision, model_config, params["vision"])(jnp.asarray(images))),
        out.image_embeds.numpy(),
        atol=1e-5,
    )

    # what it writes is read too
    theirs.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = clip_score.load(str(imported(tmp_path / "saved", tmp_path / "again")))
    assert (tmp_path / "again/tokenizer.json").is_file() and again.config == model_config
    np.testing.assert_array_equal(np.stack([clip_score.token_ids(again, text) for text in TEXTS]), ids)


@pytest.mark.parametrize("shape", [(16, 16), (37, 20), (19, 64), (200, 133)])
def test_pictures_are_prepared_as_by_the_transformers_library(tmp_path, shape):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from PIL import Image

    processor = transformers.models.clip.image_processing_pil_clip.CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    folder(tmp_path / "theirs")
    processor.save_pretrained(tmp_path / "theirs")
    model = clip_score.load(str(imported(tmp_path / "theirs", tmp_path / "ours")))
    assert (tmp_path / "ours/preprocessor_config.json").is_file()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)).save(
        tmp_path / "a.png"
    )
    want = processor(Image.open(tmp_path / "a.png"), return_tensors="np")["pixel_values"][
        0
    ].transpose(1, 2, 0)
    np.testing.assert_allclose(clip_score.preprocess(model, tmp_path / "a.png"), want, atol=1e-5)
