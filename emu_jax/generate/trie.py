"""Constrained decoding: a trie of the allowed answers, as arrays.

Read next: logits_process.py.
"""

from collections.abc import Sequence
from typing import no_type_check

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from emu_jax.batching import power_of_two
from emu_jax.config import UserError

# This id marks the unused edges of a node. It is larger than every real id, so a scatter into the
# vocabulary drops it.
NO_EDGE = np.iinfo(np.int32).max


@flax.struct.dataclass
# JAX also builds this class with leaves that are not arrays, so its types cannot be checked.
@no_type_check
class Trie:
    """Id ids[node, i] leads from a node to children[node, i]. Node 0 is the root."""

    ids: Int[Array, "nodes edges"]
    children: Int[Array, "nodes edges"]

    def allowed(self, node: Int[Array, "B"], vocab: int) -> Bool[Array, "B V"]:
        """Mask of the ids that may follow each node."""
        mask = jnp.zeros((node.shape[0], vocab), bool)
        rows = jnp.arange(node.shape[0])[:, None]
        return mask.at[rows, self.ids[node]].set(True, mode="drop")

    def follow(self, node: Int[Array, "B"], token: Int[Array, "B"]) -> Int[Array, "B"]:
        """The node that `token` leads to; the same node if it has no such edge."""
        taken = self.ids[node] == token[:, None]
        return jnp.where(taken.any(-1), (taken * self.children[node]).sum(-1), node)


def build(answers: Sequence[Sequence[int]], eos: int) -> Trie:
    """Build the trie of answers given as ids, each followed by `eos`.

    Both dimensions are rounded up to powers of two, so that programs are compiled for few shapes.
    Raises UserError for no answers.
    """
    if not answers:
        raise UserError("constrained decoding needs at least one answer to choose from")
    # For each node, the child that an id leads to.
    edges: list[dict[int, int]] = [{}]
    for answer in answers:
        node = 0
        for token in (*answer, eos):
            if token not in edges[node]:
                edges[node][token] = len(edges)
                edges.append({})
            node = edges[node][token]
    shape = (power_of_two(len(edges)), power_of_two(max(map(len, edges))))
    ids = np.full(shape, NO_EDGE, np.int32)
    children = np.zeros(shape, np.int32)
    for node, found in enumerate(edges):
        ids[node, : len(found)] = list(found)
        children[node, : len(found)] = list(found.values())
    return Trie(jnp.asarray(ids), jnp.asarray(children))
