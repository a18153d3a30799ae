"""Fuzzing: mutated input gives a document or a reason to skip it, never a crash or a hang.

Native decoders may crash, so they run in a child process. The test marked long runs as many
mutations as are run before a release.
"""

import json
import multiprocessing
import random
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from emu_jax.config import UserError
from emu_jax.data import clean, images, inspection, subtitles
from emu_jax.data.documents import Document, Skipped
from emu_jax.data.sources.options import SourceOptions
from tests.support.formats import encoded, film, picture, tar


def mutated(original: bytes, rng: random.Random) -> bytes:
    """`original` with some bytes changed, a piece removed or repeated, or its end cut off."""
    data = bytearray(original)
    for _ in range(rng.choice((1, 1, 3, 20))):
        kind = rng.randrange(4)
        place = rng.randrange(len(data))
        if kind == 0 or len(data) < 40:
            data[place] = rng.randrange(256)
        elif kind == 1:
            del data[place : place + rng.randrange(1, 30)]
        elif kind == 2:
            data[place:place] = data[place : place + rng.randrange(1, 30)]
        elif rng.random() < 0.2:
            del data[max(20, place) :]
    return bytes(data)


def try_images(count: int, seed: int) -> None:
    rng = random.Random(seed)
    photo = picture(size=(40, 30))
    grey16 = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40))
    files = [
        encoded(photo),
        encoded(photo, progressive=True),
        encoded(photo.convert("CMYK")),
        encoded(photo, "PNG"),
        encoded(photo.convert("P"), "PNG"),
        encoded(photo.convert("RGBA"), "WEBP"),
        encoded(photo, "GIF"),
        encoded(grey16, "PNG"),
        encoded(photo, "BMP"),
        encoded(photo, "TIFF"),
    ]
    good = 0
    for number in range(count):
        try:
            pixels = images.decode(mutated(files[number % len(files)], rng), 16)
            good += pixels.shape == (16, 16, 3)
        except ValueError as error:
            assert "\n" not in str(error)
    assert 0 < good < count


def try_archives(count: int, seed: int, folder: str) -> None:
    """Every record of a mutated tar, zip or parquet file becomes a document or is skipped."""
    rng = random.Random(seed)
    root = Path(folder)
    photo = encoded(picture())
    pairs = [
        {"__key__": f"{k}", "jpg": photo, "txt": f"number {k}", "json": json.dumps({"url": "x"})}
        for k in range(3)
    ]
    clip = {
        "__key__": "v",
        "mp4": film(None, 9),
        "txt": "a clip",
        "vtt": "WEBVTT\n\n00:00.000 --> 00:01.000\nhi\n",
    }
    tars, films = (tar(root / "t.tar", *samples).read_bytes() for samples in (pairs, [clip]))
    pyarrow.parquet.write_table(
        pyarrow.table({"key": ["0", "1"], "jpg": [photo, photo], "txt": ["one", "two"]}),
        root / "t.parquet",
    )
    table = (root / "t.parquet").read_bytes()
    with zipfile.ZipFile(root / "t.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.html", "<p>words<img src=a.jpg>")
        file.writestr("a.jpg", encoded(picture(size=(90, 90))))
    pages = (root / "t.zip").read_bytes()
    makes = [
        ("pairs", "tar", tars),
        ("pairs", "parquet", table),
        ("html", "zip", pages),
        ("videos", "tar", films),
        ("subtitled", "tar", films),
    ]
    seen = set()
    for number in range(count):
        kind, suffix, data = makes[number % len(makes)]
        path = root / f"{number}.{suffix}"
        path.write_bytes(mutated(data, rng))
        try:
            for document in inspection.inspect_documents(kind, path, SourceOptions()):
                seen.add((kind, type(document)))
                assert isinstance(document, Document) or "\n" not in document.reason
        # The archive as a whole cannot be read.
        except UserError as error:
            assert "\n" not in str(error)
        path.unlink()
    assert {kind for kind, _ in seen} == {"pairs", "html", "videos", "subtitled"} and (
        "pairs",
        Skipped,
    ) in seen


def in_a_child(function, *arguments, seconds: float) -> None:
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"{function.__name__} hangs")
    assert process.exitcode == 0, f"{function.__name__} ended with {process.exitcode}"


def test_images():
    in_a_child(try_images, 300, 0, seconds=300)


def test_archives(tmp_path):
    in_a_child(try_archives, 60, 0, str(tmp_path), seconds=300)


def test_subtitles():
    rng = random.Random(0)
    files = [
        b"WEBVTT\n\n00:00.000 --> 00:01.000\n<v A>hi <i>you</i> &amp; me<00:00.500><c>x</c>\n\n"
        b"1\n00:01.000 --> 00:02.000\nbye\n",
        b"1\r\n00:00:01,000 --> 00:00:02,000\r\n{\\an8}hi\r\n\r\n"
        b"2\r\n00:00:03,000 --> 00:00:04,000\r\nbye\r\n",
    ]
    good = 0
    for number in range(500):
        try:
            cues = subtitles.parse(mutated(files[number % 2], rng).decode("utf-8", "replace"))
            assert all("\n" not in cue.text and cue.text for cue in cues)
            good += 1
        except ValueError as error:
            assert str(error) == "no cues in the subtitles"
    assert 200 < good < 500


def test_texts_that_make_regular_expressions_backtrack():
    """An expression that backtracks would hang here."""
    for text in (
        "<" * 50_000,
        "<a" * 50_000,
        "4k " * 20_000,
        "a, " * 20_000 + "2018:",
        "[" * 20_000 + "4k",
        "- " * 20_000,
        "x." * 20_000 + "jpg",
    ):
        subtitles.parse("1\n00:00:01,000 --> 00:00:02,000\n" + text + "\n")
        clean.clean_video_caption(text[:100_000])
        clean.junk_reason(text)


@pytest.mark.long
def test_as_many_mutations_as_before_a_release(tmp_path):
    in_a_child(try_images, 5000, 1, seconds=600)
    in_a_child(try_archives, 2500, 1, str(tmp_path), seconds=1200)
