"""Model FLOPs: a sum written out by hand, and what the traced model multiplies."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from emu_jax.models import emu, flops, module
from tests.support import make

P = make.program(make.cfg())


def products(jaxpr, times=1):
    """FLOPs of a jaxpr's matrix products and convolutions; in a scan, of all iterations."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contract, _), _ = equation.params["dimension_numbers"]
            total += (
                times
                * 2
                * equation.outvars[0].aval.size
                * int(np.prod([equation.invars[0].aval.shape[axis] for axis in contract]))
            )
        if equation.primitive.name == "conv_general_dilated":
            # The kernel's axes are height, width, in, out.
            kernel = equation.invars[1].aval
            total += times * 2 * equation.outvars[0].aval.size * kernel.size // kernel.shape[-1]
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            total += products(
                inner,
                times * (equation.params["length"] if equation.primitive.name == "scan" else 1),
            )
    return total


def traced(function, *shapes):
    return products(
        jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).jaxpr
    )


@pytest.mark.parametrize("kv_heads", [0, 2])
def test_it_is_what_the_model_multiplies(kv_heads):
    P = make.program(make.cfg(f"model.llama.kv_heads={kv_heads}"))
    params = make.random_params(P)
    model = module.bind(emu.Emu, P.model_config, params)
    B = 2
    T = 10
    M = 3
    N = P.model_config.resampler.tokens
    counts = flops.forward(
        P.model_config, images=M, tokens=B * T, pairs=B * T * T, labels=0, regressed=0
    )
    positions = jnp.tile(jnp.arange(T), (B, 1))
    assert counts["vision"] == traced(model.vision, ((M, 28, 28, 3), jnp.float32))
    # Dense attention computes all pairs, so `pairs` counts all of them.
    assert counts["llama"] == traced(
        lambda x: model.llama(x, positions, positions)[0], ((B, T, 32), jnp.float32)
    )
    r = P.model_config.resampler
    # These pairs are computed by dense attention, although the mask forbids them.
    upper = M * r.depth * 4 * (N * (N - 1) // 2) * r.heads * r.head_width
    assert counts["resampler"] + upper == traced(model.resampler, ((M, 5, 32), jnp.float32))


def test_the_heads_by_hand():
    got = flops.forward(P.model_config, images=0, tokens=0, pairs=0, labels=7, regressed=3)
    assert got == {
        "vision": 0,
        "resampler": 0,
        "llama": 0,
        "heads": 7 * 2 * 32 * 516 + 3 * 2 * 32 * 32,
    }


def test_llama_by_hand():
    """Per token and block: 8 D D FLOPs in q, k, v and o, and 6 D F in gate, up and down.

    Documents of 3 and 2 tokens have 6 + 3 allowed pairs, of 4 D FLOPs each.
    """
    got = flops.forward(P.model_config, images=0, tokens=5, pairs=9, labels=0, regressed=0)["llama"]
    assert got == 2 * (5 * (8 * 32 * 32 + 6 * 32 * 64) + 9 * 4 * 32)


def test_an_emu_14b_step_is_about_six_times_its_parameters():
    p = make.program(make.cfg(size="emu-14b"))
    work = flops.forward(p.model_config, images=0, tokens=1, pairs=0, labels=1, regressed=0)
    # The input table is looked up, not multiplied, so it costs nothing.
    assert sum(work.values()) == pytest.approx(2 * (13.0e9 - 32000 * 5120), rel=0.01)
    assert (
        flops.train(
            p.model_config,
            {"llama": True, "heads": True},
            images=0,
            tokens=1,
            pairs=0,
            labels=1,
            regressed=0,
        )["llama"]
        == 3 * work["llama"]
    )


@pytest.mark.parametrize(
    ("trained", "times"),
    [
        ({"vision": True, "resampler": True, "llama": True, "heads": True}, (3, 3, 3, 3)),
        ({"llama": True, "heads": True}, (1, 1, 3, 3)),
        ({"resampler": True}, (1, 3, 2, 2)),
        ({"vision": True, "resampler": False}, (3, 2, 2, 2)),
        ({"heads": True}, (1, 1, 1, 3)),
        ({}, (1, 1, 1, 1)),
        # With LoRA, gradients pass through frozen matrices, which get none themselves.
        (
            flops.trained(
                ["llama/blocks/attn/q/a", "llama/blocks/attn/q/b", "llama/lm_head/added"]
            ),
            (1, 1, 2, 2),
        ),
        (
            flops.trained(["llama/blocks/attn/q/w", "llama/embed/added", "regress_head/w"]),
            (1, 1, 3, 3),
        ),
    ],
)
def test_gradients_cost_where_they_go(trained, times):
    counts = dict(images=2, tokens=20, pairs=90, labels=9, regressed=8)
    once = flops.forward(P.model_config, **counts)
    step = flops.train(P.model_config, trained, **counts)
    assert (
        tuple(step[tower] / once[tower] for tower in ("vision", "resampler", "llama", "heads"))
        == times
    )
