"""What the released chat model is asked in each benchmark, and what is kept of what it says (the
release's own evaluation).

`{image}` stands for the picture's tokens, or for those of a video's frames.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

IMAGE = "{image}"
QUESTION = "{question}"
IMAGE_SYSTEM = (
    "You will be presented with an image: [IMG]ImageContent[/IMG]. You will be able to see the image after I provide it to you. "
    "Please answer my questions based on the given image."
)
VIDEO_SYSTEM = (
    "You are a helpful assistant and you will be presented with a video consisting of multiple chronological images: "
    "[IMG]ImageContent[/IMG]. You will be able to see the video after I provide it to you. "
    "Please answer my questions based on the given video."
)
CAPTION_ASK = "please provide an accurate and concise description of the given image. [ASSISTANT]: the image depicts a photo of"
ANSWER_ASK = "based on the content of the image and common sense, please provide an accurate answer consisting of only one word or phrase."
# what may follow "known"; after "no." the answer is "unanswerable"
KNOWN = ("yes.", "no.")


# A turn up to where the answer begins, for the chat model as the release asks it, and for one that
# knows no turns (unpublished: as usual).
CHAT = {
    "caption": f" [USER]: {IMAGE}{CAPTION_ASK}",
    "answer": f" [USER]: {IMAGE} {ANSWER_ASK} {QUESTION} [ASSISTANT]: the answer is:",
    # VizWiz asks this first
    "known": f" [USER]: {IMAGE} {ANSWER_ASK} {QUESTION}, is the answer known? [ASSISTANT]:",
    # MM-Vet: answered at length
    "free": f" [USER]: {IMAGE}{QUESTION} [ASSISTANT]:",
}
PLAIN = {
    "caption": f"{IMAGE}a picture of",
    "answer": f"{IMAGE}Question: {QUESTION} Short answer:",
    "known": f"{IMAGE}Question: {QUESTION}, is the answer known? Short answer:",
    "free": f"{IMAGE}Question: {QUESTION} Answer:",
}


class Shot(NamedTuple):
    """An example before the question."""

    question: str
    answer: str
    # is it shown, or told without?
    picture: bool


def ask(
    kind: str,
    question: str = "",
    shots: Sequence[Shot] = (),
    *,
    chat: bool = True,
    video: bool = False,
) -> str:
    """The prompt of a `kind` of turn. Of a video its frames stand at {image}; so do the shown
    pictures of `shots`, in their order.
    """
    turn = (CHAT if chat else PLAIN)[kind]

    def filled(asked):
        return turn.replace(QUESTION, _quoted(asked))

    end = ".</s>" if chat else ".\n"

    def seen(shot):
        return filled(shot.question) if shot.picture else filled(shot.question).replace(IMAGE, "")

    told = "".join(f"{seen(shot)} {_quoted(shot.answer)}{end}" for shot in shots)
    return f"{_system(chat, video)}{told}{filled(question)}"


def dialog(history: Sequence[tuple[str, str]], question: str, *, chat: bool = True) -> str:
    """VisDial: after this, each candidate is scored."""
    history = [(_quoted(asked), _quoted(answered)) for asked, answered in history]
    question = _quoted(question)
    if not chat:
        return (
            IMAGE
            + "".join(f"Question: {asked}? Answer: {answered}.\n" for asked, answered in history)
            + f"Question: {question}? Answer:"
        )
    turns = "".join(
        f" [USER]: {asked}? [ASSISTANT]: {answered}.</s>" for asked, answered in history
    )
    return f"{IMAGE_SYSTEM} [USER]: {IMAGE}</s>{turns} [USER]: {question}? [ASSISTANT]:"


def clean_caption(text: str) -> str:
    """Lower case, up to the first newline or end of sentence."""
    return _until(text, ("\n", ". ")).lower()


def clean_answer(text: str) -> str:
    """Lower case, up to the first newline, end of sentence, quote or comma, without a leading "it
    is" or article.
    """
    text = _until(text, ("\n", ". ", '"', ", ")).lower().removesuffix(".")
    for start in ("it is ", "it's ", "a ", "an ", "the "):
        text = text.removeprefix(start)
    return text


def _until(text: str, ends: Sequence[str]) -> str:
    for end in ends:
        text = text.split(end)[0]
    return text.strip()


def _system(chat: bool, video: bool) -> str:
    return "" if not chat else VIDEO_SYSTEM if video else IMAGE_SYSTEM


def _quoted(text: str) -> str:
    """What others wrote, without what would be read as tokens or pictures."""
    return re.sub(
        r"\[(/?IMG|USER|ASSISTANT)\]|\{(image|question)\}|<(/s)>",
        lambda match: next(filter(None, match.groups())),
        text,
    )
