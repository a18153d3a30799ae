"""The mesh and the one table that says where every parameter lives. Axes: data, fsdp, tensor.

`data` holds copies, `fsdp` shards parameters, gradients and optimizer state, `tensor` splits heads,
ffn and vocabulary. Rows of a batch lie over (data, fsdp). Models never name a mesh axis: they call
the helpers at the end. Read next: models/layers.py, which gathers a block's weights with
`gather_weights`.
"""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from emu_jax import tree
from emu_jax.config import UserError

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")
# how the paths of those end that are cast for arithmetic
MATRIX_SUFFIXES = ("/w", "/base", "/added", "/a", "/b")
# names of what a matrix is stored as in its place, beside the scales `absmax` (models/lora.py)
QUANTIZED = ("int8", "nf4")

# Tower -> rows in reading order; beside each the weight's shape. Under blocks/ a leading L is
# scanned and never sharded.
PARAMS: dict[str, tuple[tuple[str, P], ...]] = {
    "vision": (
        # p p 3 E
        ("vision/patch/w", P(None, None, None, "fsdp")),
        # E
        ("vision/(cls|patch/bias)", P()),
        # 1+P E
        ("vision/pos", P(None, "fsdp")),
        # L E H d
        ("vision/blocks/attn/(q|k|v)/w", P(None, "fsdp", "tensor", None)),
        # L H d E
        ("vision/blocks/attn/o/w", P(None, "tensor", None, "fsdp")),
        # L E F
        ("vision/blocks/ffn/up/w", P(None, "fsdp", "tensor")),
        # L F E
        ("vision/blocks/ffn/down/w", P(None, "tensor", "fsdp")),
        # L E, L H d, L F
        ("vision/blocks/.*(bias|scale)", P()),
    ),
    # E
    "ln_visual": (("ln_visual/(scale|bias)", P()),),
    "resampler": (
        # N C
        ("resampler/queries", P(None, "fsdp")),
        # buckets H
        ("resampler/relative", P()),
        # L C|E H d
        ("resampler/blocks/(self|cross)/(q|k|v)/w", P(None, "fsdp", "tensor", None)),
        # L H d C
        ("resampler/blocks/(self|cross)/o/w", P(None, "tensor", None, "fsdp")),
        # L C F
        ("resampler/blocks/ffn/up/w", P(None, "fsdp", "tensor")),
        # L F C
        ("resampler/blocks/ffn/down/w", P(None, "tensor", "fsdp")),
        # L C
        ("resampler/(blocks/)?norm[^/]*/scale", P()),
        # C D
        ("resampler/project/w", P("tensor", "fsdp")),
        # D
        ("resampler/project/bias", P()),
    ),
    # N D
    "visual_stats": (("visual_stats/(mean|std)", P(None, "fsdp")),),
    "llama": (
        # V D; no lm_head where it is tied
        ("llama/(embed|lm_head)/base", P("tensor", "fsdp")),
        # n D
        ("llama/(embed|lm_head)/added", P(None, "fsdp")),
        # L D H d; fewer heads in k and v where they are grouped
        ("llama/blocks/attn/(q|k|v)/w", P(None, "fsdp", "tensor", None)),
        # L H d D
        ("llama/blocks/attn/o/w", P(None, "tensor", None, "fsdp")),
        # L D F
        ("llama/blocks/ffn/(gate|up)/w", P(None, "fsdp", "tensor")),
        # L F D
        ("llama/blocks/ffn/down/w", P(None, "tensor", "fsdp")),
        # L D
        ("llama/(blocks/)?norm[^/]*/scale", P()),
    ),
    # D D
    "regress_head": (("regress_head/w", P("fsdp", "tensor")),),
    "contrast": (
        # small, of the warm-up only
        ("contrast/.*", P()),
    ),
    # The decoder's towers: images lie over all axes (`constrain_images`), so nothing is split over tensor.
    # What has few channels is split on the other side.
    "unet": (
        # C|t|ND t
        ("unet/(time/(up|down)|pooled)/w", P(None, "fsdp")),
        # 3 3 c C|h w C t
        ("unet/(conv_in|places)/w", P(None, None, None, "fsdp")),
        # 3 3 C C
        ("unet/.*/(conv1|conv2|resample)/w", P(None, None, None, "fsdp")),
        # t C
        ("unet/.*/resnets/[0-9]+/time/w", P("fsdp", None)),
        # C C
        ("unet/.*/(shortcut|into|out)/w", P("fsdp", None)),
        # C|D H d
        ("unet/.*/(self|cross)/(q|k|v)/w", P("fsdp", None, None)),
        # H d C
        ("unet/.*/(self|cross)/o/w", P(None, None, "fsdp")),
        # C F
        ("unet/.*/ffn/(up|gate)/w", P(None, "fsdp")),
        # F C
        ("unet/.*/ffn/down/w", P("fsdp", None)),
        # 3 3 C c
        ("unet/conv_out/w", P(None, None, "fsdp", None)),
        # C, t, F, c
        ("unet/.*(bias|scale)", P()),
    ),
    "vae": (
        # c c, 2c 2c
        ("vae/(quant|post_quant)/w", P()),
        # 3 3 3|c C
        ("vae/(encoder|decoder)/conv_in/w", P(None, None, None, "fsdp")),
        # 3 3 C C
        ("vae/.*/(conv1|conv2|resample)/w", P(None, None, None, "fsdp")),
        # C C
        ("vae/.*/(shortcut|attn/[qkvo])/w", P("fsdp", None)),
        # 3 3 C 2c|3
        ("vae/(encoder|decoder)/conv_out/w", P(None, None, "fsdp", None)),
        # C, c
        ("vae/.*(bias|scale)", P()),
    ),
}

