"""The mesh, and the one table of where every parameter lives. Axes: data, fsdp, tensor.

`data` holds copies of the parameters; `fsdp` shards parameters, gradients and optimizer state;
`tensor` splits heads, feed-forward layers and vocabulary. Rows of a batch are sharded over (data,
fsdp). Models never name a mesh axis: they call the helpers at the end. Read next: models/layers.py,
which gathers a block's weights with `gather_weights`.
"""

import re
from functools import partial
from math import prod
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
# Suffixes of the paths of matrices (`is_matrix`): layers, vocabularies, and the factors of LoRA.
MATRIX_SUFFIXES = ("/w", "/base", "/added", "/a", "/b")
# Leaf names of a quantized matrix, in place of `w`. Its scales are in the leaf `absmax`
# (models/lora.py).
QUANTIZED = ("int8", "nf4")

Row = tuple[str, P]

# Tower -> (regex over paths, spec) rows in the order of the forward pass. The comment above a row
# is the shape of the weight, in the letters of types.py. Under blocks/ the leading L is the scanned
# depth and is never sharded.
PARAMS: dict[str, tuple[Row, ...]] = {
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
        # V D; without lm_head if the embedding is tied
        ("llama/(embed|lm_head)/base", P("tensor", "fsdp")),
        # n D
        ("llama/(embed|lm_head)/added", P(None, "fsdp")),
        # L D H d; k and v may have fewer heads (grouped-query attention)
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
    # Replicated, because it is small and used only in the contrastive warm-up.
    "contrast": (("contrast/.*", P()),),
    # The decoder's towers. Their images are sharded over all axes (`constrain_images`), so no
    # weight is split over tensor. If the output channels are few, the input channels are sharded.
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

# LoRA's factors a and b, for any matrix of a tower's blocks. The axes that a factor shares with its
# matrix are sharded like those of the matrix; the rank r is never sharded.
LORA_PARAMS: tuple[Row, ...] = (
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
    """Whether a parameter is a matrix, which may be cast for storage and arithmetic.

    Other parameters, such as norms and biases, stay float32.
    """
    return path.endswith(MATRIX_SUFFIXES)


def matrix_path(path: str) -> str:
    """The path of the matrix that a leaf is part of: ".../q/w" for ".../q/nf4" or its scales."""
    return re.sub(rf"/({'|'.join(QUANTIZED)}|absmax)$", "/w", path)


def make_mesh(sizes: dict[str, int], devices: list[jax.Device] | None = None) -> Mesh:
    """Make the mesh of {axis: size}; one size may be -1: all remaining devices.

    devices: None means all. Several TPU slices are placed along `data`, the only axis that crosses
    the data-centre network. Raises UserError if the sizes do not match the devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [sizes[axis] for axis in AXES]
    known = prod(size for size in shape if size != -1)
    if shape.count(-1) > 1 or known < 1 or min(shape) < -1:
        raise UserError(
            f"mesh {dict(sizes)}: sizes are positive, and at most one is -1 (all that remain)"
        )
    if len(devices) % known or (-1 not in shape and known != len(devices)):
        raise UserError(
            f"mesh {dict(sizes)} does not match {len(devices)} devices: "
            f"the product of its axes must be {len(devices)}"
        )
    shape = [len(devices) // known if size == -1 else size for size in shape]
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if devices[0].platform != "tpu":
        # In this order, GPUs of a node are neighbours.
        placed = np.array(devices).reshape(shape)
    elif slices == 1:
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    elif shape[0] % slices:
        raise UserError(
            f"mesh {dict(sizes)} lies on {slices} slices: data must be a multiple of {slices}"
        )
    else:
        inside = [shape[0] // slices, *shape[1:]]
        placed = mesh_utils.create_hybrid_device_mesh(
            inside, [slices, 1, 1], devices, allow_split_physical_axes=True
        )
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * 3)


def specs(params: tree.Tree) -> tree.Tree:
    """The PartitionSpec of every parameter.

    Raises ValueError for a parameter without a row, and for a row of these towers that no parameter
    needs.
    """
    matrices = {path: matrix_path(path) for path, _ in tree.leaves(params)}
    lora = []
    for pattern, spec in LORA_PARAMS:
        if any(re.fullmatch(pattern, path) for path in matrices):
            lora.append((pattern, spec))
    towers = [row for tower in params for row in PARAMS.get(tower, ())]
    by_matrix = tree.by_rule(
        [*lora, *towers],
        tree.unflatten(dict.fromkeys(matrices.values())),
        what="sharding table",
    )
    found = dict(tree.leaves(by_matrix))
    return tree.unflatten(
        {path: _stored_spec(path, found[matrix]) for path, matrix in matrices.items()}
    )


def check_divides(mesh: Mesh, params: tree.Tree) -> None:
    """Raise UserError for a parameter that the mesh does not divide; suggest a size that does."""
    table = dict(tree.leaves(specs(params)))
    for path, leaf in tree.leaves(params):
        for size, axis in zip(leaf.shape, table[path]):
            names = _names(axis)
            shards = prod(mesh.shape[name] for name in names)
            if size % shards == 0:
                continue
            largest = max(n for n in range(1, shards) if size % n == 0 and mesh.size % n == 0)
            data = mesh.shape["data"] * shards // largest
            raise UserError(
                f"mesh {dict(mesh.shape)}: {path} {list(leaf.shape)} does not divide by "
                f"{' x '.join(names)} = {shards}; {largest} would do, with the rest in data "
                f"(mesh.data={data})"
            )


def shardings(mesh: Mesh, spec_tree: Any) -> Any:
    """NamedShardings of a tree of PartitionSpecs."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), spec_tree, is_leaf=lambda x: isinstance(x, P)
    )


def state_shardings(mesh: Mesh, params: tree.Tree, state: Any) -> Any:
    """NamedShardings of a training state.

    A leaf whose path ends with a parameter's path (the parameter itself, an optimizer moment, an
    average) has the sharding of that parameter; all other leaves (steps, counters) are replicated.
    """
    table = dict(tree.leaves(specs(params)))

    def place(path, _leaf):
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        for start in range(len(names)):
            tail = "/".join(names[start:])
            if tail in table:
                return NamedSharding(mesh, table[tail])
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(place, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: rows over (data, fsdp)."""
    return NamedSharding(mesh, P(ROWS))


# Helpers for models. Without a mesh (`jax.set_mesh`) they leave the layout as it is.


def _constrain(x: jax.Array, spec: P) -> jax.Array:
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec)


def constrain(values: Any, spec_tree: Any) -> Any:
    """Lay out each array by its PartitionSpec, for example gradients like their parameters."""
    return jax.tree.map(_constrain, values, spec_tree)


def constrain_rows(x: jax.Array) -> jax.Array:
    """Lay the leading axis over (data, fsdp): the language model's activations, [B, T, D]."""
    return _constrain(x, P(ROWS))


def constrain_cache(x: jax.Array) -> jax.Array:
    """Lay out a cache [L, B, S, G, d]: rows over (data, fsdp), heads over tensor.

    The projections of keys and values produce this layout. Rows or heads that the mesh does not
    divide evenly are replicated.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x

    def where_it_divides(size, names):
        return names if size % prod(mesh.shape[name] for name in names) == 0 else None

    rows = where_it_divides(x.shape[1], ROWS)
    heads = where_it_divides(x.shape[3], ("tensor",))
    return _constrain(x, P(None, rows, None, heads))


def constrain_images(x: jax.Array) -> jax.Array:
    """Lay the leading axis over all devices: the vision encoder's activations, [B*I, P, E].

    If all devices do not divide the axis, lay it over (data, fsdp).
    """
    mesh = jax.sharding.get_abstract_mesh()
    divides = not mesh.empty and x.shape[0] % mesh.size == 0
    return _constrain(x, P(AXES) if divides else P(ROWS))


def gather_weights(where: str, weights: tree.Tree, dtype: Any, *, sliced: int = 0) -> tree.Tree:
    """Make the parameters at path `where` ready for arithmetic.

    Matrices are cast to `dtype` *before* they are gathered over fsdp, and stay split over tensor;
    gradients are reduce-scattered. sliced: number of leading axes (the scanned L) already removed.
    For a quantized matrix or one with LoRA (models/lora.py), each of its arrays is gathered: the
    codes, not the dequantized matrix.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def ready(path: str, w: Any) -> Any:
        if hasattr(w, "map"):
            folder = path.rpartition("/")[0]
            return w.map(lambda name, part: ready(f"{folder}/{name}", part))
        w = w.astype(dtype) if is_matrix(path) else w
        if mesh.empty or mesh.size == 1:
            return w
        stored = _spec(path)[sliced:]
        return _gather(w, P(*stored), P(*map(_without_fsdp, stored)))

    return tree.unflatten({path: ready(f"{where}/{path}", w) for path, w in tree.leaves(weights)})


def embedding_lookup(base: jax.Array, added: jax.Array, tokens: jax.Array, dtype: Any) -> jax.Array:
    """Look up ids [B, T] in a vocabulary `base` [V, D] and `added` [n, D] -> [B, T, D].

    Id V + i is row i of `added`. Under a mesh, the table is cast and gathered over fsdp, each
    tensor shard looks up the ids of its own rows, and a sum over tensor combines the results. A
    plain lookup would make the compiler replicate the activations.
    """
    V = base.shape[0]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _lookup(V, dtype, (), (), base, added, tokens)
    # Replicate the rows of tokens if (data, fsdp) does not divide them.
    rows = P() if tokens.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]) else P(ROWS)
    return jax.shard_map(
        partial(_lookup, V, dtype, "fsdp", "tensor"),
        in_specs=(P("tensor", "fsdp"), P(None, "fsdp"), rows),
        out_specs=rows,
        check_vma=False,
    )(base, added, tokens)


