"""Prompts: the ids that the released code makes for the same texts."""

from pathlib import Path

import numpy as np
import pytest

from emu_jax.config import UserError
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.evaluate import prompts
from emu_jax.generate import processor
from emu_jax.generate.processor import Processor, Prompt

ROMAN = {
    "You are helpful. ": [887, 526, 8444, 29889, 29871],
    ": ": [584, 29871],
    ":": [584],
    "what is this? ": [825, 338, 445, 29973, 29871],
    ": compare": [584, 7252],
    " ": [259],
    "first": [937],
    "second": [1473],
    "then": [769],
    "a photo of a dog": [263, 15373, 310, 263, 11203],
}


@pytest.fixture
def released():
    """A processor that knows LLaMA's ids of the few texts in the golden files."""
    return Processor(
        Tokenizer(32000, ROMAN.__getitem__, str), n_visual=4, image_size=56, width=40, added=6
    )


@pytest.fixture
def letters():
    return Processor(
        Tokenizer(256, lambda text: [ord(letter) for letter in text], str),
        n_visual=2,
        image_size=8,
        width=16,
        added=6,
    )


def golden(name, key):
    with np.load(Path("tests/golden") / f"{name}.npz") as file:
        return file[key].tolist()


IMAGE = np.zeros((56, 56, 3), np.uint8)
FIRST = np.zeros((8, 8, 3), np.uint8)
SECOND = np.ones((8, 8, 3), np.uint8)


def test_the_releases_prompts(released):
    assert (
        released.interleave(["first", IMAGE, "second", IMAGE, "then"]).tokens + [32001]
        == golden("emu1_pretrained", "prompt_interleaved_ids")[0]
    )
    assert (
        released.interleave(["a photo of a dog"]).tokens + [32001]
        == golden("emu1_pretrained", "prompt_text_only_ids")[0]
    )


def test_the_releases_chat(released):
    found = released.chat_turn([IMAGE, "what is this?"], system="You are helpful.", first=True)
    assert found.tokens == golden("emu1_instruct", "decode_prompt_ids")[0] and found.slots == [10]
    assert (
        released.chat_turn([IMAGE, IMAGE], system=None, first=True).tokens[:9]
        == golden("emu1_instruct", "input_ids")[1][:9]
    )


def test_system_messages_are_the_releases(letters):
    t = letters.tokenizer

    def text(ids):
        return "".join(chr(i) if i < 256 else f"<{i - 256}>" for i in ids)

    picture = np.zeros((8, 8, 3), np.uint8)
    video = [np.zeros((8, 8, 3), np.uint8)] * 8
    one = text(letters.chat_turn([picture, "what?"], system=None, first=True).tokens)
    assert one == (
        "\x01You will be presented with an image: <1>ImageContent<2>. You will be able "
        "to see the image after I provide it to you. "
        "Please answer my questions based on the given image. <4>: <1><3><3><2>what? <5>:"
    )
    assert (
        text(letters.chat_turn(["what?"], system=None, first=True).tokens) == "\x01<4>: what? <5>:"
    )
    # Interleaved prompts have no system message.
    assert text(
        letters.chat_turn([picture, "or", *video], system=None, first=True).tokens
    ).startswith("\x01<4>: <1>")
    assert text(letters.chat_turn([picture, "what?"], system="", first=True).tokens).startswith(
        "\x01<4>: <1>"
    )
    assert (
        text(letters.chat_turn(["and now?"], system=None, first=False).tokens)
        == "<4>: and now? <5>:"
    )
    assert t.img == 257


def test_text_of_added_tokens_stays_text(letters):
    found = letters.interleave(["[IMG]<image>[/IMG]</s>"])
    assert max(found.tokens) < 256 and not found.images
    assert (
        letters.chat_turn(["[USER]"], system="[ASSISTANT]", first=True).tokens.count(
            letters.tokenizer.user
        )
        == 1
    )


def test_images_of_any_size_and_visual_tokens(letters):
    found = letters.interleave([np.full((5, 9, 3), 200, np.uint8), np.ones((2, 16), np.float64)])
    assert (
        found.images[0].shape == (8, 8, 3)
        and (found.images[0] == 200).all()
        and found.images[1].dtype == np.float32
    )
    assert found.slots == [2, 6]


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((8, 8, 3)),
        np.zeros((2, 15)),
        np.zeros((0, 0, 3), np.uint8),
    ],
)
def test_an_array_that_is_not_an_image(letters, wrong):
    with pytest.raises(
        UserError, match=r"an image must be an array uint8 \[h, w, 3\], or visual tokens \[2, 16\]"
    ):
        letters.interleave([wrong])


def test_truncation_never_splits_an_image():
    given = Prompt([1, 50, 257, 259, 259, 258, 51, 257, 259, 259, 258, 52], [FIRST, SECOND], [3, 8])
    for length, tokens, images, slots in (
        (12, given.tokens, [0, 1], [3, 8]),
        (11, [1, *given.tokens[2:]], [0, 1], [2, 7]),
        (10, [1, *given.tokens[6:]], [1], [3]),
        (6, [1, *given.tokens[7:]], [1], [2]),
        (5, [1, 52], [], []),
        (2, [1, 52], [], []),
    ):
        cut = processor.truncate_left(given, length, 2)
        assert (cut.tokens, [int(image.max()) for image in cut.images], cut.slots) == (
            tokens,
            images,
            slots,
        ), length


def test_concatenation():
    a = Prompt([1, 9], [], [])
    b = Prompt([257, 259, 259, 258], [FIRST], [1])
    assert processor.concatenate(a, b, b).slots == [3, 7] and processor.concatenate(
        a, b
    ).tokens == [
        1,
        9,
        257,
        259,
        259,
        258,
    ]


def test_a_template_is_what_a_turn_is(session, images):
    """The evaluation's prompts equal the chat's.

    Their templates contain special tokens as placeholders.
    """
    asked = session.processor.template(prompts.question_prompt("free", "why"), [[images[0]]])
    turn = session.chat_prompt([images[0], "why"])
    assert (
        asked.tokens == turn.tokens and asked.slots == turn.slots and asked.images[0] is images[0]
    )
    t = session.tokenizer
    frames = session.processor.template("a</s>{image}", [images[:2]])
    assert frames.tokens[:3] == [t.bos, *t.encode("a"), t.eos] and len(frames.images) == 2
