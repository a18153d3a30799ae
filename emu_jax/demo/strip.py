"""An image for the README: some drawings, and what the decoder draws for them.

The drawings are sampled from the training names by a seed, not picked. They are from OpenMoji, "the
open-source emoji and icon project", CC BY-SA 4.0; a page that shows the image must say so.
"""

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from emu_jax.config import UserError
from emu_jax.data import sources
from emu_jax.data.documents import pixels_of, texts_of
from emu_jax.demo import decoding
from emu_jax.demo.decoding import Decoded
from emu_jax.demo.model import Model, read_config

COUNT = 12
# Sizes in pixels: side of an image, gap between images, width of the row labels, height of a line.
SIDE = 96
GAP = 8
LABELS = 148
LINE = 22
# Font size; a README shows the strip 880 pixels wide, at two thirds of its size.
FONT = 18
# Maximum number of characters in a line of a name below an image.
WRAP = 11
ROWS = {
    "image": "original",
    "encoded": "drawn from its\nvisual tokens",
    "regressed": "drawn from\nits name",
}


def sample(directory: str, decoder: str, data: str, seed: int) -> list[Decoded]:
    """Decode COUNT training drawings, chosen by the seed, from their tokens and their names.

    directory, decoder: runs of the stages `emu` and `decoder`, or checkpoints of them. data: the
    folder that `build` wrote. Raises UserError if one is missing or has too few drawings.
    """
    config = read_config(directory)
    names = sources.open_source(f"{data}/names:train", config["model"]["vision"]["image"])
    if len(names) < COUNT:
        raise UserError(f"'{data}' has {len(names)} training drawings; the strip shows {COUNT}")
    model = Model.load(directory, config, data)
    diffusion = model.load_decoder(decoder)
    chosen = np.random.default_rng(seed).choice(len(names), COUNT, replace=False)
    images = []
    captions = []
    for document in (names[int(i)] for i in chosen):
        images += pixels_of(document)
        captions += [text.text for text in texts_of(document)]
    return decoding.decode_images(model.session, diffusion, captions, np.stack(images))


def draw(decoded: list[Decoded]) -> Image.Image:
    """Lay out the strip: a column for each drawing, with its name below, and labelled rows."""
    names = [textwrap.wrap(one.caption, WRAP, max_lines=3, placeholder=" …") for one in decoded]
    width = LABELS + len(decoded) * (SIDE + GAP)
    below = len(ROWS) * (SIDE + GAP)
    height = below + max(map(len, names)) * LINE + GAP
    strip = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(strip)
    font = ImageFont.load_default(FONT)
    for row, (field, label) in enumerate(ROWS.items()):
        top = row * (SIDE + GAP) + GAP // 2
        middle = (LABELS - 2 * GAP, top + SIDE // 2)
        pen.multiline_text(middle, label, fill="#444", font=font, anchor="rm", align="right")
        for column, one in enumerate(decoded):
            image = Image.fromarray(getattr(one, field))
            large = image.resize((SIDE, SIDE), Image.Resampling.NEAREST)
            strip.paste(large, (LABELS + column * (SIDE + GAP), top))
    for column, lines in enumerate(names):
        centre = LABELS + column * (SIDE + GAP) + SIDE // 2
        for number, line in enumerate(lines):
            pen.text((centre, below + number * LINE), line, fill="#444", font=font, anchor="ma")
    return strip
