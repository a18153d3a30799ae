"""Conversations in the release's chat format.

The format is `<s>`, a system message, and turns `[USER]: question [ASSISTANT]: answer</s>`.

Training sequences and chat prompts (../generate/processor.py) use the same functions, so they
cannot drift apart. Read next: sequence.py.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Ordered
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from emu_jax.data.documents import Document, Image, Picture, Text
from emu_jax.data.sources import CorruptRecord
from emu_jax.data.tokenizer import Tokenizer

# An element of a sequence before it is encoded: a text, the id of a special token, or an image.
Piece = str | int | np.ndarray
# A part of a document, other than a pair.
Part = str | Text | Image | Picture
# Choices of data.system.
SYSTEM_CHOICES = ("release", "none")

# The release's system messages, by what the first question shows. "[IMG]" and "[/IMG]" in them
# become the added tokens, since the release's tokenizer encodes them so.
_PLACEHOLDER = ("[IMG]", "ImageContent", "[/IMG]")
SYSTEM_MESSAGES: dict[str, tuple[str, ...]] = {
    "image": (
        "You will be presented with an image: ",
        *_PLACEHOLDER,
        ". You will be able to see the image after I provide it "
        "to you. Please answer my questions based on the given image.",
    ),
    "video": (
        "You are a helpful assistant and you will be presented with a video consisting of multiple "
        "chronological images: ",
        *_PLACEHOLDER,
        ". You will be able to see the video after I provide it to you. Please answer my questions "
        "based on the given video.",
    ),
    "": (),
}


class Turn(NamedTuple):
    """A question and its answer, each a list of parts."""

    question: list[Text | Picture]
    answer: list[Text | Picture]


def opening_pieces(tokenizer: Tokenizer, system: Ordered[str]) -> list[Piece]:
    """The start of a conversation: `<s>` and the pieces of its system message, if it has one."""
    special = {"[IMG]": tokenizer.img, "[/IMG]": tokenizer.end_img}
    pieces: list[Piece] = [tokenizer.bos]
    pieces += [special.get(piece, piece) for piece in system]
    if system:
        pieces.append(" ")
    return pieces


def question_pieces(tokenizer: Tokenizer, question: Ordered[str | Image]) -> list[Piece]:
    """A question with its role tokens, up to the point where the answer starts."""
    return [tokenizer.user, ": ", *question, " ", tokenizer.assistant, ":"]


def join_texts(pieces: Iterable[Piece]) -> list[Piece]:
    """Join neighbouring texts, because they are tokenized together."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if isinstance(piece, str) and isinstance(last, str):
            joined[-1] = last + piece
        else:
            joined.append(piece)
    return joined


def is_conversation(document: Document) -> bool:
    return any(isinstance(part, (Text, Picture)) and part.role for part in document.parts)


def split_turns(document: Document) -> tuple[list[str], list[Turn]]:
    """Split a conversation into its own system messages and its turns.

    Consecutive parts of the same role form one question or answer; a final question without an
    answer is dropped. Raises CorruptRecord if roles are out of order or no question is answered.
    """
    system: list[str] = []
    turns: list[Turn] = []
    before = "system"
    for part in document.parts:
        if not isinstance(part, (Text, Picture)):
            raise _out_of_order(document.id, "", before, turns)
        if part.role == "system" and before == "system" and isinstance(part, Text):
            system.append(part.text)
        elif part.role == "user":
            if before != "user":
                turns.append(Turn([], []))
            turns[-1].question.append(part)
        elif part.role == "assistant" and turns:
            turns[-1].answer.append(part)
        else:
            raise _out_of_order(document.id, part.role, before, turns)
        before = part.role
    if turns and not turns[-1].answer:
        turns.pop()
    if not turns:
        raise CorruptRecord(document.id, "a conversation without an answer")
    return system, turns


def _out_of_order(id: str, role: str, before: str, turns: list[Turn]) -> CorruptRecord:
    position = "first" if before == "system" and not turns else f"after {before}"
    return CorruptRecord(id, f"roles out of order: {role or 'a part without a role'} {position}")


def question_kind(images: Ordered[Picture]) -> str:
    """The key in SYSTEM_MESSAGES for a question that shows `images`.

    It is "image" for one image, "video" for several frames in time order, and otherwise "".
    """
    times = [image.time for image in images if image.time is not None]
    if len(times) == len(images) > 1 and all(a < b for a, b in pairwise(times)):
        return "video"
    return "image" if len(images) == 1 else ""
