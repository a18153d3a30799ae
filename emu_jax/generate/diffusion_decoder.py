"""Visual tokens to pixels: guided diffusion of latents, then the autoencoder.

Stable Diffusion with visual tokens in place of text (sections 2.1 and 3.3 of the paper). Read next:
samplers.py.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from emu_jax import checkpoint
from emu_jax.batching import pad_batch
from emu_jax.config import UserError, from_dict
from emu_jax.generate import samplers
from emu_jax.generate.placement import abstract_params
from emu_jax.models import module
from emu_jax.models.decoder import DecoderConfig, UNetWithVae
from emu_jax.models.diffusion import Diffusion
from emu_jax.models.emu import EmuConfig
from emu_jax.tree import Tree

# Fields of config.drawing that `sample` takes.
SAMPLING_OPTIONS = ("sampler", "steps", "guidance", "rescale")
# Values of config.drawing.negative.
NEGATIVES = ("empty", "zeros")
# Images in a batch, rounded up to a multiple of the mesh's devices.
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
    """Sample one image for each condition; it depends only on the condition and its seed.

    negative: the negative condition of guidance. Emu uses the visual tokens that the model
    generates for the empty prompt; None means zeros, which training uses for a dropped condition.
    sampler, steps, guidance, rescale: see samplers.py. Raises UserError for an unknown sampler and
    an invalid number of steps.
    """
    schedule = samplers.schedule_for(model_config.diffusion, sampler, steps)
    towers = {tower: params[tower] for tower in ("unet", "vae") if tower in params}
    model: Any = module.bind(UNetWithVae, model_config, towers)
    unconditional = jnp.zeros_like(condition)
    if negative is not None:
        unconditional = jnp.broadcast_to(negative, condition.shape)
    denoise = samplers.guided_denoiser(
        model_config.diffusion,
        model.predict,
        condition,
        unconditional,
        guidance=guidance,
        rescale=rescale,
    )
    noise = samplers.initial_noise(seeds, model_config.latents)
    return model.decode_images(samplers.SAMPLERS[sampler].run(denoise, noise, schedule))


# Decoders with the same config and options share one compiled program.
_jitted_sample = jax.jit(sample, static_argnums=0, static_argnames=SAMPLING_OPTIONS)


def check_sampling(diffusion: Diffusion, drawing: Mapping[str, Any]) -> None:
    """Raise UserError for an invalid sampler, number of steps or negative in config.drawing."""
    samplers.schedule_for(diffusion, drawing["sampler"], drawing["steps"])
    if drawing["negative"] not in NEGATIVES:
        raise UserError(
            f"drawing.negative={drawing['negative']!r} is not one of {', '.join(NEGATIVES)}"
        )


class DiffusionDecoder:
    """A trained image decoder: call it with visual tokens to get pixels.

        decoder = diffusion_decoder.load("runs/decoder", session.model_config)
        images = decoder(session.generate_images([["a photo of a dog"]]))   # uint8 [1, h, w, 3]

    The first image has the seed `seed`, the next one seed + 1, and so on over all calls.
    """

    def __init__(
        self,
        model_config: DecoderConfig,
        params: Tree,
        sampling: Mapping[str, Any],
        *,
        negative: Float[np.ndarray, "N D"] | None = None,
        seed: int = 0,
        mesh: jax.sharding.Mesh | None = None,
        safety_checker: Callable[[UInt8[np.ndarray, "B h w 3"]], Bool[np.ndarray, "B"]]
        | None = None,
    ):
        """sampling: the fields SAMPLING_OPTIONS of config.drawing. negative: as in `sample`.

        safety_checker: a function from images to whether each may be shown. The others become
        black.
        """
        self.model_config = model_config
        self.params = params
        self.sampling = sampling
        self.negative = negative
        self.seed = seed
        self.mesh = mesh
        self.safety_checker = safety_checker
        # Rows of a batch, a multiple of the number of devices.
        self.rows = BATCH if mesh is None else -(-BATCH // mesh.size) * mesh.size

    def __call__(
        self, visual: Float[np.ndarray, "M N D"], seeds: Int[np.ndarray, "M"] | None = None
    ) -> UInt8[np.ndarray, "M h w 3"]:
        """Decode visual tokens. seeds: one for each image, in place of the decoder's own."""
        if seeds is None:
            seeds = self.seed + np.arange(len(visual))
            self.seed += len(visual)
        # A single image on a single device is not padded to a batch.
        rows = self.rows if self.mesh or len(visual) > 1 else 1
        side = self.model_config.image
        found = [np.zeros((0, side, side, 3), np.uint8)]
        for start in range(0, len(visual), rows):
            condition = visual[start : start + rows]
            padded = np.stack(pad_batch(condition, rows))
            padded_seeds = np.array(pad_batch(seeds[start : start + rows], rows))
            with nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
                images = _jitted_sample(
                    self.model_config,
                    self.params,
                    jnp.asarray(padded),
                    padded_seeds,
                    self.negative,
                    **self.sampling,
                )
            found.append(np.asarray(images)[: len(condition)])
        images = np.concatenate(found)
        if self.safety_checker is None:
            return images
        shown = self.safety_checker(images)
        return np.where(shown[:, None, None, None], images, 0).astype(np.uint8)


def load(
    directory: str,
    like: EmuConfig,
    *,
    mesh: jax.sharding.Mesh | None = None,
    overrides: Mapping[str, Any] | None = None,
    empty_prompt: Callable[[], Float[np.ndarray, "N D"]] | None = None,
    seed: int = 0,
) -> DiffusionDecoder:
    """Load a decoder from a run of the stage `decoder` or one of its checkpoints.

    Takes the moving average of the weights if the run has one. like: config of the model whose
    visual tokens are to be decoded. overrides: fields of config.drawing in place of the run's.
    empty_prompt: returns the visual tokens that the model generates for the empty prompt; called
    only if they are the negative condition. Raises UserError for a checkpoint of a different stage,
    or of a decoder for visual tokens of a different shape.
    """
    config = checkpoint.read_config(directory)
    if config["stage"] != "decoder":
        raise UserError(
            f"the checkpoint in '{directory}' is of the stage {config['stage']!r}, not a decoder's"
        )
    model_config = DecoderConfig.of(from_dict(config["model"]).to_dict())
    takes = [model_config.emu.resampler.tokens, model_config.emu.llama.width]
    makes = [like.resampler.tokens, like.llama.width]
    if takes != makes:
        raise UserError(
            f"the decoder in '{directory}' takes visual tokens {takes}, but the model makes "
            f"{makes} (their number and width)"
        )
    drawing = config["drawing"] | dict(overrides or {})
    check_sampling(model_config.diffusion, drawing)
    params = checkpoint.restore_params(
        directory,
        abstract_params(module.abstract(UNetWithVae, model_config), mesh, model_config.emu.compute),
        ema=config["optim"]["ema"] > 0,
    )
    negative = None
    if empty_prompt and drawing["negative"] == "empty" and drawing["guidance"] != 1:
        negative = empty_prompt()
    return DiffusionDecoder(
        model_config,
        params,
        {name: drawing[name] for name in SAMPLING_OPTIONS},
        negative=negative,
        seed=seed,
        mesh=mesh,
    )
