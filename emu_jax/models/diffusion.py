"""Diffusion as two linear maps: what is noised at time t is a x0 + s e, and a network predicts p x0
+ q e of it.

e is unit noise. Schedules say a and s (Stable Diffusion's: arXiv 2112.10752; flow: arXiv
2209.03003), targets p and q: the noise, the velocity (arXiv 2202.00512), the flow or x0. Everything
else, x0 and e from a prediction included, is the 2 x 2 system. Read next: ../generate/samplers.py.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

TARGETS = ("epsilon", "v", "flow", "x0")


@dataclass(frozen=True)
class Diffusion:
    """`config.diffusion`; times run from 0 to `steps`."""

    # of the schedule that is trained on
    steps: int
    beta_start: float
    beta_end: float
    # rescaled so that the last step is noise alone (arXiv 2305.08891)
    zero_snr: bool
    # "epsilon", "v", "x0", or "flow", whose path is straight and whose times are continuous
    target: str
    # weights of the loss are cut at this signal-to-noise ratio (arXiv 2303.09556); 0: all are 1
    min_snr: float

    def __post_init__(self):
        if self.target not in TARGETS:
            raise ValueError(f"diffusion.target={self.target!r} is not one of {', '.join(TARGETS)}")
        if self.zero_snr and self.target == "epsilon":
            raise ValueError(
                "diffusion.zero_snr=True leaves nothing to predict the noise from at the last step; "
                "use target='v'"
            )


def alphas_cumprod(d: Diffusion) -> Float[np.ndarray, "steps"]:
    """a squared at the times 0, 1, ..., of the scaled-linear schedule: the roots of its betas rise
    linearly.
    """
    betas = np.linspace(d.beta_start**0.5, d.beta_end**0.5, d.steps, dtype=np.float64) ** 2
    alphas = np.cumprod(1 - betas)
    # algorithm 1 of the paper: a is shifted to end at 0 and stretched to start where it did
    if d.zero_snr:
        a = np.sqrt(alphas)
        alphas = ((a - a[-1]) * a[0] / (a[0] - a[-1])) ** 2
    return alphas


def coefficients(d: Diffusion, times: Array) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """a and s at times (whole numbers, but for flow)."""
    if d.target == "flow":
        return 1 - times / d.steps, times / d.steps
    a2 = alphas_cumprod(d)
    at = times.astype(jnp.int32)
    return tuple(jnp.asarray(np.sqrt(x), jnp.float32)[at] for x in (a2, 1 - a2))


def sample_timesteps(d: Diffusion, key: Array, count: int) -> Float[Array, "B"]:
    """A time for each row, all equally likely: whole numbers from 0 on, or for flow anything up to
    `steps`, 0 excluded.
    """
    share = jax.random.uniform(key, (count,))
    return (1 - share) * d.steps if d.target == "flow" else jnp.floor(share * d.steps)


def target_coefficients(d: Diffusion, a: Array, s: Array) -> tuple[Array, Array]:
    """p and q: the target is p x0 + q e."""
    one = jnp.ones_like(a)
    return {"epsilon": (0 * one, one), "v": (-s, a), "flow": (-one, one), "x0": (one, 0 * one)}[
        d.target
    ]


def add_noise(
    d: Diffusion, x0: Float[Array, "B h w c"], e: Float[Array, "B h w c"], times: Float[Array, "B"]
) -> Float[Array, "B h w c"]:
    a, s = (_per_row(x) for x in coefficients(d, times))
    return a * x0 + s * e


def target(
    d: Diffusion, x0: Float[Array, "B h w c"], e: Float[Array, "B h w c"], times: Float[Array, "B"]
) -> Float[Array, "B h w c"]:
    """What the network is to predict."""
    p, q = (_per_row(x) for x in target_coefficients(d, *coefficients(d, times)))
    return p * x0 + q * e


def x0_and_eps(
    d: Diffusion,
    prediction: Float[Array, "B h w c"],
    x: Float[Array, "B h w c"],
    a: Array,
    s: Array,
) -> tuple[Array, Array]:
    """(x0, e) of which `x` is a x0 + s e and `prediction` p x0 + q e: the inverse of `add_noise`
    and `target`.
    """
    p, q = target_coefficients(d, a, s)
    a, s, p, q = (_per_row(value) for value in (a, s, p, q))
    determinant = a * q - s * p
    return (q * x - s * prediction) / determinant, (a * prediction - p * x) / determinant


def loss_weights(d: Diffusion, times: Float[Array, "B"]) -> Float[Array, "B"]:
    """Of the squared error of a prediction: min(snr, min_snr) as the weight of x0's error, in the
    target's units.
    """
    if not d.min_snr:
        return jnp.ones(times.shape)
    a, s = coefficients(d, times)
    p, q = target_coefficients(d, a, s)
    x0_of_prediction = s / (a * q - s * p)
    return jnp.minimum((a / s) ** 2, d.min_snr) * x0_of_prediction**2


def _per_row(x: Array) -> Array:
    return jnp.reshape(x, (*jnp.shape(x), 1, 1, 1)) if jnp.ndim(x) else x
