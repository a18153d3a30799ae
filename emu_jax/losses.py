"""The objective: predict the next element of a sequence, a text token or a visual token.

Section 2.2 of arXiv 2307.05222. `fused` computes cross-entropy over the vocabulary and L2
regression in one pass over the hidden states. It works in chunks, and computes a gradient written
by hand in the same forward sweep, so at any time only the logits of one chunk exist. Read next:
stages.py, which calls it.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from emu_jax.sharding import AXES, ROWS
from emu_jax.tree import Tree

# Layout of the heads on a mesh. The collectives below are written for this layout; a test checks
# that sharding.PARAMS has the same one. Shapes: V D and n D.
HEAD_SPECS = {"base": P("tensor", "fsdp"), "added": P(None, "fsdp")}
# Shape: D D.
REGRESS_SPECS = {"w": P("fsdp", "tensor")}


def fused(
    hidden: Float[Array, "B T D"],
    head: Tree,
    regress: Tree,
    labels: Int[Array, "B T"],
    label_weights: Float[Array, "B T"],
    predictors: Int[Array, "B K"],
    targets: Float[Array, "B K D"],
    target_weights: Float[Array, "B K"],
    text_scale: Float[Array, ""] | float,
    image_scale: Float[Array, ""] | float,
    *,
    chunk: int,
) -> tuple[Float[Array, ""], Float[Array, "B T"], Float[Array, "B K"]]:
    """(text_scale * sum(w * nll) + image_scale * sum(w * error), nll, error), all float32.

    Only hidden, head and regress have gradients; nll [B, T] and error [B, K] are detached, for
    metrics. Under a mesh (`jax.set_mesh`) rows are sharded over (data, fsdp), which must divide B,
    and weights are sharded as in sharding.PARAMS.

    hidden: states after the final norm, in the compute dtype. Matrix products use it and accumulate
        in float32.
    head: {"base": [V, D], "added": [n, D]}, the rows of llama/lm_head.
    regress: {"w": [D, D]}, from a hidden state to an embedding.
    labels: the id to predict *from* each position. Ids below V are rows of `base`, all others are
        rows of `added`. nll is in nats.
    label_weights, target_weights: the `w` of the two sums.
    predictors: the position whose hidden state predicts targets[b, k]. It is clipped to the row, so
        it may be any number for a target of weight 0. error is the mean square over D.
    text_scale, image_scale: the weight of each sum in the loss, divided by the global sum of its
        `w`, which normalises value and gradient.
    chunk: the most tokens of a row whose logits exist at a time. T need not be a multiple of it.
    """
    given = labels, label_weights * text_scale, predictors, targets, target_weights * image_scale
    return _fused(chunk, (hidden, head, regress), lax.stop_gradient(given))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(chunk, learnt, given):
    return _values(chunk, learnt, given, gradient=False)[0]


def _fused_fwd(chunk, learnt, given):
    # The residuals of the backward pass are the finished gradients.
    return _values(chunk, learnt, given, gradient=True)


def _fused_bwd(_chunk, gradients, cotangents):
    return jax.tree.map(lambda g: (g * cotangents[0]).astype(g.dtype), gradients), None


_fused.defvjp(_fused_fwd, _fused_bwd)


def _values(chunk, learnt, given, gradient):
    """((loss, nll, error), gradients of the loss or None), on the mesh if there is one."""
    sweep = partial(_sweep, chunk, gradient, learnt[1]["base"].shape[0])
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        (nll, error), gradients = sweep((), (), (), learnt, given)
    else:
        row = P(ROWS)
        axes = (axis if mesh.shape[axis] > 1 else () for axis in AXES)
        (nll, error), gradients = jax.shard_map(
            partial(sweep, *axes),
            check_vma=False,
            in_specs=(
                (row, HEAD_SPECS, REGRESS_SPECS),
                (row, row, row, P(ROWS, None, "tensor"), row),
            ),
            out_specs=((row, row), (row, HEAD_SPECS, REGRESS_SPECS) if gradient else None),
        )(learnt, given)
    loss = (given[1] * nll).sum() + (given[4] * error).sum()
    return (loss, nll, error), gradients


def _sweep(chunk, gradient, vocab, data, fsdp, tensor, learnt, given):
    """((nll, error), gradients of this device's shards or None).

    data, fsdp and tensor are names of mesh axes. An axis of size 1 is (), and so are all axes
    without a mesh: a collective over () does nothing. Weights are cast, then gathered over fsdp,
    once for all chunks.
    """
    hidden, head, regress = learnt
    labels, label_scales, predictors, targets, target_scales = given
    dtype = hidden.dtype
    base, added = (
        lax.all_gather(head[name].astype(dtype), fsdp, axis=1, tiled=True)
        for name in ("base", "added")
    )
    project = lax.all_gather(regress["w"].astype(dtype), fsdp, axis=0, tiled=True)

    nll, from_text = _text(
        hidden, base, added, labels, label_scales, chunk, gradient, vocab, tensor
    )
    error, from_images = _images(
        hidden, project, predictors, targets, target_scales, gradient, tensor
    )
    if not gradient:
        return (nll, error), None

    def scatter(d_w, like, axis):
        d_shard = lax.psum_scatter(d_w, fsdp, scatter_dimension=axis, tiled=True)
        return lax.psum(d_shard, data).astype(like.dtype)

    d_hidden, d_base, d_added = from_text
    positions, d_positions, d_project = from_images
    rows = jnp.arange(len(hidden))[:, None]
    d_hidden = d_hidden.at[rows, positions].add(d_positions).astype(dtype)
    d_head = {"base": scatter(d_base, head["base"], 1), "added": scatter(d_added, head["added"], 1)}
    return (nll, error), (d_hidden, d_head, {"w": scatter(d_project, regress["w"], 0)})


def _text(hidden, base, added, labels, scales, chunk, gradient, vocab, tensor):
    """(nll [B, T], (d_hidden [B, T, D], d_base, d_added) or None), float32.

    `base` holds this tensor shard's rows of the vocabulary, so its contributions are summed over
    tensor. `added` is complete on every shard, so its contributions are not.
    """
    B, T = labels.shape
    count = -(-T // chunk)
    # Make chunks of equal size, so that padding is less than `count` tokens.
    size = -(-T // count)
    pad = count * size - T
    # Id of this shard's first row.
    first = lax.axis_index(tensor) * base.shape[0]

    def chunked(x):
        """[B, T, ...] -> [count, B, size, ...]"""
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, count, size, *x.shape[2:]), 1, 0)

    def joined(x):
        """[count, B, size, ...] -> [B, T, ...]"""
        return jnp.moveaxis(x, 0, 1).reshape(B, count * size, *x.shape[3:])[:, :T]

    def step(d_weights, inputs):
        h, label, scale = inputs
        base_logits = _einsum("BtD,VD->BtV", h, base)
        added_logits = _einsum("BtD,VD->BtV", h, added)
        is_base = (label - first)[..., None] == jnp.arange(base.shape[0])
        is_added = (label - vocab)[..., None] == jnp.arange(added.shape[0])
        top = lax.pmax(jnp.maximum(base_logits.max(-1), added_logits.max(-1)), tensor)[..., None]
        base_logits = base_logits - top
        added_logits = added_logits - top
        total, at_label = lax.psum(
            (jnp.exp(base_logits).sum(-1), jnp.where(is_base, base_logits, 0).sum(-1)), tensor
        )
        total = total + jnp.exp(added_logits).sum(-1)
        nll = jnp.log(total) - at_label - jnp.where(is_added, added_logits, 0).sum(-1)
        if not gradient:
            return None, (nll, None)
        share = (scale / total)[..., None]
        scale = scale[..., None]
        # The gradient of the logits is scale * (softmax - one hot).
        d_base_logits = jnp.exp(base_logits) * share - jnp.where(is_base, scale, 0)
        d_base_logits = d_base_logits.astype(h.dtype)
        d_added_logits = jnp.exp(added_logits) * share - jnp.where(is_added, scale, 0)
        d_added_logits = d_added_logits.astype(h.dtype)
        d_h = lax.psum(_einsum("BtV,VD->BtD", d_base_logits, base), tensor)
        d_h = d_h + _einsum("BtV,VD->BtD", d_added_logits, added)
        d_base, d_added = d_weights
        d_weights = (
            d_base + _einsum("BtV,BtD->VD", d_base_logits, h),
            d_added + _einsum("BtV,BtD->VD", d_added_logits, h),
        )
        return d_weights, (nll, d_h)

    zeros = None
    if gradient:
        zeros = (jnp.zeros(base.shape, jnp.float32), jnp.zeros(added.shape, jnp.float32))
    d_weights, (nll, d_hidden) = lax.scan(
        step, zeros, (chunked(hidden), chunked(labels), chunked(scales))
    )
    if not gradient:
        return joined(nll), None
    assert d_weights
    return joined(nll), (joined(d_hidden), *d_weights)


def _images(hidden, project, predictors, targets, scales, gradient, tensor):
    """(error [B, K], (positions [B, K], d_hidden there, d_project) or None), float32.

    `project` and `targets` are this tensor shard's columns.
    """
    D = hidden.shape[-1]
    positions = jnp.clip(predictors, 0, hidden.shape[1] - 1)
    h = jnp.take_along_axis(hidden, positions[..., None], axis=1)
    residual = _einsum("BKD,DE->BKE", h, project) - targets.astype(jnp.float32)
    error = lax.psum(jnp.square(residual).sum(-1), tensor) / D
    if not gradient:
        return error, None
    d_residual = (residual * (2 / D * scales)[..., None]).astype(h.dtype)
    d_h = lax.psum(_einsum("BKE,DE->BKD", d_residual, project), tensor)
    return error, (positions, d_h, _einsum("BKD,BKE->DE", h, d_residual))


def _einsum(equation, x, y):
    """A product in the operands' dtype, accumulated and returned in float32.

    float32 operands are multiplied at full precision on every platform.
    """
    precision = "highest" if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=jnp.float32)
