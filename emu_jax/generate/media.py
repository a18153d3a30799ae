"""Image and video files to pixels. Read next: processor.py."""

import os
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from emu_jax import cli
from emu_jax.config import UserError
from emu_jax.data import images
from emu_jax.data.video import VIDEO_SUFFIXES

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"}
# Frames sampled from a video.
FRAMES = 8


def has_media_suffix(text: str) -> bool:
    """Whether a text could name a media file, existing or not."""
    suffix = Path(text).suffix.lower()
    return suffix in {*IMAGE_SUFFIXES, *VIDEO_SUFFIXES} and "\n" not in text


def is_media_file(text: str) -> bool:
    """Whether a text names an existing media file."""
    return has_media_suffix(text) and os.path.isfile(text)


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def load_image(path: Path, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Read an image and resize it to size x size, ignoring its aspect ratio.

    Raises UserError for a file that is missing, broken, too large or not an image.
    """
    try:
        with path.open("rb") as file:
            # One byte more than the limit is enough to refuse a file of any length.
            return images.decode(file.read(images.MAX_BYTES + 1), size)
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}': {_reason(error)}") from error


def resize(pixels: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Resize pixels to size x size, ignoring the aspect ratio."""
    if pixels.shape[:2] == (size, size):
        return pixels
    return np.array(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))


def load_video(path: Path, size: int) -> list[UInt8[np.ndarray, "{size} {size} 3"]]:
    """Read FRAMES frames of a video, at the centres of equal segments.

    Each is resized to size x size. Raises UserError for a file that is missing, broken or without
    frames, and without the package av.
    """
    try:
        import av

        from emu_jax.data.video import OPTIONS, segment_centres, upright
    except ModuleNotFoundError as error:
        raise UserError(f"'{path}': {cli.missing_extra(error) or error}") from error
    try:
        with (
            path.open("rb") as file,
            av.open(file, mode="r", metadata_errors="ignore", options=OPTIONS) as container,
        ):
            if not container.streams.video:
                raise UserError(f"'{path}' has no video stream")
            # Count the frames, since the number in the header may be wrong.
            count = sum(packet.size > 0 for packet in container.demux(video=0))
        if not count:
            raise UserError(f"'{path}' has no frames")
        wanted = segment_centres(count, FRAMES)
        frames = {}
        number = -1
        with (
            path.open("rb") as file,
            av.open(file, mode="r", metadata_errors="ignore", options=OPTIONS) as container,
        ):
            stream = container.streams.video[0]
            if stream.width * stream.height > images.MAX_PIXELS:
                raise UserError(
                    f"'{path}': {stream.width} x {stream.height} pixels are over the limit of "
                    f"{images.MAX_PIXELS}"
                )
            for number, frame in enumerate(container.decode(video=0)):
                if number in wanted:
                    frames[number] = resize(upright(frame), size)
                if number >= wanted[-1]:
                    break
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise UserError(f"'{path}' is not a usable video: {_reason(error)}") from error
    # Many files lack a frame or two at the end.
    if not frames or (wanted[-1] not in frames and number < wanted[-1] - 2):
        raise UserError(
            f"'{path}' is truncated: only {number + 1} of its {count} frames can be decoded"
        )
    last = frames[max(frames)]
    return [frames.get(number, last) for number in wanted]


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
