"""A session: batching, streaming, sharding, images, answers that contain them, and chats."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emu_jax import sharding, tree
from emu_jax.config import UserError
from emu_jax.generate.conversation import Conversation
from emu_jax.generate.generation_config import GenerationConfig
from emu_jax.generate.image_decoding import GeneratedImage
from emu_jax.generate.placement import abstract_params
from emu_jax.generate.processor import Prompt
from emu_jax.generate.session import Session
from emu_jax.models import module
from emu_jax.models.emu import Emu
from tests.support.small import VOCAB, make_session

EIGHT = GenerationConfig(max_new_tokens=8)
BEAMS = GenerationConfig(max_new_tokens=8, beams=3)


def like(session, **options):
    """A session of the same model with other options."""
    settings: dict[str, Any] = {"context": session.context} | options
    return Session(session.model_config, session.params, session.tokenizer, **settings)


def text_of(pieces):
    """The text of an answer without images."""
    return "".join(pieces)


@pytest.fixture(scope="module")
def prompts(images):
    return [["a dog", images[0]], ["x"], [images[1], "a longer one", images[0]]]


def uncached_image(session, uncached, prompt):
    x = uncached.x(Prompt([*prompt.tokens, session.tokenizer.img], prompt.images, prompt.slots))
    zs = []
    for _ in range(session.processor.n_visual):
        zs.append(uncached.regressed(x))
        x = np.concatenate([x, zs[-1][None]])
    return np.stack(zs), x


def test_images_are_the_uncached_loops(session, uncached, prompts):
    found = session.generate_images(prompts)
    for parts, drawn in zip(prompts, found, strict=True):
        np.testing.assert_allclose(
            drawn, uncached_image(session, uncached, session.prompt(parts))[0], atol=2e-4
        )
        np.testing.assert_allclose(session.generate_images([parts])[0], drawn, atol=2e-5)
    assert np.abs(found[0] - found[1]).max() > 0.1


@pytest.mark.parametrize("options", [EIGHT, BEAMS], ids=["greedy", "beams"])
def test_a_batch_equals_its_prompts_one_by_one(session, prompts, options):
    together = session.generate_texts(prompts, options)
    assert together == [session.generate_texts([parts], options)[0] for parts in prompts]
    assert like(session, batch=2).generate_texts(prompts, options) == together


def test_a_prefix_equals_repeating_it(session, images):
    examples = [images[3], "first", images[4], "second"]
    prefix = session.prefill(examples)
    asked = [[images[0]], ["x", images[1]], ["y"]]
    whole = [[*examples, *parts] for parts in asked]
    assert session.generate_texts(asked, EIGHT, prefix=prefix) == session.generate_texts(
        whole, EIGHT
    )
    assert session.generate_texts(asked, BEAMS, prefix=prefix) == session.generate_texts(
        whole, BEAMS
    )
    # Even without a prefix, a batch and single prompts differ by rounding: 3.5e-5 on one machine.
    drawn = session.generate_images(whole)
    np.testing.assert_allclose(session.generate_images(asked, prefix=prefix), drawn, atol=1e-4)
    assert np.abs(session.generate_images(asked[:1]) - drawn[:1]).max() > 0.05


def test_visual_tokens_are_an_image_too(session, images):
    drawn = np.asarray(session.visual_tokens([images[0]]))[0]
    assert session.generate_texts([["a", drawn, "b"]], EIGHT) == session.generate_texts(
        [["a", images[0], "b"]], EIGHT
    )


def test_a_stream_equals_the_answer_at_once(session, prompts):
    for options in (EIGHT, GenerationConfig(max_new_tokens=8, temperature=1.0, top_p=0.9)):
        for parts in prompts[:2]:
            pieces = list(session.stream(parts, options))
            assert (
                text_of(pieces) == session.generate_texts([parts], options)[0] and len(pieces) > 4
            )


def test_choices(session, prompts):
    answers = ["yes.", "no.", "yes"]
    for options in (GenerationConfig(), GenerationConfig(beams=3)):
        found = session.generate_texts(prompts, options, choices=answers)
        assert set(found) <= set(answers)
    # Without a length penalty, beams rank by the sum of log-probabilities: mean loss times length.
    best = [
        answers[int(np.argmin(session.losses(parts, answers) * [5, 4, 4]))] for parts in prompts
    ]
    assert (
        session.generate_texts(
            prompts, GenerationConfig(beams=3, length_penalty=0.0), choices=answers
        )
        == best
    )


def test_stop_texts(session):
    long: dict[str, Any] = dict(min_new_tokens=16, max_new_tokens=16)
    whole = session.generate_texts([["dog"], ["a cat"]], GenerationConfig(**long))
    stop = whole[0][5:7]
    options = GenerationConfig(**long, stop=(stop, "not there"))
    cut = [text[: text.find(stop)] if stop in text else text for text in whole]
    assert session.generate_texts([["dog"], ["a cat"]], options) == cut and len(cut[0]) <= 5
    assert text_of(session.stream(["dog"], options)) == cut[0]


@pytest.fixture(scope="module")
def drawing():
    """A model that often chooses [IMG], after about three letters each time."""
    session = make_session(scale=3, max_images=2)
    head = session.params["llama"]["lm_head"]
    head["added"] = head["added"].at[1].mul(6)
    return session


def test_an_answer_may_hold_images(drawing):
    # Try seeds until an answer contains two images.
    for seed in range(20):
        options = GenerationConfig(max_new_tokens=16, temperature=1.0, seed=seed)
        pieces = list(drawing.stream(["dog"], options))
        drawn = [number for number, piece in enumerate(pieces) if not isinstance(piece, str)]
        # max_images=2 limits the images of an answer.
        assert len(drawn) <= 2
        if len(drawn) == 2 and 0 < drawn[0] and drawn[1] < len(pieces) - 1:
            break
    # Text follows the last image.
    assert len(drawn) == 2 and drawn[1] < len(pieces) - 1
    # The answer equals what separate prompts, one after another, would give.
    said = drawing.prompt(["dog"])
    parts = pieces[: drawn[0]]
    first = Prompt(said.tokens + drawing.tokenizer.encode(text_of(parts)))
    np.testing.assert_allclose(
        pieces[drawn[0]].visual, drawing.generate_images([first])[0], atol=2e-5
    )
    assert pieces[drawn[0]].pixels is None
    assert all(isinstance(piece, str) for piece in drawing.stream(["dog"], options, images=0))


def test_text_after_an_image_depends_on_it(drawing, monkeypatch):
    greedy = GenerationConfig(max_new_tokens=12)
    head = drawing.params["llama"]["lm_head"]
    loud = drawing.params | {
        "llama": drawing.params["llama"]
        | {"lm_head": head | {"added": head["added"].at[1].mul(20)}}
    }
    eager = Session(drawing.model_config, loud, drawing.tokenizer, context=128, max_images=1)
    prompt = next(
        word
        for word in ("dog", "cat", "a", "xyz", "no", "what")
        if not isinstance(next(iter(eager.stream([word], greedy))), str)
    )
    pieces = list(eager.stream([prompt], greedy))
    assert isinstance(pieces[0], GeneratedImage)
    text = text_of(pieces[1:])
    # [IMG] was the first of twelve new tokens, so eleven are left.
    assert (
        text
        == eager.generate_texts([[prompt, pieces[0].visual]], GenerationConfig(max_new_tokens=11))[
            0
        ]
    )


def test_pixels_come_from_decode(session):
    other = like(session, image_decoder=lambda z: np.full((len(z), 8, 8, 3), 7, np.uint8))
    drawn = Conversation(other, chat=False).generate_image(["dog"])
    np.testing.assert_allclose(drawn.visual, session.generate_images([["dog"]])[0], atol=1e-5)
    assert drawn.pixels is not None and drawn.pixels.shape == (8, 8, 3)
    assert (drawn.pixels == 7).all()


def test_turns_of_a_chat_build_on_one_another(session, images):
    talk = Conversation(session, chat=True, system="be kind")
    t = session.tokenizer
    first = list(talk.reply([images[0], "what is it?"], EIGHT))
    second = list(talk.reply(["and now?"], EIGHT))
    prompt = session.chat_prompt([images[0], "what is it?"], system="be kind")
    ids = session.generate_ids([prompt], EIGHT)[0]
    assert text_of(first) == t.decode(ids)
    again = session.processor.chat_turn(["and now?"], system=None, first=False)
    # A turn ends with </s>.
    whole = Prompt([*prompt.tokens, *ids, t.eos, *again.tokens], prompt.images, prompt.slots)
    assert text_of(second) == session.generate_texts([whole], EIGHT)[0]


def test_a_chat_survives_an_abandoned_answer(session):
    talk = Conversation(session, chat=True, system="be kind")
    for number, _ in enumerate(talk.reply(["tell me a story"], EIGHT)):
        if number == 2:
            break
    assert text_of(talk.reply(["continue"], EIGHT))


def test_sharded_equals_a_single_device(session, prompts):
    mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
    shapes = module.abstract(Emu, session.model_config)
    places = dict(tree.leaves(abstract_params(shapes, mesh, session.model_config.compute)))
    params = tree.unflatten(
        {
            path: jax.device_put(leaf, places[path].sharding)
            for path, leaf in tree.leaves(session.params)
        }
    )
    sharded = Session(session.model_config, params, session.tokenizer, context=128, mesh=mesh)
    np.testing.assert_allclose(
        sharded.generate_images(prompts), session.generate_images(prompts), atol=2e-4
    )
    assert sharded.generate_texts(prompts, EIGHT) == session.generate_texts(prompts, EIGHT)
    with sharded.mesh_context():
        cache = sharded.prefill_batch(list(map(sharded.prompt, prompts)), room=16).cache
    # Each device has half of the four heads.
    assert cache.k.sharding.shard_shape(cache.k.shape)[3] == 2


# Errors


def test_a_prompt_longer_than_the_context(session):
    tight = like(session, context=20)
    with pytest.raises(
        UserError,
        match="prompt has 31 elements and its answer at least 1, but .* holds 20.*truncate=left",
    ):
        tight.generate_texts([["x" * 30]])
    with pytest.raises(UserError, match="prompt has 18 elements and its answer at least 5"):
        tight.generate_images([["x" * 16]])
    with pytest.raises(UserError, match="prompt has 33 elements"):
        Conversation(tight, chat=False).reply(["x" * 32])
    cut = like(session, context=20, truncate="left")
    assert cut.generate_ids(
        [["y" * 30 + "x" * 17]], GenerationConfig(max_new_tokens=1)
    ) == cut.generate_ids([["y" + "x" * 17]], GenerationConfig(max_new_tokens=1))


def test_no_room_is_left_for_a_turn(session):
    talk = Conversation(like(session, context=40), chat=True, system="")
    list(talk.reply(["x" * 20], GenerationConfig(max_new_tokens=2)))
    with pytest.raises(UserError, match="the context holds 40"):
        talk.reply(["x" * 20])
    # A shorter turn fits.
    assert text_of(talk.reply(["x"], GenerationConfig(max_new_tokens=2)))


def test_beams_are_not_streamed(session):
    with pytest.raises(UserError, match="cannot be streamed"):
        session.stream(["dog"], GenerationConfig(beams=2))


def test_a_model_without_roles_does_not_chat():
    plain = make_session("model.llama.added=4")
    with pytest.raises(UserError, match=r"no \[USER\] and \[ASSISTANT\]"):
        plain.chat_prompt(["dog"])


def test_losses_need_candidates(session):
    with pytest.raises(UserError, match="at least one candidate"):
        session.losses(["dog"], [])
    assert (
        VOCAB == session.model_config.llama.vocab
        and jnp.isfinite(session.losses(["dog"], ["cat"]))[0]
    )


@pytest.mark.parametrize(
    ("prompts", "told"),
    [
        ("hello", "a prompt was given as str 'h'"),
        (["hello"], "a prompt was given as str 'hello'"),
        ([Path("a.png")], "a prompt was given as PosixPath 'a.png'"),
        ([np.zeros((2, 2, 3), np.uint8)], "a prompt was given as ndarray$"),
        ([[None]], r"visual tokens \[4, 32\], not NoneType 'None'"),
        ([["a", ["b"]]], "not list"),
    ],
)
def test_what_is_no_prompt_is_refused(session, prompts, told):
    with pytest.raises(UserError, match=told):
        session.generate_texts(prompts)


def test_no_prompts_have_no_answers(session):
    assert session.generate_texts([]) == [] and session.generate_images([]).shape == (0, 4, 32)
