"""The weights that a run starts from: those of other runs, or of imports (config.init), fitted to
this run's model.

What the model has beyond those checkpoints stays fresh. Rows of new tokens are the mean of the old
ones, as the release makes them; matrices that the model stores in few bits are rounded, and how far
off that puts them is said. Read next: train.py.
"""

import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from emu_jax import checkpoint, sharding, tree
from emu_jax.config import UserError
from emu_jax.data.loader import Loader
from emu_jax.models import lora
from emu_jax.models.unet import CONDITIONED
from emu_jax.step import Program

log = logging.getLogger(__name__)

# images behind the constants that standardise visual tokens
STATS_IMAGES = 2048

ADDED = "llama/(embed|lm_head)/added"


def init_from_checkpoint(init: str, params: tree.Tree) -> tuple[tree.Tree, set[str]]:
    """Fresh parameters with what the checkpoints of config.init hold in their place, and the paths
    of that; of two that hold a leaf the later counts.
    """
    loaded = {
        path: leaf
        for directory in filter(None, init.split(","))
        for path, leaf in tree.leaves(load_weights(directory, params))
    }
    return tree.unflatten(dict(tree.leaves(params)) | loaded), set(loaded)


def load_weights(directory: str, params: tree.Tree) -> tree.Tree:
    """The leaves of the checkpoint in `directory` that `params` (arrays, or shapes with shardings)
    has too, laid out like those; says which towers came, which stay fresh and which are not used. A
    decoder's maps of its condition stay fresh where that has another width. Raises UserError where
    another shape differs or nothing is shared.
    """
    there = checkpoint.param_shapes(directory)
    here = dict(tree.leaves(params))
    wider = [
        path
        for path, leaf in here.items()
        if re.fullmatch(CONDITIONED, path) and there.get(path, leaf.shape) != leaf.shape
    ]
    if wider:
        log.warning(
            "init %s: %d maps of the condition stay fresh, for it has the width %d there and %d here: %s",
            directory,
            len(wider),
            there[wider[0]][0],
            here[wider[0]].shape[0],
            ", ".join(wider),
        )
    homeless = [
        path
        for path in there
        if path not in here
        and path.endswith(("/a", *sharding.QUANTIZED))
        and path.rpartition("/")[0] + "/w" in here
    ]
    if homeless:
        raise UserError(
            f"init={directory!r} has {homeless[0]} and this model no place for it: set config.model.lora as that run did, or make plain "
            f"matrices of it: python -m emu_jax.weights merge --from={directory} --to=DIR"
        )
    grown = [
        path
        for path, leaf in here.items()
        if re.fullmatch(ADDED, path) and path in there and there[path][0] < leaf.shape[0]
    ]
    wanted = {
        path: _like(leaf, there[path] if path in grown else leaf.shape)
        for path, leaf in here.items()
        if path in there and path not in wider
    }

    def towers(paths):
        return ", ".join(sorted({path.split("/")[0] for path in paths})) or "nothing"

    rounded = [
        path
        for path in here
        if path.endswith(sharding.QUANTIZED)
        and path not in there
        and sharding.matrix_path(path) in there
    ]
    if not wanted and not rounded:
        raise UserError(
            f"init={directory!r} has no parameter of this model; it holds {towers(there)}"
        )
    loaded = (
        dict(tree.leaves(checkpoint.restore_params(directory, tree.unflatten(wanted))))
        if wanted
        else {}
    )
    for path in grown:
        base = loaded.get(path.replace("/added", "/base"))
        loaded[path] = jax.jit(
            _with_mean_rows, static_argnums=2, out_shardings=here[path].sharding
        )(loaded[path], base, here[path].shape[0])
        log.info(
            "init %s: %d new rows of %s are the mean of its %d old ones",
            directory,
            here[path].shape[0] - there[path][0],
            path.split("/")[1],
            len(base) + there[path][0],
        )
    loaded |= _rounded(directory, rounded, here, there)
    fresh = here.keys() - loaded.keys()
    idle = there.keys() - {sharding.matrix_path(path) for path in loaded} - loaded.keys()
    log.info(
        "init %s: loaded %s; fresh: %s; not used: %s",
        directory,
        towers(loaded),
        towers(fresh),
        towers(idle),
    )
    return tree.unflatten(loaded)


