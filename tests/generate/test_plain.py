"""Greedy text is the argmax of the whole forward pass, token by token; the image loop feeds its own predictions back."""
import jax
import jax.numpy as jnp
import make
import numpy as np
import pytest

from emu_jax.generate import image, text
from emu_jax.types import Batch

C = make.cfg("data.images=1")
P = make.program(C)
PARAMS = make.random_params(P)
N, V = C.model.resampler.tokens, C.model.llama.vocab
LENGTH = 12          # every row is padded to it: one shape, compiled once


@jax.jit
def forward(row, visual, slot):
    """Hidden states [T, D] of a row with an image's visual tokens [N, D] at `slot`: the training forward, without a cache."""
    model, zeros = P.module(PARAMS), jnp.zeros((1, LENGTH), jnp.int32)
    model.encode = lambda images, key: visual[None]
    batch = Batch(tokens=row[None], segments=zeros + 1, positions=jnp.arange(LENGTH)[None], text_weights=jnp.zeros((1, LENGTH)),
                  images=jnp.zeros((1, 1, 28, 28, 3), jnp.uint8), image_slots=slot[None, None], image_weights=jnp.ones((1, 1)), sources=zeros)
    return model(batch)[0][0]


def padded(ids):
    return np.array((ids + [V] * LENGTH)[:LENGTH], np.int32)


def test_greedy_captions_are_the_argmax_of_the_whole_forward_pass():
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 3), np.uint8)
    new = 5
    got = np.asarray(jax.jit(lambda images: text.caption(P.size, PARAMS, images, new_tokens=new))(images))
    head = np.asarray(PARAMS["llama"]["lm_head"]["base"], np.float64)
    prompt = [1, V + 1, *[V + 3] * N, V + 2]
    encoded = jax.jit(lambda images: P.module(PARAMS).encode(images))(images)
    for row, visual in zip(got, encoded, strict=True):
        said = []
        while len(said) < new and text.EOS not in said:
            hidden = np.asarray(forward(padded(prompt + said), visual, np.int32(2)), np.float64)
            said.append(int((head @ hidden[len(prompt) + len(said) - 1]).argmax()))
        assert row.tolist() == said + [text.EOS] * (new - len(said))
    assert len(np.unique(got)) > 3


def test_it_stops_at_the_end_of_each_row():
    """With a head that says </s> to some rows only: what follows it is </s>."""
    images = jnp.asarray(np.random.default_rng(1).integers(0, 256, (6, 28, 28, 3), np.uint8))
    head = PARAMS["llama"]["lm_head"]
    likely = PARAMS | {"llama": PARAMS["llama"] | {"lm_head": head | {"base": head["base"].at[text.EOS].multiply(3.0)}}}
    ids = np.asarray(jax.jit(lambda params: text.caption(P.size, params, images, new_tokens=8))(likely))
    ends = [len(text.until_end(row)) for row in ids]
    assert min(ends) < 8 and len(set(ends)) > 1
    for row, end in zip(ids, ends, strict=True):
        assert (row[end:] == text.EOS).all() and text.EOS not in row[:end]


@pytest.mark.parametrize(("ids", "words"), [([5, 6, 2, 7, 2], [5, 6]), ([2, 2], []), ([5, 6], [5, 6]), ([], [])])
def test_until_end(ids, words):
    assert text.until_end(np.array(ids, int)) == words


def test_the_image_loop_by_hand():
    """Prompts of different lengths; each regressed embedding is the next slot's input, and padding after a prompt is never seen."""
    prompts = [[1, 7, 8, 9], [1, 20]]
    tokens = np.full((2, 6), V, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[:len(prompt)] = prompt
    got = jax.jit(lambda tokens, lengths: image.regress(P.size, PARAMS, tokens, lengths))(tokens, np.array([4, 2], np.int32))
    project = np.asarray(PARAMS["regress_head"]["w"])
    for number, prompt in enumerate(prompts):
        visual = np.zeros((N, 32), np.float32)
        for n in range(N):
            hidden = forward(padded(prompt + [V + 1] + [V + 3] * N), visual, np.int32(len(prompt) + 1))
            visual[n] = np.asarray(hidden)[len(prompt) + n] @ project
        np.testing.assert_allclose(got[number], visual, rtol=0, atol=1e-4 * np.abs(visual).max())
