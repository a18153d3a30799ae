"""Prompts: interleaved parts become ids, images and slots, as in training.

The grammar is that of data/sequence.py: `<s>`, then texts and `[IMG] <image> x N [/IMG]` in reading
order; in a chat `<system> [USER]: <parts> [ASSISTANT]: <answer></s>`. A video becomes its frames,
each an image. Read next: session.py.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from emu_jax.config import UserError
from emu_jax.data import chat_format
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.generate import media

# A part of a prompt: a text; the path of an image or video; pixels, uint8 [h, w, 3]; or visual
# tokens, floats [N, D].
Part = str | Path | np.ndarray
Parts = Sequence[Part]

# What `Processor.template` replaces.
PLACEHOLDERS = re.compile(r"(\[USER\]|\[ASSISTANT\]|\[IMG\]|\[/IMG\]|</s>|\{image\})")


@dataclass
class Prompt:
    """Ids, and the images whose visual tokens take the places of `<image>`."""

    tokens: list[int] = field(default_factory=list)
    # Each is uint8 pixels [h, w, 3] or float visual tokens [N, D].
    images: list[np.ndarray] = field(default_factory=list)
    # Index in `tokens` of the first of each image's N `<image>`.
    slots: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Processor:
    """Turns parts into a `Prompt` for one model: tokenizer, image sizes and chat format."""

    tokenizer: Tokenizer
    # N, the number of visual tokens of an image.
    n_visual: int
    # Height and width of the images that the vision encoder takes.
    image_size: int
    # D, the width of visual tokens.
    width: int
    # Number of tokens added to the tokenizer's vocabulary: 4, or 6 with [USER] and [ASSISTANT].
    added: int
    # The field config.data.system: which system message a chat begins with.
    system: str = "release"

    def interleave(self, parts: Parts) -> Prompt:
        """`<s>` and the parts in reading order. Each text is tokenized by itself, as in training.

        Raises UserError for a file that cannot be read and for an array that is not an image.
        """
        return self._assemble([self.tokenizer.bos, *self._flatten(parts)])

    def chat_turn(self, parts: Parts, *, system: str | None, first: bool) -> Prompt:
        """A user's turn of a chat, up to where the answer begins.

        system: None for the system message that the model was tuned with, "" for none. first:
        whether this is the first turn, which begins with `<s>` and the system message.
        Raises UserError as `interleave`, and for a model without [USER] and [ASSISTANT].
        """
        if self.added < 6:
            raise UserError(
                "this model has no [USER] and [ASSISTANT] tokens: only an instruction-tuned model "
                "can chat (model.llama.added=6)"
            )
        pieces = chat_format.question_pieces(self.tokenizer, self._flatten(parts))
        if first:
            message = self._system_message(parts, system)
            pieces = [*chat_format.opening_pieces(self.tokenizer, message), *pieces]
        return self._assemble(chat_format.join_texts(pieces))

    def template(self, text: str, images: Sequence[Sequence[np.ndarray]]) -> Prompt:
        """`<s>` and a text with placeholders.

        "[USER]", "[ASSISTANT]", "[IMG]", "[/IMG]" and "</s>" become those tokens, and each
        "{image}" the next of `images`: the pixels of an image, or the frames of a video.
        """
        t = self.tokenizer
        special = {
            "[USER]": t.user,
            "[ASSISTANT]": t.assistant,
            "[IMG]": t.img,
            "[/IMG]": t.end_img,
            "</s>": t.eos,
        }
        remaining = iter(images)
        pieces: list = [t.bos]
        for piece in PLACEHOLDERS.split(text):
            if piece == "{image}":
                pieces += next(remaining)
            elif piece:
                pieces.append(special.get(piece, piece))
        return self._assemble(pieces)

    def frames(self, path: Path) -> list[np.ndarray]:
        """Pixels of an image file or of a video's frames, in the model's size.

        Raises UserError for a file that cannot be read.
        """
        if media.is_video(path):
            return media.load_video(path, self.image_size)
        return [media.load_image(path, self.image_size)]

    def _system_message(self, parts: Parts, system: str | None) -> Sequence[str]:
        """Pieces of the system message of a chat that begins with these parts."""
        if system is not None:
            return (system,) if system else ()
        if self.system == "none":
            return ()
        return chat_format.SYSTEM_MESSAGES[_media_kind(parts)]

    def _flatten(self, parts: Iterable[Part]) -> list:
        """Texts and images of the parts."""
        if isinstance(parts, (str, Path, np.ndarray)):
            raise UserError(
                f"a prompt is a list of parts, like ['What is this?', Path('photo.jpg')], and "
                f"several prompts are a list of such lists; a prompt was given as {_shown(parts)}"
            )
        pieces: list = []
        for part in parts:
            if isinstance(part, str):
                pieces.append(part)
            elif isinstance(part, Path):
                pieces += self.frames(part)
            elif hasattr(part, "__array__"):
                pieces.append(self._image(np.asarray(part)))
            else:
                raise UserError(
                    "a part of a prompt is a str, a Path, the pixels of an image (uint8 [h, w, 3]) "
                    f"or visual tokens [{self.n_visual}, {self.width}], not {_shown(part)}"
                )
        return pieces

    def _image(self, array: np.ndarray) -> np.ndarray:
        """Pixels in the model's size, or visual tokens in float32."""
        is_pixels = array.dtype == np.uint8 and array.ndim == 3 and array.shape[-1] == 3
        if is_pixels and array.size:
            return media.resize(array, self.image_size)
        if array.dtype != np.uint8 and array.shape == (self.n_visual, self.width):
            return array.astype(np.float32)
        raise UserError(
            "an image must be an array uint8 [h, w, 3], or visual tokens "
            f"[{self.n_visual}, {self.width}], not {array.dtype} {list(array.shape)}"
        )

    def _assemble(self, pieces: Iterable) -> Prompt:
        """The prompt that consists of these texts, ids and images."""
        t = self.tokenizer
        prompt = Prompt()
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


def _shown(value: object) -> str:
    """The type and the beginning of a value, for an error message."""
    text = "" if isinstance(value, np.ndarray) else f" {str(value)[:40]!r}"
    return f"{type(value).__name__}{text}"


def _media_kind(parts: Parts) -> str:
    """Key of the release's system message: "image" or "video" if there is just one, else ""."""
    found = [part for part in parts if not isinstance(part, str)]
    if len(found) != 1:
        return ""
    return "video" if isinstance(found[0], Path) and media.is_video(found[0]) else "image"


def concatenate(*prompts: Prompt) -> Prompt:
    """Join prompts, one after another."""
    joined = Prompt()
    for prompt in prompts:
        joined.slots += [len(joined) + slot for slot in prompt.slots]
        joined.images += prompt.images
        joined.tokens += prompt.tokens
    return joined


def truncate_left(prompt: Prompt, length: int, n_visual: int) -> Prompt:
    """Cut ids after `<s>` until at most `length` remain; no image is cut in two."""
    start = len(prompt) - length + 1
    for slot in prompt.slots:
        # A cut inside [IMG] ... [/IMG] moves to the end of the image.
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
