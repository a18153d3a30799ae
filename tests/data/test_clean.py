"""Cleaning of captions and texts."""

import pytest

from emu_jax.data import clean


@pytest.mark.parametrize(
    "caption, left",
    [
        (
            "London, UK - January 12, 2018: crowd on a bridge, aerial. 4k footage, 60 fps",
            "crowd on a bridge, aerial",
        ),
        ("MOSCOW - CIRCA JUNE 2014: Red Square", "Red Square"),
        ("Time lapse of clouds - Full HD stock footage", "Time lapse of clouds"),
        ("Girl, 4k video, 3840x2160, 24fps.", "Girl."),
        ("Loop [4K 60fps] of a fish", "Loop of a fish"),
        ("Close up of hands typing on a laptop in 4K.", "Close up of hands typing on a laptop."),
        ("1080p", ""),
        ("A dog runs in the park, slow motion", "A dog runs in the park, slow motion"),
        ("Kids playing in 2012: a year", "Kids playing in 2012: a year"),
        ("Man shows hd sign", "Man shows hd sign"),
        ("  two\tspaces \n", "two spaces"),
    ],
)
def test_a_video_caption_without_its_metadata(caption, left):
    assert clean.clean_video_caption(caption) == left


@pytest.mark.parametrize(
    "caption",
    [
        "a",
        "犬",
        "😀",
        "собака",
        "photo of v1.5 icon",
        "no no",
        "photo 12",
        "image 2024",
        "Section 2.4: an example.com page",
    ],
)
def test_captions(caption):
    assert clean.junk_reason(caption) == ""


@pytest.mark.parametrize(
    "caption, reason",
    [
        ("12345", "no letter"),
        ("--- ...", "no letter"),
        ("IMG_1234.JPG", "name"),
        ("my photo (2).png", "name"),
        ("DSC0001", "name"),
        ("http://a.b/c", "URL"),
        ("www.example.com", "URL"),
        ("aaaaaaaaaa", "repeats"),
        ("buy " * 9, "repeats"),
    ],
)
def test_junk(caption, reason):
    assert reason in clean.junk_reason(caption.strip())


def test_text_of_bytes():
    assert (
        clean.decode_text("\ufeffé\r\n\rx".encode()) == "é\n\nx"
        and clean.decode_text("é".encode("utf-16")) == "é"
    )
    with pytest.raises(ValueError, match="not UTF-8"):
        clean.decode_text("é".encode("latin-1"))
    assert clean.collapse_whitespace(" a\u00a0\x07 b\n") == "a b"
