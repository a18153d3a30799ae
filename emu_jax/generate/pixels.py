"""Pictures from visual tokens: the decoder's U-Net, sampled with guidance, and its autoencoder.
Read next: samplers.py.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from emu_jax import checkpoint, sharding, tree
from emu_jax.config import UserError, from_dict
from emu_jax.generate import samplers
from emu_jax.models import emu
from emu_jax.models.decoder import Canvas, DecoderSize
from emu_jax.models.diffusion import Diffusion
from emu_jax.models.emu import EmuSize
from emu_jax.tree import Tree

# what `draw` is told of config.drawing
HOW = ("sampler", "steps", "guidance", "rescale")
NEGATIVES = ("empty", "zeros")
# pictures at once
BATCH = 8


def draw(
    size: DecoderSize,
    params: Tree,
    condition: Float[Array, "B N D"],
    seeds: Int[Array, "B"],
    negative: Float[Array, "N D"] | None = None,
    *,
    sampler: str,
    steps: int,
    guidance: float,
    rescale: float = 0.0,
) -> UInt8[Array, "B h w 3"]:
    """A picture of each condition, a function of its seed. `negative`: from what guidance leads
    away: the visual tokens that the model makes of the empty prompt (Emu's way), or None for the
    zeros of a dropped condition. Raises UserError for a sampler or steps that are not there.
    """
    plan = samplers.plan_of(size.diffusion, sampler, steps)
    model = emu.bind(
        Canvas, size, {tower: params[tower] for tower in ("unet", "vae") if tower in params}
    )
    away = (
        jnp.zeros_like(condition)
        if negative is None
        else jnp.broadcast_to(negative, condition.shape)
    )
    denoise = samplers.denoiser(
        size.diffusion, model.predict, condition, away, guidance=guidance, rescale=rescale
    )
    return model.pixels(
        samplers.SAMPLERS[sampler].run(denoise, samplers.noise(seeds, size.latents), plan)
    )


def check(diffusion: Diffusion, how: dict) -> None:
    """Raises UserError for a config.drawing that says what is not there."""
    samplers.plan_of(diffusion, how["sampler"], how["steps"])
    if how["negative"] not in NEGATIVES:
        raise UserError(
            f"drawing.negative={how['negative']!r} is not one of {', '.join(NEGATIVES)}"
        )


class Painter:
    """A trained decoder in use: paint(visual) are pictures, the first with the seed `seed`, the
    next with seed + 1, ...
    """

    def __init__(
        self,
        size: DecoderSize,
        params: Tree,
        how: dict,
        *,
        negative: Float[np.ndarray, "N D"] | None = None,
        seed: int = 0,
        mesh: jax.sharding.Mesh | None = None,
        check: Callable[[UInt8[np.ndarray, "B h w 3"]], Bool[np.ndarray, "B"]] | None = None,
    ):
        """how: the fields HOW of config.drawing. check: says which pictures may be shown (a safety
        checker); the others come out black.
        """
        self.size = size
        self.params = params
        self.how = how
        self.negative = negative
        self.seed = seed
        self.mesh = mesh
        self.check = check
        self.rows = BATCH if mesh is None else -(-BATCH // mesh.size) * mesh.size
        self._draw = jax.jit(partial(draw, size, **how))

    def __call__(
        self, visual: Float[np.ndarray, "M N D"], seeds: Int[np.ndarray, "M"] | None = None
    ) -> UInt8[np.ndarray, "M h w 3"]:
        if seeds is None:
            seeds = self.seed + np.arange(len(visual))
            self.seed += len(visual)
        found = [np.zeros((0, self.size.image, self.size.image, 3), np.uint8)]
        for start in range(0, len(visual), self.rows):
            rows = np.minimum(
                np.arange(start, start + (self.rows if self.mesh or len(visual) > 1 else 1)),
                len(visual) - 1,
            )
            with nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
                pictures = np.asarray(
                    self._draw(self.params, jnp.asarray(visual[rows]), seeds[rows], self.negative)
                )
            found.append(pictures[: len(visual) - start])
        pictures = np.concatenate(found)
        return (
            pictures
            if self.check is None
            else np.where(self.check(pictures)[:, None, None, None], pictures, 0).astype(np.uint8)
        )


def load(
    directory: str,
    like: EmuSize,
    *,
    mesh: jax.sharding.Mesh | None = None,
    given: dict | None = None,
    empty: Callable[[], Float[np.ndarray, "N D"]] | None = None,
    seed: int = 0,
) -> Painter:
    """The painter of a run of the stage `decoder`, or of one of its checkpoints, with averaged
    weights where it has them.

    like: the model whose visual tokens it is to draw. given: fields of config.drawing that differ
    from its config's. empty(): what that model makes of the empty prompt, asked where guidance
    leads away from it. Raises UserError for no decoder, or one for other visual tokens.
    """
    config = checkpoint.read_config(directory)
    if config["stage"] != "decoder":
        raise UserError(
            f"the checkpoint in '{directory}' is of the stage {config['stage']!r}, not a decoder's"
        )
    size = DecoderSize.of(from_dict(config["model"]).to_dict())
    takes, makes = ([each.resampler.tokens, each.llama.width] for each in (size.emu, like))
    if takes != makes:
        raise UserError(
            f"the decoder in '{directory}' draws visual tokens {takes}, and the model makes {makes} (their number and width)"
        )
    how = config["drawing"] | (given or {})
    check(size.diffusion, how)
    params = checkpoint.restore_params(
        directory, abstract_params(size, mesh, size.emu.compute), ema=config["optim"]["ema"] > 0
    )
    negative = empty() if empty and how["negative"] == "empty" and how["guidance"] != 1 else None
    return Painter(
        size, params, {name: how[name] for name in HOW}, negative=negative, seed=seed, mesh=mesh
    )


def abstract_params(size: DecoderSize, mesh: jax.sharding.Mesh | None, matrices: str) -> Tree:
    """Shapes of the towers that draw, laid out by the table of training, with matrices in the dtype
    `matrices`.
    """
    shapes = jax.eval_shape(partial(emu.init, Canvas, size), jax.random.key(0))
    places = dict(tree.leaves(sharding.shardings(mesh, sharding.specs(shapes)))) if mesh else {}

    def dtype(path, leaf):
        return matrices if sharding.is_matrix(path) else leaf.dtype

    return tree.unflatten(
        {
            path: jax.ShapeDtypeStruct(leaf.shape, dtype(path, leaf), sharding=places.get(path))
            for path, leaf in tree.leaves(shapes)
        }
    )
