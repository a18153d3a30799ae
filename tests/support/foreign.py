"""Small foreign checkpoints of every family, and PyTorch's file format written by hand."""

import functools
import json
import struct
import zipfile

import ml_dtypes
import numpy as np

from emu_jax import checkpoint, config, tree
from emu_jax.models.emu import EmuConfig
from emu_jax.weights import convert, files, stable_diffusion
from emu_jax.weights.__main__ import main
from emu_jax.weights.families import FAMILIES
from emu_jax.weights.family import emu_shapes
from tests.support import make

CONFIG = "--config=configs/base.py:debug"
LLAMA3 = (
    "--config.model.llama.kv_heads=2",
    "--config.model.llama.tied=true",
    "--config.model.llama.eps=1e-5",
    "--config.model.llama.rope_base=500000.0",
    "--config.model.llama.rope_scaling=('llama3',8.0,1.0,4.0,64.0)",
)


# The commands


def import_(to, *arguments):
    """Import into the folder `to`."""
    assert main(["import", *map(str, arguments), f"--to={to}"]) == 0


def export(family, source, to, *flags):
    """Export the checkpoint `source` to the folder `to`."""
    assert main(["export", f"--family={family}", f"--from={source}", f"--to={to}", *flags]) == 0


def merge(source, to):
    """Merge the LoRA of the checkpoint `source`."""
    assert main(["merge", f"--from={source}", f"--to={to}"]) == 0


def leaves(directory):
    """{path: array} of the parameters in a checkpoint of ours."""
    return dict(tree.leaves(checkpoint.restore_params(str(directory))))


# Emus and their parts


def random(c, seed=0):
    """Random parameters of a config's Emu, as NumPy arrays."""
    return tree.unflatten(_random_leaves(EmuConfig.of(c.model.to_dict()), seed))


@functools.cache
def _random_leaves(model_config, seed):
    rng = np.random.default_rng(seed)
    shapes = emu_shapes(model_config)
    return {path: rng.standard_normal(shape, np.float32) for path, shape in shapes.items()}


def tensors(c, family, dtype=np.float32, seed=0):
    """A checkpoint of `family` for a config's model: {name: array}."""
    table = FAMILIES[family].table(EmuConfig.of(c.model.to_dict()))
    theirs = convert.to_theirs(table, convert.reader(random(c, seed)))
    return {name: array.astype(dtype) for name, array in theirs}


def write(path, arrays, stem="model", **options):
    """Write {name: array} as safetensors into a folder."""
    layout = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    files.write(path, stem, layout, iter(arrays.items()), **options)


def folder(path, c, family, dtype=np.float32, seed=0):
    """Write `tensors` to a new folder, in several files with an index; returns them."""
    path.mkdir()
    arrays = tensors(c, family, dtype, seed)
    write(path, arrays, shard=20_000)
    fields = FAMILIES[family].config_json(c.model.to_dict(), 64)
    (path / "config.json").write_text(json.dumps(fields))
    return arrays


# Configs of two small U-Nets of Stable Diffusion: version 1, and version 2 with a different number
# of heads, depth and width at every level.

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
    """Write a folder as diffusers does; returns {name: array}, prefixed "unet." and "vae.".

    shard: the largest size of a file in bytes. fp16: name the files as the fp16 variant.
    """
    model_config = stable_diffusion.StableDiffusionConfig(
        stable_diffusion.unet_config(unet), stable_diffusion.vae_config(VAE)
    )
    rng = np.random.default_rng(seed)
    ours = {
        leaf: rng.standard_normal(shape, np.float32)
        for leaf, shape in stable_diffusion.shapes(model_config).items()
    }
    table = stable_diffusion.table(*model_config)
    theirs = convert.to_theirs(table, convert.reader(tree.unflatten(ours)))
    arrays = {name: array.astype(dtype) for name, array in theirs}
    for component, fields in (("unet", unet), ("vae", VAE)):
        subfolder = path / component
        subfolder.mkdir(parents=True)
        (subfolder / "config.json").write_text(json.dumps(fields))
        part = {
            name.removeprefix(f"{component}."): array
            for name, array in arrays.items()
            if name.startswith(component)
        }
        stem = "diffusion_pytorch_model"
        write(subfolder, part, stem, shard=shard or files.SHARD, bare=True)
        if fp16:
            for file in subfolder.glob("*.safetensors"):
                file.rename(file.with_suffix(".fp16.safetensors"))
    if schedule:
        (path / "scheduler").mkdir()
        (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))
    return arrays


def small(*overrides):
    """A small config, with overrides "--config.a.b=value"."""
    return make.cfg(*(override.removeprefix("--config.") for override in overrides))


def model_of(directory):
    """config.model of a checkpoint of ours."""
    return config.from_dict(checkpoint.read_config(str(directory))["model"]).to_dict()


def config_of(directory):
    """The config of the Emu in a checkpoint of ours."""
    return EmuConfig.of(model_of(directory))


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
    """A tensor as a view of the storage `key`; offset and strides count elements."""

    def __init__(self, key, offset, shape, strides, count=None):
        self.key = key
        self.offset = offset
        self.shape = shape
        self.strides = strides
        self.count = count


class Raw(bytes):
    """Opcodes, to be copied unchanged."""


def name(text):
    """The opcode that pushes a class or function by its dotted name."""
    return b"c" + b"\n".join(part.encode() for part in text.rsplit(".", 1)) + b"\n"


def opcodes(value, storages):
    """Opcodes of protocol 2 that push `value`."""
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
    """Write `value` as torch.save does; it holds Windows of `storages` {key: flat array}.

    pickle: use these bytes in place of the value. left_out: keys of storages to omit.
    """
    if pickle is None:
        pickle = b"\x80\x02" + opcodes(value, storages) + b"."
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickle)
        archive.writestr("archive/byteorder", byteorder)
        for key, array in storages.items():
            if key not in left_out:
                archive.writestr(f"archive/data/{key}", array.tobytes())
        archive.writestr("archive/version", "3\n")


def saved(path, arrays):
    """Write {name: array} as torch.save writes a state dict."""
    windows = {}
    storages = {}
    for number, (key, array) in enumerate(arrays.items()):
        strides = tuple(int(np.prod(array.shape[axis + 1 :])) for axis in range(array.ndim))
        windows[key] = Window(str(number), 0, array.shape, strides)
        storages[str(number)] = array.reshape(-1)
    torch_file(path, windows, storages)
