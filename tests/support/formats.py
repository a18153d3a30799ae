"""Files in others' formats, oddities included, written by the formats' own libraries."""

import io
import json
import struct
import zlib
from pathlib import Path

import av
import numpy as np
import webdataset
from PIL import Image

RED = (200, 30, 40)
BLUE = (20, 60, 190)


def picture(colour=RED, size=(48, 36), seed=0) -> Image.Image:
    """A plain colour whose lighter, noisy quarter at the top left shows which way is up."""
    pixels = np.full((size[1], size[0], 3), colour, np.uint8)
    pixels[: size[1] // 2, : size[0] // 2] = np.random.default_rng(seed).integers(
        180, 256, (size[1] // 2, size[0] // 2, 3)
    )
    return Image.fromarray(pixels)


def encoded(image: Image.Image, format="JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def rotated(image: Image.Image, orientation: int) -> bytes:
    """A JPEG with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, exif=exif)


def bomb() -> bytes:
    """A PNG of a few bytes that claims 20,000 x 20,000 pixels."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(100)))
        + chunk(b"IEND", b"")
    )


def tar(path: Path, *samples: dict) -> Path:
    """Write a tar with webdataset's own writer; values are bytes or str."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), encoder=False) as writer:  # ty: ignore[missing-attribute]
        for sample in samples:
            writer.write(
                {
                    key: value if key == "__key__" or isinstance(value, bytes) else value.encode()
                    for key, value in sample.items()
                }
            )
    return path


def film(path: Path | None, frames=20, rate=10, size=(64, 48), codec="mpeg4") -> bytes:
    """A clip whose frame k is grey with the value 10 + 10 k."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = *size, "yuv420p", 2_000_000
        for number in range(frames):
            grey = np.full((size[1], size[0], 3), 10 + 10 * number % 240, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    if path:
        path.write_bytes(file.getvalue())
    return file.getvalue()


def write_json(path: Path, value) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def jsonl(path: Path, *values) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path
