"""Decode video frames to upright RGB, by number or by time, with FFmpeg (PyAV).

Read next: sources/videos.py and sources/subtitled.py.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, cast

import numpy as np
from jaxtyping import UInt8

from emu_jax.data.images import MAX_PIXELS

if TYPE_CHECKING:
    # Installed by the extra `data`.
    import av

# Suffixes that always mean a video. A .gif counts as a video in a data set, but as an image in a
# prompt.
VIDEO_SUFFIXES = (
    ".mp4",
    ".webm",
    ".mkv",
    ".avi",
    ".mov",
    ".m4v",
    ".mpg",
    ".mpeg",
    ".ogv",
    ".yuv4mpeg",
    ".y4m",
    ".ts",
    ".flv",
    ".wmv",
)
SUFFIXES = (*VIDEO_SUFFIXES, ".gif")
# Frames of a video that Emu reads.
FRAMES = 8
# Only containers that consist of a single file are allowed: playlists (concat, HLS, DASH) name
# other files, which FFmpeg would read.
OPTIONS = {
    "format_whitelist": "mov,matroska,avi,mpeg,mpegts,mpegvideo,ogg,gif,yuv4mpegpipe,flv,asf",
    "protocol_whitelist": "none",
}

Frame = UInt8[np.ndarray, "h w 3"]


def silence_ffmpeg() -> None:
    """Turn off FFmpeg's own log: we report broken files ourselves.

    This is a setting of the process, so only commands call it. Does nothing without PyAV.
    """
    with suppress(ModuleNotFoundError):
        import av

        av.logging.set_level(av.logging.PANIC)


def segment_centres(count: int, frames: int = FRAMES) -> list[int]:
    """Frame numbers at the centres of `frames` equal segments of a video of `count` frames.

    Rounded as in the release.
    """
    segment = (count - 1) / frames
    # Rounding may take the last number past the end.
    return [min(count - 1, int(segment / 2) + round(segment * k)) for k in range(frames)]


def frames_by_number(data: bytes, numbers: Callable[[int], list[int]]) -> list[tuple[float, Frame]]:
    """(seconds, frame) of the frames with `numbers(count)`, for a video of `count` frames.

    Frames are counted by packets, without decoding. If fewer than that can be decoded, `numbers` is
    called again with the smaller count. Raises a one-line ValueError if decoding fails.
    """
    try:
        count = _count_packets(data)
        for _ in range(2):
            wanted = numbers(count)
            kept, decoded = _decode_some(data, wanted)
            if len(kept) == len(set(wanted)):
                return [kept[number] for number in wanted]
            if not decoded:
                break
            count = decoded
    # FFmpeg and its wrapper raise many kinds of errors.
    except Exception as error:
        raise _unusable(error) from error
    raise ValueError("not a usable video: no frame can be decoded")


def _decode_some(data: bytes, wanted: list[int]) -> tuple[dict[int, tuple[float, Frame]], int]:
    """The frames with the numbers `wanted`, and the number of frames decoded to get them."""
    kept = {}
    decoded = 0
    for number, (time, frame) in enumerate(_frames(data)):
        decoded = number + 1
        if number in wanted:
            kept[number] = time, upright(frame)
        if number == max(wanted):
            break
    return kept, decoded


def frames_by_time(data: bytes, every: float) -> Iterator[tuple[float, Frame]]:
    """Yield (k * every, the frame shown at that time) for k = 0, 1, ... until the video ends.

    A damaged video ends where the damage starts. Frames are decoded one at a time, because hours of
    video would not fit into memory. Raises a one-line ValueError if not even one can be decoded.
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
        # The frames before the damage are good.
        if not due:
            raise _unusable(error) from error
    if not due:
        raise ValueError("not a usable video: no frame can be decoded")


def _unusable(error: Exception) -> ValueError:
    """An error whose message depends only on the file.

    FFmpeg's own message also contains the last line that it logged, maybe about another file.
    Raises ModuleNotFoundError without PyAV, because then the file is not at fault.
    """
    import av

    reason = error.strerror if isinstance(error, av.FFmpegError) else error
    return ValueError(" ".join(f"not a usable video: {reason}".split()))


def _open(data: bytes) -> "av.container.InputContainer":
    import av

    container = cast(
        "av.container.InputContainer",
        av.open(io.BytesIO(data), metadata_errors="ignore", options=OPTIONS),
    )
    stream = next(iter(container.streams.video), None)
    if stream is None or stream.codec_context is None:
        raise ValueError("no video stream, or one of an unknown codec")
    if stream.width * stream.height > MAX_PIXELS:
        raise ValueError(
            f"{stream.width} x {stream.height} pixels are over the limit of {MAX_PIXELS}"
        )
    return container


def _count_packets(data: bytes) -> int:
    with _open(data) as container:
        packets = container.demux(container.streams.video[0])
        return max(1, sum(packet.size > 0 for packet in packets))


def _frames(data: bytes) -> Iterator[tuple[float, "av.VideoFrame"]]:
    with _open(data) as container:
        rate = container.streams.video[0].average_rate
        for number, frame in enumerate(container.decode(video=0)):
            time = number / float(rate or 25) if frame.time is None else frame.time
            yield time, frame


def upright(frame: "av.VideoFrame") -> Frame:
    """The pixels of a frame, rotated as its metadata says."""
    image = frame.to_ndarray(format="rgb24")
    degrees = getattr(frame, "rotation", 0) or 0
    return np.ascontiguousarray(np.rot90(image, round(degrees / 90) % 4))
