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
from emu_jax.models import module
from emu_jax.models.decoder import Canvas, DecoderConfig
from emu_jax.models.diffusion import Diffusion
from emu_jax.models.emu import EmuConfig
from emu_jax.tree import Tree

# what `draw` is told of config.drawing
SAMPLING_OPTIONS = ("sampler", "steps", "guidance", "rescale")
NEGATIVES = ("empty", "zeros")
# images at once
BATCH = 8


def sample(
    model_config: DecoderConfig,
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
    schedule = samplers.schedule_for(model_config.diffusion, sampler, steps)
    model = module.bind(
        Canvas, model_config, {tower: params[tower] for tower in ("unet", "vae") if tower in params}
    )
    unconditional = (
        jnp.zeros_like(condition)
        if negative is None
        else jnp.broadcast_to(negative, condition.shape)
    )
    denoise = samplers.guided_denoiser(
        model_config.diffusion,
        model.predict,
        condition,
        unconditional,
        guidance=guidance,
        rescale=rescale,
    )
    return model.pixels(
        samplers.SAMPLERS[sampler].run(
            denoise, samplers.initial_noise(seeds, model_config.latents), schedule
        )
    )


def check_sampling(diffusion: Diffusion, sampling: dict) -> None:
    """Raises UserError for a config.drawing that says what is not there."""
    samplers.schedule_for(diffusion, sampling["sampler"], sampling["steps"])
    if sampling["negative"] not in NEGATIVES:
        raise UserError(
            f"drawing.negative={sampling['negative']!r} is not one of {', '.join(NEGATIVES)}"
        )


class DiffusionDecoder:
    """A trained decoder in use: paint(visual) are images, the first with the seed `seed`, the
    next with seed + 1, ...
    """

    def __init__(
        self,
        model_config: DecoderConfig,
        params: Tree,
        sampling: dict,
        *,
        negative: Float[np.ndarray, "N D"] | None = None,
        seed: int = 0,
        mesh: jax.sharding.Mesh | None = None,
        safety_checker: Callable[[UInt8[np.ndarray, "B h w 3"]], Bool[np.ndarray, "B"]]
        | None = None,
    ):
        """sampling: the fields SAMPLING_OPTIONS of config.drawing. check: says which images may be shown (a safety
        checker); the others come out black.
        """
        self.model_config = model_config
        self.params = params
        self.sampling = sampling
        self.negative = negative
        self.seed = seed
        self.mesh = mesh
        self.safety_checker = safety_checker
        self.rows = BATCH if mesh is None else -(-BATCH // mesh.size) * mesh.size
        self._sample = jax.jit(partial(sample, model_config, **sampling))

    def __call__(
        self, visual: Float[np.ndarray, "M N D"], seeds: Int[np.ndarray, "M"] | None = None
    ) -> UInt8[np.ndarray, "M h w 3"]:
        if seeds is None:
            seeds = self.seed + np.arange(len(visual))
            self.seed += len(visual)
        found = [np.zeros((0, self.model_config.image, self.model_config.image, 3), np.uint8)]
        for start in range(0, len(visual), self.rows):
            rows = np.minimum(
                np.arange(start, start + (self.rows if self.mesh or len(visual) > 1 else 1)),
                len(visual) - 1,
            )
            with nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
                images = np.asarray(
                    self._sample(self.params, jnp.asarray(visual[rows]), seeds[rows], self.negative)
                )
            found.append(images[: len(visual) - start])
        images = np.concatenate(found)
        return (
            images
            if self.safety_checker is None
            else np.where(self.safety_checker(images)[:, None, None, None], images, 0).astype(
                np.uint8
            )
        )


def load(
    directory: str,
    like: EmuConfig,
    *,
    mesh: jax.sharding.Mesh | None = None,
    overrides: dict | None = None,
    empty_prompt: Callable[[], Float[np.ndarray, "N D"]] | None = None,
    seed: int = 0,
) -> DiffusionDecoder:
    """The painter of a run of the stage `decoder`, or of one of its checkpoints, with averaged
    weights where it has them.

    like: the model whose visual tokens it is to draw. overrides: fields of config.drawing that differ
    from its config's. empty_prompt(): what that model makes of the empty prompt, asked where guidance
    leads unconditional from it. Raises UserError for no decoder, or one for other visual tokens.
    """
    config = checkpoint.read_config(directory)
    if config["stage"] != "decoder":
        raise UserError(
            f"the checkpoint in '{directory}' is of the stage {config['stage']!r}, not a decoder's"
        )
    model_config = DecoderConfig.of(from_dict(config["model"]).to_dict())
    takes, makes = ([each.resampler.tokens, each.llama.width] for each in (model_config.emu, like))
    if takes != makes:
        raise UserError(
            f"the decoder in '{directory}' draws visual tokens {takes}, and the model makes {makes} (their number and width)"
        )
    sampling = config["drawing"] | (overrides or {})
    check_sampling(model_config.diffusion, sampling)
    params = checkpoint.restore_params(
        directory,
        abstract_params(model_config, mesh, model_config.emu.compute),
        ema=config["optim"]["ema"] > 0,
    )
    negative = (
        empty_prompt()
        if empty_prompt and sampling["negative"] == "empty" and sampling["guidance"] != 1
        else None
    )
    return DiffusionDecoder(
        model_config,
        params,
        {name: sampling[name] for name in SAMPLING_OPTIONS},
        negative=negative,
        seed=seed,
        mesh=mesh,
    )


def abstract_params(
    model_config: DecoderConfig, mesh: jax.sharding.Mesh | None, matrices: str
) -> Tree:
    """Shapes of the towers that draw, laid out by the table of training, with matrices in the dtype
    `matrices`.
    """
    shapes = module.abstract(Canvas, model_config)
    places = dict(tree.leaves(sharding.shardings(mesh, sharding.specs(shapes)))) if mesh else {}

    def dtype(path, leaf):
        return matrices if sharding.is_matrix(path) else leaf.dtype

    return tree.unflatten(
        {
            path: jax.ShapeDtypeStruct(leaf.shape, dtype(path, leaf), sharding=places.get(path))
            for path, leaf in tree.leaves(shapes)
        }
    )