def _lookup(V, dtype, fsdp, tensor, base, added, tokens):
    """`embedding_lookup` in one shard; fsdp and tensor are names of mesh axes, or ()."""
    base = jax.lax.all_gather(base.astype(dtype), fsdp, axis=1, tiled=True)
    added = jax.lax.all_gather(added.astype(dtype), fsdp, axis=1, tiled=True)
    shard = base.shape[0]
    index = tokens - jax.lax.axis_index(tensor) * shard
    here = (index >= 0) & (index < shard)
    x = jnp.where(here[..., None], base[jnp.clip(index, 0, shard - 1)], 0)
    x = jax.lax.psum(x, tensor)
    from_added = added[jnp.clip(tokens - V, 0, added.shape[0] - 1)]
    return jnp.where((tokens >= V)[..., None], from_added, x)


def _spec(path: str) -> P:
    """The PartitionSpec of one parameter that the table is known to cover."""
    matrix = matrix_path(path)
    for pattern, spec in (*LORA_PARAMS, *PARAMS[path.split("/")[0]]):
        if re.fullmatch(pattern, matrix):
            return _stored_spec(path, spec)
    raise KeyError(path)


def _stored_spec(path: str, matrix: P) -> P:
    """A leaf's spec from that of its matrix; scales are not split along the last axis."""
    return P(*matrix[:-1], None) if path.endswith("/absmax") else matrix


def _names(axis: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes in one entry of a PartitionSpec."""
    return (axis,) if isinstance(axis, str) else axis or ()


def _without_fsdp(axis: str | tuple[str, ...] | None) -> tuple[str, ...] | None:
    return tuple(name for name in _names(axis) if name != "fsdp") or None


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(w, stored: P, used: P):
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(w, stored), used)


def _gather_fwd(w, stored, used):
    return _gather(w, stored, used), None


def _gather_bwd(stored, _used, _residual, g):
    # Partial sums are reduce-scattered, never all-reduced.
    return (jax.lax.with_sharding_constraint(g, stored),)


_gather.defvjp(_gather_fwd, _gather_bwd)
