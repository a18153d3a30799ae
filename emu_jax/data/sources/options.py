"""Options for reading data. Each field is a flag of `python -m emu_jax.data`.

For example, `min_side` is --min-side=64. The defaults keep nearly every valid record: filtering is
up to the user. Read next: kinds.py.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from emu_jax.config import UserError


def _flag(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class SourceOptions:
    """The options of all kinds; each kind reads its own."""

    images: str = _flag(
        "",
        "folder or archive of the images and videos named in the records (obelics: the output of "
        "img2dataset for its URLs)",
    )
    min_side: int = _flag(1, "leave out images whose shorter side has fewer pixels")
    max_aspect: float = _flag(100.0, "leave out images with a larger aspect ratio")
    min_chars: int = _flag(1, "leave out shorter captions")
    max_chars: int = _flag(100_000, "leave out longer captions")
    min_score: float = _flag(
        -1.0, "pairs: leave out lower CLIP scores, if the dataset has a column of them"
    )
    min_similarity: float = _flag(
        0.32, "mmc4: leave out images that match their sentence less; the paper uses 0.32"
    )
    captions: bool = _flag(True, "html: keep the captions of figures")
    alt: bool = _flag(False, "html: add the alternative text of an image after it")
    icon: int = _flag(
        64,
        "html: images with both sides shorter than this, or one side shorter than half of it, are "
        "icons",
    )
    frames: int = _flag(8, "videos: frames per video")
    choose: str = _flag(
        "centres", "videos: 'centres' of equal segments, or 'random' (fixed by the video's id)"
    )
    every: float = _flag(5.0, "subtitled: seconds between frames")
    max_images: int = _flag(
        32, "subtitled, storyboards: images per document; longer ones are split"
    )
    max_tokens: int = _flag(
        2048,
        "subtitled, storyboards: tokens per document, estimated as 34 per image and one per 3 "
        "bytes of text",
    )

    def __post_init__(self):
        """Raise UserError for values that no kind can use."""
        for name, good, right in (
            ("choose", self.choose in ("centres", "random"), "centres or random"),
            ("frames", self.frames >= 1, "at least 1"),
            ("every", 0 < self.every < math.inf, "a positive number"),
            ("max_images", self.max_images >= 1, "at least 1"),
            ("max_aspect", self.max_aspect >= 1, "at least 1"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
        ):
            if not good:
                raise UserError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be {right}"
                )
