"""Conversations as sequences, in the release's chat format: `<s>` system, then turns `[USER]:
question [ASSISTANT]: answer</s>`.

What is trained on here and what a chat reads (../generate/processor.py) is written by the same
functions, so that they cannot drift. Read next: sequence.py.
"""

from collections.abc import Sequence as Ordered
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from emu_jax.data.documents import Document, Image, Picture, Text
from emu_jax.data.sources import CorruptRecord
from emu_jax.data.tokenizer import Tokenizer

# a text, a special id, an image
Piece = str | int | np.ndarray
# data.system
SYSTEM_CHOICES = ("release", "none")

# The release's system messages by what the first question holds; "[IMG]" in them are the added
# tokens, as its tokenizer reads them.
SYSTEM_MESSAGES: dict[str, tuple[str, ...]] = {
    "image": (
        "You will be presented with an image: ",
        "[IMG]",
        "ImageContent",
        "[/IMG]",
        ". You will be able to see the image after I provide it "
        "to you. Please answer my questions based on the given image.",
    ),
    "video": (
        "You are a helpful assistant and you will be presented with a video consisting of multiple chronological images: ",
        "[IMG]",
        "ImageContent",
        "[/IMG]",
        ". You will be able to see the video after I provide it to you. Please answer my questions based on the "
        "given video.",
    ),
    "": (),
}


class Turn(NamedTuple):
    """A question and its answer, in parts."""

    question: list[Text | Picture]
    answer: list[Text | Picture]


def opening_pieces(t: Tokenizer, said: Ordered[str]) -> list[Piece]:
    """What a conversation begins with: `<s>`, and the pieces of a system message if there is
    one.
    """
    special = {"[IMG]": t.img, "[/IMG]": t.end_img}
    return [t.bos, *(special.get(piece, piece) for piece in said), *([" "] if said else [])]


def question_pieces(t: Tokenizer, question: Ordered[str | Image]) -> list[Piece]:
    """A question, up to where its answer begins."""
    return [t.user, ": ", *question, " ", t.assistant, ":"]


def join_texts(pieces: Ordered[Piece]) -> list[Piece]:
    """Texts side by side as one, for they are encoded as one."""
    found: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, str) and found and isinstance(found[-1], str):
            found[-1] += piece
        else:
            found.append(piece)
    return found


def is_conversation(document: Document) -> bool:
    return any(isinstance(part, (Text, Picture)) and part.role for part in document.parts)


def split_turns(document: Document) -> tuple[list[str], list[Turn]]:
    """(its own system messages, its turns). Neighbours of one role are one question or answer; a
    last question without an answer is left out.

    Raises CorruptRecord, in one line, for roles out of order and for a conversation without an answer.
    """
    system = []
    found = []
    before = "system"
    for part in document.parts:
        role = part.role if isinstance(part, (Text, Picture)) else ""
        if role == "system" and before == "system" and isinstance(part, Text):
            system.append(part.text)
        elif role == "user":
            if before != "user":
                found.append(Turn([], []))
            found[-1].question.append(part)
        elif role == "assistant" and found:
            found[-1].answer.append(part)
        else:
            raise CorruptRecord(
                document.id,
                f"roles out of order: {role or 'a part without a role'} "
                + ("first" if before == "system" and not found else f"after {before}"),
            )
        before = role
    if found and not found[-1].answer:
        found.pop()
    if not found:
        raise CorruptRecord(document.id, "a conversation without an answer")
    return system, found


def question_kind(pictures: Ordered[Picture]) -> str:
    """What a question holds: "image" for one, "video" for frames in the order of their times, or ""
    for all else.
    """
    times = [picture.time for picture in pictures]
    if len(times) > 1 and None not in times and all(a < b for a, b in pairwise(times)):
        return "video"
    return "image" if len(times) == 1 else ""
