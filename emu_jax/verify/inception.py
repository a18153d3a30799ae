"""Compare FID's Inception with torch-fidelity: features and Frechet distances.

Read next: ../evaluate/metrics/fid.py.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from emu_jax.config import UserError
from emu_jax.evaluate.metrics import fid
from emu_jax.models import inception
from emu_jax.verify.golden import Quantity, compare, standard_normal
from emu_jax.weights import convert
from emu_jax.weights import inception as names

TOLERANCE = 1e-4
NEEDED = ("note", "seed", "parameter_names", "parameter_shapes")

# Images [M, 3, h, w] -> {layer: features [M, C]}.
Features = Callable[[np.ndarray], dict[str, np.ndarray]]


class Distance(NamedTuple):
    """Two sets of features, and their distances by up to three reference codes."""

    a: np.ndarray
    b: np.ndarray
    reference: list[float | None]


class Note(NamedTuple):
    """The contents of a file's note."""

    # By name.
    distances: dict[str, Distance]
    # Two sets of images, "a" and "b", and the distances of their features by layer; may be empty.
    images: dict[str, np.ndarray]
    image_distances: dict[str, list[float | None]]


def quantities(file: dict[str, np.ndarray]) -> Iterator[Quantity]:
    """Quantities of an Inception file. Raises UserError for an invalid note or weights."""
    if missing := [name for name in NEEDED if name not in file]:
        raise UserError(f"golden file: missing {', '.join(missing)}")
    note = _parse_note(str(file["note"]))
    features = _make_features(weights(file))
    compared = set(NEEDED)
    for name in file:
        if not name.startswith("images_"):
            continue
        for layer, ours in features(file[name]).items():
            reference = f"features_{name.removeprefix('images_')}_{layer}"
            if reference in file:
                compared |= {name, reference}
                yield compare(reference, file[reference], ours, TOLERANCE)
    for name, distance in note.distances.items():
        yield _distance(f"distance {name}", *distance)
    if note.images:
        ours = {name: features(images) for name, images in note.images.items()}
        for name, by_layer in ours.items():
            reference = f"features_end_to_end_{name}_mean"
            if reference in file:
                compared.add(reference)
                mean = by_layer["2048"].astype(np.float64).mean(0)
                yield compare(reference, file[reference], mean, TOLERANCE)
        for layer, references in note.image_distances.items():
            name = f"distance end to end, {layer} features"
            yield _distance(name, ours["a"][layer], ours["b"][layer], references)
    for name in file:
        if name not in compared:
            yield Quantity(name, None, TOLERANCE)


def _parse_note(text: str) -> Note:
    """Parse a file's note. Raises UserError if it does not have the expected form."""
    try:
        note = json.loads(text)
        distances = {}
        for name, pair in note["distances"].items():
            a, b = _normal_sets(name)
            distances[name] = Distance(a, b, pair["fid"])
        images = {}
        image_distances = {}
        if "end_to_end" in note:
            images = {name: _images(note["end_to_end"][name]) for name in "ab"}
            image_distances = note["end_to_end"]["fid_by_layer"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"golden file: its note cannot be parsed ({error})") from error
    return Note(distances, images, image_distances)


def _make_features(tensors: dict[str, np.ndarray]) -> Features:
    """A function that computes features, with the network's weights from `tensors`."""
    params = jax.tree.map(jnp.asarray, convert.from_theirs(names.table(), tensors))
    network = jax.jit(inception.apply)

    def features(images: np.ndarray) -> dict[str, np.ndarray]:
        rows: dict[str, list] = {}
        for image in rearrange(images, "m c h w -> m h w c"):
            prepared = inception.prepare(jnp.asarray(image[None]))
            for layer, row in network(params, prepared).items():
                rows.setdefault(layer, []).append(row)
        return {layer: np.concatenate(parts) for layer, parts in rows.items()}

    return features


def weights(file: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Make the network's tensors by the file's rule, which differs from that of golden.py."""
    tensors = {}
    shapes = json.loads(str(file["parameter_shapes"]))
    for name, shape in zip(map(str, file["parameter_names"]), shapes, strict=True):
        x = standard_normal(name, shape, int(file["seed"]))
        if name.endswith("running_var"):
            x = np.abs(x) + np.float32(0.5)
        elif len(shape) == 1:
            mean = np.float32(name.endswith("weight"))
            x = np.float32(0.1) * x + mean
        else:
            gain = np.float32(1.5 if len(shape) == 4 else 1.0)
            x = gain * x / np.float32(np.sqrt(np.prod(shape[1:])))
        tensors[name] = x
    return tensors


def _distance(name: str, a: np.ndarray, b: np.ndarray, reference: list[float | None]) -> Quantity:
    """Compare our distance with those of the reference codes that have one.

    Where the references differ from one another, that much is tolerated.
    """
    known = np.array([value for value in reference if value is not None])
    ours = fid.distance(fid.statistics(a), fid.statistics(b))
    error = np.abs(known / ours - 1).max()
    spread = np.ptp(known) / known.min()
    return Quantity(name, float(error), max(TOLERANCE, float(spread)))


def _normal_sets(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Draw two sets [n, dims] of shift + scale * |normal|, as a text describes them.

    For example "a: seed 1, n 500, shift 0, scale 1; b: seed 2, ...; dims 64". Raises ValueError.
    """
    sets = re.findall(r"seed (\d+), n (\d+), shift ([\d.]+), scale ([\d.]+)", text)
    dims = re.search(r"dims (\d+)", text)
    if len(sets) != 2 or not dims:
        raise ValueError(f"no two sets in {text!r}")
    drawn = []
    for seed, n, shift, scale in sets:
        normal = np.random.RandomState(int(seed)).standard_normal((int(n), int(dims[1])))
        drawn.append((float(shift) + float(scale) * np.abs(normal)).astype(np.float32))
    a, b = drawn
    return a, b


def _images(text: str) -> np.ndarray:
    """Draw the images [M, 3, h, w] that a text describes. Raises ValueError.

    For example "RandomState(11).randint(0, 256, (40, 3, 32, 32)).astype(uint8)", optionally with
    "// 2 + 32" before the cast.
    """
    drawn = re.search(r"RandomState\((\d+)\)\.randint\((\d+), (\d+), \(([\d, ]+)\)\)", text)
    if not drawn:
        raise ValueError(f"no images in {text!r}")
    seed, low, high = (int(number) for number in drawn.groups()[:3])
    shape = tuple(map(int, drawn[4].split(",")))
    images = np.random.RandomState(seed).randint(low, high, shape)
    if changed := re.search(r"// (\d+) \+ (\d+)", text):
        images = images // int(changed[1]) + int(changed[2])
    return images.astype(np.uint8)
