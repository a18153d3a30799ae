"""Laws of attention.

Dense equals a loop, every kernel equals dense on packed rows, and masked positions have no effect.
"""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from emu_jax.config import UserError
from emu_jax.models.attention import Mask, _spec, allowed, attention, self_mask
from emu_jax.sharding import AXES, ROWS, make_mesh
from tests.support.trees import assert_close

# The kernels pad these rows of 140 positions to two blocks of 128.
SEGMENTS = jax.device_put(
    np.array([np.repeat([1, 2, 3, 0], part) for part in ([40, 50, 30, 20], [3, 100, 25, 12])])
)
# Compiling takes most of the time of these tests, so XLA optimises nothing.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
allowed_once = jit(lambda mask, T, S: allowed(mask, T, S).astype(int), static_argnums=(1, 2))
run = jit(attention, static_argnames=("scale", "dropout", "kernel"))
on_cpu = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="kernels are interpreted on a CPU"
)
on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")


def qkv(B=2, T=140, S=None, H=2, G=None, d=64, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = (B, T, H, d), (B, S or T, G or H, d), (B, S or T, G or H, d)
    return jax.device_put([rng.normal(size=shape).astype(dtype) for shape in shapes])


def value_and_grads(q, k, v, mask, kernel, **more):
    """{"out": output, "dq", "dk", "dv": gradients of a randomly weighted sum of the output}."""
    weights = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)

    def loss(q, k, v):
        out = attention(q, k, v, mask, scale=q.shape[-1] ** -0.5, kernel=kernel, **more)
        return jnp.sum(out * weights), out

    (_, out), grads = jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return dict(zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True))


