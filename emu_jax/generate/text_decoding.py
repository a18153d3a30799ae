"""Text generation: one compiled loop over a KV cache; greedy, sampled or by beam search.

A `TextDecodeState` can be extended token by token for streaming, or in one call; both give the same
ids. Beam search is that of Hugging Face (transformers 4.44.2, early_stopping=False). Read next:
logits_process.py, session.py.
"""

from dataclasses import replace
from functools import partial
from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from emu_jax.data.tokenizer import EOS
from emu_jax.generate import decode_state, logits_process
from emu_jax.generate.decode_state import DecodeState
from emu_jax.generate.logits_process import SamplingMetadata
from emu_jax.models.emu import Emu, EmuConfig
from emu_jax.tree import Tree

# Log-probability of a beam that does not exist yet.
DEAD = -1e9


@flax.struct.dataclass
# JAX also builds this class with leaves that are not arrays, so its types cannot be checked.
@no_type_check
class TextDecodeState:
    """One answer per row: `count` ids, of which the LLM has read all but the last.

    A row that is done repeats </s>.
    """

    llm: DecodeState
    ids: Int[Array, "B n"]
    count: Int[Array, ""]
    done: Bool[Array, "B"]
    # Node of the trie that the ids lead to; 0 without a trie.
    node: Int[Array, "B"]
    keys: Key[Array, "B"]


@partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)
def start(
    config: EmuConfig,
    params: Tree,
    llm: DecodeState,
    keys: Key[Array, "B"],
    room: int,
    metadata: SamplingMetadata,
) -> TextDecodeState:
    """Choose the first id of each answer. Donates `llm`.

    keys: one per row; unused if greedy. room: the largest number of ids; the cache needs as many
    free slots.
    """
    rows = llm.lengths.shape[0]
    state = TextDecodeState(
        llm=llm,
        ids=jnp.full((rows, room), EOS),
        count=jnp.int32(0),
        done=jnp.zeros(rows, bool),
        node=jnp.zeros(rows, jnp.int32),
        keys=keys,
    )
    return _choose(decode_state.bind(config, params), state, metadata)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(
    config: EmuConfig,
    params: Tree,
    state: TextDecodeState,
    until: Int[Array, ""],
    metadata: SamplingMetadata,
) -> TextDecodeState:
    """Extend the answers to `until` ids, or until all rows are done. Donates `state`."""
    model = decode_state.bind(config, params)

    def unfinished(state: TextDecodeState) -> Bool[Array, ""]:
        return (state.count < until) & ~state.done.all()

    def step(state: TextDecodeState) -> TextDecodeState:
        token = jax.lax.dynamic_index_in_dim(state.ids, state.count - 1, 1)
        x = model.llama.embeddings(token, config.compute)
        # Rows that are done read nothing.
        lengths = (~state.done).astype(jnp.int32)
        llm = decode_state.extend(model, state.llm, x, lengths)
        return _choose(model, replace(state, llm=llm), metadata)

    return jax.lax.while_loop(unfinished, step, state)


def _choose(model: Emu, state: TextDecodeState, metadata: SamplingMetadata) -> TextDecodeState:
    """Add the next id of every row, greedily or by sampling."""
    scores = logits_process.process_logits(
        model.llama.logits(state.llm.hidden),
        metadata,
        _previous_ids(metadata, state.ids, state.count),
        state.node,
        state.count,
        EOS,
    )
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.count)
    token = jax.lax.cond(
        metadata.temperature > 0,
        lambda: logits_process.sample(scores, metadata, keys),
        lambda: jnp.argmax(scores, -1),
    )
    token = jnp.where(state.done, EOS, token)
    count = state.count + 1
    ends = metadata.stop_ids[token] | (count >= metadata.max_new_tokens)
    return replace(
        state,
        ids=state.ids.at[:, state.count].set(token),
        count=count,
        done=state.done | ends,
        node=_follow(metadata, state.node, token),
    )


def _follow(
    metadata: SamplingMetadata, node: Int[Array, "B"], token: Int[Array, "B"]
) -> Int[Array, "B"]:
    return node if metadata.trie is None else metadata.trie.follow(node, token)


