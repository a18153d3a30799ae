"""Prompts: parts in reading order become the ids, images and slots that a model was trained on
(data/sequence.py's grammar).

A part is a text, an image (pixels, or the visual tokens of one that a model drew), or the path of
an image or video file; a video is its frames, each as an image. Chat: `<system> [USER]: <parts>
[ASSISTANT]: <answer></s>`. Read next: session.py.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from emu_jax.config import UserError
from emu_jax.data import chat_format
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.generate import media

Part = str | Path | np.ndarray

# of `Processor.template`
SPECIAL = re.compile(r"(\[USER\]|\[ASSISTANT\]|\[IMG\]|\[/IMG\]|</s>|\{image\})")


@dataclass
class Prompt:
    """Ids, and the images whose visual tokens take the places of `<image>`: uint8 pixels [h w 3],
    or the tokens themselves [N D].
    """

    tokens: list[int] = field(default_factory=list)
    images: list[np.ndarray] = field(default_factory=list)
    # index in tokens of the first of each image's N slots
    slots: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Processor:
    """How parts are written for one model."""

    tokenizer: Tokenizer
    # N
    n_visual: int
    image_size: int
    # D
    width: int
    # tokens after the vocabulary; six are needed for chat
    added: int
    # what a chat begins with: data.system
    system: str = "release"

    def interleave(self, parts: Sequence[Part]) -> Prompt:
        """`<s>` and the parts; each text is encoded on its own, as in training."""
        return self._written(
            [self.tokenizer.bos, *(piece for part in parts for piece in self._pieces(part))]
        )

    def chat_turn(self, parts: Sequence[Part], *, system: str | None, first: bool) -> Prompt:
        """A user's turn of a chat, up to where the answer begins. system: None for the message it
        was tuned with, "" for none.
        """
        if self.added < 6:
            raise UserError(
                "this model has no [USER] and [ASSISTANT]: only one that was tuned on instructions can chat (model.llama.added=6)"
            )
        said = () if self.system == "none" else chat_format.SYSTEM_MESSAGES[_kind(parts)]
        said = said if system is None else (system,) if system else ()
        beginning = chat_format.opening_pieces(self.tokenizer, said) if first else []
        return self._written(
            chat_format.join_texts(
                [
                    *beginning,
                    *chat_format.question_pieces(
                        self.tokenizer, [piece for part in parts for piece in self._pieces(part)]
                    ),
                ]
            )
        )

    def template(self, text: str, images: Sequence[Sequence[np.ndarray]]) -> Prompt:
        """`<s>` and a text in which "[USER]", "[ASSISTANT]", "[IMG]", "[/IMG]" and "</s>" are those
        tokens, and each "{image}" the next of `images`: an image's pixels, or the frames of a
        video.
        """
        t = self.tokenizer
        waiting = iter(images)
        pieces = [self.tokenizer.bos]
        special = {
            "[USER]": t.user,
            "[ASSISTANT]": t.assistant,
            "[IMG]": t.img,
            "[/IMG]": t.end_img,
            "</s>": t.eos,
        }
        for piece in SPECIAL.split(text):
            if piece == "{image}":
                pieces += next(waiting)
            elif piece:
                pieces.append(special.get(piece, piece))
        return self._written(pieces)

    def frames(self, path: Path) -> list[np.ndarray]:
        """The picture in a file, or the frames of a video, as the model sees them. Raises
        UserError.
        """
        return self._pieces(path)

    def _pieces(self, part: Part) -> list:
        """A part as texts and images."""
        if isinstance(part, str):
            return [part]
        if isinstance(part, Path):
            return (
                media.load_video(part, self.image_size)
                if media.is_video(part)
                else [media.load_image(part, self.image_size)]
            )
        part = np.asarray(part)
        if part.dtype == np.uint8 and part.ndim == 3 and part.shape[-1] == 3 and part.size:
            return [media.resize(part, self.image_size)]
        if part.dtype != np.uint8 and part.shape == (self.n_visual, self.width):
            return [part.astype(np.float32)]
        raise UserError(
            f"an image is an array uint8 [h, w, 3], or visual tokens [{self.n_visual}, {self.width}]; "
            f"this is {part.dtype} {list(part.shape)}"
        )

    def _written(self, pieces: list) -> Prompt:
        prompt = Prompt()
        t = self.tokenizer
        for piece in pieces:
            if isinstance(piece, str):
                prompt.tokens += t.encode(piece)
            elif isinstance(piece, int):
                prompt.tokens.append(piece)
            else:
                prompt.images.append(piece)
                prompt.slots.append(len(prompt) + 1)
                prompt.tokens += [t.img, *[t.image] * self.n_visual, t.end_img]
        return prompt


def _kind(parts: Sequence[Part]) -> str:
    """One image, one video, or else nothing that the release has a system message for."""
    pictures = [part for part in parts if not isinstance(part, str)]
    if len(pictures) != 1:
        return ""
    return "video" if isinstance(pictures[0], Path) and media.is_video(pictures[0]) else "image"


def concatenate(*prompts: Prompt) -> Prompt:
    """One prompt of several, one after another."""
    whole = Prompt()
    for prompt in prompts:
        whole.slots += [len(whole) + slot for slot in prompt.slots]
        whole.images += prompt.images
        whole.tokens += prompt.tokens
    return whole


def truncate_left(prompt: Prompt, length: int, n_visual: int) -> Prompt:
    """The prompt's end, of at most `length` ids, `<s>` before it, without parts of images."""
    start = len(prompt) - length + 1
    for slot in prompt.slots:
        # inside [IMG] ... [/IMG]
        if slot - 1 < start <= slot + n_visual:
            start = slot + n_visual + 1
    kept = [
        (image, slot - start + 1)
        for image, slot in zip(prompt.images, prompt.slots, strict=True)
        if slot > start
    ]
    return Prompt(
        [prompt.tokens[0], *prompt.tokens[start:]],
        [image for image, _ in kept],
        [slot for _, slot in kept],
    )