def test_dense_is_the_definition():
    q, k, v = map(np.asarray, qkv(T=5, S=7, H=4, G=2, d=3))
    bias = np.random.default_rng(0).normal(size=(4, 5, 7)).astype(np.float32)
    q_segments, q_positions = np.array(
        [[[1, 1, 2, 2, 3], [1, 2, 2, 9, 9]], [[1, 2, 1, 2, 0], [5, 0, 1, 0, 1]]]
    )
    segments, positions = np.array(
        [
            [[1, 1, 1, 2, 2, 2, 0], [1, 1, 2, 2, 2, 2, 0]],
            [[0, 1, 2, 0, 1, 2, 0], [0, 1, 0, 1, 2, 3, 0]],
        ]
    )
    out = run(
        q,
        k,
        v,
        Mask(q_segments, segments, q_positions, positions, causal=True),
        scale=0.5,
        bias=bias,
        kernel="dense",
    )
    out = np.asarray(out)
    for b in range(2):
        for t in range(5):
            seen = [
                s
                for s in range(7)
                if segments[b, s] == q_segments[b, t] and positions[b, s] <= q_positions[b, t]
            ]
            for h in range(4):
                logits = np.array(
                    [0.5 * np.dot(q[b, t, h], k[b, s, h // 2]) + bias[h, t, s] for s in seen]
                )
                probs = np.exp(logits) / np.exp(logits).sum()
                expected = sum((p * v[b, s, h // 2] for p, s in zip(probs, seen)), np.zeros(3))
                np.testing.assert_allclose(out[b, t, h], expected, atol=1e-5)
    # A query that may see no key gives zero.
    assert not out[0, 4].any() and not out[1, 3:].any()


def test_gradients_are_finite_where_a_query_has_no_key():
    mask = Mask(q_segments=np.array([[1, 1, 1]] * 2), kv_segments=np.array([[2, 2, 2], [1, 2, 1]]))
    chex.assert_tree_all_finite(value_and_grads(*qkv(T=3), mask, "dense"))


def test_masks_of_the_docstring():
    packed = allowed_once(self_mask(jax.device_put(np.array([[1, 1, 2, 2, 0]]))), 5, 5)[0]
    assert packed.tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    cache = Mask(*map(np.array, ([[1, 1]], [[1, 1, 1, 0]], [[1, 2]], [[0, 1, 2, 0]])), causal=True)
    assert allowed_once(cache, 2, 4)[0].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
    assert allowed_once(self_mask(), 3, 3)[0].tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert np.all(allowed_once(None, 2, 3)) and np.all(allowed_once(self_mask(causal=False), 3, 3))


@pytest.mark.parametrize(
    "causal, d, H, G", [(True, 128, 2, 2), (False, 64, 4, 2), (True, 88, 2, 1)]
)
@on_cpu
def test_kernels_equal_dense_on_packed_rows(causal, d, H, G):
    q, k, v = qkv(d=d, H=H, G=G)
    mask = self_mask(SEGMENTS, causal=causal)
    dense = value_and_grads(q, k, v, mask, "dense")
    for kernel in ("splash", "pallas"):
        assert_close(value_and_grads(q, k, v, mask, kernel), dense, 2e-5)


@on_cpu
def test_splash_equals_dense_over_many_blocks(monkeypatch):
    """Rows have three blocks of 128: causality skips some, and documents cross blocks."""
    monkeypatch.setattr("emu_jax.models.attention._block_size", lambda length: 128)
    q, k, v = qkv(B=1, T=260, H=1, d=16)
    mask = self_mask(jax.device_put(np.repeat([1, 2, 3, 0], [100, 65, 90, 5])[None]))
    assert_close(
        value_and_grads(q, k, v, mask, "splash"), value_and_grads(q, k, v, mask, "dense"), 2e-5
    )


@pytest.mark.parametrize(
    "kernel, causal, S", [("splash", True, 140), ("splash", False, 70), ("pallas", False, 140)]
)
@on_cpu
def test_kernels_equal_dense_without_segments(kernel, causal, S):
    q, k, v = qkv(B=1, S=S)
    mask = self_mask(causal=causal)
    assert_close(
        value_and_grads(q, k, v, mask, kernel), value_and_grads(q, k, v, mask, "dense"), 2e-5
    )


@pytest.mark.parametrize(
    "kernel", ["dense", pytest.param("splash", marks=on_cpu), pytest.param("pallas", marks=on_cpu)]
)
def test_documents_packed_equal_documents_alone(kernel):
    q, k, v = qkv(B=1)
    packed = np.asarray(run(q, k, v, self_mask(SEGMENTS[:1]), scale=0.1, kernel=kernel))
    for start, stop in ((0, 40), (40, 90), (90, 120)):
        alone = run(*(x[:, start:stop] for x in (q, k, v)), self_mask(), scale=0.1, kernel="dense")
        np.testing.assert_allclose(packed[:, start:stop], alone, atol=1e-5)


@pytest.mark.parametrize(
    "kernel", ["dense", pytest.param("splash", marks=on_cpu), pytest.param("pallas", marks=on_cpu)]
)
def test_the_future_and_the_neighbours_have_zero_gradient(kernel):
    """Gradients of the output at position 60, in the second document (positions 40 to 89)."""
    q, k, v = qkv(B=1)

    def loss(k, v):
        return jnp.sum(attention(q, k, v, self_mask(SEGMENTS[:1]), scale=0.1, kernel=kernel)[:, 60])

    for grad in jax.device_get(jit(jax.grad(loss, argnums=(0, 1)))(k, v)):
        assert not grad[:, :40].any() and not grad[:, 61:].any()
        assert np.abs(grad[:, 40:61]).sum((0, 2, 3)).all()


def test_dropout_keeps_the_mean_and_needs_a_key():
    q, k, v = qkv(B=1, T=8, d=16)
    plain = run(q, k, v, scale=0.1, kernel="dense")
    np.testing.assert_array_equal(run(q, k, v, scale=0.1, kernel="dense", dropout=0.5), plain)
    draw = jax.vmap(lambda key: attention(q, k, v, scale=0.1, dropout=0.3, key=key))
    many = np.asarray(jit(lambda key: draw(jax.random.split(key, 2000)))(jax.random.key(2)))
    assert np.abs(many[0] - plain).max() > 0.1
    np.testing.assert_allclose(many.mean(0), plain, atol=0.1)


@pytest.mark.parametrize(
    "kernel, sizes, G, causal",
    [
        # Rows are sharded over data and fsdp, heads over tensor.
        ("splash", dict(data=2, fsdp=2, tensor=2), 2, True),
        # A single key head cannot be divided over tensor, so rows are sharded over all axes.
        ("splash", dict(data=1, fsdp=4, tensor=2), 1, True),
        # Without causality, as for images, rows are sharded over all axes.
        ("pallas", dict(data=1, fsdp=4, tensor=2), 2, False),
    ],
)
@on_cpu
def test_sharded_equals_single(kernel, sizes, G, causal):
    q, k, v = qkv(B=8, T=12, d=32, G=G)
    segments = jax.device_put(np.array([np.repeat([1, 2, 0], [5, 4, 3])] * 8))
    mask = self_mask(segments, causal=causal)
    single = value_and_grads(q, k, v, mask, "dense")
    with jax.set_mesh(make_mesh(sizes)):
        assert_close(value_and_grads(q, k, v, mask, kernel), single, 2e-5)


@pytest.mark.parametrize(
    "B, G, causal, spec",
    [
        (8, 2, True, P(ROWS, None, "tensor", None)),
        (8, 3, True, P(AXES, None, None, None)),
        (4, 3, True, P(ROWS, None, None, None)),
        (8, 2, False, P(AXES, None, None, None)),
        (1, 2, True, P(None, None, "tensor", None)),
    ],
)
def test_rows_and_heads_lie_where_they_divide(B, G, causal, spec):
    assert _spec(jax.sharding.AbstractMesh((2, 2, 2), AXES), B, G, causal) == spec


def mesh_of(platform):
    """A mesh of four absent devices: code traced under it is lowered for their platform."""
    kind, cores = {"tpu": ("TPU v5", 1), "gpu": ("NVIDIA H100 80GB HBM3", 132)}[platform]
    device = jax.sharding.AbstractDevice(kind, cores, platform)
    return jax.sharding.AbstractMesh(
        (1, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=device
    )


@pytest.mark.parametrize(
    "platform, target, kernel, call",
    [("tpu", "tpu", "splash", "tpu_custom_call"), ("gpu", "cuda", "pallas", "triton")],
)
@on_cpu
def test_kernels_lower_for_accelerators_that_are_not_here(platform, target, kernel, call):
    """The kernel is lowered for the platform, once per device, and "auto" chooses it.

    Rows are packed and in bfloat16. No kernel is interpreted.
    """
    q, k, v = (jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in qkv(T=256, d=88))
    ids = jax.ShapeDtypeStruct((2, 256), jnp.int32)

    def loss(q, k, v, ids, kernel):
        return jnp.sum(
            attention(q, k, v, self_mask(ids), scale=0.1, kernel=kernel).astype(jnp.float32)
        )

    with jax.sharding.use_abstract_mesh(mesh_of(platform)):
        for name, is_kernel in ((kernel, True), ("auto", True), ("dense", False)):
            step = jax.jit(jax.grad(partial(loss, kernel=name), argnums=(0, 1, 2)))
            text = step.trace(q, k, v, ids).lower(lowering_platforms=(target,)).as_text()
            assert (call in text) == ("manual_computation" in text) == is_kernel, name


@pytest.mark.parametrize(
    "kernel, more, why",
    [
        ("splash", dict(bias=jnp.zeros((2, 8, 8))), "bias"),
        ("splash", dict(dropout=0.1, key=jax.random.key(0)), "dropout"),
        ("pallas", dict(mask=Mask(*np.zeros((4, 2, 8), int), causal=True)), "self_mask"),
        ("cudnn", dict(), "not on cpu"),
        ("flash", dict(), "the kernels are dense"),
    ],
)
@on_cpu
def test_a_kernel_that_cannot_says_so_and_auto_falls_back(kernel, more, why):
    q, k, v = qkv(T=8)
    with pytest.raises(UserError, match=why) as error:
        attention(q, k, v, scale=0.1, kernel=kernel, **more)
    assert "\n" not in str(error.value)
    np.testing.assert_array_equal(
        run(q, k, v, scale=0.1, kernel="auto", **more),
        run(q, k, v, scale=0.1, kernel="dense", **more),
    )


def test_cudnn_refuses_segments():
    q, k, v = qkv(T=8, dtype=jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(mesh_of("gpu")), pytest.raises(UserError, match="segments"):
        attention(q, k, v, self_mask(SEGMENTS[:, :8]), scale=0.1, kernel="cudnn")


@pytest.mark.parametrize(
    "kernel, width, why",
    [("cudnn", 160, "at most 128"), ("cudnn", 36, "multiple of 8"), ("pallas", 160, "at most 128")],
)
@on_cpu
def test_heads_for_which_a_gpus_kernels_have_no_room_are_dense(kernel, width, why):
    """Stable Diffusion has such heads: 160 channels in the U-Net, 512 in the autoencoder."""
    q, k, v = qkv(d=width, dtype=jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(mesh_of("gpu")):
        with pytest.raises(UserError, match=why):
            attention(q, k, v, scale=0.1, kernel=kernel)
        if width > 128:
            assert (
                "custom_call"
                not in jax.jit(partial(attention, scale=0.1))
                .trace(q, k, v)
                .lower(lowering_platforms=("cuda",))
                .as_text()
            )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T", [256, 257])
@on_cpu
def test_cudnn_has_a_gradient_for_rows_of_any_length(T, causal, monkeypatch):
    """Rows of 257 positions, as in an image encoder, are padded: JAX refuses odd lengths.

    The lowered gradient has two calls of cuDNN, forward and backward, and no other kernel.
    """
    monkeypatch.setattr(
        "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000
    )
    q, k, v = (jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in qkv(T=T, d=88))
    grad = jax.jit(
        jax.grad(
            lambda *x: attention(*x, self_mask(causal=causal), scale=0.1).astype(jnp.float32).sum(),
            argnums=(0, 1, 2),
        )
    )
    with jax.sharding.use_abstract_mesh(mesh_of("gpu")):
        text = grad.trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    assert (
        text.count("cudnn$fmha") == 2
        and "triton" not in text
        and [x.shape for x in jax.tree.leaves(grad.eval_shape(q, k, v))] == [q.shape] * 3
    )


@pytest.mark.parametrize(
    "kernel, T, mask",
    [
        ("cudnn", 140, self_mask()),
        ("cudnn", 140, None),
        ("cudnn", 257, None),
        ("cudnn", 257, self_mask()),
        ("pallas", 140, self_mask(SEGMENTS)),
        ("pallas", 257, None),
    ],
)
@on_gpu
def test_gpu_kernels_equal_dense(kernel, T, mask):
    q, k, v = qkv(T=T, d=88, dtype=jnp.bfloat16)
    assert_close(
        value_and_grads(q, k, v, mask, kernel),
        value_and_grads(*(x.astype(jnp.float32) for x in (q, k, v)), mask, "dense"),
        2e-2,
    )
