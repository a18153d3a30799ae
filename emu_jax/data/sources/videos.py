"""Videos with captions: video2dataset's tars, or video files with caption files.

A tar contains KEY.mp4, KEY.txt and KEY.json; the caption of NAME.mp4 is in NAME.txt or NAME.json.

A document is 8 frames (--frames), then the caption without metadata (clean.py). Read next:
storyboards.py.
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
# Number of video files (outside tars) in a shard.
FILES = 100


def list_shards(path: Path, files: int = FILES) -> list[InputShard]:
    """One shard per tar, and one per `files` video files outside tars."""
    found = archives.list_files(path, (*archives.TARS, *video.SUFFIXES))
    root = path if path.is_dir() else path.parent
    tars = [file for file in found if file.name.endswith(archives.TARS)]
    videos = [file for file in found if not file.name.endswith(archives.TARS)]
    loose = [file.relative_to(root).as_posix() for file in videos]
    starts = range(0, len(loose), files)
    shards = [InputShard(file) for file in tars]
    return shards + [InputShard(root, tuple(loose[start : start + files])) for start in starts]


def read_documents(shard: InputShard, options: SourceOptions) -> Iterator[Document | Skipped]:
    """The videos of one shard; ids are the tar's keys, or file names."""
    if not shard.names:
        try:
            for key, files in archives.webdataset_samples(shard.path):
                yield _document(key, files, shard, options)
        except ValueError as error:
            yield Skipped(shard.path.name, str(error), whole_file=True)
        return
    folder = archives.open_archive(shard.path)
    for name in shard.names:
        try:
            files = _loose_files(folder, name)
        except ValueError as error:
            yield Skipped(name, str(error))
        else:
            yield _document(name, files, shard, options)


def _loose_files(folder: archives.Files, name: str) -> dict[str, bytes]:
    """{extension: bytes} of a video and its caption files, like a sample of a tar."""
    stem, _, extension = name.rpartition(".")
    files = {}
    for one in (extension, "txt", "json"):
        if f"{stem}.{one}" in folder:
            files[one.lower()] = folder.read(f"{stem}.{one}")
    return files


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
    except UnicodeError as error:
        return Skipped(id, f"caption: {error}")
    except (ValueError, RecursionError):
        return Skipped(id, "the .json file is broken")
    caption = clean.clean_video_caption(text) if isinstance(text, str) else ""
    if not caption:
        reason = "caption is only metadata" if str(text).strip() else "no caption"
        return Skipped(id, reason)
    if not options.min_chars <= len(caption) <= options.max_chars:
        return Skipped(
            id,
            f"caption length is not between {options.min_chars} and {options.max_chars} characters",
        )
    try:
        shown = frames(data, id, options)
    except ValueError as error:
        return Skipped(id, str(error))
    provenance = {"url": meta["url"]} if isinstance(meta.get("url"), str) else {}
    return Document(id, (*shown, Text(caption)), shard.name, provenance)


def frames(data: bytes, id: str, options: SourceOptions) -> list[Picture]:
    """`options.frames` frames of a video, chosen as `options.choose` says.

    A random choice depends only on `id`. Raises a one-line ValueError if decoding fails.
    """
    seed = int.from_bytes(hashlib.sha256(id.encode()).digest()[:8], "little")
    rng = np.random.default_rng(seed)

    def numbers(count: int) -> list[int]:
        if options.choose == "centres":
            return video.segment_centres(count, options.frames)
        return sorted(rng.integers(0, count, options.frames).tolist())

    chosen = video.frames_by_number(data, numbers)
    return [Picture(frame, time=round(time, 3)) for time, frame in chosen]