# What lies beside a matrix of any tower's blocks, where it has LoRA; codes and scales of a stored
# matrix lie where it would (models/lora.py).
LORA_PARAMS: tuple[tuple[str, P], ...] = (
    # L D r
    (".*/blocks/.*/(q|k|v|gate|up)/a", P(None, "fsdp", None)),
    # L r H d
    (".*/blocks/.*/(q|k|v)/b", P(None, None, "tensor", None)),
    # L H d r
    (".*/blocks/.*/o/a", P(None, "tensor", None, None)),
    # L r F
    (".*/blocks/.*/(gate|up)/b", P(None, None, "tensor")),
    # L F r
    (".*/blocks/.*/down/a", P(None, "tensor", None)),
    # L r D
    (".*/blocks/.*/(o|down)/b", P(None, None, "fsdp")),
)


def is_matrix(path: str) -> bool:
    """Whether a parameter is a matrix: arithmetic and `frozen_dtype` cast it; norms and biases stay
    float32.
    """
    return path.endswith(MATRIX_SUFFIXES)


def matrix_path(path: str) -> str:
    """The path of the matrix that a leaf is, or is stored for."""
    return re.sub(rf"/({'|'.join(QUANTIZED)}|absmax)$", "/w", path)


def make_mesh(sizes: dict[str, int], devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of {axis: size}; one -1 is what is left. Several TPU slices are neighbours along
    `data`, which alone crosses the data-centre network. Raises UserError where it does not match
    the devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [sizes[axis] for axis in AXES]
    known = int(np.prod([size for size in shape if size != -1]))
    if shape.count(-1) > 1 or known < 1 or min(shape) < -1:
        raise UserError(
            f"mesh {dict(sizes)}: sizes are positive, and at most one is -1 (what is left)"
        )
    if len(devices) % known or (-1 not in shape and known != len(devices)):
        raise UserError(
            f"mesh {dict(sizes)} does not match {len(devices)} devices: the product of its axes must be {len(devices)}"
        )
    shape = [len(devices) // known if size == -1 else size for size in shape]
    # GPUs of a node are neighbours already
    if devices[0].platform != "tpu":
        placed = np.array(devices).reshape(shape)
    elif (slices := len({getattr(device, "slice_index", 0) for device in devices})) == 1:
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    elif shape[0] % slices:
        raise UserError(
            f"mesh {dict(sizes)} lies on {slices} slices: data must be a multiple of {slices}"
        )
    else:
        placed = mesh_utils.create_hybrid_device_mesh(
            [shape[0] // slices, *shape[1:]],
            [slices, 1, 1],
            devices,
            allow_split_physical_axes=True,
        )
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * 3)


def specs(params: tree.Tree) -> tree.Tree:
    """The PartitionSpec of every parameter. Raises ValueError for a parameter without a row, or a
    row without one.
    """
    roles = {path: matrix_path(path) for path, _ in tree.leaves(params)}
    rows = [row for row in LORA_PARAMS if any(re.fullmatch(row[0], path) for path in roles)]
    rows += [row for tower in params for row in PARAMS.get(tower, ())]
    found = dict(
        tree.leaves(
            tree.by_rule(rows, tree.unflatten(dict.fromkeys(roles.values())), what="sharding table")
        )
    )
    return tree.unflatten({path: _whole_scales(path, found[role]) for path, role in roles.items()})


def check_divides(mesh: Mesh, params: tree.Tree) -> None:
    """Raises UserError for a parameter that the mesh does not divide, naming the largest sizes of
    that axis which would.
    """
    table = dict(tree.leaves(specs(params)))
    for path, leaf in tree.leaves(params):
        for size, over in zip(leaf.shape, table[path]):
            axes = (over,) if isinstance(over, str) else over or ()
            if size % (shares := int(np.prod([mesh.shape[axis] for axis in axes], dtype=int))):
                fit = [n for n in range(1, shares) if size % n == 0 and mesh.size % n == 0]
                raise UserError(
                    f"mesh {dict(mesh.shape)}: {path} {list(leaf.shape)} does not divide by {' x '.join(axes)} = {shares}; "
                    f"{fit[-1]} would do, with the rest in data (mesh.data={mesh.shape['data'] * shares // fit[-1]})"
                )


def shardings(mesh: Mesh, spec_tree: Any) -> Any:
    """NamedShardings of a tree of PartitionSpecs."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), spec_tree, is_leaf=lambda x: isinstance(x, P)
    )


def state_shardings(mesh: Mesh, params: tree.Tree, state: Any) -> Any:
    """NamedShardings of a whole training state: a leaf whose path ends with a parameter's path (the
    parameter itself, an optimizer moment, an average) lies where that parameter does; everything
    else (steps, counters) is replicated.
    """
    table = dict(tree.leaves(specs(params)))

    def place(path, _leaf):
        names = [
            str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path
        ]
        tails = ("/".join(names[start:]) for start in range(len(names)))
        return NamedSharding(mesh, next((table[tail] for tail in tails if tail in table), P()))

    return jax.tree_util.tree_map_with_path(place, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over (data, fsdp)."""
    return NamedSharding(mesh, P(ROWS))


# The helpers that models call: no-ops without a mesh (`jax.set_mesh`).


def _constrain(x: jax.Array, spec: P) -> jax.Array:
    return (
        x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, spec)
    )


