"""Which ids may follow when an answer must be one of given ones: a token trie as two arrays that a
compiled loop can walk.
"""

from collections.abc import Sequence
from typing import no_type_check

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from emu_jax.config import UserError


@flax.struct.dataclass
# JAX rebuilds it with what are no arrays
@no_type_check
class Trie:
    """Node 0 is the start; the i-th edge of a node carries the id ids[node, i] to the node children[node,
    i].
    """

    # a number beyond every id where there is no edge
    ids: Int[Array, "nodes edges"]
    children: Int[Array, "nodes edges"]

    def allowed(self, node: Int[Array, "B"], vocab: int) -> Bool[Array, "B V"]:
        """Ids that may come next."""
        rows = jnp.arange(node.shape[0])[:, None]
        return (
            jnp.zeros((node.shape[0], vocab), bool).at[rows, self.ids[node]].set(True, mode="drop")
        )

    def follow(self, node: Int[Array, "B"], token: Int[Array, "B"]) -> Int[Array, "B"]:
        """The node after `token`; the node itself where it has no such edge."""
        taken = self.ids[node] == token[:, None]
        return jnp.where(taken.any(-1), (taken * self.children[node]).sum(-1), node)


def build(answers: Sequence[Sequence[int]], eos: int) -> Trie:
    """The trie of answers as ids, each followed by </s>. Its shape is of powers of two, so that few
    are compiled for.
    """
    if not answers:
        raise UserError("constrained decoding was given no answers to choose from")
    edges: list[dict[int, int]] = [{}]
    for answer in answers:
        node = 0
        for token in (*answer, eos):
            if token not in edges[node]:
                edges[node][token] = len(edges)
                edges.append({})
            node = edges[node][token]
    shape = [1 << (n - 1).bit_length() for n in (len(edges), max(map(len, edges)))]
    ids = np.full(shape, np.iinfo(np.int32).max, np.int32)
    children = np.zeros(shape, np.int32)
    for node, found in enumerate(edges):
        ids[node, : len(found)] = list(found)
        children[node, : len(found)] = list(found.values())
    return Trie(jnp.asarray(ids), jnp.asarray(children))
