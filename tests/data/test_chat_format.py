"""Conversations: grammar, labels, cutting by turns, and prompts as in training."""

import logging

import numpy as np
import pytest

from emu_jax.config import UserError
from emu_jax.data import chat_format
from emu_jax.data.documents import Document, Picture, Text
from emu_jax.data.mixture import MAX_BAD_STREAK, Mixture, Stream
from emu_jax.data.sequence import NO_RULE, SequenceBuilder, SourceRule
from emu_jax.data.sources import CorruptRecord
from emu_jax.generate.processor import Processor, concatenate

# Special ids of the tokenizer of letters.
S = 1
E = 2
IMG = 257
END = 258
SLOT = 259
USER = 260
ASSISTANT = 261


def said(*parts):
    """Texts and pictures from "u:text", "a:text", "s:text" or ("u", image[, time])."""
    roles = {"u": "user", "a": "assistant", "s": "system", " ": ""}
    return tuple(
        Text(part[2:], role=roles[part[0]])
        if isinstance(part, str)
        else Picture(part[1], roles[part[0]], *part[2:])
        for part in parts
    )


@pytest.fixture
def make(letters):
    def call(*parts, **settings):
        settings = (
            dict(
                n_visual=2,
                max_tokens=1000,
                max_images=10,
                image_first=0.5,
                labels=("text", "</s>"),
                system="none",
            )
            | settings
        )
        rule = settings.pop("rule", NO_RULE)
        build = SequenceBuilder(letters, **settings)
        return build(Document("d", said(*parts)), rng=np.random.default_rng(0), rule=rule)

    return call


def letters_of(text):
    return [ord(letter) for letter in text]


def test_grammar_by_hand(make, picture):
    sequence = make(
        "s:be", ("u", picture(3)), "u:hm", "a:ok", "u:q", "a:so", ("a", picture(4)), "a:!"
    )
    first = [
        S,
        *letters_of("be "),
        USER,
        *letters_of(": "),
        IMG,
        SLOT,
        SLOT,
        END,
        *letters_of("hm "),
        ASSISTANT,
        ord(":"),
        *letters_of("ok"),
        E,
    ]
    second = [
        USER,
        *letters_of(": q "),
        ASSISTANT,
        ord(":"),
        *letters_of("so"),
        IMG,
        SLOT,
        SLOT,
        END,
        ord("!"),
        E,
    ]
    assert sequence.tokens.tolist() == first + second
    counts = np.flatnonzero(sequence.text_weights)
    assert [chr(i) if i > 2 else i for i in sequence.tokens[counts]] == [
        "o",
        "k",
        E,
        "s",
        "o",
        "!",
        E,
    ]
    # Only images in the model's own turns count in the loss.
    assert sequence.images[:, 0, 0, 0].tolist() == [3, 4] and sequence.image_weights.tolist() == [
        0,
        1,
    ]
    assert (sequence.tokens[sequence.image_slots - 1] == IMG).all()
    assert (sequence.cut, sequence.cut_turns) == (0, 0)


def test_labels_choose_the_parts_of_an_answer_that_count(make, picture):
    parts = (("u", picture(1)), "u:a", ("a", picture(2)), "a:b")
    for labels, want in (
        (("text", "</s>", "[IMG]"), [IMG, ord("b"), E]),
        (("</s>",), [E]),
        (("text",), [ord("b")]),
    ):
        sequence = make(*parts, labels=labels)
        assert sequence.tokens[sequence.text_weights > 0].tolist() == want


@pytest.mark.parametrize(
    ("parts", "kind"),
    [
        ((("u", 1), "u:q", "a:a"), "image"),
        (("u:q", "a:a"), ""),
        ((("u", 1), ("u", 2), "u:q", "a:a"), ""),
        ((("u", 1, 0.5), ("u", 2, 1.5), "u:q", "a:a"), "video"),
        ((("u", 1, 0.5), ("u", 2, 0.5), "u:q", "a:a"), ""),
        (("u:q", "a:a", ("u", 1), "u:q", "a:a"), ""),
    ],
)
def test_system_messages_of_the_release(make, picture, letters, parts, kind):
    parts = [
        part if isinstance(part, str) else ("u", picture(part[1]), *part[2:]) for part in parts
    ]
    tokens = make(*parts, system="release").tokens.tolist()
    opening = [
        S,
        *(
            token
            for piece in chat_format.SYSTEM_MESSAGES[kind]
            for token in ({"[IMG]": [IMG], "[/IMG]": [END]}.get(piece) or letters.encode(piece))
        ),
    ]
    # A space separates a system message from the first turn.
    assert tokens[: len(opening)] == opening and tokens[len(opening) :].index(USER) == (kind != "")
    own = make("s:own", *parts, system="release").tokens.tolist()
    assert own[: own.index(USER)] == [S, *letters_of("own ")]


