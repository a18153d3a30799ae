"""Decode image files to upright RGB, at full size or at the size of the model's input.

The model's input is squashed, not cropped, to a square with a bicubic filter, as in Emu's release;
models/vision.py normalises it.

simplejpeg (libjpeg-turbo) decodes JPEGs: bit-equal to Pillow at full size, or at 1/2, 1/4 or 1/8 if
that is still large enough. Pillow decodes everything else. Both release the interpreter lock, so
threads decode in parallel. Read next: sources/.
"""

import io
import threading
import warnings

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

# Without a limit, a file of a few kilobytes could fill the memory (a "decompression bomb"). 64
# megapixels take 192 MB as RGB.
MAX_PIXELS = 64 * 1024 * 1024
MAX_BYTES = 64 * 1024 * 1024
# EPS is left out because Pillow starts Ghostscript to read it.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO")
FITS = ("squash", "centre", "random")

# Held while Pillow's own limit, which is global, is changed.
_PILLOW_LIMIT = threading.Lock()
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def silence_pillow() -> None:
    """Hide Pillow's warnings about odd metadata in images whose pixels are good.

    This changes the warning filters of the process, so only commands call it. Images that cannot be
    decoded still raise errors.
    """
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")


def decode(data: bytes, size: int, fit: str = "squash") -> UInt8[np.ndarray, "h w 3"]:
    """Decode an image for a model with inputs of size x size: upright by EXIF, over white.

    fit: "squash" resizes to size x size; "centre" scales the shorter side to `size` and crops the
    middle; "random" only scales the shorter side, and sequence.py crops at random later. Raises a
    one-line ValueError like `decode_full`.
    """
    # A JPEG is decoded at a reduced size, but at least twice the size that is needed: after the
    # bicubic filter, no difference is visible.
    image = _upright(data, 2 * size)
    if fit == "squash":
        width = height = size
    else:
        scale = size / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    if fit == "centre":
        left = (width - size) // 2
        top = (height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return np.array(image)


def decode_full(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """Decode an image at full size, upright, with transparency over white.

    Reads JPEG, PNG, WebP, GIF (the first frame), BMP, TIFF, PPM and ICO; also 16-bit, palette, CMYK
    and greyscale images. Raises a one-line ValueError if the data is not an image, is truncated, or
    exceeds MAX_BYTES or MAX_PIXELS.
    """
    return np.array(_upright(data, 0))


def header_size(data: bytes) -> tuple[int, int] | None:
    """Width and height from the header, before any rotation; None if `data` is not an image."""
    try:
        return _open(data).size
    # Pillow raises nearly anything for broken files.
    except Exception:
        return None


def encode(image: UInt8[np.ndarray, "h w 3"], quality: int = 90) -> bytes:
    """Encode as a JPEG without chroma subsampling, the format of stored video frames.

    Deterministic.
    """
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(image), quality=quality, colorspace="RGB", colorsubsampling="444"
    )


def _open(data: bytes) -> Image.Image:
    """Open an image and read only its header.

    Pillow's own limit of the size is off meanwhile. Ours, MAX_PIXELS, is lower, and its error
    message gives the size.
    """
    with _PILLOW_LIMIT:
        limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            return Image.open(io.BytesIO(data), formats=FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _upright(data: bytes, least: int) -> Image.Image:
    """The upright RGB image.

    A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as both sides have at least `least`
    pixels; 0 means full size.
    """
    try:
        if len(data) > MAX_BYTES:
            raise ValueError(f"{len(data)} bytes are over the limit of {MAX_BYTES}")
        image = _open(data)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(
                f"{image.width} x {image.height} pixels are over the limit of {MAX_PIXELS}"
            )
        # Pillow rotates TIFFs itself.
        turn = None if image.format == "TIFF" else _UPRIGHT.get(_orientation(image))
        image = (
            _jpeg(data, image, least)
            if image.format == "JPEG" and image.mode in ("RGB", "L")
            else _rgb(image)
        )
        return image if turn is None else image.transpose(turn)
    # The original message contains a memory address, and reasons must be reproducible.
    except UnidentifiedImageError as error:
        raise ValueError("not a usable image: cannot identify its format") from error
    # Pillow raises nearly anything for broken files.
    except Exception as error:
        raise ValueError(" ".join(f"not a usable image: {error}".split())) from error


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    # The pixels may be good even if the EXIF data is not.
    except Exception:
        return 1


def _jpeg(data: bytes, image: Image.Image, least: int) -> Image.Image:
    try:
        return Image.fromarray(
            simplejpeg.decode_jpeg(data, min_height=least, min_width=least, min_factor=2)
        )
    # libjpeg only warns about some faults for which simplejpeg refuses a file; Pillow reads such
    # files.
    except ValueError:
        return _rgb(image)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image = _from_integers(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _from_integers(image: Image.Image) -> Image.Image:
    """Convert 16-bit or 32-bit grey to 8-bit grey; Pillow's conversion would clip it to white."""
    values = np.asarray(image)
    is_16_bit = image.mode != "I" or values.max(initial=0) > 255
    grey = (values >> 8 if is_16_bit else values).clip(0, 255)
    converted = Image.fromarray(grey.astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        alpha = np.where(values == transparent, 0, 255)
        converted.putalpha(Image.fromarray(alpha.astype(np.uint8)))
    return converted
