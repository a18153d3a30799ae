"""Foreign checkpoints for the tests: small ones of every family, and PyTorch's file format written
by hand.
"""

import json
import struct
import zipfile

import ml_dtypes
import numpy as np

from emu_jax import checkpoint, config, tree
from emu_jax.models import emu, module
from emu_jax.weights import convert, files, stable_diffusion
from emu_jax.weights.families import FAMILIES
from tests.support import make

CONFIG = "--config=configs/base.py:debug"
LLAMA3 = (
    "--config.model.llama.kv_heads=2",
    "--config.model.llama.tied=true",
    "--config.model.llama.eps=1e-5",
    "--config.model.llama.rope_base=500000.0",
    "--config.model.llama.rope_scaling=('llama3',8.0,1.0,4.0,64.0)",
)


def random(c, seed=0):
    """Random parameters of a config's Emu, as NumPy arrays."""
    shapes = module.abstract(emu.Emu, emu.EmuConfig.of(c.model.to_dict()))
    rng = np.random.default_rng(seed)
    return tree.unflatten(
        {path: rng.standard_normal(leaf.shape, np.float32) for path, leaf in tree.leaves(shapes)}
    )


def tensors(c, family, dtype=np.float32, seed=0):
    """A checkpoint of `family` for a config's model: {name: array}."""
    table = FAMILIES[family].table(emu.EmuConfig.of(c.model.to_dict()))
    return {
        name: array.astype(dtype)
        for name, array in convert.to_theirs(table, convert.reader(random(c, seed)))
    }


def folder(path, c, family, dtype=np.float32, seed=0):
    """Its sharded safetensors with an index, in a new folder."""
    path.mkdir()
    arrays = tensors(c, family, dtype, seed)
    files.write(
        path,
        "model",
        {name: (array.shape, array.dtype) for name, array in arrays.items()},
        iter(arrays.items()),
        20_000,
    )
    (path / "config.json").write_text(
        json.dumps(FAMILIES[family].config_json(c.model.to_dict(), 64))
    )
    return arrays


# Stable Diffusions by their configs: a small one of version 1, and of version 2 with another head
# count, depth and width at every level.

UNET1 = dict(
    in_channels=2,
    out_channels=2,
    block_out_channels=[16, 24],
    down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
    layers_per_block=1,
    attention_head_dim=2,
    cross_attention_dim=12,
    norm_num_groups=4,
    sample_size=8,
)
UNET2 = UNET1 | dict(
    layers_per_block=[1, 2],
    attention_head_dim=[2, 3],
    transformer_layers_per_block=[1, 2],
    cross_attention_dim=20,
    use_linear_projection=True,
)
VAE = dict(
    in_channels=3,
    out_channels=3,
    latent_channels=2,
    block_out_channels=[8, 12],
    down_block_types=["DownEncoderBlock2D"] * 2,
    up_block_types=["UpDecoderBlock2D"] * 2,
    layers_per_block=1,
    norm_num_groups=4,
    scaling_factor=0.25,
)
PNDM = dict(
    _class_name="PNDMScheduler",
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
)


def diffusion(path, unet=UNET1, dtype=np.float32, seed=0, schedule=PNDM, shard=None, fp16=False):
    """A folder as diffusers saves it; {name: array} with "unet." and "vae." in front. `shard`:
    bytes of a file; `fp16`: named as that variant.
    """
    size = stable_diffusion.StableDiffusionConfig(
        stable_diffusion.unet_config(unet), stable_diffusion.vae_config(VAE)
    )
    rng = np.random.default_rng(seed)
    ours = {
        leaf: rng.standard_normal(shape, np.float32)
        for leaf, shape in stable_diffusion.shapes(size).items()
    }
    theirs = convert.to_theirs(stable_diffusion.table(*size), convert.reader(tree.unflatten(ours)))
    arrays = {name: array.astype(dtype) for name, array in theirs}
    for component, said in (("unet", unet), ("vae", VAE)):
        (path / component).mkdir(parents=True)
        (path / component / "config.json").write_text(json.dumps(said))
        mine = {
            name.removeprefix(f"{component}."): array
            for name, array in arrays.items()
            if name.startswith(component)
        }
        files.write(
            path / component,
            "diffusion_pytorch_model",
            {name: (array.shape, array.dtype) for name, array in mine.items()},
            iter(mine.items()),
            shard or files.SHARD,
            bare=True,
        )
        for file in (path / component).glob("*.safetensors") if fp16 else ():
            file.rename(file.with_suffix(".fp16.safetensors"))
    if schedule:
        (path / "scheduler").mkdir()
        (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))
    return arrays


