"""Videos with WebVTT or SubRip beside them (NAME.mp4 with NAME.vtt, NAME.en.vtt or NAME.srt), made
into storyboards as Emu's are.

Frame k is at k times --every seconds; frames and cues are sorted by time, a frame before a cue of
its time, and the cues between two frames are joined by a space and stand before the second. What is
too long is cut. Read next: webpages.py.
"""

import heapq
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from emu_jax.data import clean, subtitles, video
from emu_jax.data.documents import Document, Picture, Skipped, Text
from emu_jax.data.sources import archives
from emu_jax.data.sources.options import SourceOptions
from emu_jax.data.sources.storyboards import Part, pieces
from emu_jax.data.sources.tables import InputShard

SUBTITLES = (".vtt", ".srt")
# videos in a unit
FILES = 20
MAX_SUBTITLES = 64 * 2**20


def list_shards(path: Path) -> list[InputShard]:
    """A unit a tar (KEY.mp4, KEY.vtt), and one for 20 videos of a folder."""
    found = archives.list_files(path, (*archives.TARS, *video.SUFFIXES))
    root = path if path.is_dir() else path.parent
    loose = [
        file.relative_to(root).as_posix() for file in found if not file.name.endswith(archives.TARS)
    ]
    return [InputShard(file) for file in found if file.name.endswith(archives.TARS)] + [
        InputShard(root, tuple(loose[first : first + FILES]))
        for first in range(0, len(loose), FILES)
    ]


def read_documents(shard: InputShard, options: SourceOptions) -> Iterator[Document | Skipped]:
    """The videos of one unit; ids are names of files, or the tar's keys, followed by "#1", "#2",
    ... for later pieces.
    """
    if shard.names:
        folder = archives.open_archive(shard.path)
        for name in shard.names:
            try:
                beside = _beside(name, shard.path)
                yield from _documents(
                    name,
                    folder.read(name),
                    folder.read(beside, MAX_SUBTITLES) if beside else None,
                    shard,
                    options,
                )
            except ValueError as error:
                yield Skipped(name, str(error))
        return
    try:
        for key, files in archives.webdataset_samples(shard.path):
            film = next(
                (files[suffix[1:]] for suffix in video.SUFFIXES if suffix[1:] in files), None
            )
            said = next(
                (files[name] for name in sorted(files) if name.endswith(("vtt", "srt"))), None
            )
            try:
                yield from _documents(key, film, said, shard, options)
            except ValueError as error:
                yield Skipped(key, str(error))
    except ValueError as error:
        yield Skipped(shard.path.name, str(error))


def _beside(name: str, root: Path) -> str | None:
    """The subtitles of the video `name`: its stem with .vtt or .srt, or with a language between,
    the first in alphabetical order.
    """
    folder = (root / name).parent
    stem = Path(name).stem
    files = [
        file.name
        for file in folder.iterdir()
        if file.name.startswith(f"{stem}.") and file.suffix.lower() in SUBTITLES
    ]
    files = sorted(
        (file for file in files if file.count(".") <= stem.count(".") + 2),
        key=lambda file: (file.count("."), Path(file).suffix != ".vtt", file),
    )
    return (Path(name).parent / files[0]).as_posix() if files else None


def _documents(
    id: str, film: bytes | None, said: bytes | None, shard: InputShard, options: SourceOptions
) -> Iterator[Document | Skipped]:
    if film is None:
        raise ValueError("no video")
    if said is None:
        raise ValueError("no subtitles")
    try:
        text = clean.decode_text(said)
    except ValueError:
        raise ValueError("the subtitles are not UTF-8") from None
    cues = [(cue.start, 1, cue.text) for cue in subtitles.parse(text)]
    frames = ((time, 0, frame) for time, frame in video.frames_by_time(film, options.every))
    yield from pieces(
        _interleaved(heapq.merge(cues, frames, key=lambda item: item[:2])),
        Document(id, (), shard.name),
        options,
    )


def _interleaved(line: Iterable[tuple]) -> Iterator[Part]:
    """Parts of (time, is it text, text or frame), in order of time."""
    waiting: list[tuple[float, str]] = []
    for time, is_text, content in itertools.chain(line, [(None, 0, None)]):
        if is_text:
            waiting.append((time, content))
            continue
        if waiting:
            yield Text(" ".join(text for _, text in waiting), time=waiting[0][0])
            waiting = []
        if content is not None:
            yield Picture(content, time=time)
