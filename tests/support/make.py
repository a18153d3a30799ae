"""Small models and batches for tests: packed rows of random interleaved documents."""

import dataclasses

import jax
import numpy as np

from emu_jax import checkpoint, config, tree
from emu_jax.data.packing import empty_batch, write_row
from emu_jax.data.sequence import Document, SequenceBuilder
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.models import module
from emu_jax.plan import make_program


def cfg(*overrides: str, size: str = "debug"):
    """configs/base.py at a small size, on one device, without dropout; overrides: "a.b=value".

    The encoder's blocks are unrolled and LLaMA's are scanned, as in large models.
    """
    small = (
        "optim.steps=4",
        "data.batch=8",
        "data.tokens=48",
        "data.images=3",
        "data.num_streams=4",
        "objective.chunk=16",
        "mesh.fsdp=1",
        "model.resampler.dropout=0.0",
        "model.vision.remat=none",
        "model.resampler.remat=none",
        "model.llama.remat=full",
    )
    return config.load(
        [
            f"--config=configs/base.py:{size}",
            *(f"--config.{override}" for override in (*small, *overrides)),
        ]
    )


VAE = dict(channels=3, latent=4, widths=(8, 8), resnets=1, groups=4, scale=0.5, remat="none")


def decoder_cfg(*overrides: str, vae: bool = False):
    """configs/decoder.py at a small size, with one image per row.

    The encoder reads 28 x 28 pixels; the U-Net draws 8 x 8 pixels, or 4 x 4 latents of them.
    """
    small = (
        "optim.steps=4",
        "optim.warmup=0.25",
        "optim.boundaries=((2, 0.5),)",
        "data.batch=8",
        "data.tokens=24",
        "data.num_streams=4",
        "mesh.fsdp=1",
        "model.resampler.dropout=0.0",
        "model.vision.remat=none",
        "model.resampler.remat=none",
        "model.llama.remat=none",
        "data.conditions=",
        "model.decoder.condition=teacher_forced",
    )
    c = config.load(
        ["--config=configs/decoder.py:debug", *(f"--config.{override}" for override in small)]
    )
    with c.unlocked():
        c.model.decoder.update(
            dict(
                image=8,
                unet=dict(
                    channels_in=3,
                    channels_out=3,
                    patch=2,
                    widths=(8,),
                    resnets=(1,),
                    attends_down=(True,),
                    attends_up=(False,),
                    depths=(1,),
                    heads=(2,),
                    time=16,
                    groups=4,
                    remat="none",
                ),
            )
        )
        c.model.decoder.vae = VAE if vae else {}
        if vae:
            c.model.decoder.unet.update(dict(channels_in=4, channels_out=4))
    for override in overrides:
        config.override(c, *override.split("=", 1))
    return c


def warm_cfg(*overrides: str):
    """`cfg` for the contrastive stage: images of 32 pixels in patches of 16, and no LLM."""
    return cfg(
        "stage=contrastive",
        "model.vision.image=32",
        "model.vision.patch=16",
        "rules.peak_lr=(('.*', 1e-3),)",
        "rules.groups=(('vision/.*', 'vision'), ('.*', 'rest'))",
        *overrides,
    )


def documents(count: int, size: int, seed: int = 0) -> list[Document]:
    """Documents of one to three parts, texts and images in any order."""
    rng = np.random.default_rng(seed)

    def image():
        return rng.integers(0, 256, (size, size, 3), np.uint8)

    def word():
        return "".join(chr(97 + k) for k in rng.integers(0, 26, rng.integers(2, 9)))

    kinds = (
        lambda: (image(), word()),
        lambda: (word(), image()),
        lambda: (word(),),
        lambda: (word(), image(), word()),
    )
    return [Document(f"d{k}", kinds[rng.integers(len(kinds))]()) for k in range(count)]


def sequences(c, count: int, seed: int = 0):
    vocab = c.model.llama.vocab
    letters = Tokenizer(
        vocab,
        lambda text: [3 + ord(letter) - 97 for letter in text],
        lambda ids: "".join(chr(94 + k) for k in ids),
    )
    to_sequence = SequenceBuilder(
        tokenizer=letters,
        n_visual=c.model.resampler.tokens,
        max_tokens=c.data.tokens,
        max_images=c.data.images,
        image_first=0.5,
        labels=c.data.labels,
    )
    return [
        to_sequence(document, rng=np.random.default_rng(seed))
        for document in documents(count, c.model.vision.image, seed)
    ]


def pack(c, rows):
    """A Batch whose row b holds the sequences rows[b]."""
    batch = empty_batch(
        len(rows), c.data.tokens, c.data.images, c.model.vision.image, pad=c.model.llama.vocab
    )
    for number, row in enumerate(rows):
        write_row(batch, number, row, [k % 2 for k in range(len(row))])
    return batch


def batch(c, seed: int = 0):
    """c.data.batch rows, unevenly filled: one, two or three documents each."""
    waiting = sequences(c, 3 * c.data.batch, seed)
    rows = []
    for number in range(c.data.batch):
        row = []
        tokens = 0
        images = 0
        for _ in range(1 + number % 3):
            candidate = waiting.pop()
            tokens = tokens + len(candidate.tokens)
            images = images + len(candidate.image_slots)
            if tokens <= c.data.tokens and images <= c.data.images:
                row.append(candidate)
        rows.append(row)
    return pack(c, rows)


def program(c):
    """The loop's Program of a config, for two sources."""
    made = make_program(c)
    return dataclasses.replace(made, objective=made.objective.copy({"sources": 2}))


def params(p, seed: int = 0):
    return module.init(p.stage.module, p.model_config, jax.random.key(seed))


def abstract(p):
    """Shapes and dtypes of `params`."""
    return module.abstract(p.stage.module, p.model_config)


def flat(params) -> list[tuple[str, np.ndarray]]:
    """("a/b", leaf) of every leaf, in order."""
    return list(tree.leaves(params))


def random_params(p, seed: int = 0):
    """Random values for every leaf; the scales of norms are near 1.

    A fresh model's biases of 0 and scales of 1 would hide mistakes.
    """
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        noise = rng.standard_normal(x.shape, np.float32)
        return 1 + 0.1 * noise if path.endswith(("scale", "std")) else 0.2 * noise

    leaves = {path: leaf(path, x) for path, x in flat(abstract(p))}
    # jnp.asarray would compile a program for every shape.
    return jax.device_put(tree.unflatten(leaves))


def written(path, c, params):
    """Write a checkpoint of parameters and a config to `path`; returns the parameters."""
    flat = {name: np.asarray(leaf) for name, leaf in tree.leaves(params)}
    shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in flat.items()}
    with checkpoint.param_writer(str(path), shapes, set(), config.to_dict(c)) as put:
        for name, leaf in flat.items():
            put(name, None, leaf)
    return params


def packed_and_separate(c):
    """(packed batch, the same documents one per row, their places in the packed batch).

    Three packed rows hold eight documents. A place is (row, start, first image).
    """
    found = [
        s
        for s in sequences(c, 40)
        if len(s.tokens) <= c.data.tokens // 3 and len(s.image_slots) <= 1
    ][:8]
    rows = [found[:3], found[3:5], found[5:]]
    places = []
    for number, row in enumerate(rows):
        start = first = 0
        for sequence in row:
            places.append((number, start, first))
            start = start + len(sequence.tokens)
            first = first + len(sequence.image_slots)
    assert len(found) == 8 and any(len(s.image_slots) for s in found[1:3])
    return pack(c, rows + [[]] * 5), pack(c, [[sequence] for sequence in found]), places
