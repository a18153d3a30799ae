"""Text: the next token again and again, in one compiled loop over a cache; greedy, sampled, or by
beams.

A `TextDecodeState` can be written on to any length, token by token for a reader who waits, or at once: the
same loop, the same ids. BeamSearchState are Hugging Face's (transformers 4.44.2, early_stopping=False). Read
next: session.py.
"""

from functools import partial
from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from emu_jax.generate import decode_state, logits_process
from emu_jax.generate.decode_state import DecodeState
from emu_jax.generate.logits_process import SamplingMetadata
from emu_jax.models import emu, module
from emu_jax.tree import Tree

BOS = 1
EOS = 2
# log-probability of a beam that is not there
DEAD = -1e9


@flax.struct.dataclass
# JAX rebuilds it with what are no arrays
@no_type_check
class TextDecodeState:
    """Answers that are being written: `count` ids a row, of which all but the last are read. A row
    that is done repeats </s>.
    """

    llm: DecodeState
    ids: Int[Array, "B n"]
    count: Int[Array, ""]
    done: Bool[Array, "B"]
    # in the trie
    node: Int[Array, "B"]
    keys: Key[Array, "B"]


@partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)
def start(
    config: emu.EmuConfig,
    params: Tree,
    llm: DecodeState,
    keys: Key[Array, "B"],
    room: int,
    metadata: SamplingMetadata,
) -> TextDecodeState:
    """The first id of each answer; there will be at most `room`, and the context needs room for
    them.
    """
    rows = llm.lengths.shape[0]
    zeros = jnp.zeros(rows, jnp.int32)
    state = TextDecodeState(
        llm, jnp.full((rows, room), EOS), jnp.int32(0), jnp.zeros(rows, bool), zeros, keys
    )
    return _choose(module.bind(emu.Emu, config, params), state, metadata)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(
    config: emu.EmuConfig,
    params: Tree,
    state: TextDecodeState,
    until: Int[Array, ""],
    metadata: SamplingMetadata,
) -> TextDecodeState:
    """The state with `until` ids a row, or fewer if all rows are done before."""
    model = module.bind(emu.Emu, config, params)

    def step(state: TextDecodeState) -> TextDecodeState:
        token = jax.lax.dynamic_index_in_dim(state.ids, state.count - 1, 1)
        x = model.llama.embeddings(token, config.compute)
        return _choose(
            model,
            state.replace(
                llm=decode_state.extend(model, state.llm, x, (~state.done).astype(jnp.int32))
            ),
            metadata,
        )

    return jax.lax.while_loop(lambda state: (state.count < until) & ~state.done.all(), step, state)


def _choose(model: emu.Emu, state: TextDecodeState, metadata: SamplingMetadata) -> TextDecodeState:
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
    return state.replace(
        ids=state.ids.at[:, state.count].set(token),
        count=count,
        done=state.done | metadata.stop_ids[token] | (count >= metadata.max_new_tokens),
        node=state.node if metadata.trie is None else metadata.trie.follow(state.node, token),
    )


def _previous_ids(
    metadata: SamplingMetadata, ids: Int[Array, "B n"], count: Int[Array, ""]
) -> Int[Array, "B s"]:
    """Ids of the prompts and of the answers so far."""
    nothing = metadata.allowed.shape[0]
    return jnp.concatenate(
        [metadata.prompt_ids, jnp.where(jnp.arange(ids.shape[1]) < count, ids, nothing)], 1
    )


@partial(jax.jit, static_argnums=0)
def nll(
    config: emu.EmuConfig,
    params: Tree,
    llm: DecodeState,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
) -> Float[Array, "B"]:
    """Summed cross-entropy of the first `lengths` tokens of each row, as what follows the
    llm.
    """
    model = module.bind(emu.Emu, config, params)
    hidden, _ = decode_state.forward(
        model, llm, model.llama.embeddings(tokens, config.compute), lengths
    )
    before = jnp.concatenate([llm.hidden[:, None], hidden[:, :-1]], 1)

    def step(pair):
        hidden, token = pair
        return jnp.take_along_axis(
            jax.nn.log_softmax(model.llama.logits(hidden), -1), token[:, None], 1
        )[:, 0]

    # the logits of one position at a time
    found = jax.lax.map(step, (jnp.moveaxis(before, 1, 0), tokens.T))
    return -jnp.where(jnp.arange(tokens.shape[1]) < lengths[:, None], found.T, 0).sum(1)


def until_end(ids: np.ndarray) -> list[int]:
    """The ids before the first </s>."""
    end = np.flatnonzero(ids == EOS)
    return ids[: end[0] if len(end) else None].tolist()


# --- beams: K running answers a row, and the K best that have ended ---


@flax.struct.dataclass
# JAX rebuilds it with what are no arrays
@no_type_check
class BeamSearchState:
    # B * K rows, beam after beam
    llm: DecodeState
    ids: Int[Array, "B K n"]
    # log-probabilities
    sums: Float[Array, "B K"]
    node: Int[Array, "B K"]
    count: Int[Array, ""]
    # without their </s>, which fills the rest
    ended: Int[Array, "B K n"]
    # of the ended; -inf for none
    scores: Float[Array, "B K"]
    done: Bool[Array, "B"]


