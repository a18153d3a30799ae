"""U-Net, VAE, training and samplers agree with diffusers."""

import json

import numpy as np
import pytest

from emu_jax import verify
from emu_jax.config import UserError
from emu_jax.verify import golden

FILE = golden.load("tests/golden/stable_diffusion.npz")


def test_every_quantity_is_diffusers():
    rows = list(verify.quantities(FILE))
    assert [row for row in rows if not row.ok] == []
    told = {row.name for row in rows}
    assert told >= {
        "unet_out",
        "vae_mean",
        "vae_logvar",
        "vae_decoded",
        "add_noise",
        "alphas_cumprod",
        "train_loss",
        *(
            f"{what}_{name}"
            for what in ("sample", "timesteps")
            for name in ("pndm", "ddim", "euler", "dpmpp")
        ),
    }
    assert sum(name.startswith("grad_norm ") for name in told) == len(FILE["grad_names"]) == 208


def changed(**fields):
    return FILE | {
        "unet_config": np.array(json.dumps(json.loads(str(FILE["unet_config"])) | fields))
    }


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({name: x for name, x in FILE.items() if name != "vae_mean"}, "missing vae_mean"),
        (changed(class_embed_type="timestep"), "class_embed_type"),
        (
            changed(cross_attention_dim=24),
            "condition has 40 channels, and unet_config's cross_attention_dim is 24",
        ),
        (changed(layers_per_block=2), "tensors missing"),
        (changed(block_out_channels=[32, 96]), "has the shape .*, and its config makes"),
        (FILE | {"unet_config": np.array("{")}, "not JSON"),
    ],
)
def test_what_does_not_fit_is_one_line(file, message):
    with pytest.raises(UserError, match=message):
        list(verify.quantities(file))