def _previous_ids(
    metadata: SamplingMetadata, ids: Int[Array, "B n"], count: Int[Array, ""]
) -> Int[Array, "B s"]:
    """Ids of the prompts and of the answers so far; V for no id."""
    vocab = metadata.allowed.shape[0]
    answers = jnp.where(jnp.arange(ids.shape[1]) < count, ids, vocab)
    return jnp.concatenate([metadata.prompt_ids, answers], 1)


@partial(jax.jit, static_argnums=0)
def nll(
    config: EmuConfig,
    params: Tree,
    llm: DecodeState,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
) -> Float[Array, "B"]:
    """Summed cross-entropy in nats of each row's first `lengths` tokens."""
    model = decode_state.bind(config, params)
    x = model.llama.embeddings(tokens, config.compute)
    hidden, _ = decode_state.forward(model, llm, x, lengths)
    # Token t is predicted from the element before it.
    before = jnp.concatenate([llm.hidden[:, None], hidden[:, :-1]], 1)

    def log_probs(position: tuple[Float[Array, "B D"], Int[Array, "B"]]) -> Float[Array, "B"]:
        hidden, token = position
        log_softmax = jax.nn.log_softmax(model.llama.logits(hidden), -1)
        return jnp.take_along_axis(log_softmax, token[:, None], 1)[:, 0]

    # Take one position at a time, because the logits of all positions may not fit in memory.
    found = jax.lax.map(log_probs, (jnp.moveaxis(before, 1, 0), tokens.T)).T
    return -jnp.where(jnp.arange(tokens.shape[1]) < lengths[:, None], found, 0).sum(1)


def until_end(ids: Int[np.ndarray, "n"]) -> list[int]:
    """The ids before the first </s>."""
    end = np.flatnonzero(ids == EOS)
    return ids[: end[0] if len(end) else None].tolist()


# Beam search: K running answers per row, and the K best that have ended


@flax.struct.dataclass
# JAX also builds this class with leaves that are not arrays, so its types cannot be checked.
@no_type_check
class BeamSearchState:
    """K running answers per row (`ids`, `log_probs`, `node`) and the K best ended ones."""

    # B * K rows, the K beams of an answer next to each other.
    llm: DecodeState
    ids: Int[Array, "B K n"]
    log_probs: Float[Array, "B K"]
    # Node of the trie that the ids lead to; 0 without a trie.
    node: Int[Array, "B K"]
    count: Int[Array, ""]
    # Ids of the ended answers, padded with </s>.
    ended: Int[Array, "B K n"]
    # Scores of the ended answers; -inf where there is none.
    scores: Float[Array, "B K"]
    done: Bool[Array, "B"]


@partial(jax.jit, static_argnums=(0, 3, 4))
def beam_search(
    config: EmuConfig,
    params: Tree,
    llm: DecodeState,
    beams: int,
    room: int,
    metadata: SamplingMetadata,
) -> Int[Array, "B n"]:
    """The best answer of each row, padded with </s>.

    llm: holds every row `beams` times (see `decode_state.expand`), with `room` free slots.

    Every step takes the 2 K best continuations of the K running beams. Those among the first K that
    end become hypotheses with the score (sum of log-probabilities) / length ** length_penalty,
    where the length includes </s>; the first K that do not end keep running. A row is done at its
    limit, or when its worst kept hypothesis scores at least as high as the best continuation would
    if it ended now.
    """
    model = decode_state.bind(config, params)
    K = beams
    rows = llm.lengths.shape[0] // K
    no_answers = jnp.full((rows, K, room), EOS)
    # All beams are equal at first, so only one of them counts.
    log_probs = jnp.array([0.0] + [DEAD] * (K - 1))
    state = BeamSearchState(
        llm=llm,
        ids=no_answers,
        log_probs=jnp.tile(log_probs, (rows, 1)),
        node=jnp.zeros((rows, K), jnp.int32),
        count=jnp.int32(0),
        ended=no_answers,
        scores=jnp.full((rows, K), -jnp.inf),
        done=jnp.zeros(rows, bool),
    )
    metadata = replace(metadata, prompt_ids=jnp.repeat(metadata.prompt_ids, K, 0))

    def unfinished(state: BeamSearchState) -> Bool[Array, ""]:
        return ((state.count < metadata.max_new_tokens) & ~state.done).any()

    def step(state: BeamSearchState) -> BeamSearchState:
        ids = state.ids.reshape(rows * K, room)
        token = jax.lax.dynamic_index_in_dim(ids, state.count - 1, 1)
        x = model.llama.embeddings(token, config.compute)
        llm = decode_state.extend(model, state.llm, x, jnp.ones(rows * K, jnp.int32))
        return _extend_beams(model, replace(state, llm=llm), metadata)

    state = jax.lax.while_loop(unfinished, step, _extend_beams(model, state, metadata))

    # At the limit, running beams compete with the ended ones.
    lengths = jnp.minimum(state.count, metadata.max_new_tokens).astype(jnp.float32)[:, None]
    running = state.log_probs / lengths**metadata.length_penalty
    running = jnp.where(state.done[:, None], -jnp.inf, running)
    best = jnp.argmax(jnp.concatenate([state.scores, running], 1), 1)
    answers = jnp.concatenate([state.ended, state.ids], 1)
    return _pick(answers, best[:, None])[:, 0]