def constrain(values: Any, spec_tree: Any) -> Any:
    """A tree of arrays laid out by a tree of PartitionSpecs: gradients like their parameters."""
    return jax.tree.map(_constrain, values, spec_tree)


def constrain_rows(x: jax.Array) -> jax.Array:
    """Leading axis over (data, fsdp): activations of the language model, [B, T, D]."""
    return _constrain(x, P(ROWS))


def constrain_cache(x: jax.Array) -> jax.Array:
    """Rows over (data, fsdp) and heads over tensor, as the projections leave them, where they
    divide: a cache, [L, B, S, G, d].
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x

    def fitting(size, axes):
        return axes if size % int(np.prod([mesh.shape[axis] for axis in axes])) == 0 else None

    return _constrain(x, P(None, fitting(x.shape[1], ROWS), None, fitting(x.shape[3], ("tensor",))))


def constrain_images(x: jax.Array) -> jax.Array:
    """Leading axis over all devices where it divides, else over (data, fsdp): activations of the
    encoder, [B*I, P, E].
    """
    mesh = jax.sharding.get_abstract_mesh()
    return _constrain(x, P(AXES) if not mesh.empty and x.shape[0] % mesh.size == 0 else P(ROWS))


def gather_weights(where: str, weights: tree.Tree, dtype: Any, *, sliced: int = 0) -> tree.Tree:
    """A subtree of parameters at path `where`, ready for arithmetic: matrices cast to `dtype`
    *before* they are gathered over fsdp, still split over tensor; `sliced` leading axes (the
    scanned L) are gone. The gradient is reduce-scattered back. Of a weight that is more than one
    array (models/lora.py), each is gathered: codes, not the matrix that they stand for.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def ready(path: str, w: Any) -> Any:
        if hasattr(w, "map"):
            return w.map(lambda name, part: ready(f"{path.rpartition('/')[0]}/{name}", part))
        w = w.astype(dtype) if is_matrix(path) else w
        if mesh.empty or mesh.size == 1:
            return w
        rows = (*LORA_PARAMS, *PARAMS[where.split("/")[0]])
        spec = _whole_scales(
            path, next(spec for pattern, spec in rows if re.fullmatch(pattern, matrix_path(path)))
        )[sliced:]
        return _gather(w, P(*spec), P(*map(_without_fsdp, spec)))

    return tree.unflatten({path: ready(f"{where}/{path}", w) for path, w in tree.leaves(weights)})


