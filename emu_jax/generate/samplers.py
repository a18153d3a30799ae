"""Samplers of diffusion models: functions (denoise, x, schedule) -> x, each citing the algorithm
that it follows.

`x` is unit noise [B, h, w, c]; `denoise(x, t, a, s)` gives (x0, eps), the two of which x is made as a
x0 + s eps at time t (see `Denoiser`); a `Schedule` says where to go. Each loop is one scan, compiled
once whatever the number of steps, and all randomness is in x. Read next: ../models/diffusion.py.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from emu_jax.config import UserError
from emu_jax.models.diffusion import Diffusion, alphas_cumprod, split


class Denoiser(NamedTuple):
    """A network in use (see `guided_denoiser`, which guides): predict(x, t) -> prediction;
    split(prediction, x, a, s) -> (x0, eps), x being a x0 + s eps.
    """

    predict: Callable[[Array, Array], Array]
    split: Callable[[Array, Array, Array, Array], tuple[Array, Array]]

    def __call__(self, x: Array, t: Array, a: Array, s: Array) -> tuple[Array, Array]:
        return self.split(self.predict(x, t), x, a, s)


class Schedule(NamedTuple):
    """n steps between n + 1 points, from noise to the result, each point a x0 + s eps; `t` is what
    the network is told at all but the last.
    """

    timesteps: Float[np.ndarray, "n"]
    alphas: Float[np.ndarray, "n+1"]
    sigmas: Float[np.ndarray, "n+1"]


def make_schedule(
    d: Diffusion, steps: int, *, spacing: str = "leading", offset: int = 1, last: str = "zero"
) -> Schedule:
    """`steps` of the timesteps that were trained on, falling.

    spacing: "leading" (0, k, 2 k, ... plus `offset`: Stable Diffusion's), "inner" (k, 2 k, ... with
    a smaller k, plus `offset`: diffusers' for DPM-Solver), "trailing" (the last time and back from
    there: needed where that is noise alone). last: what follows the last step, "zero" noise or that
    of the "first" time. Flow goes from noise to data in equal steps. Raises UserError for what is
    none of these.
    """
    if not 1 <= steps <= d.steps:
        raise UserError(
            f"a sampler takes 1 to {d.steps} steps (those that were trained on), not {steps}"
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
            f"a schedule's spacing is {', '.join(spaced)} and its last noise zero or first, not {spacing!r} and {last!r}"
        )
    t = np.clip(spaced[spacing], 0, d.steps - 1).astype(int)[::-1]
    a2 = alphas_cumprod(d)
    a2 = np.append(a2[t], 1.0 if last == "zero" else a2[0])
    return Schedule(t.astype(np.float64), np.sqrt(a2), np.sqrt(1 - a2))


def initial_noise(seeds: Int[Array, "B"], shape: tuple[int, ...]) -> Float[Array, "B h w c"]:
    """Unit noise; a row is a function of its own seed, whatever stands beside it and wherever it is
    computed.
    """
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
    """That of network(x, timesteps, condition) -> prediction, with classifier-free guidance (arXiv
    2207.12598): away from the condition `negative`, which guidance 1 does not ask. `rescale` takes
    the result's deviation so far back to the conditional one's (arXiv 2305.08891, section 3.4).
    """

    def predict(x, t):
        timesteps = jnp.full(len(x), t)
        if guidance == 1.0:
            return network(x, timesteps, condition)

        def twice(y):
            return jnp.concatenate([y, y])

        without, conditional = jnp.split(
            network(twice(x), twice(timesteps), jnp.concatenate([negative, condition])), 2
        )
        guided = without + guidance * (conditional - without)

        def deviation(y):
            return y.std((1, 2, 3), keepdims=True)

        return (
            guided * (1 - rescale + rescale * deviation(conditional) / deviation(guided))
            if rescale
            else guided
        )

    return Denoiser(predict, partial(split, d))


def ddim(
    denoise: Denoiser, x: Float[Array, "B h w c"], schedule: Schedule
) -> Float[Array, "B h w c"]:
    """DDIM without noise (arXiv 2010.02502, equation 12 with sigma 0)."""

    def step(x, row):
        t, a, s, a_next, s_next = row
        x0, eps = denoise(x, t, a, s)
        return a_next * x0 + s_next * eps, None

    return jax.lax.scan(step, x, _rows(schedule))[0]


def euler(
    denoise: Denoiser, x: Float[Array, "B h w c"], schedule: Schedule
) -> Float[Array, "B h w c"]:
    """Euler's method on y = x / a, whose derivative by the noise level s / a is eps (arXiv
    2206.00364, algorithm 1 without its second-order correction).
    """

    def step(y, row):
        t, a, s, a_next, s_next = row
        _, eps = denoise(a * y, t, a, s)
        return y + (s_next / a_next - s / a) * eps, None

    _regular(schedule, "euler")
    return schedule.alphas[-1] * jax.lax.scan(step, x / schedule.alphas[0], _rows(schedule))[0]


def pndm(
    denoise: Denoiser, x: Float[Array, "B h w c"], schedule: Schedule
) -> Float[Array, "B h w c"]:
    """Pseudo linear multistep (PNDM, arXiv 2202.09778, equations 11 to 13): Adams-Bashforth on the
    prediction, then DDIM's step with it.

    The first step is done twice, the second time with the mean of the predictions at both its ends,
    in place of the paper's three of Runge-Kutta (Stable Diffusion's choice): n + 1 evaluations.
    What is extrapolated is the network's own target (as in diffusers; the paper's is eps).
    """
    # the places of the evaluations
    at = pndm_evaluations(len(schedule.timesteps))
    # and of the steps
    start = np.where(np.arange(len(at)) == 1, 0, at)
    weights = (
        np.array(
            [
                [24, 0, 0, 0],
                [12, 12, 0, 0],
                [36, -12, 0, 0],
                [46, -32, 10, 0],
                *[[55, -59, 37, -9]] * (len(at) - 4),
            ]
        )[: len(at)]
        / 24
    )

    def step(carry, row):
        # seen [4, ...]: the newest prediction's place, and the three before it
        x, before, seen = carry
        number, t, a_start, s_start, a_next, s_next, weight = row
        seen = seen.at[0].set(denoise.predict(x, t))
        origin = jnp.where(number == 1, before, x)
        x0, eps = denoise.split(jnp.tensordot(weight, seen, 1), origin, a_start, s_start)
        moved = a_next * x0 + s_next * eps
        # the prediction at the first step's end is made anew
        kept = jnp.where(number == 1, seen, jnp.roll(seen, 1, 0))
        return (moved, x, kept), None

    _regular(schedule, "pndm")
    rows = tuple(
        jnp.asarray(row, jnp.float32)
        for row in (
            np.arange(len(at)),
            schedule.timesteps[at],
            schedule.alphas[start],
            schedule.sigmas[start],
            schedule.alphas[start + 1],
            schedule.sigmas[start + 1],
            weights,
        )
    )
    return jax.lax.scan(step, (x, x, jnp.zeros((4, *x.shape))), rows)[0][0]


def pndm_evaluations(steps: int) -> Int[np.ndarray, "m"]:
    """The points at which PNDM asks the network: the second one twice."""
    return np.array([0, 1, *range(1, steps)][: steps + (steps > 1)])


def dpm_solver(
    denoise: Denoiser, x: Float[Array, "B h w c"], schedule: Schedule
) -> Float[Array, "B h w c"]:
    """DPM-Solver++ (2M) (arXiv 2211.01095, algorithm 2): x0 is extrapolated in the logarithm of a /
    s from the last two.

    First order at the first step, and at the last where it ends without noise or there are fewer
    than 15, as its authors do.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        # infinite where a point is noise alone or has none
        h = np.diff(np.log(schedule.alphas) - np.log(schedule.sigmas))
        more = np.append(0.0, h[1:] / (2 * h[:-1]))
    if schedule.sigmas[-1] == 0 or len(h) < 15:
        more[-1] = 0.0

    def step(carry, row):
        x, x0_before = carry
        t, a, s, a_next, s_next, more = row
        x0, _ = denoise(x, t, a, s)
        extrapolated = x0 + more * (x0 - x0_before)
        return (s_next / s * x + (a_next - a * s_next / s) * extrapolated, x0), None

    return jax.lax.scan(step, (x, x), (*_rows(schedule), jnp.asarray(more, jnp.float32)))[0][0]


