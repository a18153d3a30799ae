"""Laws of the fused objective: the plain one's value and gradient, without its memory."""

import re
from functools import partial

import chex
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from emu_jax import losses, sharding, tree
from emu_jax.losses import fused
from tests.support.trees import assert_close

B = 8
T = 11
K = 5
D = 16
V = 40
n = 6


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def learnt(dtype=jnp.float32):
    """Hidden states and the two heads."""
    return (
        normal(1, B, T, D).astype(dtype),
        {"base": 3 * normal(2, V, D), "added": 3 * normal(3, n, D)},
        {"w": normal(4, D, D) / 4},
    )


def given():
    """Arguments with every special case.

    Labels come from both tables. Weights are fractional, and 0 in one complete row and in other
    places. Some predictors share a position. Others lie beyond the ends of the row, and have weight
    0.
    """
    rng = np.random.default_rng(0)
    labels = rng.integers(0, V + n, (B, T))
    labels[:, :4] = [0, V - 1, V, V + n - 1]
    label_weights = rng.uniform(0.5, 2, (B, T)) * rng.integers(0, 2, (B, T))
    label_weights[:, :4] = 1
    label_weights[2] = 0
    predictors = rng.integers(0, T, (B, K))
    predictors[:, 1] = predictors[:, 0]
    predictors[:, 2] = T + 3
    predictors[:, 3] = -2
    target_weights = rng.uniform(0.5, 2, (B, K))
    target_weights[:, 2:4] = 0
    target_weights[3] = 0
    return (
        labels.astype(np.int32),
        label_weights.astype(np.float32),
        predictors.astype(np.int32),
        normal(5, B, K, D),
        target_weights.astype(np.float32),
        np.float32(0.7 / label_weights.sum()),
        np.float32(1.3 / target_weights.sum()),
    )


def plain(
    learnt, labels, label_weights, predictors, targets, target_weights, text_scale, image_scale
):
    """The objective written directly, with all logits."""
    hidden, head, regress = jax.tree.map(lambda x: x.astype(jnp.float32), learnt)
    logits = jnp.einsum("BTD,VD->BTV", hidden, jnp.concatenate([head["base"], head["added"]]))
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]
    at = jnp.take_along_axis(hidden, jnp.clip(predictors, 0, T - 1)[..., None], 1)
    error = jnp.square(jnp.einsum("BKD,DE->BKE", at, regress["w"]) - targets).mean(-1)
    loss = text_scale * (label_weights * nll).sum() + image_scale * (target_weights * error).sum()
    return loss, (nll, error)


def ours(learnt, *given, chunk=4):
    loss, nll, error = fused(*learnt, *given, chunk=chunk)
    return loss, (nll, error)


value_and_grad = partial(jax.value_and_grad, has_aux=True)
# Compiled once for all tests.
ours_once = jax.jit(ours)
fused_once = jax.jit(value_and_grad(ours))
plain_once = jax.jit(value_and_grad(plain))


@pytest.mark.parametrize("chunk", [1, 4, 11, 256])
def test_equals_plain(chunk):
    x = learnt()
    y = given()
    want = plain_once(x, *y)
    assert_close(jax.jit(value_and_grad(partial(ours, chunk=chunk)))(x, *y), want, 1e-5)
    assert_close(jax.jit(partial(ours, chunk=chunk))(x, *y), want[0], 1e-5)


def test_large_logits_do_not_overflow():
    (hidden, *heads) = learnt()
    y = given()
    # These logits reach several hundred.
    x = (50 * hidden, *heads)
    got = fused_once(x, *y)
    want = plain_once(x, *y)
    assert_close(got, want, 1e-5)
    chex.assert_tree_all_finite(got)


def test_what_does_not_count_has_no_gradient():
    y = given()
    _, (d_hidden, _, _) = fused_once(learnt(), *y)
    counts = y[1] != 0
    for b, k in zip(*np.nonzero(y[4]), strict=True):
        # This position predicts a target that counts.
        counts[b, y[2][b, k]] = True
    np.testing.assert_array_equal(np.any(d_hidden, -1), counts)


def test_no_gradient_to_targets_or_weights():
    x, y = jax.device_put((learnt(), given()))
    floats = tuple(part for part in y if part.dtype == jnp.float32)

    def loss(floats):
        parts = iter(floats)
        return ours(x, *(next(parts) if part.dtype == jnp.float32 else part for part in y))[0]

    assert len(floats) == 5 and not any(np.any(g) for g in jax.jit(jax.grad(loss))(floats))


def test_nll_and_error_are_detached():
    detached = jax.jit(jax.grad(lambda x, *y: sum(part.sum() for part in ours(x, *y)[1])))
    gradient = detached(learnt(), *given())
    assert not any(np.any(g) for g in jax.tree.leaves(gradient))


def test_gradient_is_scaled_by_the_cotangent():
    x, y = jax.device_put((learnt(), given()))
    (loss, _), once = jax.device_get(fused_once(x, *y))
    composed = jax.jit(jax.grad(lambda x: jnp.square(3 * ours(x, *y)[0]) + x[0].sum()))(x)
    want = jax.tree.map(lambda g: 18 * loss * g, once)
    assert_close(composed, (want[0] + 1, *want[1:]), 1e-5)


