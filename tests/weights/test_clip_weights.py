"""Import and export of CLIP are inverse bit for bit.

Where PyTorch and transformers are installed, features and images are those of transformers.
"""

import json
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emu_jax import checkpoint, config
from emu_jax.evaluate.metrics import clip_score
from emu_jax.models import module
from emu_jax.models.clip import ClipConfig, ClipText, ClipVision
from emu_jax.weights import clip, files
from emu_jax.weights.__main__ import main
from tests.support.clips import CLIP1, CLIP2, folder
from tests.support.foreign import (
    export,
    import_,
    leaves,
    model_of,
    saved,
)
from tests.support.trees import assert_bitwise_equal

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


@pytest.mark.parametrize(
    ("fields", "dtype"), [(CLIP1, np.float32), (CLIP2, np.float16)], ids=["quick-gelu", "gelu-fp16"]
)
def test_export_of_import_is_the_identity(tmp_path, fields, dtype):
    arrays = folder(tmp_path / "theirs", fields, dtype)
    import_(tmp_path / "ours", "--family=clip", tmp_path / "theirs")
    export("clip", tmp_path / "ours", tmp_path / "back")
    back = files.read([str(tmp_path / "back")])
    assert_bitwise_equal(back.tensors, arrays)
    assert len(arrays) == 14 + 16 * 5
    for tower in ("text_config", "vision_config"):
        assert back.config[tower] == fields[tower]
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == [
        "checkpoints",
        "merges.txt",
        "vocab.json",
    ]


def test_old_pytorch_files_give_the_same_as_safetensors(tmp_path):
    """pytorch_model.bin of older versions has a buffer that we ignore."""
    arrays = folder(tmp_path / "new", CLIP1)
    (tmp_path / "old").mkdir()
    buffers = {"text_model.embeddings.position_ids": np.arange(20)[None]}
    saved(tmp_path / "old/pytorch_model.bin", arrays | buffers)
    (tmp_path / "old/config.json").write_text((tmp_path / "new/config.json").read_text())
    for name in ("new", "old"):
        import_(tmp_path / f"{name}-ours", "--family=clip", tmp_path / name)
    assert_bitwise_equal(leaves(tmp_path / "old-ours"), leaves(tmp_path / "new-ours"))


def test_vit_l_14_has_its_published_number_of_parameters():
    model = config.load(["--config=configs/clip.py"]).model.to_dict()
    shapes = clip.shapes(ClipConfig.of(model))
    assert sum(map(prod, shapes.values())) == 427_616_513


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(hidden_act="swish"),
            "has hidden_act='swish', which is not supported; choose from quick_gelu, gelu",
        ),
        (dict(num_attention_heads=5), "5 heads do not divide a width of 16"),
        (None, "does not determine clip.eos, clip.text.heads"),
    ],
)
def test_unsupported_and_missing_configs_are_refused(tmp_path, capsys, change, message):
    folder(tmp_path / "theirs")
    path = tmp_path / "theirs/config.json"
    if change is None:
        path.unlink()
    else:
        fields = json.loads(path.read_text())
        fields["text_config"] |= change
        path.write_text(json.dumps(fields))
    assert main(["import", "--family=clip", str(tmp_path / "theirs"), f"--to={tmp_path}/x"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert message in error
    assert not (tmp_path / "x").exists()


def test_a_clip_cannot_be_used_as_an_emu(tmp_path, capsys):
    folder(tmp_path / "theirs")
    import_(tmp_path / "ours", "--family=clip", tmp_path / "theirs")
    for arguments, message in (
        (
            ["import", "--family=llama", str(tmp_path / "theirs")],
            "it looks like clip: --family=clip",
        ),
        (
            ["export", "--family=llama", f"--from={tmp_path / 'ours'}"],
            "does not hold a complete llama",
        ),
    ):
        assert main([*arguments, f"--to={tmp_path}/x"]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("fields", [CLIP1, CLIP2], ids=["quick-gelu", "gelu"])
def test_features_are_those_of_transformers(tmp_path, fields):
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    folder(tmp_path / "theirs", fields)
    import_(tmp_path / "ours", "--family=clip", tmp_path / "theirs")
    model = clip_score.load(str(tmp_path / "ours"))
    theirs = transformers.CLIPModel.from_pretrained(tmp_path / "theirs").eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "theirs")
    encoded = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=20)
    ids = np.array(encoded["input_ids"])
    ours = np.stack([clip_score.token_ids(model, text) for text in TEXTS])
    np.testing.assert_array_equal(ours, ids)
    images = np.random.default_rng(0).standard_normal((3, 16, 16, 3), np.float32)
    with torch.no_grad():
        out = theirs(
            input_ids=torch.tensor(ids),
            pixel_values=torch.tensor(images.transpose(0, 3, 1, 2).copy()),
        )
    params = jax.tree.map(jnp.asarray, checkpoint.restore_params(str(tmp_path / "ours")))
    model_config = ClipConfig.of(model_of(tmp_path / "ours"))

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

    # What transformers writes is read too.
    theirs.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    import_(tmp_path / "again", "--family=clip", tmp_path / "saved")
    again = clip_score.load(str(tmp_path / "again"))
    assert (tmp_path / "again/tokenizer.json").is_file()
    assert again.config == model_config
    ours = np.stack([clip_score.token_ids(again, text) for text in TEXTS])
    np.testing.assert_array_equal(ours, ids)


@pytest.mark.parametrize("shape", [(16, 16), (37, 20), (19, 64), (200, 133)])
def test_images_are_preprocessed_as_by_transformers(tmp_path, shape):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from PIL import Image

    processor = transformers.models.clip.image_processing_pil_clip.CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    folder(tmp_path / "theirs")
    processor.save_pretrained(tmp_path / "theirs")
    import_(tmp_path / "ours", "--family=clip", tmp_path / "theirs")
    model = clip_score.load(str(tmp_path / "ours"))
    assert (tmp_path / "ours/preprocessor_config.json").is_file()
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    processed = processor(Image.open(tmp_path / "a.png"), return_tensors="np")
    want = processed["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_allclose(clip_score.preprocess(model, tmp_path / "a.png"), want, atol=1e-5)
