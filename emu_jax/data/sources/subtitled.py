"""Videos with subtitle files next to them, turned into storyboards like those of Emu.

The subtitles of NAME.mp4 are NAME.vtt, NAME.en.vtt (or another language) or NAME.srt.

Frame k is at k times --every seconds. Frames and cues are sorted by time; at equal times the frame
comes first. The cues between two frames are joined by spaces into one text. Long videos are split.
Read next: webpages.py.
"""

import heapq
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from emu_jax.data import clean, subtitles, video
from emu_jax.data.documents import Document, Picture, Skipped, Text
from emu_jax.data.sources import archives, videos
from emu_jax.data.sources.options import SourceOptions
from emu_jax.data.sources.storyboards import Part, split_document
from emu_jax.data.sources.tables import InputShard

SUBTITLES = (".vtt", ".srt")
# Number of video files (outside tars) in a shard.
FILES = 20
MAX_SUBTITLES = 64 * 2**20


def list_shards(path: Path) -> list[InputShard]:
    """One shard per tar (KEY.mp4, KEY.vtt), and per FILES video files outside tars."""
    return videos.list_shards(path, FILES)


def read_documents(shard: InputShard, options: SourceOptions) -> Iterator[Document | Skipped]:
    """The videos of one shard, split into documents.

    Ids are file names or the tar's keys, with "#1", "#2", ... for later pieces of a video.
    """
    if not shard.names:
        try:
            for key, files in archives.webdataset_samples(shard.path):
                yield from _video(key, *_sample_files(files), shard, options)
        except ValueError as error:
            yield Skipped(shard.path.name, str(error), whole_file=True)
        return
    folder = archives.open_archive(shard.path)
    for name in shard.names:
        try:
            subtitles_name = _subtitles_name(name, shard.path)
            film = folder.read(name)
            cues = folder.read(subtitles_name, MAX_SUBTITLES) if subtitles_name else None
        except ValueError as error:
            yield Skipped(name, str(error))
        else:
            yield from _video(name, film, cues, shard, options)


def _sample_files(files: dict[str, bytes]) -> tuple[bytes | None, bytes | None]:
    """The video and the subtitles of a sample of a tar."""
    extensions = [suffix[1:] for suffix in video.SUFFIXES]
    film = next((files[name] for name in extensions if name in files), None)
    subtitle_names = [name for name in sorted(files) if name.endswith(("vtt", "srt"))]
    return film, files[subtitle_names[0]] if subtitle_names else None


def _video(
    id: str, film: bytes | None, cues: bytes | None, shard: InputShard, options: SourceOptions
) -> Iterator[Document | Skipped]:
    try:
        yield from _documents(id, film, cues, shard, options)
    except ValueError as error:
        yield Skipped(id, str(error))


def _subtitles_name(name: str, root: Path) -> str | None:
    """The name of the subtitles of the video `name`: its stem with .vtt or .srt.

    A language may stand in between, as in NAME.en.vtt. Of several languages, the alphabetically
    first is used.
    """
    folder = (root / name).parent
    stem = Path(name).stem
    candidates = [
        file.name
        for file in folder.iterdir()
        if file.name.startswith(f"{stem}.")
        and file.suffix.lower() in SUBTITLES
        and file.name.count(".") <= stem.count(".") + 2
    ]
    if not candidates:
        return None
    # Prefer names without a language, then .vtt to .srt.
    first = min(candidates, key=lambda file: (file.count("."), Path(file).suffix != ".vtt", file))
    return (Path(name).parent / first).as_posix()


def _documents(
    id: str, film: bytes | None, said: bytes | None, shard: InputShard, options: SourceOptions
) -> Iterator[Document | Skipped]:
    if film is None:
        raise ValueError("no video")
    if said is None:
        raise ValueError("no subtitles")
    try:
        text = clean.decode_text(said)
    except UnicodeError:
        raise ValueError("subtitles are not UTF-8") from None
    # The second entry sorts frames (0) before texts (1) of the same time.
    cues = [(cue.start, 1, cue.text) for cue in subtitles.parse(text)]
    frames = ((time, 0, frame) for time, frame in video.frames_by_time(film, options.every))
    events = heapq.merge(cues, frames, key=lambda event: event[:2])
    yield from split_document(_interleave(events), Document(id, (), shard.name), options)


def _interleave(events: Iterable[tuple[float, int, Any]]) -> Iterator[Part]:
    """The parts of sorted events (time, is_text, content); neighbouring texts are joined."""
    texts: list[str] = []
    start = 0.0
    for time, is_text, content in events:
        if is_text:
            if not texts:
                start = time
            texts.append(content)
            continue
        if texts:
            yield Text(" ".join(texts), time=start)
            texts = []
        yield Picture(content, time=time)
    if texts:
        yield Text(" ".join(texts), time=start)
