"""We and transformers load each other's LLaMA, with the same logits; files are PyTorch's.

Skipped where PyTorch and transformers are not installed: nothing of ours needs them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emu_jax import checkpoint
from emu_jax.models import module
from emu_jax.models.llama import Llama
from emu_jax.weights import eva_clip, pickles
from tests.support.foreign import (
    CONFIG,
    LLAMA3,
    config_of,
    export,
    folder,
    import_,
    saved,
    small,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
IDS = np.random.default_rng(0).integers(3, 500, (2, 100))
LINEAR = ("--config.model.llama.rope_scaling=('linear',4.0)", "--config.model.llama.kv_heads=1")


def ours(directory):
    """Logits of our LLaMA in a checkpoint."""
    params = jax.tree.map(jnp.asarray, checkpoint.restore_params(str(directory)))
    model = module.bind(Llama, config_of(directory).llama, params["llama"])
    at = jnp.tile(jnp.arange(IDS.shape[1]), (len(IDS), 1))
    hidden = model(
        model.embeddings(jnp.asarray(IDS), jnp.float32), at, jnp.ones_like(at), kernel="dense"
    )[0]
    return np.einsum("btD,vD->btv", np.asarray(hidden), np.asarray(model.head()["base"]))


def theirs(model):
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


@pytest.mark.parametrize("overrides", [(), LLAMA3, LINEAR], ids=["llama1", "llama3", "linear"])
def test_transformers_loads_our_export_with_the_same_logits(tmp_path, overrides):
    arrays = folder(tmp_path / "source", small(*overrides), "llama")
    rope = "--config.model.llama.rope_dtype=float32"
    import_(tmp_path / "ours", "--family=llama", tmp_path / "source", CONFIG, rope, *overrides)
    export("llama", tmp_path / "ours", tmp_path / "theirs")
    model, report = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "theirs", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert len(arrays) > 15
    want = theirs(model)
    np.testing.assert_allclose(ours(tmp_path / "ours"), want, atol=2e-4 * np.abs(want).max())


STRETCHED = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)


@pytest.mark.parametrize(
    "fields",
    [
        dict(rms_norm_eps=1e-6),
        dict(num_key_value_heads=2, rms_norm_eps=1e-5),
        dict(
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            rope_theta=500000.0,
            rope_scaling=STRETCHED,
        ),
    ],
    ids=["llama1", "llama2", "llama3"],
)
def test_we_load_what_transformers_saves_with_the_same_logits(tmp_path, fields):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=500,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=8,
        max_position_embeddings=512,
        initializer_range=0.2,
        **fields,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    import_(tmp_path / "ours", "--family=llama", tmp_path / "theirs")
    want = theirs(model)
    np.testing.assert_allclose(ours(tmp_path / "ours"), want, atol=2e-4 * np.abs(want).max())
    torch.save(model.state_dict(), tmp_path / "theirs" / "model.bin")
    import_(tmp_path / "again", "--family=llama", tmp_path / "theirs" / "model.bin")
    np.testing.assert_array_equal(ours(tmp_path / "again"), ours(tmp_path / "ours"))


def test_pytorch_files_are_read_as_pytorch_reads_them(tmp_path):
    base = torch.randn(6, 8)
    tensors = {
        "whole": base,
        "t": base.T,
        "row": base[2],
        "half": base.half(),
        "bf": base.bfloat16(),
        "ids": torch.arange(3),
        "scalar": torch.tensor(2.5),
        "parameter": torch.nn.Parameter(base[:2].clone()),
        "none": torch.zeros(0, 3),
    }
    torch.save({"epoch": 1, "lr": 0.5, "module": tensors}, tmp_path / "a.pt")
    got = {
        name: pickles.read(tmp_path / "a.pt", place)
        for name, place in pickles.places(tmp_path / "a.pt").items()
    }
    assert list(got) == list(tensors)
    for name, tensor in tensors.items():
        bits = tensor.detach().contiguous()
        if tensor.numel():
            bits = bits.reshape(-1).view(torch.uint8)
        assert got[name].shape == tuple(tensor.shape), name
        assert got[name].tobytes() == bits.numpy().tobytes(), name


def test_pytorch_reads_the_files_that_tests_write(tmp_path):
    arrays = {
        "a.b": np.random.default_rng(0).standard_normal((3, 4), np.float32),
        "c": np.arange(5),
    }
    saved(tmp_path / "a.bin", arrays)
    for name, tensor in torch.load(tmp_path / "a.bin", weights_only=True).items():
        np.testing.assert_array_equal(tensor.numpy(), arrays[name])


@pytest.mark.parametrize("side", [3, 16, 23, 32])
def test_position_embeddings_are_interpolated_as_pytorch_does(side):
    positions = np.random.default_rng(0).standard_normal((1, 1 + 16 * 16, 6), np.float32)
    square = torch.tensor(positions[:, 1:]).reshape(1, 16, 16, 6).permute(0, 3, 1, 2)
    want = torch.nn.functional.interpolate(
        square, size=(side, side), mode="bicubic", align_corners=False
    )
    want = want.permute(0, 2, 3, 1).reshape(1, side * side, 6).numpy()
    # PyTorch rounds its coordinates to float32.
    np.testing.assert_allclose(eva_clip.interpolate(positions, side)[:, 1:], want, atol=1e-5)
