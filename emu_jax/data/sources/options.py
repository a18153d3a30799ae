"""What a user may choose when documents are made: every field is a flag of `python -m emu_jax.data`
(min_side: --min-side=64).

The defaults keep all that is whole: filters are for sets of known size. Read next: kinds.py.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from emu_jax.config import UserError


def _flag(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class SourceOptions:
    """The choices of all kinds; a kind looks at its own."""

    images: str = _flag(
        "",
        "folder or archive of the pictures and videos that records name (obelics: what img2dataset made of their addresses)",
    )
    min_side: int = _flag(1, "pictures whose shorter side has fewer pixels are left out")
    max_aspect: float = _flag(100.0, "... whose sides are further apart than this ratio")
    min_chars: int = _flag(1, "captions that are shorter are left out")
    max_chars: int = _flag(100_000, "... longer")
    min_score: float = _flag(
        -1.0, "pairs: CLIP scores below are left out, where the set has such a column"
    )
    min_similarity: float = _flag(
        0.32, "mmc4: pictures that match their sentence less are left out; the paper: 0.32"
    )
    captions: bool = _flag(True, "html: keep the captions of figures")
    alt: bool = _flag(False, "html: the alternative text of a picture follows it")
    icon: int = _flag(
        64,
        "html: pictures with neither side as long as this, and strips under half of it, are icons",
    )
    frames: int = _flag(8, "videos: frames of a video")
    choose: str = _flag(
        "centres", "videos: 'centres' of equal segments, or 'random', by the video's id"
    )
    every: float = _flag(5.0, "subtitled: seconds between frames")
    max_images: int = _flag(
        32, "subtitled, storyboards: pictures of a document; longer ones are cut into several"
    )
    max_tokens: int = _flag(
        2048,
        "subtitled, storyboards: tokens of a document, a picture counting as 34, and 3 bytes of text as one",
    )

    def __post_init__(self):
        """Raises UserError for what no kind can work with."""
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