def embedding_lookup(base: jax.Array, added: jax.Array, tokens: jax.Array, dtype: Any) -> jax.Array:
    """Rows of a vocabulary `base` [V, D] and `added` [n, D] by ids [B, T] -> [B, T, D]; ids from V
    on are added rows.

    By hand under a mesh: each tensor shard looks its own rows up in the table that was cast, then
    gathered over fsdp, and the sum over tensor puts them together. (The compiler's own way was to
    replicate the activations.)
    """

    def look(fsdp, tensor, base, added, tokens):
        base, added = (
            jax.lax.all_gather(w.astype(dtype), fsdp, axis=1, tiled=True) for w in (base, added)
        )
        at = tokens - jax.lax.axis_index(tensor) * base.shape[0]
        mine = (at >= 0) & (at < base.shape[0])
        x = jax.lax.psum(
            jnp.where(mine[..., None], base[jnp.clip(at, 0, base.shape[0] - 1)], 0), tensor
        )
        return jnp.where(
            (tokens >= V)[..., None], added[jnp.clip(tokens - V, 0, added.shape[0] - 1)], x
        )

    V = base.shape[0]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return look((), (), base, added, tokens)
    # a few rows are everybody's
    rows = P() if tokens.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]) else P(ROWS)
    return jax.shard_map(
        partial(look, "fsdp", "tensor"),
        in_specs=(P("tensor", "fsdp"), P(None, "fsdp"), rows),
        out_specs=rows,
        check_vma=False,
    )(base, added, tokens)


def _whole_scales(path: str, spec: P) -> P:
    """The spec of a matrix for what is stored in its place: the few scales along the last axis are
    not split.
    """
    return P(*spec[:-1], None) if path.endswith("/absmax") else spec


def _without_fsdp(axis):
    kept = tuple(
        name for name in ((axis,) if isinstance(axis, str) else axis or ()) if name != "fsdp"
    )
    return kept or None


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(w, stored: P, used: P):
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(w, stored), used)


def _gather_fwd(w, stored, used):
    return _gather(w, stored, used), None


def _gather_bwd(stored, _used, _residual, g):
    # partial sums -> reduce-scatter, never all-reduce
    return (jax.lax.with_sharding_constraint(g, stored),)


_gather.defvjp(_gather_fwd, _gather_bwd)