@pytest.mark.parametrize("system", chat_format.SYSTEM_CHOICES)
def test_chat_prompts_equal_the_training_sequence(make, picture, letters, system):
    """A session's prompts and answers, joined turn by turn, equal the training sequence."""
    sequence = make(
        ("u", picture(1)),
        "u:what?",
        "a:a cat",
        "u:sure?",
        ("u", picture(2)),
        "a:yes",
        system=system,
    )
    processor = Processor(letters, n_visual=2, image_size=4, width=8, added=6, system=system)

    def answer(text):
        return type(processor.interleave([]))([*letters.encode(text), E])

    whole = concatenate(
        processor.chat_turn([picture(1), "what?"], system=None, first=True),
        answer("a cat"),
        processor.chat_turn(["sure?", picture(2)], system=None, first=False),
        answer("yes"),
    )
    assert whole.tokens == sequence.tokens.tolist() and whole.slots == sequence.image_slots.tolist()


def test_truncation_is_by_whole_turns(make, picture):
    parts = (
        ("u", picture(1)),
        "u:one",
        "a:first",
        "u:two",
        "a:second",
        ("u", picture(2)),
        ("u", picture(3)),
        "u:three",
        "a:third",
    )
    whole = make(*parts)
    ends = [0, *(np.flatnonzero(whole.tokens == E) + 1)]
    for max_tokens in range(1, len(whole.tokens) + 2):
        for max_images in range(4):
            cut = make(*parts, max_tokens=max_tokens, max_images=max_images)
            turns = max(
                n for n in range(4) if ends[n] <= max_tokens and (0, 1, 1, 3)[n] <= max_images
            )
            assert (
                cut.tokens.tolist() == whole.tokens[: ends[turns]].tolist()
                and cut.cut_turns == 3 - turns
            )
            assert cut.cut == len(whole.tokens) - len(cut.tokens)
            assert (
                len(cut.images)
                == (cut.tokens == IMG).sum()
                == len(cut.image_slots)
                == len(cut.image_weights)
            )
    assert (
        make(*parts, rule=SourceRule(tokens=int(ends[1]))).cut_turns == 2
        and make(*parts, rule=SourceRule(images=2)).cut_turns == 1
    )


def test_a_question_that_nobody_answers_is_left_out(make):
    assert make("u:q", "a:a", "u:more").tokens.tolist() == make("u:q", "a:a").tokens.tolist()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (("u:q",), "d: a conversation without an answer"),
        (("s:be", "u:q", "u:r"), "d: a conversation without an answer"),
        (("s:be",), "d: a conversation without an answer"),
        (("a:hi", "u:q", "a:a"), "d: roles out of order: assistant first"),
        (("u:q", "s:be", "a:a"), "d: roles out of order: system after user"),
        (("u:q", "a:a", " :?"), "d: roles out of order: a part without a role after assistant"),
    ],
)
def test_bad_conversations_are_one_line(make, parts, message):
    with pytest.raises(CorruptRecord) as error:
        make(*parts)
    assert str(error.value) == message


def test_a_model_without_the_tokens_cannot_learn_one(make):
    with pytest.raises(
        UserError,
        match=r"d is a conversation, and this model has no \[USER\] and \[ASSISTANT\] tokens; set",
    ):
        make("u:q", "a:a", chats=False)


# In a stream


class Docs:
    def __init__(self, *documents):
        self.documents = [Document(str(k), said(*parts)) for k, parts in enumerate(documents)]

    def __len__(self):
        return len(self.documents)

    def __getitem__(self, index):
        return self.documents[index]


def stream(letters, docs, tokens=30):
    to_sequence = SequenceBuilder(
        tokenizer=letters,
        n_visual=2,
        max_tokens=tokens,
        max_images=4,
        image_first=0.0,
        labels=("text", "</s>"),
        system="none",
    )
    return Stream(Mixture(("talk",), (1.0,), (docs,), 1, 0), 0, to_sequence, 2, once=True)


def test_streams_skip_bad_ones_count_cut_ones_and_pack_the_rest(letters, caplog):
    docs = Docs(
        ("u:a", "a:b"),
        ("u:a",),
        ("u:" + 40 * "x", "a:b"),
        ("u:a", "a:b", "u:" + 40 * "x", "a:b"),
        ("u:c", "a:d"),
    )
    made = stream(letters, docs)
    with caplog.at_level(logging.WARNING):
        rows = [made.row(25, 4) for _ in range(3)]
    assert [packed.id for packed in rows[0]] == ["talk/0", "talk/3"]
    assert [packed.id for packed in rows[1]] == ["talk/4"]
    assert rows[2] == []
    assert (
        "source talk: skipping a corrupt record: 1: a conversation without an answer" in caplog.text
    )
    counts = made.state()["counts"]
    assert (counts["documents"], counts["cut_documents"], counts["cut_turns"], made.bad) == (
        3,
        2,
        2,
        [1],
    )


def test_a_source_with_only_too_long_first_turns_ends_the_run(letters):
    docs = Docs(*[("u:" + 40 * "x", "a:b")] * (MAX_BAD_STREAK + 1))
    with pytest.raises(
        UserError,
        match=rf"source .talk.: {MAX_BAD_STREAK} conversations in a row .* raise data\.tokens",
    ):
        stream(letters, docs).row(30, 4)


def test_a_state_without_a_count_of_cut_turns_is_restored(letters):
    made = stream(letters, Docs(("u:a", "a:b")))
    state = made.state()
    del state["counts"]["cut_turns"]
    again = Stream(made.mixture, 0, made.to_sequence, 2, state, once=True)
    assert again.row(30, 4) and again.state()["counts"]["cut_turns"] == 0
