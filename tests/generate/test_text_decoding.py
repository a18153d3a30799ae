"""Text decoding against the model without a cache, and beams against a plain search."""

import numpy as np
import pytest

from emu_jax.generate.generation_config import GenerationConfig
from emu_jax.generate.session import Session
from tests.support.small import VOCAB, Uncached, make_session


def log_softmax(x):
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def greedy(uncached, prompt, most, allowed):
    x = uncached.x(prompt)
    ids = []
    while len(ids) < most:
        scores = np.where(np.arange(VOCAB + 6) < allowed, uncached.logits(x)[-1], -np.inf)
        ids.append(int(scores.argmax()))
        if ids[-1] == 2:
            return ids[:-1]
        x = np.concatenate([x, uncached.embedding(ids[-1])])
    return ids


def plain_beams(uncached, prompt, most, beams, penalty, least=0):
    """The beam search of transformers 4.44.2 with early_stopping=False, for one prompt.

    Hypotheses are (score, ids without </s>).
    """
    start = uncached.x(prompt)
    running = [(0.0, [])]
    kept = []

    def add(score, ids):
        kept.append((score, ids))
        kept.sort(key=lambda pair: -pair[0])
        del kept[beams:]

    for length in range(1, most + 1):
        candidates = []
        for total, ids in running:
            x = np.concatenate([start, *map(uncached.embedding, ids)])
            scores = log_softmax(uncached.logits(x)[-1].astype(np.float64))
            if length <= least:
                scores[2] = -np.inf
            candidates += [(total + score, [*ids, token]) for token, score in enumerate(scores)]
        candidates = sorted(candidates, key=lambda pair: -pair[0])[: 2 * beams]
        running = []
        for rank, (total, ids) in enumerate(candidates):
            if ids[-1] != 2:
                running.append((total, ids))
            elif rank < beams:
                add(total / length**penalty, ids[:-1])
            if len(running) == beams:
                break
        if len(kept) == beams and kept[-1][0] >= candidates[0][0] / length**penalty:
            return kept[0][1]
    for total, ids in running:
        add(total / most**penalty, ids)
    return kept[0][1]


@pytest.fixture(scope="module")
def ending():
    """A model whose answers sometimes end: its output row for </s> is scaled up."""
    session = make_session(scale=3)
    head = session.params["llama"]["lm_head"]
    head["base"] = head["base"].at[2].mul(3)
    return session


def test_greedy_is_the_uncached_argmax(session, uncached, images):
    prompts = [
        session.prompt(parts)
        for parts in (["a dog", images[0]], ["x"], [images[1], "this is a longer one"])
    ]
    found = session.generate_ids(prompts, GenerationConfig(max_new_tokens=12))
    assert found == [greedy(uncached, prompt, 12, VOCAB) for prompt in prompts]
    assert len({tuple(ids) for ids in found}) == 3


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("beams", [2, 5])
def test_beams_are_a_plain_search(ending, images, beams, penalty):
    uncached = Uncached(ending)
    prompts = [
        ending.prompt(parts) for parts in (["dog"], [images[0], "!"], ["a cat", images[1], "and?"])
    ]
    found = ending.generate_ids(
        prompts, GenerationConfig(max_new_tokens=8, beams=beams, length_penalty=penalty), added=True
    )
    assert found == [plain_beams(uncached, prompt, 8, beams, penalty) for prompt in prompts]
    assert any(len(ids) < 8 for ids in found) or penalty > 0


def test_beams_that_must_not_end_yet(ending):
    prompt = ending.prompt(["dog"])
    options = GenerationConfig(max_new_tokens=8, min_new_tokens=5, beams=3, length_penalty=-1.0)
    (found,) = ending.generate_ids([prompt], options, added=True)
    assert found == plain_beams(Uncached(ending), prompt, 8, 3, -1.0, least=5) and len(found) >= 5


def test_min_new_tokens(ending):
    short, long = (
        ending.generate_ids([["dog"]], GenerationConfig(max_new_tokens=16, min_new_tokens=least))[0]
        for least in (0, 12)
    )
    assert len(short) < 12 <= len(long) and long[: len(short)] == short


def test_an_answer_ends_with_the_context(session):
    tight = Session(session.model_config, session.params, session.tokenizer, context=14)
    lengths = [
        len(ids)
        for ids in tight.generate_ids(
            [["x" * 5], ["x" * 11]], GenerationConfig(max_new_tokens=16, min_new_tokens=16)
        )
    ]
    assert lengths == [8, 2]
    assert [
        len(ids)
        for ids in tight.generate_ids(
            [["x" * 5], ["x" * 11]],
            GenerationConfig(max_new_tokens=16, min_new_tokens=16, beams=2),
        )
    ] == lengths


def test_sampling_follows_the_seed_and_the_row(session):
    options = GenerationConfig(max_new_tokens=12, temperature=1.0, top_k=50)
    first, again = (session.generate_ids([["dog"], ["dog"]], options) for _ in range(2))
    assert first == again and first[0] != first[1]
    assert (
        session.generate_ids(
            [["dog"]], GenerationConfig(max_new_tokens=12, temperature=1.0, top_k=50, seed=1)
        )[0]
        != first[0]
    )
    assert session.generate_ids(
        [["dog"]], GenerationConfig(max_new_tokens=12, temperature=1.0, top_k=1)
    ) == session.generate_ids([["dog"]], GenerationConfig(max_new_tokens=12))


def test_a_penalty_against_repetition(session):
    said = session.generate_ids(
        [["dog"]], GenerationConfig(max_new_tokens=16, repetition_penalty=1e6, min_new_tokens=16)
    )[0]
    assert len(set(said)) == 16 and not set(said) & set(session.tokenizer.encode("dog"))


def test_losses_are_the_uncached_models(session, uncached, images):
    prompt = session.prompt(["is it", images[0]])
    answers = ["a cat", "no", "a very large dog"]
    found = session.losses(prompt, answers)
    for answer, loss in zip(answers, found, strict=True):
        ids = [*session.tokenizer.encode(answer), 2]
        x = np.concatenate([uncached.x(prompt), *map(uncached.embedding, ids)])
        logits = uncached.logits(x)[len(prompt) - 1 : -1]
        assert loss == pytest.approx(
            -np.mean([log_softmax(row)[token] for row, token in zip(logits, ids)]), abs=2e-4
        )
    alone = session.losses(prompt, answers[:1])
    assert alone[0] == pytest.approx(found[0], abs=1e-5) and session.losses(
        session.prefill(prompt), answers
    ) == pytest.approx(found)
    assert abs(session.losses(prompt, answers, end=False) - found).min() > 1e-3
