"""Each rule on examples made by hand, and the trie."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emu_jax.config import UserError
from emu_jax.generate import logits_process, trie
from emu_jax.generate.generation_config import GenerationConfig

SCORES = jnp.log(jnp.array([[0.1, 0.4, 0.05, 0.25, 0.2]]))


def kept(scores):
    return np.flatnonzero(np.isfinite(scores[0])).tolist()


@pytest.mark.parametrize(
    "k, left",
    [(1, [1]), (2, [1, 3]), (4, [0, 1, 3, 4]), (0, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])],
)
def test_top_k(k, left):
    assert kept(logits_process.top_k(SCORES, jnp.int32(k))) == left


def test_top_k_keeps_what_is_equal():
    assert kept(logits_process.top_k(jnp.array([[1.0, 2, 1, 0]]), jnp.int32(2))) == [0, 1, 2]


@pytest.mark.parametrize(
    "p, left",
    [
        (0.0, [1]),
        (0.39, [1]),
        (0.41, [1, 3]),
        (0.64, [1, 3]),
        (0.66, [1, 3, 4]),
        (0.94, [0, 1, 3, 4]),
        (1.0, [0, 1, 2, 3, 4]),
    ],
)
def test_top_p(p, left):
    assert kept(logits_process.top_p(SCORES, jnp.float32(p))) == left


@pytest.mark.parametrize(
    "p, left", [(0.0, [0, 1, 2, 3, 4]), (0.2, [0, 1, 3, 4]), (0.3, [1, 3, 4]), (1.0, [1])]
)
def test_min_p(p, left):
    assert kept(logits_process.min_p(SCORES, jnp.float32(p))) == left


def test_repetition_penalty():
    scores = jnp.array([[2.0, -2.0, 1.0, -1.0]])
    # Id 0 occurs twice but counts once. 4 means no id.
    said = jnp.array([[0, 1, 0, 4]])
    np.testing.assert_allclose(
        logits_process.repetition_penalty(scores, said, jnp.float32(2)), [[1, -4, 1, -1]]
    )


def test_samples_follow_the_probabilities():
    unused: dict[str, Any] = dict.fromkeys(
        field.name for field in dataclasses.fields(logits_process.SamplingMetadata)
    )
    metadata = logits_process.SamplingMetadata(
        **unused
        | {
            "temperature": jnp.float32(0.5),
            "top_k": jnp.int32(3),
            "top_p": jnp.float32(1),
            "min_p": jnp.float32(0),
        }
    )
    draws = logits_process.sample(
        jnp.tile(SCORES, (4000, 1)), metadata, jax.random.split(jax.random.key(0), 4000)
    )
    # A temperature of 1/2 squares the probabilities.
    weights = np.array([0, 0.4, 0, 0.25, 0.2]) ** 2
    np.testing.assert_allclose(
        np.bincount(draws, minlength=5) / 4000, weights / weights.sum(), atol=0.03
    )


def test_a_trie_allows_its_answers_and_nothing_else():
    answers = [[5, 7], [5], [6, 7, 8]]
    made = trie.build(answers, 2)
    found = []

    def walk(node, so_far):
        for token in np.flatnonzero(made.allowed(jnp.array([node]), 10)[0]).tolist():
            if token == 2:
                found.append(so_far)
            else:
                walk(int(made.follow(jnp.array([node]), jnp.array([token]))[0]), [*so_far, token])

    walk(0, [])
    assert sorted(found) == sorted(answers)
    with pytest.raises(UserError, match="at least one answer"):
        trie.build([], 2)


@pytest.mark.parametrize(
    "wrong, told",
    [
        (dict(max_new_tokens=0), "max_new_tokens=0 must be at least 1"),
        (dict(min_new_tokens=9, max_new_tokens=8), "at most 8"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(temperature=1.0, top_p=1.5), "top_p=1.5"),
        (dict(beams=0), "beams=0"),
        (dict(beams=3, temperature=1.0), "exclude each other"),
        (dict(top_k=5), "need a temperature"),
        (dict(stop=("",)), "must not be empty"),
    ],
)
def test_invalid_configs(wrong, told):
    with pytest.raises(UserError, match=told):
        GenerationConfig(**wrong)
