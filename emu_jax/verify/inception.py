"""FID's Inception against torch-fidelity: features after five layers, and Frechet distances, on a golden file's images."""
import json
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
INPUTS = {"note", "seed", "parameter_names", "parameter_shapes"}


def quantities(file: dict[str, np.ndarray]) -> Iterator[Quantity]:
    """Every quantity of an Inception file. Raises UserError for one that lacks its note, its weights' rule or its images."""
    if missing := [name for name in ("note", "seed", "parameter_names", "parameter_shapes") if name not in file]:
        raise UserError(f"golden file: missing {', '.join(missing)}")
    try:
        note = json.loads(str(file["note"]))
        pairs = note["distances"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"golden file: its note lacks {error}") from error
    params = jax.tree.map(jnp.asarray, convert.from_theirs(names.table(), weights(file)))
    run, seen = jax.jit(inception.apply), set(INPUTS)
    for name in [name for name in file if name.startswith("images_")]:
        case, images = name.removeprefix("images_"), rearrange(file[name], "m c h w -> m h w c")
        rows = [run(params, jnp.asarray(image[None])) for image in images]
        seen.add(name)
        for layer in rows[0]:
            if (theirs := f"features_{case}_{layer}") in file:
                seen.add(theirs)
                yield compare(theirs, file[theirs], np.concatenate([row[layer] for row in rows]), TOLERANCE)
    for name, pair in pairs.items():
        a = _random(1, pair["n"], pair["dims"], 0.0, 1.0)
        b = _random(2, pair["m"], pair["dims"], pair["shift"], pair["scale"])
        yield _distance(f"distance {name}", pair["fid"], fid.distance(fid.statistics(a), fid.statistics(b)))
    if "end_to_end" in note:
        yield from _end_to_end(file, note["end_to_end"], run, params)
        seen |= {"features_end_to_end_a_mean", "features_end_to_end_b_mean"}
    yield from (Quantity(name, None, TOLERANCE) for name in file if name not in seen)
