"""Frames by number and by time, of clips whose frames can be told apart."""

import io
import struct

import av
import numpy as np
import pytest

from emu_jax.data import video
from tests.support.formats import film


def test_centres_are_those_of_the_release():
    assert video.segment_centres(9) == [0, 1, 2, 3, 4, 5, 6, 7] and video.segment_centres(81) == [
        5,
        15,
        25,
        35,
        45,
        55,
        65,
        75,
    ]
    assert video.segment_centres(1) == [0] * 8 and max(video.segment_centres(3)) == 2


def test_frames_by_number_and_by_time():
    data = film(None, 20, rate=10)

    def number(frame):
        return round((float(frame.mean()) - 10) / 10)

    assert [
        (time, number(frame))
        for time, frame in video.frames_by_number(data, lambda count: [count - 1, 0, 3])
    ] == [(1.9, 19), (0.0, 0), (0.3, 3)]
    assert [(time, number(frame)) for time, frame in video.frames_by_time(data, 0.75)] == [
        (0.0, 0),
        (0.75, 7),
        (1.5, 15),
    ]


def test_a_film_shot_with_the_phone_upright_stands_upright():
    """The file asks for a quarter turn clockwise: the stored left is shown at the top."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
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
    data = file.getvalue()
    track = data.index(b"tkhd")
    data = data[:track] + data[track:].replace(plain, turned, 1)
    ((_, frame),) = video.frames_by_number(data, lambda count: [0])
    assert frame.shape == (64, 48, 3) and frame[:28].mean() > 250 and frame[36:].mean() < 5


@pytest.mark.parametrize(
    "suffix, codec",
    [
        ("mp4", "mpeg4"),
        ("mkv", "mpeg4"),
        ("avi", "mpeg4"),
        ("mpg", "mpeg2video"),
        ("mov", "mpeg4"),
        ("ogv", "libvpx"),
        ("webm", "vp9"),
        ("y4m", "wrapped_avframe"),
        ("gif", "gif"),
    ],
)
def test_every_container_is_read(tmp_path, suffix, codec):
    if codec not in av.codecs_available:
        pytest.skip(f"FFmpeg was built without {codec}")
    path = tmp_path / f"clip.{suffix}"
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width = 64
        stream.height = 48
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 255, np.uint8), format="rgb24")
            container.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
        container.mux(stream.encode())
    ((_, frame),) = video.frames_by_number(path.read_bytes(), lambda count: [0])
    assert frame.shape == (48, 64, 3) and frame.mean() > 240


def test_a_playlist_is_not_a_video(tmp_path, monkeypatch):
    """A playlist names other files, which FFmpeg would read."""
    monkeypatch.chdir(tmp_path)
    film(tmp_path / "secret.mp4", 9)
    for data in (
        b"ffconcat version 1.0\nfile 'secret.mp4'\nduration 1\n",
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:0.9,\nfile:secret.mp4\n#EXT-X-ENDLIST\n",
    ):
        with pytest.raises(ValueError, match="not a usable video"):
            video.frames_by_number(data, lambda count: [0])


@pytest.mark.parametrize("data", [b"", b"no video", film(None, 9)[:400]])
def test_bytes_that_are_not_a_video(data):
    for frames in (
        lambda: video.frames_by_number(data, lambda count: [0]),
        lambda: list(video.frames_by_time(data, 1.0)),
    ):
        with pytest.raises(ValueError, match="^not a usable video: ") as caught:
            frames()
        assert "\n" not in str(caught.value)
