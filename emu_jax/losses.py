"""The objective: predict the next element of the sequence, a word or an image's embedding (arXiv
2307.05222, section 2.2).

`fused` is cross-entropy over the vocabulary and L2 regression in one pass over the hidden states.
It goes in chunks, with a gradient written by hand and computed in the same forward sweep, so the
logits of a chunk are all that ever exists. Read next: loop.py, which differentiates it.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from emu_jax.sharding import AXES, ROWS
from emu_jax.tree import Tree

# How the heads lie on a mesh, as in sharding.PARAMS: the collectives below are written for it.
# V D, n D
HEAD_SPECS = {"base": P("tensor", "fsdp"), "added": P(None, "fsdp")}
# D D
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
    """(text_scale * sum(w * nll) + image_scale * sum(w * error), nll [B T], error [B K]); all
    float32, the last two detached.

    hidden  after the final norm, in the compute dtype, which the matrix products use (they
    accumulate in float32). head    {"base": [V D], "added": [n D]}, llama/lm_head; regress {"w": [D
    D]}, from hidden state to embedding. labels  labels[b, t] is the id to predict *from* position
    t: below V a base row, from V on an added one. nll in nats. predictors  the position whose
    hidden state predicts targets[b, k]; clipped, so that a target of weight 0 may name any. error
    mean square over D. A scale is the term's weight over the global sum of its `w`: value and
    gradient come normalised. chunk   at most so many tokens of a row have logits at one time; T
    need not be a multiple of it.

    Only hidden, head and regress have gradients. Under a mesh (`jax.set_mesh`) the rows lie over
    (data, fsdp), which must divide B, and the weights as in sharding.PARAMS. `nll` and `error` are
    there for metrics: per source, per document.
    """
    given = labels, label_weights * text_scale, predictors, targets, target_weights * image_scale
    return _fused(chunk, (hidden, head, regress), lax.stop_gradient(given))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(chunk, learnt, given):
    return _values(chunk, learnt, given, gradient=False)[0]


def _fused_fwd(chunk, learnt, given):
    # the residuals are the finished gradients
    return _values(chunk, learnt, given, gradient=True)


def _fused_bwd(_chunk, gradients, cotangents):
    return jax.tree.map(lambda g: (g * cotangents[0]).astype(g.dtype), gradients), None


_fused.defvjp(_fused_fwd, _fused_bwd)


def _values(chunk, learnt, given, gradient):
    """((loss, nll, error), gradients of the loss or None), on one device or on the mesh that is
    set.
    """
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
    """((nll, error), gradients of this device's shards or None). `data`, `fsdp` and `tensor` name
    the axes of the mesh, () for one of size 1 or none: a collective over no axis does nothing.
    Weights are cast, then gathered over fsdp, once.
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
        return lax.psum(
            lax.psum_scatter(d_w, fsdp, scatter_dimension=axis, tiled=True), data
        ).astype(like.dtype)

    d_hidden, d_base, d_added = from_text
    places, d_places, d_project = from_images
    d_hidden = d_hidden.at[jnp.arange(len(hidden))[:, None], places].add(d_places).astype(dtype)
    d_head = {"base": scatter(d_base, head["base"], 1), "added": scatter(d_added, head["added"], 1)}
    return (nll, error), (d_hidden, d_head, {"w": scatter(d_project, regress["w"], 0)})


def _text(hidden, base, added, labels, scales, chunk, gradient, vocab, tensor):
    """(nll [B T], (d_hidden [B T D], d_base, d_added) or None), float32. `base` holds this tensor
    shard's rows of the vocabulary, `added` is whole on every shard: what comes from `base` is
    summed over tensor, what comes from `added` is not.
    """
    B, T = labels.shape
    count = -(-T // chunk)
    # chunks as equal as can be: fewer than `count` tokens are padding
    size = -(-T // count)
    pad = count * size - T
    # the id of this shard's first row
    first = lax.axis_index(tensor) * base.shape[0]

    # B T ... -> count B size ...
    def chunked(x):
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, count, size, *x.shape[2:]), 1, 0)

    def whole(x):
        return jnp.moveaxis(x, 0, 1).reshape(B, count * size, *x.shape[3:])[:, :T]

    def step(d_weights, inputs):
        h, label, scale = inputs
        own = _einsum("BtD,VD->BtV", h, base)
        more = _einsum("BtD,VD->BtV", h, added)
        own_hit = (label - first)[..., None] == jnp.arange(base.shape[0])
        more_hit = (label - vocab)[..., None] == jnp.arange(added.shape[0])
        top = lax.pmax(jnp.maximum(own.max(-1), more.max(-1)), tensor)[..., None]
        own = own - top
        more = more - top
        total, at_label = lax.psum(
            (jnp.exp(own).sum(-1), jnp.where(own_hit, own, 0).sum(-1)), tensor
        )
        total = total + jnp.exp(more).sum(-1)
        nll = jnp.log(total) - at_label - jnp.where(more_hit, more, 0).sum(-1)
        if not gradient:
            return None, (nll, None)
        down = (scale / total)[..., None]
        scale = scale[..., None]
        # scale * (softmax - one hot)
        d_own = (jnp.exp(own) * down - jnp.where(own_hit, scale, 0)).astype(h.dtype)
        d_more = (jnp.exp(more) * down - jnp.where(more_hit, scale, 0)).astype(h.dtype)
        d_h = lax.psum(_einsum("BtV,VD->BtD", d_own, base), tensor) + _einsum(
            "BtV,VD->BtD", d_more, added
        )
        d_base, d_added = d_weights
        d_weights = (
            d_base + _einsum("BtV,BtD->VD", d_own, h),
            d_added + _einsum("BtV,BtD->VD", d_more, h),
        )
        return d_weights, (nll, d_h)

    zeros = (
        (jnp.zeros(base.shape, jnp.float32), jnp.zeros(added.shape, jnp.float32))
        if gradient
        else None
    )
    d_weights, (nll, d_hidden) = lax.scan(
        step, zeros, (chunked(hidden), chunked(labels), chunked(scales))
    )
    return whole(nll), (whole(d_hidden), *d_weights) if gradient else None


def _images(hidden, project, predictors, targets, scales, gradient, tensor):
    """(error [B K], (places [B K], gradient there [B K D], d_project) or None), float32. `project`
    holds this tensor shard's columns, `targets` those of the embeddings.
    """
    D = hidden.shape[-1]
    places = jnp.clip(predictors, 0, hidden.shape[1] - 1)
    h = jnp.take_along_axis(hidden, places[..., None], axis=1)
    miss = _einsum("BKD,DE->BKE", h, project) - targets.astype(jnp.float32)
    error = lax.psum(jnp.square(miss).sum(-1), tensor) / D
    if not gradient:
        return error, None
    d_miss = (miss * (2 / D * scales)[..., None]).astype(h.dtype)
    d_h = lax.psum(_einsum("BKE,DE->BKD", d_miss, project), tensor)
    return error, (places, d_h, _einsum("BKD,BKE->DE", h, d_miss))


def _einsum(equation, x, y):
    """In the operands' dtype, accumulated and returned in float32 (float32 means float32, on every
    platform).
    """
    precision = "highest" if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=jnp.float32)
