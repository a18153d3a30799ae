"""The README's strip: small enough to show, with every image in its place."""

import io

import numpy as np

from emu_jax.demo import strip
from emu_jax.demo.decoding import Decoded


def test_images_stand_in_labelled_rows_and_the_file_is_small():
    images = np.random.default_rng(0).integers(0, 256, (3, 12, 32, 32, 3), np.uint8)
    decoded = []
    for k in range(12):
        decoded.append(Decoded(f"a name of {k} long words", *images[:, k]))
    drawn = strip.draw(decoded)
    pixels = np.array(drawn)
    for row in range(3):
        for column in range(12):
            top = row * (strip.SIDE + strip.GAP) + strip.GAP // 2
            left = strip.LABELS + column * (strip.SIDE + strip.GAP)
            shown = pixels[top : top + strip.SIDE : 3, left : left + strip.SIDE : 3]
            np.testing.assert_array_equal(shown, images[row, column])
    file = io.BytesIO()
    drawn.save(file, "PNG", optimize=True)
    # Noise is the worst case.
    assert len(file.getvalue()) < 300_000