@pytest.mark.parametrize("part", range(3))
def test_gradient_by_finite_differences(part):
    x = learnt()
    y = given()
    gradient = jax.device_get(fused_once(x, *y)[1][part])
    # In this direction, all elements of the gradient add up and none cancels another.
    direction = jax.tree.map(lambda g: np.where(g < 0, -1.0, 1.0), gradient)

    def at(step):
        moved = jax.tree.map(lambda w, d: np.float32(w + step * d), x[part], direction)
        return ours_once((*x[:part], moved, *x[part + 1 :]), *y)[0]

    want = sum(np.abs(g).sum() for g in jax.tree.leaves(gradient))
    np.testing.assert_allclose((at(1e-3) - at(-1e-3)) / 2e-3, want, rtol=1e-2)


def test_bfloat16():
    x = learnt(jnp.bfloat16)
    y = given()
    got, gradient = fused_once(x, *y)
    chex.assert_trees_all_equal_dtypes(gradient, x)
    assert got[0].dtype == got[1][0].dtype == jnp.float32
    assert_close((got, gradient), plain_once(x, *y), tolerance=0.03)


@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((2, 2, 2), jnp.float32),
        ((1, 8, 1), jnp.float32),
        ((1, 2, 4), jnp.float32),
        ((2, 2, 2), jnp.bfloat16),
    ],
)
def test_sharded_equals_single(shape, dtype):
    x = learnt(dtype)
    y = given()
    want = fused_once(x, *y)
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, shape, strict=True)))
    specs = P(sharding.ROWS), losses.HEAD_SPECS, losses.REGRESS_SPECS
    with jax.set_mesh(mesh):
        placed = jax.tree.map(
            lambda w, spec: jax.device_put(w, NamedSharding(mesh, spec)), x, specs
        )
        got = fused_once(placed, *y)
        tolerance = 1e-5 if dtype == jnp.float32 else 0.01
        assert_close(got, want, tolerance)
        assert_close(ours_once(placed, *y), want[0], tolerance)
    assert all(
        jax.tree.leaves(
            jax.tree.map(
                lambda g, w: g.sharding.is_equivalent_to(w.sharding, g.ndim), got[1], placed
            )
        )
    )


def test_heads_lie_as_the_table_says():
    rows = [row for tower in ("llama", "regress_head") for row in sharding.PARAMS[tower]]
    for path, spec in tree.leaves(
        {"llama": {"lm_head": losses.HEAD_SPECS}, "regress_head": losses.REGRESS_SPECS}
    ):
        assert next(value for pattern, value in rows if re.fullmatch(pattern, path)) == spec


def equations(jaxpr, loops=0):
    """(equation, how many scans it is inside of) of a jaxpr and all that it calls."""
    for equation in jaxpr.eqns:
        yield equation, loops
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner, loops + (equation.primitive.name == "scan"))


def arrays(function, *arguments):
    """(shape, dtype name) of every array that `function` makes."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    return {
        (out.aval.shape, out.aval.dtype.name)
        for equation, _ in equations(jaxpr)
        for out in equation.outvars
    }


# T is 11: chunks of 4, 4 and 3, or of 6 and 5.
@pytest.mark.parametrize("chunk, largest_chunk", [(4, 4), (8, 6)])
@pytest.mark.parametrize("wrap", [partial, value_and_grad])
def test_logits_never_exist_beyond_a_chunk(wrap, chunk, largest_chunk):
    def largest(function):
        """Size of the largest array over the vocabulary that is not a weight."""
        found = arrays(function, learnt(), *given())
        return max(
            np.prod(shape)
            for shape, _ in found
            if set(shape) & {V, V + n} and shape[-2:] not in {(V, D), (V + n, D)}
        )

    assert largest(wrap(partial(ours, chunk=chunk))) == B * largest_chunk * V
    assert largest(plain) == B * T * (V + n)


def test_evaluating_makes_no_gradient():
    # In bfloat16, the cast copies of the weights cannot be mistaken for a float32 gradient.
    x = learnt(jnp.bfloat16)
    y = given()
    buffer = ((V, D), "float32")
    assert buffer in arrays(value_and_grad(ours), x, *y)
    assert buffer not in arrays(ours, x, *y)


def test_a_frozen_head_costs_no_gradient_buffer():
    # Use one row, so that a chunk of one token is far smaller than the head.
    y = jax.device_put([part[:1] if part.ndim else part for part in given()])
    x = jax.device_put(
        (
            normal(1, 1, T, D),
            {"base": normal(2, 4096, D), "added": normal(3, n, D)},
            {"w": normal(4, D, D)},
        )
    )

    def memory(trained):
        """Bytes of temporaries and results of the gradient of the first `trained` parts."""

        def loss(parts):
            return ours((*parts, *x[trained:]), *y, chunk=1)[0]

        stats = jax.jit(jax.grad(loss)).lower(x[:trained]).compile().memory_analysis()
        assert stats
        return stats.temp_size_in_bytes + stats.output_size_in_bytes

    assert memory(1) < 4096 * D * 4 / 2 < 4096 * D * 4 < memory(2)


def test_only_tensor_collectives_inside_the_loop():
    with jax.set_mesh(sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        jaxpr = jax.make_jaxpr(value_and_grad(ours))(learnt(), *given()).jaxpr
    over = {True: set(), False: set()}
    for equation, loops in equations(jaxpr):
        if equation.primitive.name != "axis_index":
            axes = equation.params.get("axes", equation.params.get("axis_name", ()))
            over[loops > 0] |= set(axes if isinstance(axes, tuple) else (axes,)) & set(
                sharding.AXES
            )
    assert over == {True: {"tensor"}, False: {"data", "fsdp", "tensor"}}
