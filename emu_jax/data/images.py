"""Encoded bytes to upright RGB, and to the pixels a model sees: squashed (not cropped) to a square,
bicubic, as Emu's release does it.

JPEGs go through libjpeg-turbo (simplejpeg: bit-equal to Pillow's full decoding, and scaled by 1/2,
1/4 or 1/8 where what is left is still large), everything else through Pillow. Both give up the
interpreter lock: threads decode side by side. Mean and standard deviation are the model's business
(models/vision.py). Read next: sources/.
"""

import io
import warnings

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

# Beyond this a file of a few kilobytes could fill the memory ("decompression bomb"). 64 megapixels
# are 192 MB of RGB.
MAX_PIXELS = 64 * 1024 * 1024
MAX_BYTES = 64 * 1024 * 1024
# Pillow's own limit is wider and warns on the way
Image.MAX_IMAGE_PIXELS = None
# of odd tags in files whose pixels are good
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
# not EPS, whose reader starts a program
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO")
FITS = ("squash", "centre", "random")

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


def decode(data: bytes, size: int, fit: str = "squash") -> UInt8[np.ndarray, "h w 3"]:
    """The pixels for a model of side `size`; transparency shows white, and a photo stands as its
    EXIF says.

    `fit`: "squash" to size x size; "centre" scales the shorter side to `size` and cuts the middle
    out; "random" only scales the shorter side: where the square is cut is drawn later, by
    `make_sequence`. Raises ValueError, in one line, for what `decode_full` refuses.
    """
    # twice the size: scaled decoding does not show after the bicubic filter
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
    """The whole picture, upright: JPEG, PNG, WebP, GIF (first frame), BMP, TIFF; 16-bit, palette,
    CMYK, grey; transparency over white.

    Raises ValueError, in one line, for what is no image, is cut short, or has more than MAX_BYTES
    or MAX_PIXELS.
    """
    return np.array(_upright(data, 0))


def header_size(data: bytes) -> tuple[int, int] | None:
    """Width and height by the header, as stored; None for what is no image."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS).size
    # as in _upright
    except Exception:
        return None


def encode(image: UInt8[np.ndarray, "h w 3"], quality: int = 90) -> bytes:
    """A JPEG with full chroma: how frames of videos are stored. The same bytes for the same
    pixels.
    """
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(image), quality=quality, colorspace="RGB", colorsubsampling="444"
    )


def _upright(data: bytes, least: int) -> Image.Image:
    """RGB; a JPEG may come at a half, a quarter or an eighth of its size, its sides at least
    `least` (0: only whole).
    """
    try:
        if len(data) > MAX_BYTES:
            raise ValueError(f"{len(data)} bytes are over the limit of {MAX_BYTES}")
        # reads the header only
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(
                f"{image.width} x {image.height} pixels are over the limit of {MAX_PIXELS}"
            )
        # Pillow turns those itself
        turn = None if image.format == "TIFF" else _UPRIGHT.get(_orientation(image))
        image = (
            _jpeg(data, image, least)
            if image.format == "JPEG" and image.mode in ("RGB", "L")
            else _rgb(image)
        )
        return image if turn is None else image.transpose(turn)
    # whose text is an address in memory
    except UnidentifiedImageError as error:
        raise ValueError("not a usable image: cannot identify its format") from error
    # on broken files Pillow's readers raise nearly anything
    except Exception as error:
        raise ValueError(" ".join(f"not a usable image: {error}".split())) from error


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    # the pixels may be good though the EXIF is not
    except Exception:
        return 1


def _jpeg(data: bytes, image: Image.Image, least: int) -> Image.Image:
    try:
        return Image.fromarray(
            simplejpeg.decode_jpeg(data, min_height=least, min_width=least, min_factor=2)
        )
    # it refuses what libjpeg only warns of; Pillow does not
    except ValueError:
        return _rgb(image)


def _rgb(image: Image.Image) -> Image.Image:
    # Pillow would clip 16-bit grey to white
    if image.mode.startswith("I"):
        values = np.asarray(image)
        clear = image.info.get("transparency")
        image = Image.fromarray(
            (values >> 8 if values.max(initial=0) > 255 or image.mode != "I" else values)
            .clip(0, 255)
            .astype(np.uint8)
        )
        if clear is not None:
            image.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