@partial(jax.jit, static_argnums=(0, 3, 4))
def beam_search(
    config: emu.EmuConfig,
    params: Tree,
    llm: DecodeState,
    beams: int,
    room: int,
    metadata: SamplingMetadata,
) -> Int[Array, "B n"]:
    """The best answer of each row, filled up with </s>; the llm, already `beams` times over,
    needs room for `room` ids.

    Every step takes the 2 K best continuations of the K running beams: of the first K, those that
    end become hypotheses, which score sum of log-probabilities / length ** length_penalty, </s>
    counted; the first K that do not end run on. A row is done when its worst kept hypothesis scores
    at least what the best continuation would, were it to end now; or at its limit.
    """
    model = module.bind(emu.Emu, config, params)
    K = beams
    rows = llm.lengths.shape[0] // K
    nobody = jnp.full((rows, K, room), EOS)
    state = BeamSearchState(
        llm,
        nobody,
        jnp.tile(jnp.array([0.0] + [DEAD] * (K - 1)), (rows, 1)),
        jnp.zeros((rows, K), jnp.int32),
        jnp.int32(0),
        nobody,
        jnp.full((rows, K), -jnp.inf),
        jnp.zeros(rows, bool),
    )
    metadata = metadata.replace(prompt_ids=jnp.repeat(metadata.prompt_ids, K, 0))

    def step(state: BeamSearchState) -> BeamSearchState:
        token = jax.lax.dynamic_index_in_dim(state.ids.reshape(rows * K, room), state.count - 1, 1)
        x = model.llama.embeddings(token, config.compute)
        return _extend(
            model,
            state.replace(
                llm=decode_state.extend(model, state.llm, x, jnp.ones(rows * K, jnp.int32))
            ),
            metadata,
        )

    def unfinished(state):
        return ((state.count < metadata.max_new_tokens) & ~state.done).any()

    state = jax.lax.while_loop(unfinished, step, _extend(model, state, metadata))
    running = (
        state.sums
        / jnp.minimum(state.count, metadata.max_new_tokens).astype(jnp.float32)[:, None]
        ** metadata.length_penalty
    )
    scores = jnp.concatenate([state.scores, jnp.where(state.done[:, None], -jnp.inf, running)], 1)
    return jnp.take_along_axis(
        jnp.concatenate([state.ended, state.ids], 1), jnp.argmax(scores, 1)[:, None, None], 1
    )[:, 0]


def _extend(model: emu.Emu, state: BeamSearchState, metadata: SamplingMetadata) -> BeamSearchState:
    """One more id of every running beam."""
    B, K, room = state.ids.shape
    V = metadata.allowed.shape[0]
    logits = jax.nn.log_softmax(model.llama.logits(state.llm.hidden), -1)
    scores = logits_process.process_logits(
        logits,
        metadata,
        _previous_ids(metadata, state.ids.reshape(B * K, room), state.count),
        state.node.ravel(),
        state.count,
        EOS,
    )
    best, at = jax.lax.top_k(
        (scores.reshape(B, K, V) + state.sums[..., None]).reshape(B, K * V), 2 * K
    )
    parent = at // V
    token = at % V

    def pick(values, index):
        return jnp.take_along_axis(values, index.reshape(*index.shape, *[1] * (values.ndim - 2)), 1)

    score = best / (state.count + 1).astype(jnp.float32) ** metadata.length_penalty

    ends = token == EOS
    hypotheses = jnp.concatenate(
        [state.scores, jnp.where(ends & (jnp.arange(2 * K) < K), score, -jnp.inf)], 1
    )
    kept_scores, kept = jax.lax.top_k(hypotheses, K)
    ended = pick(jnp.concatenate([state.ended, pick(state.ids, parent)], 1), kept)

    # the first K that do not end
    order = jnp.argsort(ends, axis=1, stable=True)[:, :K]
    parent = pick(parent, order)
    token = pick(token, order)
    sums = pick(best, order)
    ids = pick(state.ids, parent).at[:, :, state.count].set(token)
    node = pick(state.node, parent)
    node = (
        node
        if metadata.trie is None
        else metadata.trie.follow(node.ravel(), token.ravel()).reshape(B, K)
    )

    # such a row stays as it is
    over = state.done | (state.count >= metadata.max_new_tokens)

    def keep(old, new):
        return jnp.where(over.reshape(B, *[1] * (new.ndim - 1)), old, new)

    # or nothing more is allowed
    done = (kept_scores > -jnp.inf).all(1) & (kept_scores.min(1) >= score[:, 0]) | (
        score[:, 0] == -jnp.inf
    )
    came_from = (keep(jnp.arange(K)[None], parent) + K * jnp.arange(B)[:, None]).ravel()
    return BeamSearchState(
        _reorder(state.llm, came_from, room),
        keep(state.ids, ids),
        keep(state.sums, sums),
        keep(state.node, node),
        state.count + 1,
        keep(state.ended, ended),
        keep(state.scores, kept_scores),
        state.done | ~over & done,
    )


def _reorder(llm: DecodeState, came_from: Int[Array, "B"], room: int) -> DecodeState:
    """Each beam's own answer moves with it; what was read before the answers is the same for all
    beams of a row.
    """
    start = llm.cache.capacity - room

    def move(x):
        return jax.lax.dynamic_update_slice_in_dim(x, x[:, came_from, start:], start, 2)

    cache = llm.cache.replace(k=move(llm.cache.k), v=move(llm.cache.v))
    return llm.replace(cache=cache, hidden=llm.hidden[came_from])