def small(*overrides):
    return make.cfg(*(override.removeprefix("--config.") for override in overrides))


def size_of(directory):
    """The model of a checkpoint of ours."""
    return emu.EmuConfig.of(
        config.from_dict(checkpoint.read_config(str(directory))["model"]).to_dict()
    )


# PyTorch's .bin and .pt

KINDS = {
    np.dtype(dtype): name
    for name, dtype in (
        ("Float", np.float32),
        ("Half", np.float16),
        ("BFloat16", ml_dtypes.bfloat16),
        ("Double", np.float64),
        ("Long", np.int64),
        ("Byte", np.uint8),
    )
}


class Window:
    """A tensor as a window of a storage: arrays[key], with an offset and strides in elements."""

    def __init__(self, key, offset, shape, strides, count=None):
        self.key = key
        self.offset = offset
        self.shape = shape
        self.strides = strides
        self.count = count


class Raw(bytes):
    """Opcodes as they are."""


def name(text):
    return b"c" + b"\n".join(part.encode() for part in text.rsplit(".", 1)) + b"\n"


def opcodes(value, storages):
    """The opcodes of protocol 2 that push `value`."""
    if isinstance(value, Raw):
        return bytes(value)
    if isinstance(value, dict):
        return (
            b"}("
            + b"".join(opcodes(part, storages) for item in value.items() for part in item)
            + b"u"
        )
    if isinstance(value, tuple):
        return b"(" + b"".join(opcodes(part, storages) for part in value) + b"t"
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    if isinstance(value, bool) or value is None:
        return {True: b"\x88", False: b"\x89", None: b"N"}[value]
    if isinstance(value, int):
        return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)
    array = storages[value.key]
    count = array.size if value.count is None else value.count
    storage = Raw(
        opcodes(
            ("storage", Raw(name(f"torch.{KINDS[array.dtype]}Storage")), value.key, "cpu", count),
            storages,
        )
        + b"Q"
    )
    hooks = Raw(name("collections.OrderedDict") + b")R")
    return (
        name("torch._utils._rebuild_tensor_v2")
        + opcodes((storage, value.offset, value.shape, value.strides, False, hooks), storages)
        + b"R"
    )


def torch_file(
    path,
    value,
    storages,
    *,
    pickle=None,
    compression=zipfile.ZIP_STORED,
    left_out=(),
    byteorder="little",
):
    """As torch.save writes it; `value` holds Windows of `storages` {key: flat array}."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(
            "archive/data.pkl",
            b"\x80\x02" + opcodes(value, storages) + b"." if pickle is None else pickle,
        )
        archive.writestr("archive/byteorder", byteorder)
        for key, array in storages.items():
            if key not in left_out:
                archive.writestr(f"archive/data/{key}", array.tobytes())
        archive.writestr("archive/version", "3\n")


def saved(path, arrays):
    """{name: array} as torch.save of a state dict writes it."""
    storages = {str(number): array.reshape(-1) for number, array in enumerate(arrays.values())}

    def strides(shape):
        return tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))

    torch_file(
        path,
        {
            key: Window(str(number), 0, array.shape, strides(array.shape))
            for number, (key, array) in enumerate(arrays.items())
        },
        storages,
    )
