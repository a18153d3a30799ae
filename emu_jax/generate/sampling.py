"""Scores of the next token to what may be chosen, with Hugging Face's definitions. What is forbidden scores -inf.

Pure functions on [B, V]; the numbers may be traced, so that one compiled loop serves all of them. Read next: text.py.
"""
from dataclasses import dataclass
from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from emu_jax.config import UserError
from emu_jax.generate.trie import Trie


@dataclass(frozen=True)
class Options:
    """How text is generated. Greedy unless there is a temperature or there are beams."""
    max_new_tokens: int = 128
    min_new_tokens: int = 0             # before it, no </s>
    temperature: float = 0.0            # 0: the likeliest token
    top_k: int = 0                      # sample among the k likeliest; 0: all
    top_p: float = 1.0                  # among the likeliest that together have probability p
    min_p: float = 0.0                  # among those with at least this share of the likeliest's probability
    repetition_penalty: float = 1.0     # scores of ids that were in the prompt or the answer: divided by it if positive, else multiplied
    beams: int = 1
    length_penalty: float = 1.0         # of beams: a hypothesis scores its log-probability / length ** length_penalty
    stop: tuple[str, ...] = ()          # texts before which an answer ends
    seed: int = 0

    def __post_init__(self):
        """Raises UserError for what is out of range, or does not go together."""
        for name, low, high in (("max_new_tokens", 1, None), ("min_new_tokens", 0, self.max_new_tokens), ("temperature", 0, None), ("top_k", 0, None),
                                ("top_p", 0, 1), ("min_p", 0, 1), ("repetition_penalty", 1e-3, None), ("beams", 1, 64)):
            value = getattr(self, name)
            if not value >= low or high is not None and value > high:
                raise UserError(f"{name}={value} must be at least {low}" + ("" if high is None else f" and at most {high}"))
        if "" in self.stop:
            raise UserError("a stop string must not be empty")
        if self.beams > 1 and self.temperature:
            raise UserError(f"beams={self.beams} search for the likeliest answer and temperature={self.temperature} draws one at random: choose one of them")
        if not self.temperature and (self.top_k or self.top_p < 1 or self.min_p):
            raise UserError("top_k, top_p and min_p choose among samples: they need a temperature, for example temperature=1")


@flax.struct.dataclass
@no_type_check                              # JAX rebuilds it with what are no arrays
class Rules:
    """`Options` and what else bears on the choice of a token, for a compiled loop."""
    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    min_p: Float[Array, ""]
    repetition_penalty: Float[Array, ""]
    length_penalty: Float[Array, ""]
    min_new_tokens: Int[Array, ""]
    limits: Int[Array, "B"]             # new tokens that a row may have
    allowed: Bool[Array, "V"]           # ids that may be chosen at all
    ends: Bool[Array, "V"]              # ids after which a row is done
    said: Int[Array, "B T"]             # ids of the prompts; V or more for none
    trie: Trie | None                   # of the answers to choose from


def process(scores: Float[Array, "B V"], rules: Rules, said: Int[Array, "B T"], node: Int[Array, "B"], count: Int[Array, ""], eos: int) -> Float[Array, "B V"]:
    """Repetition penalty, no early </s>, and the trie; before anything is drawn, or added up by beams."""
    V = scores.shape[-1]
    scores = repetition_penalty(scores, said, rules.repetition_penalty)
    scores = jnp.where((jnp.arange(V) == eos) & (count < rules.min_new_tokens), -jnp.inf, scores)
    allowed = rules.allowed if rules.trie is None else rules.allowed & rules.trie.allowed(node, V)
    return jnp.where(allowed, scores, -jnp.inf)


def sample(scores: Float[Array, "B V"], rules: Rules, keys: PRNGKeyArray) -> Int[Array, "B"]:
    """One id a row, at random; `keys` has one of each row."""
    scores = scores / rules.temperature
    for keep, value in ((top_k, rules.top_k), (top_p, rules.top_p), (min_p, rules.min_p)):
        scores = keep(scores, value)
    return jax.vmap(jax.random.categorical)(keys, scores)


def repetition_penalty(scores: Float[Array, "B V"], said: Int[Array, "B T"], penalty: Float[Array, ""]) -> Float[Array, "B V"]:
    """Scores of ids in `said` (V or more: none), once each, divided by the penalty where positive, else multiplied by it."""
    rows = jnp.arange(scores.shape[0])[:, None]
    seen = jnp.zeros(scores.shape, bool).at[rows, said].set(True, mode="drop")
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def top_k(scores: Float[Array, "B V"], k: Int[Array, ""]) -> Float[Array, "B V"]:
    """Without all that is below the k-th largest; 0 keeps all."""
    V = scores.shape[-1]
    least = jnp.sort(scores, -1)[:, V - jnp.where(k > 0, jnp.minimum(k, V), V)]
    return jnp.where(scores < least[:, None], -jnp.inf, scores)


def top_p(scores: Float[Array, "B V"], p: Float[Array, ""]) -> Float[Array, "B V"]:
    """Without the least likely whose probabilities add up to at most 1 - p; the likeliest always stays."""
    ascending = jnp.sort(scores, -1)
    keep = (jnp.cumsum(jax.nn.softmax(ascending, -1), -1) > 1 - p).at[:, -1].set(True)
    least = jnp.min(jnp.where(keep, ascending, jnp.inf), -1)
    return jnp.where((scores < least[:, None]) & (p < 1), -jnp.inf, scores)


def min_p(scores: Float[Array, "B V"], p: Float[Array, ""]) -> Float[Array, "B V"]:
    """Without those of a probability less than p times the likeliest's."""
    probs = jax.nn.softmax(scores, -1)
    return jnp.where(probs < p * probs.max(-1, keepdims=True), -jnp.inf, scores)