def _extend_beams(
    model: Emu, state: BeamSearchState, metadata: SamplingMetadata
) -> BeamSearchState:
    """Add one id to every running beam, and move the beams that end to the ended ones."""
    B, K, room = state.ids.shape
    V = metadata.allowed.shape[0]
    log_softmax = jax.nn.log_softmax(model.llama.logits(state.llm.hidden), -1)
    scores = logits_process.process_logits(
        log_softmax,
        metadata,
        _previous_ids(metadata, state.ids.reshape(B * K, room), state.count),
        state.node.ravel(),
        state.count,
        EOS,
    )
    totals = scores.reshape(B, K, V) + state.log_probs[..., None]
    best, index = jax.lax.top_k(totals.reshape(B, K * V), 2 * K)
    parent = index // V
    token = index % V
    # The score of each continuation if it ended here.
    score = best / (state.count + 1).astype(jnp.float32) ** metadata.length_penalty

    # Continuations that end become hypotheses if they are among the first K.
    ends = token == EOS
    new_scores = jnp.where(ends & (jnp.arange(2 * K) < K), score, -jnp.inf)
    kept_scores, kept = jax.lax.top_k(jnp.concatenate([state.scores, new_scores], 1), K)
    ended = _pick(jnp.concatenate([state.ended, _pick(state.ids, parent)], 1), kept)

    # The first K that do not end keep running.
    order = jnp.argsort(ends, axis=1, stable=True)[:, :K]
    parent = _pick(parent, order)
    token = _pick(token, order)
    log_probs = _pick(best, order)
    ids = _pick(state.ids, parent).at[:, :, state.count].set(token)
    node = _pick(state.node, parent)
    node = _follow(metadata, node.ravel(), token.ravel()).reshape(B, K)

    hopeless = (kept_scores > -jnp.inf).all(1) & (kept_scores.min(1) >= score[:, 0])
    nothing_allowed = score[:, 0] == -jnp.inf

    # A row that is done stays as it is.
    over = state.done | (state.count >= metadata.max_new_tokens)

    def keep(old, new):
        return jnp.where(over.reshape(B, *[1] * (new.ndim - 1)), old, new)

    first_beam = K * jnp.arange(B)[:, None]
    came_from = keep(jnp.arange(K)[None], parent) + first_beam
    return BeamSearchState(
        llm=_reorder(state.llm, came_from.ravel(), room),
        ids=keep(state.ids, ids),
        log_probs=keep(state.log_probs, log_probs),
        node=keep(state.node, node),
        count=state.count + 1,
        ended=keep(state.ended, ended),
        scores=keep(state.scores, kept_scores),
        done=state.done | ~over & (hopeless | nothing_allowed),
    )


def _pick(values: Array, index: Int[Array, "B k"]) -> Array:
    """values[b, index[b, i]] for every b and i; values is [B, n, ...]."""
    return jnp.take_along_axis(values, index.reshape(*index.shape, *[1] * (values.ndim - 2)), 1)


def _reorder(llm: DecodeState, came_from: Int[Array, "B"], room: int) -> DecodeState:
    """Move each beam's own answer, the last `room` slots of the cache, with the beam.

    What was read before the answers is the same for all beams of a row.
    """
    begin = llm.cache.capacity - room

    def move(x):
        return jax.lax.dynamic_update_slice_in_dim(x, x[:, came_from, begin:], begin, 2)

    cache = replace(llm.cache, k=move(llm.cache.k), v=move(llm.cache.v))
    return replace(llm, cache=cache, hidden=llm.hidden[came_from])
