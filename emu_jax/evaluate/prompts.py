"""What the released chat model is asked in each benchmark, and what is kept of what it says (the release's own evaluation).

`{image}` stands for the picture's tokens, or for those of a video's frames.
"""
from collections.abc import Sequence

IMAGE = "{image}"
IMAGE_SYSTEM = ("You will be presented with an image: [IMG]ImageContent[/IMG]. You will be able to see the image after I provide it to you. "
                "Please answer my questions based on the given image.")
VIDEO_SYSTEM = ("You are a helpful assistant and you will be presented with a video consisting of multiple chronological images: "
                "[IMG]ImageContent[/IMG]. You will be able to see the video after I provide it to you. "
                "Please answer my questions based on the given video.")
CAPTION_ASK = "please provide an accurate and concise description of the given image. [ASSISTANT]: the image depicts a photo of"
ANSWER_ASK = "based on the content of the image and common sense, please provide an accurate answer consisting of only one word or phrase."
KNOWN = ("yes.", "no.")              # what may follow `known`; after "no." the answer is "unanswerable"


def caption() -> str:
    return f"{IMAGE_SYSTEM} [USER]: {IMAGE}{CAPTION_ASK}"


def answer(question: str, *, video: bool = False) -> str:
    """The prompt of VQA; of a video its frames stand at {image}."""
    return f"{VIDEO_SYSTEM if video else IMAGE_SYSTEM} [USER]: {IMAGE} {ANSWER_ASK} {question} [ASSISTANT]: the answer is:"


def known(question: str) -> str:
    """VizWiz asks this first: can the question be answered at all?"""
    return f"{IMAGE_SYSTEM} [USER]: {IMAGE} {ANSWER_ASK} {question}, is the answer known? [ASSISTANT]:"


def dialog(history: Sequence[tuple[str, str]], question: str) -> str:
    """VisDial: after this, each candidate is scored."""
    turns = "".join(f" [USER]: {asked}? [ASSISTANT]: {answered}.</s>" for asked, answered in history)
    return f"{IMAGE_SYSTEM} [USER]: {IMAGE}</s>{turns} [USER]: {question}? [ASSISTANT]:"


def free(question: str) -> str:
    """MM-Vet: the question alone, answered at length."""
    return f"{IMAGE_SYSTEM} [USER]: {IMAGE}{question} [ASSISTANT]:"


def clean_caption(text: str) -> str:
    """Lower case, up to the first newline or end of sentence."""
    return _until(text, ("\n", ". ")).lower()


def clean_answer(text: str) -> str:
    """Lower case, up to the first newline, end of sentence, quote or comma, without a leading "it is" or article."""
    text = _until(text, ("\n", ". ", '"', ", ")).lower().removesuffix(".")
    for start in ("it is ", "it's ", "a ", "an ", "the "):
        text = text.removeprefix(start)
    return text


def _until(text: str, ends: Sequence[str]) -> str:
    for end in ends:
        text = text.split(end)[0]
    return text.strip()
