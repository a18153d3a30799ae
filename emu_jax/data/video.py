"""Frames of videos, through FFmpeg's libraries (PyAV): chosen by number or by time, upright RGB.

Read next: sources/videos.py and sources/subtitled.py.
"""

import io
from collections.abc import Callable, Iterator

import av
import numpy as np
from jaxtyping import UInt8

from emu_jax.data.images import MAX_PIXELS

# broken files are reported by us, once
av.logging.set_level(av.logging.PANIC)

SUFFIXES = (
    ".mp4",
    ".webm",
    ".mkv",
    ".avi",
    ".mov",
    ".m4v",
    ".mpg",
    ".mpeg",
    ".ogv",
    ".gif",
    ".yuv4mpeg",
    ".y4m",
)
# FFmpeg's containers of one file: its playlists (concat, HLS, DASH) name other files, which it
# would read.
OPTIONS = {
    "format_whitelist": "mov,matroska,avi,mpeg,mpegts,mpegvideo,ogg,gif,yuv4mpegpipe,flv,asf",
    "protocol_whitelist": "none",
}

Frame = UInt8[np.ndarray, "h w 3"]


def segment_centres(count: int, frames: int = 8) -> list[int]:
    """The numbers of `frames` frames of a video of `count`, at the centres of equal segments, as
    Emu's release takes them.
    """
    segment = (count - 1) / frames
    # the last may round to one too many
    return [min(count - 1, int(segment / 2) + round(segment * k)) for k in range(frames)]


def frames_by_number(data: bytes, numbers: Callable[[int], list[int]]) -> list[tuple[float, Frame]]:
    """(time, frame) of the frames `numbers(count)` of a video that has `count`, in the order asked
    for.

    Packets are counted without decoding them; where fewer decode than there are, it is asked again
    with what does. Raises ValueError, in one line, for what cannot be decoded.
    """
    try:
        count = _count(data)
        for _ in range(2):
            wanted = numbers(count)
            last = max(wanted)
            kept = {}
            seen = 0
            for number, (time, frame) in enumerate(_frames(data)):
                seen = number + 1
                if number in wanted:
                    kept[number] = time, upright(frame)
                if number == last:
                    return [kept[number] for number in wanted]
            if not seen:
                break
            count = seen
    # FFmpeg's errors and those of its wrapper
    except Exception as error:
        raise _unusable(error) from error
    raise ValueError("not a usable video: no frame can be decoded")


def frames_by_time(data: bytes, every: float) -> Iterator[tuple[float, Frame]]:
    """(k * every, frame): the frame that is shown at that time, for k = 0, 1, ... until the video
    ends, or is damaged. One at a time: hours of frames would not fit. Raises ValueError, as
    `frames_by_number`, if there is not one.
    """
    due = 0
    shown = None
    first = None
    last = 0.0
    try:
        for time, frame in _frames(data):
            first = time if first is None else first
            while shown is not None and due * every < time - first - 1e-6:
                yield due * every, upright(shown)
                due += 1
            shown = frame
            last = time - first
        if shown is not None and due * every <= last + 1e-6:
            yield due * every, upright(shown)
            due += 1
    except Exception as error:
        # what decoded before the damage is good
        if not due:
            raise _unusable(error) from error
    if not due:
        raise ValueError("not a usable video: no frame can be decoded")


def _unusable(error: Exception) -> ValueError:
    """Says the same of the same file: the text of FFmpeg's own errors holds what it logged last, of
    whichever file that was.
    """
    return ValueError(
        " ".join(
            f"not a usable video: {error.strerror if isinstance(error, av.FFmpegError) else error}".split()
        )
    )


def _open(data: bytes) -> "av.container.InputContainer":
    container = av.open(io.BytesIO(data), metadata_errors="ignore", options=OPTIONS)
    stream = next(iter(container.streams.video), None)
    if stream is None or stream.codec_context is None:
        raise ValueError("it holds no pictures, or of an unknown kind")
    if stream.width * stream.height > MAX_PIXELS:
        raise ValueError(
            f"{stream.width} x {stream.height} pixels are over the limit of {MAX_PIXELS}"
        )
    return container


def _count(data: bytes) -> int:
    with _open(data) as container:
        return max(
            1, sum(packet.size > 0 for packet in container.demux(container.streams.video[0]))
        )


def _frames(data: bytes) -> Iterator[tuple[float, "av.VideoFrame"]]:
    with _open(data) as container:
        rate = container.streams.video[0].average_rate
        for number, frame in enumerate(container.decode(video=0)):
            yield (frame.time if frame.time is not None else number / float(rate or 25)), frame


def upright(frame: "av.VideoFrame") -> Frame:
    """Its pixels, turned as the file says that it was filmed."""
    image = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(
        np.rot90(image, round((getattr(frame, "rotation", 0) or 0) / 90) % 4)
    )
