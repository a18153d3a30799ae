"""Pictures from visual tokens: the decoder's U-Net, sampled with guidance, and its autoencoder. Read next: samplers.py."""
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from emu_jax.generate import samplers
from emu_jax.models import emu
from emu_jax.models.decoder import Decoder, DecoderSize
from emu_jax.tree import Tree


def draw(size: DecoderSize, params: Tree, condition: Float[Array, "B N D"], seeds: Int[Array, "B"], negative: Float[Array, "N D"] | None = None, *,
         sampler: str, steps: int, guidance: float, rescale: float = 0.0) -> UInt8[Array, "B h w 3"]:
    """A picture of each condition, a function of its seed. `negative`: from what guidance leads away: the visual tokens that the model makes of the
    empty prompt (Emu's way), or None for the zeros of a dropped condition. Raises UserError for a sampler or steps that are not there."""
    plan = samplers.plan_of(size.diffusion, sampler, steps)
    model = emu.bind(Decoder, size, params)
    away = jnp.zeros_like(condition) if negative is None else jnp.broadcast_to(negative, condition.shape)
    denoise = samplers.denoiser(size.diffusion, model.predict, condition, away, guidance=guidance, rescale=rescale)
    return model.pixels(samplers.SAMPLERS[sampler].run(denoise, samplers.noise(seeds, size.latents), plan))
