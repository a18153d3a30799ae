"""Videos with captions: video2dataset's WebDataset tars (KEY.mp4, KEY.txt, KEY.json), and plain
video files with NAME.txt or NAME.json beside.

A document is 8 frames, one after another, then the caption without its metadata (clean.py). Read
next: storyboards.py.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from emu_jax.data import clean, video
from emu_jax.data.documents import Document, Picture, Skipped, Text
from emu_jax.data.sources import archives
from emu_jax.data.sources.options import SourceOptions
from emu_jax.data.sources.tables import InputShard

EXTENSIONS = tuple(suffix[1:] for suffix in video.SUFFIXES)
# video files in a unit
FILES = 100


def list_shards(path: Path) -> list[InputShard]:
    """A unit a tar, and one for 100 video files of a folder."""
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
    """The videos of one unit; ids are the tar's keys, or names of files."""
    if shard.names:
        folder = archives.open_archive(shard.path)
        for name in shard.names:
            stem = name[: name.rindex(".")]
            files = {}
            try:
                for extension in (name[len(stem) + 1 :], "txt", "json"):
                    if f"{stem}.{extension}" in folder:
                        files[extension.lower()] = folder.read(f"{stem}.{extension}")
            except ValueError as error:
                yield Skipped(name, str(error))
                continue
            yield _document(name, files, shard, options)
        return
    try:
        for key, files in archives.webdataset_samples(shard.path):
            yield _document(key, files, shard, options)
    except ValueError as error:
        yield Skipped(shard.path.name, str(error))


def _document(
    id: str, files: dict[str, bytes], shard: InputShard, options: SourceOptions
) -> Document | Skipped:
    data = next((files[name] for name in EXTENSIONS if name in files), None)
    if data is None:
        return Skipped(id, "no video")
    try:
        meta = json.loads(clean.decode_text(files["json"])) if "json" in files else {}
        meta = meta if isinstance(meta, dict) else {}
        text = (
            clean.decode_text(files["txt"])
            if files.get("txt", b"").strip()
            else meta.get("caption") or meta.get("title") or ""
        )
    except (ValueError, RecursionError) as error:
        return Skipped(
            id, f"caption: {error}" if str(error).startswith("the text") else "the .json is broken"
        )
    caption = clean.clean_video_caption(text) if isinstance(text, str) else ""
    if not caption:
        return Skipped(
            id, "no caption" if not str(text).strip() else "the caption is metadata only"
        )
    if not options.min_chars <= len(caption) <= options.max_chars:
        return Skipped(
            id, f"the caption is not of {options.min_chars} to {options.max_chars} characters"
        )
    try:
        shown = frames(data, id, options)
    except ValueError as error:
        return Skipped(id, str(error))
    provenance = {"url": meta["url"]} if isinstance(meta.get("url"), str) else {}
    return Document(id, (*shown, Text(caption)), shard.name, provenance)


def frames(data: bytes, id: str, options: SourceOptions) -> list[Picture]:
    """`options.frames` frames of a video, by `options.choose`. Raises ValueError for what cannot be
    decoded.
    """
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(id.encode()).digest()[:8], "little"))
    numbers = {
        "centres": lambda count: video.segment_centres(count, options.frames),
        "random": lambda count: sorted(rng.integers(0, count, options.frames).tolist()),
    }[options.choose]
    return [
        Picture(frame, time=round(time, 3)) for time, frame in video.frames_by_number(data, numbers)
    ]
