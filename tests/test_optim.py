"""The optimizer is AdamW with a rate and a decay per parameter; schedules by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emu_jax import optim, tree
from emu_jax.config import UserError
from tests.support import make


def settings(*overrides):
    return make.cfg(
        "optim.steps=10", "optim.warmup=0.2", *(f"optim.{override}" for override in overrides)
    ).optim


@pytest.mark.parametrize(
    ("overrides", "shares"),
    [
        (["schedule=cosine"], {0: 0, 1: 0.5, 2: 1, 4: 0.853553, 6: 0.5, 8: 0.146447, 10: 0, 12: 0}),
        (["schedule=cosine", "final=0.1"], {2: 1, 6: 0.55, 10: 0.1}),
        (["schedule=cosine", "warmup=0.0"], {0: 1, 5: 0.5, 10: 0}),
        (["schedule=linear"], {1: 0.5, 2: 1, 6: 0.5, 9: 0.125, 10: 0}),
        (["schedule=linear", "final=0.2"], {2: 1, 6: 0.6, 10: 0.2, 11: 0.2}),
        (["schedule=constant"], {0: 0, 1: 0.5, 2: 1, 9: 1, 10: 1}),
        (
            ["schedule=stepped", "boundaries=((4, 0.5), (8, 0.1))"],
            {0: 0, 1: 0.5, 2: 1, 3: 1, 4: 0.5, 7: 0.5, 8: 0.1, 10: 0.1},
        ),
        (["schedule=cosine", "warmup=1.0"], {0: 0, 5: 0.5, 9: 0.9, 10: 1}),
    ],
)
def test_schedule_by_hand(overrides, shares):
    schedule = optim.schedule(settings(*overrides))
    np.testing.assert_allclose(
        [schedule(step) for step in shares], list(shares.values()), atol=1e-6
    )


def test_the_decoders_published_schedule():
    """Linear warm-up over 5k of 15k steps to 1e-4, 5e-5 from 10k, 1e-5 from 14k."""
    schedule = optim.schedule(
        settings(
            "steps=15000",
            "warmup=0.3333333",
            "schedule=stepped",
            "boundaries=((10_000, 0.5), (14_000, 0.1))",
        )
    )
    np.testing.assert_allclose(
        [schedule(step) for step in (0, 2500, 5000, 9999, 10_000, 13_999, 14_000)],
        [0, 0.5, 1, 1, 0.5, 0.5, 0.1],
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["schedule=cosin"],
            "optim.schedule='cosin' is not one of cosine, linear, constant, stepped",
        ),
        (["warmup=2000"], r"optim.warmup=2000.0 must be a share of the steps, 0 to 1"),
        (["warmup=-0.1"], "optim.warmup=-0.1 must be a share"),
        (["steps=0"], "optim.steps=0 at least 1"),
        (
            ["schedule=stepped", "boundaries=((8, 0.5), (4, 0.1))"],
            r"optim.boundaries=.* \(step, share of the peak\) pairs, steps rising from the "
            "warm-up's end, 2",
        ),
        (["schedule=stepped", "boundaries=((1, 0.5),)"], "optim.boundaries="),
        (["schedule=stepped", "boundaries=(4, 0.5)"], "optim.boundaries="),
    ],
)
def test_a_wrong_schedule_is_one_line(overrides, message):
    with pytest.raises(UserError, match=message):
        optim.schedule(settings(*overrides))


PARAMS = {
    "llama": {"norm": np.float32([1.0, 2.0]), "w": np.float32([[1.0, -2.0], [0.5, 4.0]])},
    "vision": np.float32([3.0]),
}
PEAKS = {"llama": {"norm": 1e-2, "w": 1e-2}, "vision": 3e-3}
DECAYS = {"llama": {"norm": 0.0, "w": 0.05}, "vision": 0.1}
GRADS = [
    jax.tree.map(
        lambda x, k=k: np.cos(np.arange(x.size, dtype=np.float32) + k).reshape(x.shape), PARAMS
    )
    for k in range(4)
]


def by_the_book(c, share):
    """AdamW (arXiv 1711.05101) over GRADS in float64, after clipping by the global norm."""
    params = jax.tree.map(np.float64, PARAMS)
    (m, v) = (jax.tree.map(np.zeros_like, PARAMS) for _ in range(2))
    for t, grads in enumerate(GRADS, 1):
        norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
        grads = jax.tree.map(lambda g: g * min(1, c.clip / norm) if c.clip else g, grads)
        m = jax.tree.map(lambda m, g: c.b1 * m + (1 - c.b1) * g, m, grads)
        v = jax.tree.map(lambda v, g: c.b2 * v + (1 - c.b2) * g**2, v, grads)
        params = jax.tree.map(
            lambda p, m, v, peak, decay: (
                p
                - share[t - 1]
                * peak
                * (m / (1 - c.b1**t) / (np.sqrt(v / (1 - c.b2**t)) + c.eps) + decay * p)
            ),
            params,
            m,
            v,
            PEAKS,
            DECAYS,
        )
    return params


@pytest.mark.parametrize(
    "overrides", [["clip=0.0"], ["clip=0.5"], ["clip=100.0", "b1=0.5", "eps=0.1"]]
)
def test_it_is_adamw_with_a_rate_and_a_decay_for_every_leaf(overrides):
    c = settings(*overrides)
    optimizer = optim.make_optimizer(c, PEAKS, DECAYS)
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = optimizer.init(params)
    for grads in GRADS:
        updates, state = optimizer.update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    want = by_the_book(c, share=[0, 0.5, 1, 0.961940])
    chex.assert_trees_all_close(params, want, rtol=2e-6)
    assert all(
        (np.asarray(a) != b).all() for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(PARAMS))
    )


def test_the_papers_rates_and_decay_on_matrices_only():
    c = make.cfg()
    params = make.abstract(make.program(c))
    rates, decays = (
        dict(tree.leaves(tree.by_rule(rows, params))) for rows in (c.rules.peak_lr, c.rules.decay)
    )
    assert len(rates) > 50
    for path in rates:
        assert rates[path] == {"vision": 4e-5, "llama": 3e-5}.get(path.split("/")[0], 1e-4), path
        assert decays[path] == (0.05 if path.endswith(("/w", "/base")) else 0.0), path