def flow_euler(
    denoise: Denoiser, x: Float[Array, "B h w c"], schedule: Schedule
) -> Float[Array, "B h w c"]:
    """Euler's method on the straight path from noise to data (arXiv 2209.03003, section 2): the
    velocity is eps - x0.
    """

    def step(x, row):
        t, a, s, _, s_next = row
        x0, eps = denoise(x, t, a, s)
        return x + (s_next - s) * (eps - x0), None

    if not np.allclose(schedule.alphas + schedule.sigmas, 1):
        raise UserError(
            "the sampler 'flow' needs a model that was trained with diffusion.target='flow'; this one takes ddim, pndm, euler or dpm++"
        )
    return jax.lax.scan(step, x, _rows(schedule))[0]


class Sampler(NamedTuple):
    """A sampler and the schedule that its golden numbers have."""

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
    """The sampler's own schedule; from the last time on where that is noise alone. Raises UserError
    for an unknown sampler.
    """
    if sampler not in SAMPLERS:
        raise UserError(f"no sampler {sampler!r}; there are {', '.join(SAMPLERS)}")
    chosen = SAMPLERS[sampler]
    return make_schedule(
        d, steps, spacing="trailing" if d.zero_snr else chosen.spacing, last=chosen.last
    )


def _rows(schedule: Schedule) -> tuple[Array, ...]:
    """(t, a, s, next a, next s) of every step."""
    return tuple(
        jnp.asarray(row, jnp.float32)
        for row in (
            schedule.timesteps,
            schedule.alphas[:-1],
            schedule.sigmas[:-1],
            schedule.alphas[1:],
            schedule.sigmas[1:],
        )
    )


def _regular(schedule: Schedule, sampler: str) -> None:
    if schedule.alphas[0] == 0:
        raise UserError(
            f"the sampler {sampler!r} cannot start where there is noise alone (flow, or diffusion.zero_snr); use ddim or dpm++"
        )
