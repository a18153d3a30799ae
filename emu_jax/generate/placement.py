"""Layout of parameters for inference: training's sharding table, and dtypes.

Read next: session.py.
"""

import jax

from emu_jax import checkpoint, sharding, tree


def abstract_params(
    shapes: tree.Tree, mesh: jax.sharding.Mesh | None, matrix_dtype: str
) -> tree.Tree:
    """Shapes, dtypes and shardings with which to restore parameters.

    shapes: the model's, from `models.module.abstract`. mesh: None for one device. matrix_dtype:
    dtype of the weight matrices; norms and biases keep theirs. Raises UserError for a mesh that
    does not divide the shapes.
    """
    if mesh:
        sharding.check_divides(mesh, shapes)
    placed = dict(tree.leaves(sharding.shardings(mesh, sharding.specs(shapes)))) if mesh else {}
    leaves = {}
    for path, leaf in tree.leaves(shapes):
        dtype = matrix_dtype if sharding.is_matrix(path) else leaf.dtype
        leaves[path] = jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=placed.get(path))
    return tree.unflatten(leaves)


def inference_mesh(
    directory: str, devices: list[jax.Device] | None = None
) -> jax.sharding.Mesh | None:
    """Mesh of all devices for the checkpoint in `directory`; None for a single device.

    Uses as much tensor parallelism as the parameter shapes allow, and FSDP for the rest. Also None
    if no mesh of all devices divides the shapes. devices: all of JAX's by default.
    """
    count = len(jax.devices() if devices is None else devices)
    if count == 1:
        return None
    shapes = checkpoint.param_shapes(directory)
    specs = dict(tree.leaves(sharding.specs(tree.unflatten(shapes))))

    def divides(sizes: dict[str, int]) -> bool:
        """Whether the mesh axes divide every dimension that they shard."""
        return all(
            length % sizes.get(axis, 1) == 0
            for path, shape in shapes.items()
            for length, axis in zip(shape, specs[path])
        )

    for tensor in range(count, 0, -1):
        sizes = dict(data=1, fsdp=count // tensor, tensor=tensor)
        if count % tensor == 0 and divides(sizes):
            return sharding.make_mesh(sizes, devices)
    return None
