"""Encoded bytes to the pixels a model sees: RGB, squashed (not cropped) to a square, bicubic, as Emu's release does it.

Mean and standard deviation are the model's business (models/vision.py). Read next: sources/.
"""
import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image

# Beyond this a file of a few kilobytes could fill the memory ("decompression bomb"). 64 megapixels are 192 MB of RGB.
MAX_PIXELS = 64 * 1024 * 1024


def decode(data: bytes, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """RGB pixels, 0 to 255, of a PNG, JPEG, WebP, GIF (first frame) or whatever else Pillow reads; transparency shows white.

    Raises ValueError, in one line, for what is no image, is cut short, or has more than MAX_PIXELS.
    """
    try:
        image = Image.open(io.BytesIO(data))                  # reads the header only
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are over the limit of {MAX_PIXELS}")
        image = _rgb(image)
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        return np.array(image)
    except Exception as error:                                # on broken files Pillow's readers raise nearly anything
        raise ValueError(" ".join(f"not a usable image: {error}".split())) from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):                         # Pillow would clip 16-bit grey to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