def measure_visual_stats(
    program: Program, params: tree.Tree, loader: Loader, layout: tree.Tree
) -> tree.Tree:
    """Mean and deviation of each dimension of each visual token over STATS_IMAGES training images, for
    models that standardise them. Several processes all read the same images: `loader` is that of
    one process.
    """
    encode = jax.jit(
        lambda params, images: sharding.constrain(
            program.bind(params).encode(images).astype(jnp.float32), PartitionSpec()
        )
    )
    found: list[np.ndarray] = []
    for item in loader:
        images = item.batch.images[item.batch.has_image]
        # one shape for every batch
        rows = len(item.batch.images) * item.batch.images.shape[1]
        padded = np.concatenate(
            [images, np.zeros((rows - len(images), *images.shape[1:]), np.uint8)]
        )
        found.append(np.asarray(encode(params, padded))[: len(images)])
        if sum(map(len, found)) >= STATS_IMAGES:
            break
    loader.close()
    tokens = np.concatenate(found)[:STATS_IMAGES].astype(np.float64)
    stats = {"mean": tokens.mean(0), "std": np.maximum(tokens.std(0), 1e-4)}
    log.info(
        "visual tokens standardised by the mean and deviation of %d images; mean deviation %.3g",
        len(tokens),
        stats["std"].mean(),
    )
    return {
        name: jax.device_put(value.astype(np.float32), layout[name])
        for name, value in stats.items()
    }


def _like(leaf: jax.Array | jax.ShapeDtypeStruct, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding)


def _with_mean_rows(added: jax.Array, base: jax.Array, count: int) -> jax.Array:
    """The added rows, `count` of them: those that are lacking are the mean of all others."""
    total = base.astype(jnp.float32).sum(0) + added.astype(jnp.float32).sum(0)
    mean = (total / (len(base) + len(added))).astype(added.dtype)
    return jnp.concatenate([added, jnp.tile(mean, (count - len(added), 1))])


def _rounded(
    directory: str, paths: list[str], here: dict, there: dict[str, tuple[int, ...]]
) -> dict[str, jax.Array]:
    """The codes at `paths` and their scales, of a checkpoint that holds the matrices; one matrix at
    a time.
    """
    found: dict[str, jax.Array] = {}
    errors = {}
    for path in paths:
        matrix, where, storage = sharding.matrix_path(path), *path.rpartition("/")[::2]
        at = {name: here[f"{where}/{name}"].sharding for name in (storage, "absmax")}
        whole = jax.ShapeDtypeStruct(there[matrix], jnp.float32, sharding=at[storage])
        w = dict(
            tree.leaves(checkpoint.restore_params(directory, tree.unflatten({matrix: whole})))
        )[matrix]
        codes, absmax = jax.jit(
            _quantised, static_argnums=1, out_shardings=(at[storage], at["absmax"])
        )(w, storage)
        if codes.shape != here[path].shape:
            raise UserError(
                f"init={directory!r}: {matrix} is {list(there[matrix])} there, which does not make {path} {list(here[path].shape)}"
            )
        errors[matrix] = float(_error(w, codes, absmax))
        found |= {path: codes, f"{where}/absmax": absmax}
    if errors:
        worst = max(errors, key=errors.get)
        log.info(
            "init %s: %d matrices stored as %s, off by %.2f %% of their root mean square, at most %.2f %% (%s)",
            directory,
            len(errors),
            storage,
            100 * np.mean(list(errors.values())),
            100 * errors[worst],
            worst,
        )
    return found


def _quantised(w: jax.Array, storage: str) -> tuple[jax.Array, jax.Array]:
    """lora.quantize, a layer at a time: in one piece its steps would be held for the whole
    stack.
    """
    return jax.lax.map(lambda layer: lora.quantize(layer, storage), w)


@jax.jit
def _error(w: jax.Array, codes: jax.Array, absmax: jax.Array) -> jax.Array:
    """Root mean square of what storing w changes, of that of w."""

    def layer(one):
        return (jnp.square(lora.dequantize(*one[1:]) - one[0]).mean(), jnp.square(one[0]).mean())

    off, whole = jax.lax.map(layer, (w, codes, absmax))
    return jnp.sqrt(off.mean() / whole.mean())
