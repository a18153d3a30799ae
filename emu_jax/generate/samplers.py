"""Samplers of diffusion models, as functions (denoise, x, schedule) -> x.

The first x is unit noise [B, h, w, c]; a noisy image is a x0 + s eps, where a is the weight of the
signal and s that of the noise. `denoise(x, t, a, s)` estimates (x0, eps), and a `Schedule` lists
the steps. Each sampler cites its algorithm and is one scan, whose body is compiled once; all
randomness is in the first x. Read next: ../models/diffusion.py.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from emu_jax.config import UserError
from emu_jax.models.diffusion import Diffusion, alphas_cumprod, x0_and_eps


class Denoiser(NamedTuple):
    """A network as samplers call it; `guided_denoiser` makes one.

    predict(x, t) -> prediction, whatever the network was trained to predict;
    split(prediction, x, a, s) -> (x0, eps) with x = a x0 + s eps.
    """

    predict: Callable[[Array, Array], Array]
    split: Callable[[Array, Array, Array, Array], tuple[Array, Array]]

    def __call__(self, x: Array, t: Array, a: Array, s: Array) -> tuple[Array, Array]:
        return self.split(self.predict(x, t), x, a, s)


class Schedule(NamedTuple):
    """The n steps between n + 1 points, from noise to the result.

    timesteps: the network's second argument at each point but the last. alphas, sigmas: the weights
    of signal and noise at each point.
    """

    timesteps: Float[np.ndarray, "n"]
    alphas: Float[np.ndarray, "n+1"]
    sigmas: Float[np.ndarray, "n+1"]


def make_schedule(
    d: Diffusion, steps: int, *, spacing: str = "leading", offset: int = 1, last: str = "zero"
) -> Schedule:
    """Choose `steps` of the training timesteps, from noise to data.

    spacing: "leading" is 0, k, 2 k, ... plus `offset` (Stable Diffusion); "inner" is k, 2 k, ...
    with a smaller k, plus `offset` (diffusers' DPM-Solver); "trailing" counts back from the last
    timestep, which is needed if that one is pure noise. last: the noise after the last step, "zero"
    or that of the "first" timestep. Flow takes equal steps and ignores all three. Raises UserError
    for invalid values.
    """
    if not 1 <= steps <= d.steps:
        raise UserError(
            f"steps={steps}: a sampler takes 1 to {d.steps} steps, the number of training timesteps"
        )
    if d.target == "flow":
        t = np.linspace(d.steps, 0, steps + 1)
        return Schedule(t[:-1], 1 - t / d.steps, t / d.steps)
    spaced = {
        "leading": np.arange(steps) * (d.steps // steps) + offset,
        "inner": np.arange(1, steps + 1) * (d.steps // (steps + 1)) + offset,
        "trailing": np.round(np.arange(1, steps + 1) * d.steps / steps) - 1,
    }
    if spacing not in spaced or last not in ("zero", "first"):
        raise UserError(
            f"spacing={spacing!r} must be one of {', '.join(spaced)}, "
            f"and last={last!r} zero or first"
        )
    t = np.clip(spaced[spacing], 0, d.steps - 1).astype(int)[::-1]
    alphas_squared = alphas_cumprod(d)
    final = 1.0 if last == "zero" else alphas_squared[0]
    alphas_squared = np.append(alphas_squared[t], final)
    return Schedule(t.astype(np.float64), np.sqrt(alphas_squared), np.sqrt(1 - alphas_squared))


def initial_noise(seeds: Int[Array, "B"], shape: tuple[int, ...]) -> Float[Array, "B h w c"]:
    """Unit noise; each row depends on its own seed only, not on the batch or the mesh."""
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))(seeds)


def guided_denoiser(
    d: Diffusion,
    network: Callable[[Array, Array, Array], Array],
    condition: Float[Array, "B N D"],
    negative: Float[Array, "B N D"],
    *,
    guidance: float,
    rescale: float = 0.0,
) -> Denoiser:
    """Make the denoiser of network(x, timesteps, condition) with classifier-free guidance.

    prediction = unconditional + guidance * (conditional - unconditional) (arXiv 2207.12598), where
    `negative` takes the place of the dropped condition. guidance: 1 turns it off, and then the
    network runs once a step, not twice. rescale: how far the prediction's standard deviation is
    moved back to the conditional one's, 0 to 1 (arXiv 2305.08891, section 3.4).
    """

    def predict(x, t):
        timesteps = jnp.full(len(x), t)
        if guidance == 1.0:
            return network(x, timesteps, condition)
        both = network(
            jnp.concatenate([x, x]),
            jnp.concatenate([timesteps, timesteps]),
            jnp.concatenate([negative, condition]),
        )
        unconditional, conditional = jnp.split(both, 2)
        guided = unconditional + guidance * (conditional - unconditional)
        if not rescale:
            return guided
        ratio = _deviation(conditional) / _deviation(guided)
        return guided * (1 - rescale + rescale * ratio)

    return Denoiser(predict, partial(x0_and_eps, d))


def _deviation(x: Float[Array, "B h w c"]) -> Float[Array, "B 1 1 1"]:
    return x.std((1, 2, 3), keepdims=True)


def ddim(
    denoise: Denoiser, x: Float[Array, "B h w c"], schedule: Schedule
) -> Float[Array, "B h w c"]:
    """Deterministic DDIM (arXiv 2010.02502, equation 12 with sigma = 0)."""

    def step(x, row):
        t, a, s, a_next, s_next = row
        x0, eps = denoise(x, t, a, s)
        return a_next * x0 + s_next * eps, None

    return jax.lax.scan(step, x, _rows(schedule))[0]


def euler(
    denoise: Denoiser, x: Float[Array, "B h w c"], schedule: Schedule
) -> Float[Array, "B h w c"]:
    """Euler's method on y = x / a, whose derivative with respect to s / a is eps.

    Algorithm 1 of arXiv 2206.00364 without its second-order correction. Raises UserError for a
    schedule that starts with pure noise.
    """
    _check_start(schedule, "euler")

    def step(y, row):
        t, a, s, a_next, s_next = row
        _, eps = denoise(a * y, t, a, s)
        return y + (s_next / a_next - s / a) * eps, None

    y, _ = jax.lax.scan(step, x / schedule.alphas[0], _rows(schedule))
    return schedule.alphas[-1] * y


def pndm(
    denoise: Denoiser, x: Float[Array, "B h w c"], schedule: Schedule
) -> Float[Array, "B h w c"]:
    """Pseudo linear multistep (PNDM, arXiv 2202.09778, equations 11 to 13).

    Adams-Bashforth extrapolates the prediction, and DDIM takes the step with it. As in Stable
    Diffusion, in place of the paper's three Runge-Kutta steps the first step is done twice, the
    second time with the mean of the predictions at both of its ends; n steps take n + 1
    evaluations. As in diffusers, the network's prediction is extrapolated; the paper extrapolates
    eps. Raises UserError for a schedule that starts with pure noise.
    """
    _check_start(schedule, "pndm")
    # The points at which the network is evaluated, and the points from which the steps start.
    at = pndm_evaluations(len(schedule.timesteps))
    start = np.where(np.arange(len(at)) == 1, 0, at)
    # Weights of the newest prediction and the three before it.
    first_weights = [[24, 0, 0, 0], [12, 12, 0, 0], [36, -12, 0, 0], [46, -32, 10, 0]]
    later_weights = [[55, -59, 37, -9]] * (len(at) - 4)
    weights = np.array((first_weights + later_weights)[: len(at)]) / 24

    def step(carry, row):
        # The carry: the sample, the sample before the last step, the newest four predictions.
        x, before, predictions = carry
        number, t, a_start, s_start, a_next, s_next, weight = row
        predictions = predictions.at[0].set(denoise.predict(x, t))
        origin = jnp.where(number == 1, before, x)
        x0, eps = denoise.split(jnp.tensordot(weight, predictions, 1), origin, a_start, s_start)
        moved = a_next * x0 + s_next * eps
        # The repeated first step replaces the prediction at its end.
        kept = jnp.where(number == 1, predictions, jnp.roll(predictions, 1, 0))
        return (moved, x, kept), None

    columns = (
        np.arange(len(at)),
        schedule.timesteps[at],
        schedule.alphas[start],
        schedule.sigmas[start],
        schedule.alphas[start + 1],
        schedule.sigmas[start + 1],
        weights,
    )
    rows = tuple(jnp.asarray(column, jnp.float32) for column in columns)
    (x, _, _), _ = jax.lax.scan(step, (x, x, jnp.zeros((4, *x.shape))), rows)
    return x


def pndm_evaluations(steps: int) -> Int[np.ndarray, "m"]:
    """Points of the schedule at which PNDM evaluates the network; the second occurs twice."""
    return np.array([0, 1, *range(1, steps)][: steps + (steps > 1)])


def dpm_solver(
    denoise: Denoiser, x: Float[Array, "B h w c"], schedule: Schedule
) -> Float[Array, "B h w c"]:
    """DPM-Solver++ (2M) (arXiv 2211.01095, algorithm 2).

    Extrapolates x0 in the logarithm of a / s from the last two steps. As in the authors' code, the
    first step is of first order, and so is the last one if it ends without noise or there are fewer
    than 15 steps.
    """
    # The logarithm is infinite at pure noise and at no noise.
    with np.errstate(divide="ignore", invalid="ignore"):
        h = np.diff(np.log(schedule.alphas) - np.log(schedule.sigmas))
        extrapolation = np.append(0.0, h[1:] / (2 * h[:-1]))
    if schedule.sigmas[-1] == 0 or len(h) < 15:
        extrapolation[-1] = 0.0

    def step(carry, row):
        x, x0_before = carry
        t, a, s, a_next, s_next, weight = row
        x0, _ = denoise(x, t, a, s)
        extrapolated = x0 + weight * (x0 - x0_before)
        return (s_next / s * x + (a_next - a * s_next / s) * extrapolated, x0), None

    rows = (*_rows(schedule), jnp.asarray(extrapolation, jnp.float32))
    (x, _), _ = jax.lax.scan(step, (x, x), rows)
    return x


def flow_euler(
    denoise: Denoiser, x: Float[Array, "B h w c"], schedule: Schedule
) -> Float[Array, "B h w c"]:
    """Euler's method on the straight path from noise to data (arXiv 2209.03003, section 2).

    The velocity is eps - x0. Raises UserError for a schedule of a model without target "flow".
    """
    if not np.allclose(schedule.alphas + schedule.sigmas, 1):
        raise UserError(
            "the sampler 'flow' needs a model trained with diffusion.target='flow'; use ddim, "
            "pndm, euler or dpm++ for this one"
        )

    def step(x, row):
        t, a, s, _, s_next = row
        x0, eps = denoise(x, t, a, s)
        return x + (s_next - s) * (eps - x0), None

    return jax.lax.scan(step, x, _rows(schedule))[0]


class Sampler(NamedTuple):
    """A sampler, and the schedule with which it reproduces diffusers."""

    run: Callable[[Denoiser, Array, Schedule], Array]
    spacing: str
    last: str


SAMPLERS = {
    "ddim": Sampler(ddim, "leading", "first"),
    "pndm": Sampler(pndm, "leading", "first"),
    "euler": Sampler(euler, "leading", "zero"),
    "dpm++": Sampler(dpm_solver, "inner", "zero"),
    "flow": Sampler(flow_euler, "leading", "zero"),
}


def schedule_for(d: Diffusion, sampler: str, steps: int) -> Schedule:
    """The sampler's own schedule, or a "trailing" one if the last timestep is pure noise.

    Raises UserError for an unknown sampler and an invalid number of steps.
    """
    if sampler not in SAMPLERS:
        raise UserError(f"unknown sampler {sampler!r}; choose one of {', '.join(SAMPLERS)}")
    chosen = SAMPLERS[sampler]
    spacing = "trailing" if d.zero_snr else chosen.spacing
    return make_schedule(d, steps, spacing=spacing, last=chosen.last)


def _rows(schedule: Schedule) -> tuple[Array, ...]:
    """(t, a, s, next a, next s) of every step."""
    a = schedule.alphas
    s = schedule.sigmas
    columns = (schedule.timesteps, a[:-1], s[:-1], a[1:], s[1:])
    return tuple(jnp.asarray(column, jnp.float32) for column in columns)


def _check_start(schedule: Schedule, sampler: str) -> None:
    if schedule.alphas[0] == 0:
        raise UserError(
            f"the sampler {sampler!r} cannot start from pure noise (flow, or diffusion.zero_snr); "
            "use ddim or dpm++"
        )
