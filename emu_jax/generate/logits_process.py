"""Scores of the next token to what may be chosen, with Hugging Face's definitions. What is
forbidden scores -inf.

Pure functions on [B, V]; the numbers may be traced, so that one compiled loop serves all of them.
Read next: text_decoding.py.
"""

from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from emu_jax.generate.trie import Trie


@flax.struct.dataclass
# JAX rebuilds it with what are no arrays
@no_type_check
class SamplingMetadata:
    """`GenerationConfig` (generation_config.py) and what else bears on the choice of a token, for a compiled loop."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    min_p: Float[Array, ""]
    repetition_penalty: Float[Array, ""]
    length_penalty: Float[Array, ""]
    min_new_tokens: Int[Array, ""]
    # new tokens that a row may have
    max_new_tokens: Int[Array, "B"]
    # ids that may be chosen at all
    allowed: Bool[Array, "V"]
    # ids after which a row is done
    stop_ids: Bool[Array, "V"]
    # ids of the prompts; V or more for none
    prompt_ids: Int[Array, "B T"]
    # of the answers to choose from
    trie: Trie | None


def process_logits(
    scores: Float[Array, "B V"],
    metadata: SamplingMetadata,
    previous_ids: Int[Array, "B T"],
    node: Int[Array, "B"],
    count: Int[Array, ""],
    eos: int,
) -> Float[Array, "B V"]:
    """Repetition penalty, no early </s>, and the trie; before anything is drawn, or added up by
    beams.
    """
    V = scores.shape[-1]
    scores = repetition_penalty(scores, previous_ids, metadata.repetition_penalty)
    scores = jnp.where((jnp.arange(V) == eos) & (count < metadata.min_new_tokens), -jnp.inf, scores)
    allowed = (
        metadata.allowed
        if metadata.trie is None
        else metadata.allowed & metadata.trie.allowed(node, V)
    )
    return jnp.where(allowed, scores, -jnp.inf)


def sample(
    scores: Float[Array, "B V"], metadata: SamplingMetadata, keys: Key[Array, "B"]
) -> Int[Array, "B"]:
    """One id a row, at random; `keys` has one of each row."""
    scores = scores / metadata.temperature
    for keep, value in ((top_k, metadata.top_k), (top_p, metadata.top_p), (min_p, metadata.min_p)):
        scores = keep(scores, value)
    return jax.vmap(jax.random.categorical)(keys, scores)


def repetition_penalty(
    scores: Float[Array, "B V"], previous_ids: Int[Array, "B T"], penalty: Float[Array, ""]
) -> Float[Array, "B V"]:
    """Scores of ids in `previous_ids` (V or more: none), once each, divided by the penalty where positive,
    else multiplied by it.
    """
    rows = jnp.arange(scores.shape[0])[:, None]
    seen = jnp.zeros(scores.shape, bool).at[rows, previous_ids].set(True, mode="drop")
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def top_k(scores: Float[Array, "B V"], k: Int[Array, ""]) -> Float[Array, "B V"]:
    """Without all that is below the k-th largest; 0 keeps all."""
    V = scores.shape[-1]
    least = jnp.sort(scores, -1)[:, V - jnp.where(k > 0, jnp.minimum(k, V), V)]
    return jnp.where(scores < least[:, None], -jnp.inf, scores)


def top_p(scores: Float[Array, "B V"], p: Float[Array, ""]) -> Float[Array, "B V"]:
    """Without the least likely whose probabilities add up to at most 1 - p; the likeliest always
    stays.
    """
    ascending = jnp.sort(scores, -1)
    keep = (jnp.cumsum(jax.nn.softmax(ascending, -1), -1) > 1 - p).at[:, -1].set(True)
    least = jnp.min(jnp.where(keep, ascending, jnp.inf), -1)
    return jnp.where((scores < least[:, None]) & (p < 1), -jnp.inf, scores)


def min_p(scores: Float[Array, "B V"], p: Float[Array, ""]) -> Float[Array, "B V"]:
    """Without those of a probability less than p times the likeliest's."""
    probs = jax.nn.softmax(scores, -1)
    return jnp.where(probs < p * probs.max(-1, keepdims=True), -jnp.inf, scores)
