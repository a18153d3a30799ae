"""Scores of the next token: penalties, masks and sampling, as Hugging Face defines them.

Pure functions on scores [B, V]; a forbidden id scores -inf. All settings may be traced, so that one
compiled loop serves every setting. Read next: text_decoding.py.
"""

from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from emu_jax.generate.trie import Trie

# The array library of the arguments: NumPy outside a compiled function, JAX inside.
AnyArray = Array | np.ndarray


@flax.struct.dataclass
# JAX also builds this class with leaves that are not arrays, so its types cannot be checked.
@no_type_check
class SamplingMetadata:
    """A `GenerationConfig`, limits and masks, as arrays for a compiled loop."""

    temperature: Float[AnyArray, ""]
    top_k: Int[AnyArray, ""]
    top_p: Float[AnyArray, ""]
    min_p: Float[AnyArray, ""]
    repetition_penalty: Float[AnyArray, ""]
    length_penalty: Float[AnyArray, ""]
    min_new_tokens: Int[AnyArray, ""]
    # Limit of each row, which is below the config's if the context ends earlier.
    max_new_tokens: Int[AnyArray, "B"]
    # Mask of the ids that may be chosen at all.
    allowed: Bool[AnyArray, "V"]
    # Mask of the ids after which a row is done.
    stop_ids: Bool[AnyArray, "V"]
    # Ids of the prompts, for the repetition penalty. V, which is not an id, fills up the rows.
    prompt_ids: Int[AnyArray, "B T"]
    # Trie of the allowed answers; None if every answer is allowed.
    trie: Trie | None


def process_logits(
    scores: Float[Array, "B V"],
    metadata: SamplingMetadata,
    previous_ids: Int[Array, "B T"],
    node: Int[Array, "B"],
    count: Int[Array, ""],
    eos: int,
) -> Float[Array, "B V"]:
    """Apply the settings that greedy decoding, sampling and beam search share.

    These are the repetition penalty, min_new_tokens (no </s> before it), the allowed ids and the
    trie. previous_ids: ids of prompt and answer; V for no id. node: each row's node in the trie.
    count: number of ids in the answer so far.
    """
    V = scores.shape[-1]
    scores = repetition_penalty(scores, previous_ids, metadata.repetition_penalty)
    too_early = (jnp.arange(V) == eos) & (count < metadata.min_new_tokens)
    scores = jnp.where(too_early, -jnp.inf, scores)
    allowed = metadata.allowed
    if metadata.trie is not None:
        allowed = allowed & metadata.trie.allowed(node, V)
    return jnp.where(allowed, scores, -jnp.inf)


def sample(
    scores: Float[Array, "B V"], metadata: SamplingMetadata, keys: Key[Array, "B"]
) -> Int[Array, "B"]:
    """Sample one id per row from processed scores, with the row's own key."""
    scores = scores / metadata.temperature
    scores = top_k(scores, metadata.top_k)
    scores = top_p(scores, metadata.top_p)
    scores = min_p(scores, metadata.min_p)
    return jax.vmap(jax.random.categorical)(keys, scores)


def repetition_penalty(
    scores: Float[Array, "B V"], previous_ids: Int[Array, "B T"], penalty: Float[AnyArray, ""]
) -> Float[Array, "B V"]:
    """Divide positive scores of previous ids by the penalty, and multiply negative ones by it.

    An id counts once, however often it occurs. Ids of V or more are ignored.
    """
    rows = jnp.arange(scores.shape[0])[:, None]
    seen = jnp.zeros(scores.shape, bool).at[rows, previous_ids].set(True, mode="drop")
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def top_k(scores: Float[Array, "B V"], k: Int[AnyArray, ""]) -> Float[Array, "B V"]:
    """Keep the k highest scores, and ties with the k-th; 0 keeps all."""
    V = scores.shape[-1]
    kept = jnp.where(k > 0, jnp.minimum(k, V), V)
    lowest = jnp.sort(scores, -1)[:, V - kept]
    return jnp.where(scores < lowest[:, None], -jnp.inf, scores)


def top_p(scores: Float[Array, "B V"], p: Float[AnyArray, ""]) -> Float[Array, "B V"]:
    """Drop the least likely ids of total probability 1 - p or less, never the likeliest."""
    ascending = jnp.sort(scores, -1)
    keep = (jnp.cumsum(jax.nn.softmax(ascending, -1), -1) > 1 - p).at[:, -1].set(True)
    lowest = jnp.min(jnp.where(keep, ascending, jnp.inf), -1)
    return jnp.where((scores < lowest[:, None]) & (p < 1), -jnp.inf, scores)


def min_p(scores: Float[Array, "B V"], p: Float[AnyArray, ""]) -> Float[Array, "B V"]:
    """Drop ids less likely than p times the likeliest."""
    probs = jax.nn.softmax(scores, -1)
    return jnp.where(probs < p * probs.max(-1, keepdims=True), -jnp.inf, scores)
