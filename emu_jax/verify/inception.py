"""Compare FID's Inception with torch-fidelity: features and Frechet distances."""

import json
import re
import zlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from emu_jax.config import UserError
from emu_jax.evaluate.metrics import fid
from emu_jax.models import inception
from emu_jax.verify.golden import Quantity, compare
from emu_jax.weights import convert
from emu_jax.weights import inception as names

TOLERANCE = 1e-4
NEEDED = ("note", "seed", "parameter_names", "parameter_shapes")


def quantities(file: dict[str, np.ndarray]) -> Iterator[Quantity]:
    """Quantities of an Inception file; raises UserError for an invalid note or weights."""
    if missing := [name for name in NEEDED if name not in file]:
        raise UserError(f"golden file: missing {', '.join(missing)}")
    try:
        note = json.loads(str(file["note"]))
        pairs = {
            name: (_normal_sets(name), pair["fid"]) for name, pair in note["distances"].items()
        }
        sets = {}
        by_layer = {}
        if "end_to_end" in note:
            sets = {which: _images(note["end_to_end"][which]) for which in "ab"}
            by_layer = note["end_to_end"]["fid_by_layer"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"golden file: its note cannot be followed ({error})") from error
    params = jax.tree.map(jnp.asarray, convert.from_theirs(names.table(), weights(file)))
    network = jax.jit(inception.apply)
    seen = set(NEEDED)

    def features(images):
        rows = [
            network(params, inception.prepare(jnp.asarray(image[None])))
            for image in rearrange(images, "m c h w -> m h w c")
        ]
        return jax.tree.map(lambda *layers: np.concatenate(layers), *rows)

    for name in [name for name in file if name.startswith("images_")]:
        for layer, ours in features(file[name]).items():
            if (theirs := f"features_{name.removeprefix('images_')}_{layer}") in file:
                seen |= {name, theirs}
                yield compare(theirs, file[theirs], ours, TOLERANCE)
    for name, (two, reference) in pairs.items():
        yield _distance(f"distance {name}", reference, *two)
    if sets:
        ours = {which: features(images) for which, images in sets.items()}
        for which, some in ours.items():
            if (theirs := f"features_end_to_end_{which}_mean") in file:
                seen.add(theirs)
                yield compare(
                    theirs, file[theirs], some["2048"].astype(np.float64).mean(0), TOLERANCE
                )
        for layer, reference in by_layer.items():
            yield _distance(
                f"distance end to end, {layer} features",
                reference,
                ours["a"][layer],
                ours["b"][layer],
            )
    yield from (Quantity(name, None, TOLERANCE) for name in file if name not in seen)


def weights(file: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Make the network's tensors by the file's rule, which differs from the Emu files'."""
    out = {}
    for name, shape in zip(
        map(str, file["parameter_names"]), json.loads(str(file["parameter_shapes"])), strict=True
    ):
        x = (
            np.random.RandomState((zlib.crc32(name.encode()) + int(file["seed"])) % 2**32)
            .standard_normal(shape)
            .astype(np.float32)
        )
        if name.endswith("running_var"):
            x = np.abs(x) + np.float32(0.5)
        elif len(shape) == 1:
            x = np.float32(0.1) * x + np.float32(name.endswith("weight"))
        else:
            x = (
                np.float32(1.5 if len(shape) == 4 else 1.0)
                * x
                / np.float32(np.sqrt(np.prod(shape[1:])))
            )
        out[name] = x
    return out


def _distance(name: str, reference: list[float | None], a: np.ndarray, b: np.ndarray) -> Quantity:
    """Compare our distance with those of up to three reference codes.

    The tolerance is at least the relative spread of the references.
    """
    known = np.array([value for value in reference if value is not None])
    ours = fid.distance(fid.statistics(a), fid.statistics(b))
    return Quantity(
        name,
        float(np.abs(known / ours - 1).max()),
        max(TOLERANCE, float(np.ptp(known) / known.min())),
    )


def _normal_sets(text: str) -> list[np.ndarray]:
    """Draw the two sets, shift + scale * |normal|, that a text describes.

    Such as "a: seed 1, n 500, shift 0, scale 1; b: seed 2, ...; dims 64". Raises ValueError.
    """
    sets = re.findall(r"seed (\d+), n (\d+), shift ([\d.]+), scale ([\d.]+)", text)
    dims = re.search(r"dims (\d+)", text)
    if len(sets) != 2 or not dims:
        raise ValueError(f"no two sets in {text!r}")
    return [
        (
            float(shift)
            + float(scale)
            * np.abs(np.random.RandomState(int(seed)).standard_normal((int(n), int(dims[1]))))
        ).astype(np.float32)
        for seed, n, shift, scale in sets
    ]


def _images(text: str) -> np.ndarray:
    """Draw the images that a text describes; raises ValueError.

    Such as "RandomState(11).randint(0, 256, (40, 3, 32, 32)).astype(uint8)", optionally with
    "// 2 + 32" before the cast.
    """
    drawn = re.search(r"RandomState\((\d+)\)\.randint\((\d+), (\d+), \(([\d, ]+)\)\)", text)
    if not drawn:
        raise ValueError(f"no images in {text!r}")
    images = np.random.RandomState(int(drawn[1])).randint(
        int(drawn[2]), int(drawn[3]), tuple(map(int, drawn[4].split(",")))
    )
    changed = re.search(r"// (\d+) \+ (\d+)", text)
    return (images // int(changed[1]) + int(changed[2]) if changed else images).astype(np.uint8)
