"""Diffusion as two linear maps: noisy images a x0 + s eps, and targets p x0 + q eps.

x0 is a clean image and eps is Gaussian noise of variance 1. The schedule determines a and s (Stable
Diffusion: arXiv 2112.10752; flow: arXiv 2209.03003). The kind of target determines p and q: the
network predicts the noise, the velocity (arXiv 2202.00512), the flow or x0. Together the two maps
are a 2 x 2 system, whose inverse recovers x0 and eps from a prediction. Read next:
../generate/samplers.py.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

TARGETS = ("epsilon", "v", "flow", "x0")


@dataclass(frozen=True)
class Diffusion:
    """`config.model.decoder.diffusion`. Timesteps run from 0 to `steps`."""

    # Number of training timesteps.
    steps: int
    beta_start: float
    beta_end: float
    # Rescale the schedule so that the last timestep is pure noise (arXiv 2305.08891).
    zero_snr: bool
    # What the network predicts, one of TARGETS. "flow" also replaces the schedule: timesteps are
    # continuous, and a and s are linear in them.
    target: str
    # Clip loss weights at this signal-to-noise ratio (arXiv 2303.09556); 0: all weights are 1.
    min_snr: float

    def __post_init__(self):
        if self.target not in TARGETS:
            known = ", ".join(TARGETS)
            raise ValueError(f"diffusion.target={self.target!r} is not one of {known}")
        if self.zero_snr and self.target == "epsilon":
            raise ValueError(
                "diffusion.zero_snr=True leaves nothing to predict the noise from at the last "
                "step; use target='v'"
            )


def alphas_cumprod(d: Diffusion) -> Float[np.ndarray, "steps"]:
    """Compute the square of a, the coefficient of x0, at every timestep.

    The schedule is "scaled linear", which means that the square roots of the betas are linear in
    the timestep.
    """
    betas = np.linspace(d.beta_start**0.5, d.beta_end**0.5, d.steps, dtype=np.float64) ** 2
    alphas = np.cumprod(1 - betas)
    if d.zero_snr:
        # Algorithm 1 of arXiv 2305.08891 shifts a to end at 0 and then restores its first value.
        a = np.sqrt(alphas)
        alphas = ((a - a[-1]) * a[0] / (a[0] - a[-1])) ** 2
    return alphas


def coefficients(d: Diffusion, timesteps: Array) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Look up a and s, the coefficients of x0 and eps, at `timesteps`.

    Timesteps must be whole numbers unless the target is "flow".
    """
    if d.target == "flow":
        return 1 - timesteps / d.steps, timesteps / d.steps
    a_squared = alphas_cumprod(d)
    a = jnp.asarray(np.sqrt(a_squared), jnp.float32)
    s = jnp.asarray(np.sqrt(1 - a_squared), jnp.float32)
    index = timesteps.astype(jnp.int32)
    return a[index], s[index]


def sample_timesteps(d: Diffusion, key: Array, count: int) -> Float[Array, "B"]:
    """Draw uniform timesteps: integers below `steps`, or for "flow" reals in (0, steps]."""
    uniform = jax.random.uniform(key, (count,))
    if d.target == "flow":
        return (1 - uniform) * d.steps
    return jnp.floor(uniform * d.steps)


def target_coefficients(d: Diffusion, a: Array, s: Array) -> tuple[Array, Array]:
    """Compute p and q of the prediction target p x0 + q eps from the schedule's a and s."""
    one = jnp.ones_like(a)
    by_target = {
        "epsilon": (0 * one, one),
        "v": (-s, a),
        "flow": (-one, one),
        "x0": (one, 0 * one),
    }
    return by_target[d.target]


def add_noise(
    d: Diffusion,
    x0: Float[Array, "B h w c"],
    eps: Float[Array, "B h w c"],
    timesteps: Float[Array, "B"],
) -> Float[Array, "B h w c"]:
    """Compute the noisy images a x0 + s eps, with a and s of each row's timestep."""
    a, s = coefficients(d, timesteps)
    return _per_row(a) * x0 + _per_row(s) * eps


def target(
    d: Diffusion,
    x0: Float[Array, "B h w c"],
    eps: Float[Array, "B h w c"],
    timesteps: Float[Array, "B"],
) -> Float[Array, "B h w c"]:
    """Compute the prediction target p x0 + q eps, with p and q of each row's timestep."""
    p, q = target_coefficients(d, *coefficients(d, timesteps))
    return _per_row(p) * x0 + _per_row(q) * eps


def x0_and_eps(
    d: Diffusion,
    prediction: Float[Array, "B h w c"],
    x: Float[Array, "B h w c"],
    a: Array,
    s: Array,
) -> tuple[Array, Array]:
    """Recover (x0, eps) from x = a x0 + s eps and `prediction` = p x0 + q eps.

    a and s are scalars or have one value per row [B].
    """
    p, q = target_coefficients(d, a, s)
    a, s, p, q = (_per_row(value) for value in (a, s, p, q))
    determinant = a * q - s * p
    x0 = (q * x - s * prediction) / determinant
    eps = (a * prediction - p * x) / determinant
    return x0, eps


def loss_weights(d: Diffusion, timesteps: Float[Array, "B"]) -> Float[Array, "B"]:
    """Compute the Min-SNR weight of each row's squared prediction error.

    Min-SNR gives the squared error of x0 the weight min(snr, min_snr). The second factor of the
    result converts this to a weight for the squared error of the prediction target.
    """
    if not d.min_snr:
        return jnp.ones(timesteps.shape)
    a, s = coefficients(d, timesteps)
    p, q = target_coefficients(d, a, s)
    x0_per_prediction = s / (a * q - s * p)
    return jnp.minimum((a / s) ** 2, d.min_snr) * x0_per_prediction**2


def _per_row(x: Array) -> Array:
    """Reshape [B] to [B, 1, 1, 1], which broadcasts over images; scalars stay scalars."""
    return jnp.reshape(x, (*jnp.shape(x), 1, 1, 1)) if jnp.ndim(x) else x
