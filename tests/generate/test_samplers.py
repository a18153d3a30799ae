"""Samplers on a problem with a known answer.

If the data have a Gaussian distribution, a formula gives the path from each noise to its sample.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emu_jax.config import UserError
from emu_jax.generate import samplers
from emu_jax.models.diffusion import Diffusion, coefficients, target_coefficients, x0_and_eps

SD = Diffusion(
    steps=1000, beta_start=0.00085, beta_end=0.012, zero_snr=False, target="epsilon", min_snr=0.0
)
V, ZERO, FLOW = (
    dataclasses.replace(SD, target=target, zero_snr=zero)
    for target, zero in (("v", False), ("v", True), ("flow", False))
)
MEAN = 0.7
DEVIATION = 0.3
X = samplers.initial_noise(jnp.arange(4), (2, 2, 3))


def exact(d):
    """The optimal denoiser of data with the distribution N(MEAN, DEVIATION^2)."""

    def predict(x, t):
        a, s = (value[0] for value in coefficients(d, jnp.reshape(t, 1)))
        x0 = MEAN + a * DEVIATION**2 / (a * a * DEVIATION**2 + s * s) * (x - a * MEAN)
        p, q = target_coefficients(d, a, s)
        return p * x0 + q * (x - a * x0) / s

    return samplers.Denoiser(predict, partial(x0_and_eps, d))


def error(name, d, steps, schedule=None):
    """Largest distance of a sampler's result to the end of the exact path.

    schedule: the sampler's own by default.
    """
    schedule = schedule or samplers.schedule_for(d, name, steps)

    def at(k):
        return np.sqrt((schedule.alphas[k] * DEVIATION) ** 2 + schedule.sigmas[k] ** 2)

    want = schedule.alphas[-1] * MEAN + at(-1) / at(0) * (X - schedule.alphas[0] * MEAN)
    return float(jnp.abs(samplers.SAMPLERS[name].run(exact(d), X, schedule) - want).max())


@pytest.mark.parametrize(
    ("name", "d", "order"),
    [
        ("ddim", SD, 1),
        ("euler", SD, 1),
        ("pndm", SD, 2),
        ("pndm", V, 2),
        ("dpm++", SD, 1),
        ("flow", FLOW, 1),
        ("ddim", ZERO, 1),
        ("dpm++", ZERO, 1),
        ("ddim", FLOW, 1),
    ],
)
def test_samplers_follow_the_exact_path(name, d, order):
    coarse = error(name, d, 25)
    fine = error(name, d, 100)
    assert fine < 0.04 and fine < coarse / 2**order, (coarse, fine)


def test_second_order_is_nearer_than_first():
    """DPM-Solver++ and PNDM have half the error of DDIM.

    DPM-Solver++ stops at a little noise here, because a last step to no noise is of first order.
    """
    schedule = samplers.make_schedule(SD, 200, last="first")
    assert (
        error("dpm++", SD, 200, schedule) < error("ddim", SD, 200, schedule) / 2
        and error("pndm", SD, 20) < error("ddim", SD, 20) / 2
    )


def test_euler_is_ddim_in_other_coordinates():
    schedule = samplers.make_schedule(SD, 10)
    np.testing.assert_allclose(
        samplers.euler(exact(SD), X, schedule), samplers.ddim(exact(SD), X, schedule), atol=1e-4
    )


def test_flow_euler_is_ddim_on_the_straight_path():
    schedule = samplers.schedule_for(FLOW, "flow", 10)
    np.testing.assert_allclose(
        samplers.flow_euler(exact(FLOW), X, schedule),
        samplers.ddim(exact(FLOW), X, schedule),
        atol=1e-5,
    )


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_the_network_is_traced_once_and_one_step_will_do(name):
    d = FLOW if name == "flow" else SD
    calls = []

    def counting(x, t):
        calls.append(1)
        return exact(d).predict(x, t)

    for steps in (30, 3, 2, 1):
        calls.clear()
        got = samplers.SAMPLERS[name].run(
            exact(d)._replace(predict=counting), X, samplers.schedule_for(d, name, steps)
        )
        assert len(calls) == 1 and np.isfinite(got).all() and got.shape == X.shape


# Schedules


def test_spacings_by_hand():
    def of(**more):
        return samplers.make_schedule(SD, 4, **more).timesteps.tolist()

    assert of() == [751, 501, 251, 1] and of(offset=0) == [750, 500, 250, 0]
    assert of(spacing="inner") == [801, 601, 401, 201] and of(spacing="trailing") == [
        999,
        749,
        499,
        249,
    ]
    # No timestep lies beyond the last one, 999.
    assert samplers.make_schedule(SD, 1000).timesteps[0] == 999
    assert samplers.make_schedule(FLOW, 4).timesteps.tolist() == [1000, 750, 500, 250]


def test_the_end_of_a_schedule():
    clean = samplers.make_schedule(SD, 4)
    first = samplers.make_schedule(SD, 4, last="first")
    assert (clean.alphas[-1], clean.sigmas[-1]) == (1, 0) and first.alphas[
        -1
    ] ** 2 == pytest.approx(1 - 0.00085)
    assert samplers.schedule_for(ZERO, "ddim", 10).alphas[0] == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: samplers.make_schedule(SD, 0), "1 to 1000 steps"),
        (lambda: samplers.make_schedule(SD, 1001), "steps=1001"),
        (lambda: samplers.make_schedule(SD, 5, spacing="even"), "spacing='even'"),
        (
            lambda: samplers.schedule_for(SD, "plms", 5),
            "unknown sampler 'plms'; choose one of ddim, pndm",
        ),
        (
            lambda: samplers.flow_euler(exact(SD), X, samplers.make_schedule(SD, 5)),
            "diffusion.target='flow'",
        ),
        (
            lambda: samplers.pndm(exact(ZERO), X, samplers.schedule_for(ZERO, "pndm", 5)),
            "cannot start from pure noise",
        ),
        (
            lambda: samplers.euler(exact(FLOW), X, samplers.schedule_for(FLOW, "euler", 5)),
            "use ddim or dpm",
        ),
    ],
)
def test_invalid_settings_are_one_line(call, message):
    with pytest.raises(UserError, match=message):
        call()


# Guidance


def network(x, timesteps, condition):
    """A fake network whose result depends on all its inputs."""
    return jnp.tanh(
        x * condition.mean((1, 2))[:, None, None, None] + timesteps[:, None, None, None] / 1000
    )


CONDITION, NEGATIVE = (
    jnp.asarray(np.random.default_rng(k).standard_normal((4, 5, 6)), jnp.float32) for k in (1, 2)
)


def sampled(guidance, negative=NEGATIVE, **more):
    denoise = samplers.guided_denoiser(V, network, CONDITION, negative, guidance=guidance, **more)
    return samplers.ddim(denoise, X, samplers.schedule_for(V, "ddim", 4))


def test_guidance_one_is_the_condition_alone():
    alone = samplers.ddim(
        samplers.guided_denoiser(V, network, CONDITION, CONDITION, guidance=3.0),
        X,
        samplers.schedule_for(V, "ddim", 4),
    )
    # In `alone`, the negative condition is the condition itself, so guidance changes nothing.
    np.testing.assert_allclose(sampled(1.0), alone, atol=1e-5)
    # Guidance just above 1 gives almost the same.
    np.testing.assert_allclose(sampled(1.0 + 1e-6), alone, atol=1e-4)
    np.testing.assert_array_equal(sampled(1.0, NEGATIVE + 1), sampled(1.0))


def test_guidance_zero_is_the_negative_condition_alone():
    alone = samplers.ddim(
        samplers.guided_denoiser(V, network, NEGATIVE, NEGATIVE, guidance=1.0),
        X,
        samplers.schedule_for(V, "ddim", 4),
    )
    np.testing.assert_allclose(sampled(0.0), alone, atol=1e-5)
    assert jnp.abs(sampled(5.0) - sampled(5.0, NEGATIVE + 1)).max() > 1e-3


def test_rescaled_guidance_has_the_conditional_deviation():
    t = jnp.float32(500.0)

    def prediction(guidance, rescale):
        return samplers.guided_denoiser(
            V, network, CONDITION, NEGATIVE, guidance=guidance, rescale=rescale
        ).predict(X, t)

    def deviation(x):
        return np.asarray(x).std((1, 2, 3))

    np.testing.assert_allclose(
        deviation(prediction(7.5, 1.0)), deviation(prediction(1.0, 0.0)), rtol=1e-3
    )
    plain, half, full = (np.asarray(prediction(7.5, rescale)) for rescale in (0.0, 0.5, 1.0))
    np.testing.assert_allclose(half, (plain + full) / 2, rtol=1e-3, atol=1e-4)


# Seeds


def test_noise_is_a_function_of_the_rows_own_seed():
    both = samplers.initial_noise(jnp.array([5, 9]), (3, 3, 2))
    np.testing.assert_array_equal(both[1], samplers.initial_noise(jnp.array([9]), (3, 3, 2))[0])
    assert jnp.abs(both[0] - both[1]).max() > 0.1
    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
        spread = jax.jit(
            samplers.initial_noise,
            static_argnums=1,
            out_shardings=jax.sharding.PartitionSpec("data"),
        )(jnp.arange(8), (3, 3, 2))
    np.testing.assert_array_equal(spread[5], both[0])
