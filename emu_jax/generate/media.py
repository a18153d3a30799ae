"""Media files to pixels: an image, the eight frames of a video, the parts of a storyboard. Read
next: prompt.py.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from emu_jax.config import UserError
from emu_jax.data import images

IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"}
VIDEOS = {
    ".mp4",
    ".mov",
    ".m4v",
    ".mkv",
    ".webm",
    ".avi",
    ".mpg",
    ".mpeg",
    ".ogv",
    ".ts",
    ".flv",
    ".wmv",
}
FRAMES = 8


def has_media_suffix(text: str) -> bool:
    """Is this the name of a media file, there or not?"""
    return Path(text).suffix.lower() in IMAGES | VIDEOS and "\n" not in text


def is_media_file(text: str) -> bool:
    """Is this a media file that is there?"""
    return has_media_suffix(text) and os.path.isfile(text)


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEOS


def load_image(path: Path, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """The picture in a file, squashed to size x size. Raises UserError for a file that is missing,
    broken, too large or no image.
    """
    try:
        with path.open("rb") as file:
            # no more of it, whatever its size
            return images.decode(file.read(images.MAX_BYTES + 1), size)
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}': {getattr(error, 'strerror', None) or error}") from error


def resize(pixels: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """As `load_image`, of pixels."""
    return (
        pixels
        if pixels.shape[:2] == (size, size)
        else np.array(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))
    )


def load_video(path: Path, size: int) -> list[UInt8[np.ndarray, "{size} {size} 3"]]:
    """FRAMES frames of a video, each squashed. Raises UserError for a file that is missing, broken,
    or without frames.
    """
    try:
        import av

        from emu_jax.data.video import OPTIONS, upright
    except ImportError:
        raise UserError(f"'{path}': videos are read with the package av: pip install av") from None
    try:
        with (
            path.open("rb") as file,
            av.open(file, metadata_errors="ignore", options=OPTIONS) as container,
        ):
            if not container.streams.video:
                raise UserError(f"'{path}' has no video in it")
            # what a header says of the number may be wrong
            count = sum(packet.size > 0 for packet in container.demux(video=0))
        if not count:
            raise UserError(f"'{path}' has no frames in it")
        wanted = centres(count)
        found = {}
        with (
            path.open("rb") as file,
            av.open(file, metadata_errors="ignore", options=OPTIONS) as container,
        ):
            stream = container.streams.video[0]
            if stream.width * stream.height > images.MAX_PIXELS:
                raise UserError(
                    f"'{path}': {stream.width} x {stream.height} pixels are over the limit of {images.MAX_PIXELS}"
                )
            for number, frame in enumerate(container.decode(video=0)):
                if number in wanted:
                    found[number] = resize(upright(frame), size)
                if number >= wanted[-1]:
                    break
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise UserError(
            f"'{path}' is no usable video: {getattr(error, 'strerror', None) or error}"
        ) from error
    # a frame or two are lost at the ends of many a sound file
    if not found or (wanted[-1] not in found and number < wanted[-1] - 2):
        raise UserError(
            f"'{path}' is cut short: {number + 1 if found else 0} of its {count} frames can be decoded"
        )
    return [found.get(at, found[max(found)]) for at in wanted]


def centres(count: int, frames: int = FRAMES) -> list[int]:
    """The numbers of the frames at the centres of equal segments, of `count`, as the release takes
    them.
    """
    segment = (count - 1) / frames
    return [int(segment / 2) + round(segment * i) for i in range(frames)]


def storyboard(
    frames: Sequence[UInt8[np.ndarray, "h w 3"]],
    seconds: float,
    subtitles: Sequence[tuple[float, str]],
) -> list:
    """The parts of a storyboard: thumbnails of a film of so many seconds, and its (start, text)
    subtitles, by time. Frame i stands at i * round(seconds / frames); what is said between two
    frames is one text before the next; what is said after the last stays.
    """
    every = round(seconds / max(len(frames), 1))
    events = [(i * every, 0, frame) for i, frame in enumerate(frames)] + [
        (start, 1, text) for start, text in subtitles
    ]
    parts: list = []
    for *_, event in sorted(events, key=lambda event: event[:2]):
        if isinstance(event, str) and parts and isinstance(parts[-1], str):
            parts[-1] += " " + event
        else:
            parts.append(event)
    return parts
