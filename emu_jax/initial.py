"""The weights that a run starts from: those of config.init, made to fit the model.

Parameters that those checkpoints lack stay freshly initialised. Rows of new tokens become the mean
of the old rows, as in the release. Matrices that the model stores in 4 or 8 bits are quantized, and
the error is logged. Read next: train.py.
"""

import logging
import re
from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, UInt8

from emu_jax import checkpoint, sharding, tree
from emu_jax.config import UserError
from emu_jax.data.loader import Loader
from emu_jax.models import lora
from emu_jax.models.unet import CONDITIONED
from emu_jax.step import Program

log = logging.getLogger(__name__)

# Number of images from which the constants that standardise visual tokens are measured.
STATS_IMAGES = 2048
# Regex for the paths of the vocabulary rows that Emu adds.
ADDED = "llama/(embed|lm_head)/added"


def init_from_checkpoint(init: str, params: tree.Tree) -> tuple[tree.Tree, set[str]]:
    """Replace fresh parameters by those in the checkpoints of config.init.

    init: folders separated by commas; if two of them hold a parameter, the later one wins. Returns
    the parameters and the paths that were loaded.
    """
    loaded: dict[str, jax.Array] = {}
    for directory in filter(None, init.split(",")):
        loaded |= dict(tree.leaves(load_weights(directory, params)))
    return tree.unflatten(dict(tree.leaves(params)) | loaded), set(loaded)


def load_weights(directory: str, params: tree.Tree) -> tree.Tree:
    """Load the parameters that `directory` and `params` share, laid out as in `params`.

    params: arrays, or shapes with shardings. Logs which towers were loaded, which stay fresh, and
    which towers of the checkpoint are not used. Projections of a decoder's condition stay fresh if
    the condition has a different width in the checkpoint. Raises UserError if any other shape
    differs, or if no parameter is shared.
    """
    there = checkpoint.param_shapes(directory)
    here = dict(tree.leaves(params))
    widened = _maps_of_other_widths(directory, here, there)
    _check_adapters(directory, here, there)
    grown = [
        path
        for path, leaf in here.items()
        if re.fullmatch(ADDED, path) and path in there and there[path][0] < leaf.shape[0]
    ]
    wanted = {
        path: _shape_like(leaf, there[path] if path in grown else leaf.shape)
        for path, leaf in here.items()
        if path in there and path not in widened
    }
    quantized = [
        path
        for path in here
        if path.endswith(sharding.QUANTIZED)
        and path not in there
        and sharding.matrix_path(path) in there
    ]
    if not wanted and not quantized:
        raise UserError(
            f"init={directory!r} has no parameter of this model; it holds {_towers(there)}"
        )

    loaded = {}
    if wanted:
        loaded = dict(tree.leaves(checkpoint.restore_params(directory, tree.unflatten(wanted))))
    for path in grown:
        loaded[path] = _add_mean_rows(directory, path, here[path], loaded)
    loaded |= _quantize(directory, quantized, here, there)

    used = {sharding.matrix_path(path) for path in loaded} | loaded.keys()
    log.info(
        "init %s: loaded %s; fresh: %s; not used: %s",
        directory,
        _towers(loaded),
        _towers(here.keys() - loaded.keys()),
        _towers(there.keys() - used),
    )
    return tree.unflatten(loaded)


def _maps_of_other_widths(directory: str, here: dict, there: dict) -> list[str]:
    """Projections of a decoder's condition that have a different width in the checkpoint."""
    widened = [
        path
        for path, leaf in here.items()
        if re.fullmatch(CONDITIONED, path) and there.get(path, leaf.shape) != leaf.shape
    ]
    if widened:
        log.warning(
            "init %s: %d projections of the condition stay fresh, because its width is %d there "
            "and %d here: %s",
            directory,
            len(widened),
            there[widened[0]][0],
            here[widened[0]].shape[0],
            ", ".join(widened),
        )
    return widened


def _check_adapters(directory: str, here: dict, there: dict) -> None:
    """Raise UserError if a plain matrix of the model has LoRA or codes in the checkpoint."""
    for path in there:
        parent, _, name = path.rpartition("/")
        if path not in here and name in ("a", *sharding.QUANTIZED) and f"{parent}/w" in here:
            raise UserError(
                f"init={directory!r} has {path}, which this model does not: set config.model.lora "
                "as in that run, or merge it into plain matrices: python -m emu_jax.weights merge "
                f"--from={directory} --to=DIR"
            )


def _towers(paths: Iterable[str]) -> str:
    return ", ".join(sorted({path.split("/")[0] for path in paths})) or "nothing"


def _add_mean_rows(directory: str, path: str, leaf: jax.Array, loaded: dict) -> jax.Array:
    """Rows of the added tokens; rows missing in the checkpoint become the mean of its rows."""
    added = loaded[path]
    base = loaded[path.replace("/added", "/base")]
    count = leaf.shape[0]
    log.info(
        "init %s: %d new rows of %s are the mean of its %d old ones",
        directory,
        count - len(added),
        path.split("/")[1],
        len(base) + len(added),
    )
    extend = jax.jit(_with_mean_rows, static_argnums=2, out_shardings=leaf.sharding)
    return extend(added, base, count)


