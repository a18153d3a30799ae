"""The table of diffusers' names: every leaf and every tensor once, both ways; the releases' own sizes; what is not built is said."""
from functools import partial

import jax
import numpy as np
import pytest

from emu_jax import sharding, tree
from emu_jax.config import UserError
from emu_jax.models import emu
from emu_jax.models.unet import UNet
from emu_jax.models.vae import Vae
from emu_jax.weights import convert
from emu_jax.weights import stable_diffusion as family

SD1 = dict(block_out_channels=[320, 640, 1280, 1280], down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
           up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, layers_per_block=2, attention_head_dim=8, cross_attention_dim=768)
SD2 = SD1 | dict(attention_head_dim=[5, 10, 20, 20], cross_attention_dim=1024, use_linear_projection=True)
VAE = dict(block_out_channels=[128, 256, 512, 512], down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
           layers_per_block=2)
SMALL = dict(block_out_channels=[16, 24, 8], down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
             up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], layers_per_block=[1, 2, 1], attention_head_dim=[2, 3, 4],
             transformer_layers_per_block=[1, 2, 1], cross_attention_dim=12, norm_num_groups=4, in_channels=5, out_channels=3)
SMALL_VAE = VAE | dict(block_out_channels=[8, 12], down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
                       norm_num_groups=4, latent_channels=2)


def shapes(unet, vae):
    of = lambda module, size: jax.eval_shape(partial(emu.init, module, size), jax.random.key(0))
    return {"unet": of(UNet, unet), "vae": of(Vae, vae)}


@pytest.mark.parametrize(("config", "count"), [(SD1, 859_520_964), (SD2, 865_910_724)], ids=["sd1", "sd2"])
def test_the_releases_sizes(config, count):
    """Parameters as published; 686 tensors in the U-Net, 248 in the autoencoder."""
    unet, vae = family.unet_size(config), family.vae_size(VAE)
    params = shapes(unet, vae)
    size = {tower: sum(leaf.size for leaf in jax.tree.leaves(part)) for tower, part in params.items()}
    assert size == {"unet": count, "vae": 83_653_863}
    names = convert.uses(family.table(unet, vae), made=False)
    assert sum(name.startswith("unet.") for name in names) == 686 and sum(name.startswith("vae.") for name in names) == 248
    assert sharding.specs(params)


@pytest.mark.parametrize("linear", [False, True])
def test_export_of_import_is_the_identity(linear):
    unet, vae = family.unet_size(SMALL | {"use_linear_projection": linear}), family.vae_size(SMALL_VAE)
    table, rng = family.table(unet, vae), np.random.default_rng(0)
    ours = {path: rng.standard_normal(leaf.shape, np.float32) for path, leaf in tree.leaves(shapes(unet, vae))}
    theirs = dict(convert.to_theirs(table, convert.reader(tree.unflatten(ours))))
    back = dict(tree.leaves(convert.from_theirs(table, family.canonical(theirs))))
    assert back.keys() == ours.keys() == {row.ours for row in table.rows}
    for path, leaf in ours.items():
        np.testing.assert_array_equal(back[path], leaf, err_msg=path)
    again = dict(convert.to_theirs(table, convert.reader(tree.unflatten(back))))
    assert theirs["unet.mid_block.attentions.0.proj_in.weight"].shape == ((8, 8) if linear else (8, 8, 1, 1))
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(again[name], tensor, err_msg=name)


def test_old_autoencoders_names_and_shapes():
    x = np.zeros((4, 4, 1, 1), np.float32)
    old = {f"vae.encoder.mid_block.attentions.0.{name}.weight": x for name in ("query", "key", "value", "proj_attn")}
    new = family.canonical(old | {"unet.conv_in.weight": x})
    want = {f"vae.encoder.mid_block.attentions.0.{name}.weight": (4, 4) for name in ("to_q", "to_k", "to_v", "to_out.0")}
    assert {name: tensor.shape for name, tensor in new.items()} == want | {"unet.conv_in.weight": x.shape}


@pytest.mark.parametrize(("changes", "message"), [
    ({"class_embed_type": "timestep"}, "class_embed_type='timestep', which is not built"),
    ({"down_block_types": ["AttnDownBlock2D"] * 3}, "down_block_types with 'AttnDownBlock2D', which is not built"),
    ({"up_block_types": ["UpBlock2D"]}, "has 1 up_block_types and 3 block_out_channels"),
    ({"cross_attention_dim": [8, 8, 16]}, "one width for all levels"),
    ({"attention_head_dim": 5}, "5 heads at level 1, which do not divide its width 24"),
    ({"attention_head_dim": [2, 3]}, "or 3 of them, one a level"), ({"norm_num_groups": 16}, "16 norm groups, which do not divide its width 24"),
    ({"block_out_channels": None}, "lacks block_out_channels"), ({"mid_block_type": None}, "mid_block_type=None, which is not built")])
def test_what_a_unet_config_asks_in_vain(changes, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        family.unet_size(SMALL | changes)


@pytest.mark.parametrize(("changes", "message"), [
    ({"use_quant_conv": False}, "use_quant_conv=False, which is not built"), ({"out_channels": 4}, "must be the same"),
    ({"up_block_types": ["UpBlock2D"] * 2}, "up_block_types with 'UpBlock2D'")])
def test_what_an_autoencoder_config_asks_in_vain(changes, message):
    with pytest.raises(UserError, match=message):
        family.vae_size(SMALL_VAE | changes)
