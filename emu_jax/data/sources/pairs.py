"""Image-text pairs as img2dataset writes them: WebDataset tars (NNNNN.tar: KEY.jpg, KEY.txt,
KEY.json) and parquet (columns key, jpg, txt).

The caption is that of the .txt, or else the "caption" of the .json; the parquet file that
img2dataset puts beside a tar holds no pictures and is passed over. A pair becomes one `Pair`. Read
next: mmc4.py.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from emu_jax.config import UserError
from emu_jax.data import clean, images
from emu_jax.data.documents import Document, Pair, Picture, Skipped
from emu_jax.data.sources import archives, tables
from emu_jax.data.sources.options import SourceOptions
from emu_jax.data.sources.tables import InputShard

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tiff")
SCORES = (
    "similarity",
    "clip_similarity",
    "clip_score",
    "clip_similarity_vitb32",
    "clip_similarity_vitl14",
    "clip_b32_similarity_score",
    "clip_l14_similarity_score",
)
PROVENANCE = ("url", "license", "sha256")


def list_shards(path: Path) -> list[InputShard]:
    """A unit a tar, and one a parquet file that holds pictures."""
    found = archives.list_files(path, (*archives.TARS, ".parquet"))
    with_pictures = [
        file
        for file in found
        if file.suffix != ".parquet" or set(tables.parquet_columns(file)) & set(IMAGES)
    ]
    if not with_pictures:
        raise UserError(
            f"'{path}' holds no pictures: no tar, and no parquet with a column {' or '.join(IMAGES)}"
        )
    return [InputShard(file) for file in with_pictures]


def read_documents(shard: InputShard, options: SourceOptions) -> Iterator[Document | Skipped]:
    """The pairs of one file."""
    if shard.path.suffix == ".parquet":
        for number, row in tables.parquet_rows(shard):
            yield (
                row
                if isinstance(row, Skipped)
                else _row(row, str(row.get("key") or number), shard, options)
            )
        return
    try:
        for key, files in archives.webdataset_samples(shard.path, images.MAX_BYTES):
            yield _sample(key, files, shard, options)
    except ValueError as error:
        yield Skipped(shard.path.name, str(error))


def _sample(
    key: str, files: dict[str, bytes], shard: InputShard, options: SourceOptions
) -> Document | Skipped:
    meta = {}
    complaint = "no caption"
    try:
        meta = json.loads(clean.decode_text(files["json"])) if "json" in files else {}
    except (ValueError, RecursionError):
        complaint = "the .json is broken"
    meta = meta if isinstance(meta, dict) else {}
    caption = ""
    if "txt" in files:
        try:
            caption = clean.decode_text(files["txt"])
        except ValueError as error:
            complaint = f"caption: {error}"
    image = next((files[name] for name in IMAGES if name in files), None)
    return _pair(
        key,
        image,
        caption if caption.strip() else meta.get("caption"),
        meta,
        complaint,
        shard,
        options,
    )


def _row(
    row: dict[str, Any], key: str, shard: InputShard, options: SourceOptions
) -> Document | Skipped:
    image = next((row[name] for name in IMAGES if row.get(name) is not None), None)
    text = row.get("txt")
    text = text if isinstance(text, str) and text.strip() else row.get("caption")
    return _pair(key, image, text, row, "no caption", shard, options)


def _pair(
    key: str,
    image: Any,
    caption: Any,
    meta: dict,
    complaint: str,
    shard: InputShard,
    options: SourceOptions,
) -> Document | Skipped:
    if image is None:
        return Skipped(
            key,
            "no image"
            + (
                f": {clean.collapse_whitespace(str(meta['error_message']))}"
                if meta.get("error_message")
                else ""
            ),
        )
    if not isinstance(image, bytes) or not image:
        return Skipped(key, "the image is empty")
    caption = clean.collapse_whitespace(caption) if isinstance(caption, str) else ""
    if not caption:
        return Skipped(key, complaint)
    if not options.min_chars <= len(caption) <= options.max_chars:
        return Skipped(
            key, f"the caption is not of {options.min_chars} to {options.max_chars} characters"
        )
    if reason := clean.junk_reason(caption):
        return Skipped(key, reason)
    scores = [
        value
        for name, value in meta.items()
        if name.lower() in SCORES and isinstance(value, (int, float))
    ]
    # NaN, where there was no picture to compare
    if scores and not scores[0] >= options.min_score:
        return Skipped(key, f"the CLIP score is under {options.min_score}")
    provenance = {name: meta[name] for name in PROVENANCE if isinstance(meta.get(name), str)}
    return Document(key, (Pair(Picture(image), caption),), shard.name, provenance)
