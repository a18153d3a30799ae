"""Decoding of images: modes, orientation, sizes, and broken files."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from emu_jax.data import images


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.fixture
def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))


def test_pixels_of_the_right_size_are_kept():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    decoded = images.decode(encoded(Image.fromarray(pixels)), 32)
    assert decoded.dtype == np.uint8 and (decoded == pixels).all()


def test_others_are_squashed_not_cropped(photo):
    decoded = images.decode(encoded(photo), 28)
    assert (decoded == np.array(photo.resize((28, 28), Image.Resampling.BICUBIC))).all()
    assert decoded.shape == (28, 28, 3)


@pytest.mark.parametrize(
    "mode, format",
    [("1", "PNG"), ("L", "PNG"), ("P", "PNG"), ("CMYK", "TIFF"), ("YCbCr", "TIFF"), ("L", "BMP")],
)
def test_every_mode_becomes_rgb(mode, format):
    grey = Image.new("L", (8, 8), 255)
    grey.paste(0, (0, 0, 8, 4))
    decoded = images.decode(encoded(grey.convert(mode), format), 8)
    assert decoded.shape == (8, 8, 3)
    assert decoded[:4].max() <= 2 and decoded[4:].min() >= 253


def test_sixteen_bits_lose_their_lower_eight():
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    assert (images.decode(encoded(Image.fromarray(values)), 8) == (values >> 8)[..., None]).all()


def test_one_of_sixteen_bit_greys_may_be_transparent():
    values = np.array([[1000, 1001]], np.uint16)
    assert images.decode_full(encoded(Image.fromarray(values), transparency=1001))[
        ..., 0
    ].tolist() == [[3, 255]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_shows_white(mode):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 8, 4))
    decoded = images.decode(encoded(image.convert(mode)), 8)
    assert (decoded[:4] == 0).all() and (decoded[4:] == 255).all()


def test_half_transparent_is_mixed_with_white():
    assert (images.decode(encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 51))), 4) == 204).all()


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    decoded = images.decode(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), 8)
    assert (decoded == (255, 0, 0)).all()


def bomb():
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


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs(photo, monkeypatch):
    with pytest.raises(ValueError, match="not a usable image"):
        images.decode(bomb(), 16)
    monkeypatch.setattr(images, "MAX_PIXELS", 40 * 60 - 1)
    with pytest.raises(ValueError, match="60 x 40 pixels are over the limit of 2399"):
        images.decode(encoded(photo), 16)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_files_cut_short(photo, format):
    whole = encoded(photo, format)
    images.decode(whole, 16)
    for length in (0, 10, len(whole) // 2):
        with pytest.raises(ValueError) as caught:
            images.decode(whole[:length], 16)
        assert "\n" not in str(caught.value)


def test_bytes_that_are_not_an_image():
    for data in (b"", b"<html>not found</html>", bytes(1000), np.random.default_rng(0).bytes(1000)):
        reasons = []
        for _ in range(2):
            with pytest.raises(ValueError, match="not a usable image") as caught:
                images.decode(data, 16)
            reasons.append(str(caught.value))
        # Reasons are written to the cards of builds, which are compared by bytes, so they must not
        # contain memory addresses.
        assert reasons[0] == reasons[1]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_stand_upright(photo, orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo, format, exif=exif)
    assert (
        images.decode_full(data)
        == np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    ).all()
    assert images.decode_full(data).shape[:2] == ((40, 60) if orientation < 5 else (60, 40))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}], ids=str)
def test_jpegs_are_bit_equal_to_pillow(photo, mode, options):
    data = encoded(photo.convert(mode), "JPEG", **options)
    assert (
        images.decode_full(data) == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    ).all()


def test_scaled_decoding_is_near_the_whole():
    """A JPEG much larger than needed is decoded at a fraction of its size, with little error."""
    smooth = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    ).resize((480, 320), Image.Resampling.BICUBIC)
    data = encoded(smooth, "JPEG", quality=95)
    whole = np.asarray(
        Image.open(io.BytesIO(data)).resize((48, 48), Image.Resampling.BICUBIC)
    ).astype(int)
    difference = np.abs(images.decode(data, 48) - whole)
    assert 0 < difference.max() <= 6 and difference.mean() < 0.5


def test_fits(photo):
    data = encoded(photo)
    assert images.decode(data, 20).shape == images.decode(data, 20, "centre").shape == (20, 20, 3)
    wide = images.decode(data, 20, "random")
    assert wide.shape == (20, 30, 3) and (images.decode(data, 20, "centre") == wide[:, 5:25]).all()


def test_too_many_bytes(photo, monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="bytes are over the limit of 100"):
        images.decode_full(encoded(photo))


def test_formats_that_start_programs_are_refused():
    with pytest.raises(ValueError, match="not a usable image"):
        images.decode_full(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")


def test_frames_are_stored_nearly_as_they_are(photo):
    smooth = np.asarray(photo.resize((6, 4)).resize((60, 40), Image.Resampling.BICUBIC))
    assert images.encode(smooth) == images.encode(smooth.copy())
    assert np.abs(images.decode_full(images.encode(smooth)).astype(int) - smooth).mean() < 2
