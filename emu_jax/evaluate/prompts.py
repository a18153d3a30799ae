"""Prompts of the benchmarks, as in the release's own evaluation, and cleaning of answers.

In a prompt, `{image}` stands for the visual tokens of an image or of a video's frames. Read next:
tasks.py.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from emu_jax.data.chat_format import SYSTEM_MESSAGES

IMAGE = "{image}"
QUESTION = "{question}"
IMAGE_SYSTEM = "".join(SYSTEM_MESSAGES["image"])
VIDEO_SYSTEM = "".join(SYSTEM_MESSAGES["video"])
CAPTION_INSTRUCTION = (
    "please provide an accurate and concise description of the given image. "
    "[ASSISTANT]: the image depicts a photo of"
)
ANSWER_INSTRUCTION = (
    "based on the content of the image and common sense, please provide an accurate answer "
    "consisting of only one word or phrase."
)
# The choices after a prompt of kind "known"; after the second, the answer is "unanswerable".
KNOWN_CHOICES = ("yes.", "no.")

# The turn up to where the answer begins, in the release's words for the chat model. VizWiz asks
# "known" first; "free" is for MM-Vet, whose answers may have any length.
CHAT = {
    "caption": f" [USER]: {IMAGE}{CAPTION_INSTRUCTION}",
    "answer": f" [USER]: {IMAGE} {ANSWER_INSTRUCTION} {QUESTION} [ASSISTANT]: the answer is:",
    "known": (
        f" [USER]: {IMAGE} {ANSWER_INSTRUCTION} {QUESTION}, is the answer known? [ASSISTANT]:"
    ),
    "free": f" [USER]: {IMAGE}{QUESTION} [ASSISTANT]:",
}
# The same for a model without chat tokens. Its prompts are unpublished; these are common ones.
PLAIN = {
    "caption": f"{IMAGE}a picture of",
    "answer": f"{IMAGE}Question: {QUESTION} Short answer:",
    "known": f"{IMAGE}Question: {QUESTION}, is the answer known? Short answer:",
    "free": f"{IMAGE}Question: {QUESTION} Answer:",
}


class Shot(NamedTuple):
    """A few-shot example: a question with its answer, with or without its image."""

    question: str
    answer: str
    has_image: bool


def question_prompt(
    kind: str,
    question: str = "",
    shots: Sequence[Shot] = (),
    *,
    chat: bool = True,
    video: bool = False,
) -> str:
    """The prompt of one question.

    It contains {image} once for each shot with an image, and once for the question.

    Args:
        kind: A key of CHAT.
        shots: Examples before the question.
        chat: Whether the model has chat tokens.
        video: Whether the question is about a video.
    """
    turn = (CHAT if chat else PLAIN)[kind]
    end = ".</s>" if chat else ".\n"
    system = ""
    if chat:
        system = VIDEO_SYSTEM if video else IMAGE_SYSTEM
    turns = []
    for shot in shots:
        shot_turn = turn if shot.has_image else turn.replace(IMAGE, "")
        asked = shot_turn.replace(QUESTION, _escape(shot.question))
        turns.append(f"{asked} {_escape(shot.answer)}{end}")
    turns.append(turn.replace(QUESTION, _escape(question)))
    return system + "".join(turns)


def dialog_prompt(history: Sequence[tuple[str, str]], question: str, *, chat: bool = True) -> str:
    """VisDial's prompt; each candidate is scored as its continuation.

    history: earlier questions with their answers.
    """
    if chat:
        prompt = f"{IMAGE_SYSTEM} [USER]: {IMAGE}</s>"
        turn = " [USER]: {}? [ASSISTANT]: {}.</s>"
        last = " [USER]: {}? [ASSISTANT]:"
    else:
        prompt = IMAGE
        turn = "Question: {}? Answer: {}.\n"
        last = "Question: {}? Answer:"
    for earlier, answer in history:
        prompt += turn.format(_escape(earlier), _escape(answer))
    return prompt + last.format(_escape(question))


def clean_caption(text: str) -> str:
    """Lower-case `text` and cut it at the first newline or end of sentence."""
    return _cut(text, ("\n", ". ")).lower()


def clean_answer(text: str) -> str:
    """Lower-case `text` and cut it at the first newline, end of sentence, quote or comma.

    Also removes a leading "it is" and a leading article.
    """
    text = _cut(text, ("\n", ". ", '"', ", ")).lower().removesuffix(".")
    for start in ("it is ", "it's ", "a ", "an ", "the "):
        text = text.removeprefix(start)
    return text


def _cut(text: str, ends: Sequence[str]) -> str:
    for end in ends:
        text = text.split(end)[0]
    return text.strip()


def _escape(text: str) -> str:
    """Remove the brackets of marks that would be read as special tokens, like [IMG]."""
    marks = re.compile(r"\[(/?IMG|USER|ASSISTANT)\]|\{(image|question)\}|<(/s)>")
    return marks.sub(lambda match: next(filter(None, match.groups())), text)
