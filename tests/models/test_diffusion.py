"""Schedules by hand, and x0 and eps recovered from noisy images and predictions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emu_jax.models import diffusion
from emu_jax.models.diffusion import Diffusion

SD = Diffusion(
    steps=1000, beta_start=0.00085, beta_end=0.012, zero_snr=False, target="epsilon", min_snr=0.0
)
KINDS = [
    SD,
    dataclasses.replace(SD, target="v"),
    dataclasses.replace(SD, target="v", zero_snr=True),
    dataclasses.replace(SD, target="flow"),
    dataclasses.replace(SD, target="x0", zero_snr=True),
]


def name(d):
    return d.target + "-zero" * d.zero_snr


rng = np.random.default_rng(0)
X0, E = (jnp.asarray(rng.standard_normal((4, 3, 3, 2)), jnp.float32) for _ in range(2))
TIMES = jnp.array([1.0, 400.0, 998.0, 999.0])


def test_the_schedule_is_a_product_of_one_minus_beta():
    a2 = []
    left = 1.0
    for step in range(1000):
        root = 0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * step / 999
        left *= 1 - root * root
        a2.append(left)
    np.testing.assert_allclose(diffusion.alphas_cumprod(SD), a2, rtol=1e-12)


def test_zero_terminal_snr_ends_in_noise_and_starts_where_it_did():
    plain = diffusion.alphas_cumprod(SD)
    rescaled = diffusion.alphas_cumprod(KINDS[2])
    assert (
        rescaled[-1] == 0
        and rescaled[0] == pytest.approx(plain[0], rel=1e-12)
        and (np.diff(rescaled) < 0).all()
    )
    a = np.sqrt(plain)
    b = np.sqrt(rescaled)
    # The square roots are shifted and stretched.
    np.testing.assert_allclose(np.diff(b) / np.diff(a), b[0] / (a[0] - a[-1]), rtol=1e-9)


def test_noise_is_added_by_hand():
    got = diffusion.add_noise(SD, X0, E, TIMES)
    a2 = diffusion.alphas_cumprod(SD)[TIMES.astype(int)].reshape(4, 1, 1, 1)
    np.testing.assert_allclose(got, np.sqrt(a2) * X0 + np.sqrt(1 - a2) * E, rtol=1e-5, atol=1e-6)
    half = diffusion.add_noise(KINDS[3], X0, E, jnp.full(4, 500.0))
    np.testing.assert_allclose(half, (X0 + E) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("d", KINDS, ids=name)
def test_a_prediction_gives_back_what_it_was_made_of(d):
    x = diffusion.add_noise(d, X0, E, TIMES)
    prediction = diffusion.target(d, X0, E, TIMES)
    x0, e = diffusion.x0_and_eps(d, prediction, x, *diffusion.coefficients(d, TIMES))
    # Where there is little signal, a predicted noise gives x0 only roughly.
    np.testing.assert_allclose(x0, X0, atol=1e-3 if d.target == "epsilon" else 1e-5)
    np.testing.assert_allclose(e, E, atol=1e-4)


def test_targets_by_hand():
    a, s = (np.asarray(x).reshape(4, 1, 1, 1) for x in diffusion.coefficients(SD, TIMES))
    np.testing.assert_array_equal(diffusion.target(SD, X0, E, TIMES), E)
    np.testing.assert_allclose(
        diffusion.target(KINDS[1], X0, E, TIMES), a * E - s * X0, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(diffusion.target(KINDS[3], X0, E, TIMES), E - X0, rtol=1e-6)
    np.testing.assert_array_equal(diffusion.target(KINDS[4], X0, E, TIMES), X0)


def test_min_snr_weights_are_the_papers():
    """Weights are min(snr, 5) / snr for epsilon, / (snr + 1) for v and / 1 for x0.

    Without min_snr, all weights are 1.
    """
    a2 = diffusion.alphas_cumprod(SD)[TIMES.astype(int)]
    snr = a2 / (1 - a2)
    for d, below in (
        (KINDS[0], snr),
        (KINDS[1], snr + 1),
        (dataclasses.replace(SD, target="x0"), 1),
    ):
        got = diffusion.loss_weights(dataclasses.replace(d, min_snr=5.0), TIMES)
        np.testing.assert_allclose(got, np.minimum(snr, 5) / below, rtol=1e-3)
        np.testing.assert_array_equal(diffusion.loss_weights(d, TIMES), 1)


def test_times_cover_the_schedule_evenly():
    whole = np.asarray(diffusion.sample_timesteps(SD, jax.random.key(0), 20_000))
    assert (
        whole.min() == 0
        and whole.max() == 999
        and (whole == np.floor(whole)).all()
        and abs(whole.mean() - 499.5) < 10
    )
    flow = np.asarray(diffusion.sample_timesteps(KINDS[3], jax.random.key(0), 20_000))
    assert flow.min() > 0 and flow.max() <= 1000 and (flow != np.floor(flow)).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "noise"}, "is not one of epsilon, v, flow, x0"),
        ({"zero_snr": True}, "use target='v'"),
    ],
)
def test_what_cannot_be_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SD, **changes)