def measure_visual_stats(
    program: Program, params: tree.Tree, loader: Loader, layout: tree.Tree
) -> tree.Tree:
    """Mean and standard deviation of each dimension of each token, over STATS_IMAGES images.

    For models that standardise their visual tokens. loader: the training data as a single process
    would read it, so that all processes see the same images. layout: shardings of the result.
    """
    found: list[np.ndarray] = []
    for item in loader:
        images = item.batch.images[item.batch.has_image]
        # Pad, so that every batch has the same shape.
        slots = item.batch.has_image.size
        padding = np.zeros((slots - len(images), *images.shape[1:]), np.uint8)
        tokens = _encode(program, params, np.concatenate([images, padding]))
        found.append(np.asarray(tokens)[: len(images)])
        if sum(map(len, found)) >= STATS_IMAGES:
            break
    loader.close()
    tokens = np.concatenate(found)[:STATS_IMAGES].astype(np.float64)
    stats = {"mean": tokens.mean(0), "std": np.maximum(tokens.std(0), 1e-4)}
    log.info(
        "visual tokens are standardised by the mean and standard deviation over %d images; their "
        "mean standard deviation is %.3g",
        len(tokens),
        stats["std"].mean(),
    )
    return {
        name: jax.device_put(value.astype(np.float32), layout[name])
        for name, value in stats.items()
    }


@partial(jax.jit, static_argnums=0)
def _encode(
    program: Program, params: tree.Tree, images: UInt8[Array, "m h w 3"]
) -> Float[Array, "m N D"]:
    """Visual tokens in float32, replicated."""
    tokens = program.bind(params).encode(images).astype(jnp.float32)
    return sharding.constrain(tokens, PartitionSpec())


def _shape_like(
    leaf: jax.Array | jax.ShapeDtypeStruct, shape: tuple[int, ...]
) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding)


def _with_mean_rows(added: jax.Array, base: jax.Array, count: int) -> jax.Array:
    """`added`, filled up to `count` rows with the mean of all rows."""
    total = base.astype(jnp.float32).sum(0) + added.astype(jnp.float32).sum(0)
    mean = (total / (len(base) + len(added))).astype(added.dtype)
    return jnp.concatenate([added, jnp.tile(mean, (count - len(added), 1))])


def _quantize(
    directory: str, paths: list[str], here: dict, there: dict[str, tuple[int, ...]]
) -> dict[str, jax.Array]:
    """Quantize the checkpoint's plain matrices, one at a time: {path: codes or scales}."""
    found: dict[str, jax.Array] = {}
    errors: dict[str, float] = {}
    storage = ""
    for path in paths:
        matrix = sharding.matrix_path(path)
        parent, _, storage = path.rpartition("/")
        scales = f"{parent}/absmax"
        shape = jax.ShapeDtypeStruct(there[matrix], jnp.float32, sharding=here[path].sharding)
        restored = checkpoint.restore_params(directory, tree.unflatten({matrix: shape}))
        w = dict(tree.leaves(restored))[matrix]
        layout = (here[path].sharding, here[scales].sharding)
        codes, absmax = jax.jit(_quantize_layers, static_argnums=1, out_shardings=layout)(
            w, storage
        )
        if codes.shape != here[path].shape:
            raise UserError(
                f"init={directory!r}: {matrix} has the shape {list(there[matrix])} there, which "
                f"does not give {path} the shape {list(here[path].shape)}"
            )
        errors[matrix] = float(_relative_error(w, codes, absmax))
        found |= {path: codes, scales: absmax}
    if errors:
        worst = max(errors, key=lambda matrix: errors[matrix])
        log.info(
            "init %s: %d matrices stored as %s; error relative to their root mean square: %.2f %% "
            "on average, at most %.2f %% (%s)",
            directory,
            len(errors),
            storage,
            100 * np.mean(list(errors.values())),
            100 * errors[worst],
            worst,
        )
    return found


def _quantize_layers(w: jax.Array, storage: str) -> tuple[jax.Array, jax.Array]:
    """Apply lora.quantize layer by layer: temporaries of all layers would not fit in memory."""
    return jax.lax.map(lambda layer: lora.quantize(layer, storage), w)


@jax.jit
def _relative_error(w: jax.Array, codes: jax.Array, absmax: jax.Array) -> jax.Array:
    """Root mean square of the quantization error of w, relative to that of w."""

    def squares(layer):
        w, codes, absmax = layer
        error = lora.dequantize(codes, absmax) - w
        return jnp.square(error).mean(), jnp.square(w).mean()

    error, size = jax.lax.map(squares, (w, codes, absmax))
    return jnp.sqrt(error.mean() / size.mean())
