"""The decoding state does not depend on how it was computed.

One prefill equals two prefills, wherever the prompt is split. A row alone equals the same row among
longer ones. A shared prefix equals whole prompts.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from emu_jax.generate import decode_state
from emu_jax.generate.generation_config import GenerationConfig
from emu_jax.generate.processor import Prompt
from tests.support.small import Uncached, make_session

LLAMA3 = (
    "model.llama.kv_heads=2",
    "model.llama.tied=true",
    "model.llama.eps=1e-5",
    "model.llama.rope_base=500000.0",
    "model.llama.rope_scaling=('llama3',8.0,1.0,4.0,16.0)",
)


def read(session, state, prompt):
    x, lengths = session.embed([prompt])
    return decode_state.prefill(session.model_config, session.params, state, x, lengths)


def same(a, b):
    np.testing.assert_allclose(a.hidden, b.hidden, atol=2e-5)
    np.testing.assert_array_equal(a.lengths, b.lengths)


def part(prompt, start, stop):
    """The elements of a prompt from `start` up to `stop`, which must not cut an image."""
    inside = [
        (image, slot - start)
        for image, slot in zip(prompt.images, prompt.slots)
        if start < slot < stop
    ]
    return Prompt(
        prompt.tokens[start:stop], [image for image, _ in inside], [slot for _, slot in inside]
    )


def test_cached_is_uncached(session, uncached, images):
    prompt = session.prompt(["a dog", images[0], "and", images[1], "!"])
    state = session.prefill_batch([prompt])
    np.testing.assert_allclose(state.hidden[0], uncached.hidden(uncached.x(prompt))[-1], atol=2e-5)
    assert (
        state.lengths.tolist() == [len(prompt)]
        and state.cache.capacity == 32
        and int(state.cache.length) == 32
    )


def test_cached_is_uncached_with_llama_3s_shapes(images):
    """Cached equals uncached with fewer key and value heads, scaled positions and a tied head.

    The cache holds only those fewer heads.
    """
    session = make_session(*LLAMA3)
    uncached = Uncached(session)
    prompt = session.prompt(["a dog", images[0], "and"])
    state = session.prefill_batch([prompt], room=16)
    assert state.cache.k.shape[3] == 2 and "lm_head" not in session.params["llama"]
    x = uncached.x(prompt)
    for token in (7, 11, 13):
        np.testing.assert_allclose(state.hidden[0], uncached.hidden(x)[-1], atol=2e-5)
        table = np.concatenate(
            [session.params["llama"]["embed"][name] for name in ("base", "added")]
        )
        np.testing.assert_allclose(
            uncached.logits(x)[-1], table @ np.asarray(state.hidden[0]), atol=2e-4
        )
        state = decode_state.prefill(
            session.model_config,
            session.params,
            state,
            uncached.embedding(token)[None],
            jnp.array([1]),
        )
        x = np.concatenate([x, uncached.embedding(token)])
    options = GenerationConfig(max_new_tokens=16)
    answer = session.generate_texts([["a dog", images[0], "and"]], options)
    together = session.generate_texts([["a dog", images[0], "and"], ["x"]], options)
    assert answer == together[:1] and answer[0]


# Cuts after <s>, before [IMG], after [/IMG] and before the last id.
@pytest.mark.parametrize("at", [1, 6, 12, 19])
def test_any_split_of_a_prompt(session, images, at):
    prompt = session.prompt(["a dog", images[0], "is here."])
    assert len(prompt) == 20
    empty = decode_state.init(session.model_config, session.params, 1, 64)
    twice = read(session, read(session, empty, part(prompt, 0, at)), part(prompt, at, 20))
    same(twice, session.prefill_batch([prompt]))


def test_reading_nothing_changes_nothing(session):
    state = session.prefill_batch([session.prompt(["a dog"])], room=16)
    hidden = np.asarray(state.hidden)
    after = decode_state.prefill(
        session.model_config, session.params, state, jnp.zeros((1, 16, 32)), jnp.array([0])
    )
    np.testing.assert_array_equal(after.hidden, hidden)
    assert after.lengths.tolist() == [6]


def test_rows_do_not_see_each_other(session, images):
    prompts = [
        session.prompt(parts)
        for parts in (["x"], ["a longer one", images[2], "of two"], [images[3]])
    ]
    together = session.prefill_batch(prompts)
    # Rows are padded to a power of two.
    assert together.hidden.shape[0] == 4
    for row, prompt in enumerate(prompts):
        alone = session.prefill_batch([prompt])
        np.testing.assert_allclose(together.hidden[row], alone.hidden[0], atol=2e-5)


def test_a_prefix_is_shared(session, images):
    prefix = session.prefill(["few ", images[0], "shots: "])
    prompts = [session.processor.interleave(["a"]), session.processor.interleave(["bb", images[1]])]
    after = session.prefill_batch(
        [session.continuation(["a"]), session.continuation(["bb", images[1]])],
        prefix=prefix,
        room=16,
    )
    for row, prompt in enumerate(prompts):
        whole = session.prompt(["few ", images[0], "shots: "])
        tokens = whole.tokens + prompt.tokens[1:]
        slots = whole.slots + [len(whole) + slot - 1 for slot in prompt.slots]
        alone = session.prefill_batch([Prompt(tokens, whole.images + prompt.images, slots)])
        np.testing.assert_allclose(after.hidden[row], alone.hidden[0], atol=2e-5)
    # The prefix can be used again.
    assert not prefix.state.hidden.is_deleted()


def test_bfloat16_is_cached_in_bfloat16(session):
    model_config = dataclasses.replace(session.model_config, compute="bfloat16")
    cache = decode_state.init(model_config, session.params, 2, 16).cache
    assert cache.k.dtype == cache.v.dtype == jnp.bfloat16 and cache.k.shape == (2, 2, 16, 4, 8)
