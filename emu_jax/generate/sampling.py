"""Scores of the next token to what may be chosen, with Hugging Face's definitions. What is
forbidden scores -inf.

Pure functions on [B, V]; the numbers may be traced, so that one compiled loop serves all of them.
Read next: text.py.
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
class Rules:
    """`Options` (options.py) and what else bears on the choice of a token, for a compiled loop."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    min_p: Float[Array, ""]
    repetition_penalty: Float[Array, ""]
    length_penalty: Float[Array, ""]
    min_new_tokens: Int[Array, ""]
    # new tokens that a row may have
    limits: Int[Array, "B"]
    # ids that may be chosen at all
    allowed: Bool[Array, "V"]
    # ids after which a row is done
    ends: Bool[Array, "V"]
    # ids of the prompts; V or more for none
    said: Int[Array, "B T"]
    # of the answers to choose from
    trie: Trie | None


def process(
    scores: Float[Array, "B V"],
    rules: Rules,
    said: Int[Array, "B T"],
    node: Int[Array, "B"],
    count: Int[Array, ""],
    eos: int,
) -> Float[Array, "B V"]:
    """Repetition penalty, no early </s>, and the trie; before anything is drawn, or added up by
    beams.
    """
    V = scores.shape[-1]
    scores = repetition_penalty(scores, said, rules.repetition_penalty)
    scores = jnp.where((jnp.arange(V) == eos) & (count < rules.min_new_tokens), -jnp.inf, scores)
    allowed = rules.allowed if rules.trie is None else rules.allowed & rules.trie.allowed(node, V)
    return jnp.where(allowed, scores, -jnp.inf)


def sample(scores: Float[Array, "B V"], rules: Rules, keys: Key[Array, "B"]) -> Int[Array, "B"]:
    """One id a row, at random; `keys` has one of each row."""
    scores = scores / rules.temperature
    for keep, value in ((top_k, rules.top_k), (top_p, rules.top_p), (min_p, rules.min_p)):
        scores = keep(scores, value)
    return jax.vmap(jax.random.categorical)(keys, scores)


def repetition_penalty(
    scores: Float[Array, "B V"], said: Int[Array, "B T"], penalty: Float[Array, ""]
) -> Float[Array, "B V"]:
    """Scores of ids in `said` (V or more: none), once each, divided by the penalty where positive,
    else multiplied by it.
    """
    rows = jnp.arange(scores.shape[0])[:, None]
    seen = jnp.zeros(scores.shape, bool).at[rows, said].set(True, mode="drop")
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
