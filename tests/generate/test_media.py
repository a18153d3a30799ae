"""Files become pixels; other files give one clear line."""

import builtins
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emu_jax.config import UserError
from emu_jax.data import video
from emu_jax.generate import media

av = pytest.importorskip("av")


def write_video(path, count, size=(32, 48), codec="mpeg4", **options):
    """Write a video whose frames grow brighter."""
    with av.open(str(path), "w", **options) as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(
                np.full((*size, 3), 255 * number // max(count - 1, 1), np.uint8), format="rgb24"
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize(
    "count, frames",
    [
        (8, [0, 1, 2, 3, 4, 4, 5, 6]),
        (1, [0] * 8),
        (81, [5, 15, 25, 35, 45, 55, 65, 75]),
        (17, [1, 3, 5, 7, 9, 11, 13, 15]),
    ],
)
def test_the_releases_frames(count, frames):
    assert video.segment_centres(count) == frames


def test_a_video(tmp_path):
    write_video(tmp_path / "film.mp4", 41)
    frames = media.load_video(tmp_path / "film.mp4", 28)
    assert [frame.shape for frame in frames] == [(28, 28, 3)] * 8
    np.testing.assert_allclose(
        [frame.mean() for frame in frames],
        [255 * at / 40 for at in video.segment_centres(41)],
        atol=8,
    )


def test_an_image_is_squashed(tmp_path):
    Image.fromarray(np.full((5, 50, 3), 90, np.uint8)).save(tmp_path / "wide.png")
    assert (media.load_image(tmp_path / "wide.png", 28) == 90).all()


def huge(path):
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )


def truncated(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda path: path.write_text("hello"), "not a usable image: cannot identify"),
        (truncated, "not a usable image: .*truncated"),
        (huge, "not a usable image: .*limit"),
        (lambda path: path.write_bytes(b""), "not a usable image"),
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "Is a directory"),
    ],
    ids=["text", "truncated", "huge", "empty", "missing", "folder"],
)
def test_unusable_images(tmp_path, make, told):
    make(tmp_path / "x.png")
    with pytest.raises(UserError, match=rf"x\.png'.*{told}") as error:
        media.load_image(tmp_path / "x.png", 28)
    assert "\n" not in str(error.value)


def sound(path):
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def playlist(path):
    """Write a playlist that names another file, which must not be read."""
    write_video(path.with_name("other.mp4"), 9)
    path.write_text("ffconcat version 1.0\nfile other.mp4\n")


def claims(path):
    """Write a video whose header claims 50,000 x 50,000 pixels."""
    write_video(path, 9, (64, 64), "rawvideo", format="avi")
    data = path.read_bytes()
    path.write_bytes(data.replace(struct.pack("<II", 64, 64), struct.pack("<II", 50_000, 50_000)))


def cut(path):
    write_video(path, 200, (96, 96))
    path.write_bytes(path.read_bytes()[:400])


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda path: path.write_text("hello"), "is not a usable video"),
        (lambda path: path.write_bytes(b""), "is not a usable video"),
        (sound, "has no video stream"),
        (playlist, "not a usable video"),
        (claims, "2500000000|50000 x 50000|not a usable video"),
        (lambda path: write_video(path, 0), "not a usable video|no frames|no video"),
        (cut, "not a usable video"),
        (lambda path: None, "No such file"),
    ],
    ids=["text", "empty", "sound", "playlist", "huge", "frameless", "truncated", "missing"],
)
def test_unusable_videos(tmp_path, make, told):
    make(tmp_path / "x.mp4")
    with pytest.raises(UserError, match=rf"x\.mp4'.*({told})") as error:
        media.load_video(tmp_path / "x.mp4", 28)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "ffconcat version 1.0\nfile 'secret.mp4'\nduration 1\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:0.9,\nsecret.mp4\n#EXT-X-ENDLIST\n",
    ],
    ids=["concat", "hls"],
)
def test_a_playlist_is_not_a_video(tmp_path, monkeypatch, text):
    """A playlist names other files, which FFmpeg would read."""
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "secret.mp4", 20)
    (tmp_path / "x.mp4").write_text(text)
    with pytest.raises(UserError, match="is not a usable video"):
        media.load_video(tmp_path / "x.mp4", 28)


def test_a_film_shot_with_the_phone_upright_stands_upright(tmp_path):
    """The file asks for a quarter turn clockwise: the stored left is shown at the top."""
    with av.open(str(tmp_path / "film.mp4"), "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = 64
        stream.height = 48
        stream.pix_fmt = "yuv420p"
        pixels = np.zeros((48, 64, 3), np.uint8)
        pixels[:, :32] = 255
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    plain, turned = (
        struct.pack(">9i", *numbers, 1 << 30)
        for numbers in ((65536, 0, 0, 0, 65536, 0, 0, 0), (0, 65536, 0, -65536, 0, 0, 48 << 16, 0))
    )
    data = (tmp_path / "film.mp4").read_bytes()
    track = data.index(b"tkhd")
    (tmp_path / "film.mp4").write_bytes(data[:track] + data[track:].replace(plain, turned, 1))
    frame = media.load_video(tmp_path / "film.mp4", 28)[0]
    assert frame[:12].mean() > 240 and frame[16:].mean() < 15


def test_without_av(monkeypatch):
    real = builtins.__import__

    def absent(name, *rest):
        if name == "av":
            raise ModuleNotFoundError(name=name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match=r"x.mp4': .* needs the package av: .* '\.\[data\]'"):
        media.load_video(Path("x.mp4"), 28)


def test_which_texts_name_a_media_file(tmp_path):
    truncated(tmp_path / "x.PNG")
    assert (
        media.is_media_file(str(tmp_path / "x.PNG"))
        and not media.is_media_file(str(tmp_path / "y.png"))
        and not media.is_media_file(str(tmp_path))
    )
    assert not media.is_media_file("a photo of a dog.png\nand more") and not media.is_media_file(
        "x" * 5000 + ".png"
    )
    assert media.is_video(Path("a.MP4")) and not media.is_video(Path("a.png"))
