"""Image-text pairs in the formats of img2dataset: WebDataset tars, or parquet.

NNNNN.tar contains KEY.jpg, KEY.txt and KEY.json; parquet has the columns key, jpg and txt.

The caption is the .txt, or else "caption" in the .json. A parquet file that img2dataset writes next
to a tar has no images and is ignored. A record becomes one `Pair`. Read next: mmc4.py.
"""

import json
import shlex
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
    """One shard per tar, and per parquet file that contains images."""
    suffixes = (*archives.TARS, ".parquet")
    if path.is_file() and not path.name.lower().endswith(suffixes):
        raise UserError(
            f"'{path}' is not a file of pairs: its name ends in none of {', '.join(suffixes)}"
        )
    try:
        found = archives.list_files(path, suffixes)
    except UserError:
        _refuse_loose_images(path)
        raise
    with_images = [
        file
        for file in found
        if file.suffix != ".parquet" or set(tables.parquet_columns(file)) & set(IMAGES)
    ]
    if not with_images:
        _refuse_loose_images(path)
        raise UserError(
            f"'{path}' contains no images: it has no tar, and no parquet file with a column "
            f"{' or '.join(IMAGES)}"
        )
    return [InputShard(file) for file in with_images]


def read_documents(shard: InputShard, options: SourceOptions) -> Iterator[Document | Skipped]:
    """The pairs of one shard; ids are the tar's keys, or the parquet's keys or row numbers."""
    if shard.path.suffix == ".parquet":
        for number, row in tables.parquet_rows(shard):
            yield (
                row
                if isinstance(row, Skipped)
                else _row(row, str(row.get("key") or number), shard, options)
            )
        return
    try:
        for name, files in archives.webdataset_samples(shard.path, images.MAX_BYTES):
            for key, sample in _split_at_last_dot(name, files):
                yield _sample(key, sample, shard, options)
    except ValueError as error:
        yield Skipped(shard.path.name, str(error), whole_file=True)


def _refuse_loose_images(path: Path) -> None:
    """Raise UserError that says how to pack the folder `path` if it has image files."""
    if any(file.suffix.lower().lstrip(".") in IMAGES for file in path.rglob("*")):
        raise UserError(
            f"'{path}' is a folder of images: pack it first with "
            f"`tar -cf pictures.tar -C {shlex.quote(str(path))} .` "
            "(each image needs a text file of the same name)"
        )


def _split_at_last_dot(key: str, files: dict[str, bytes]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the pairs of a sample whose file names have more than one dot.

    WebDataset's key ends at the first dot, so a.1.jpg, a.1.txt, a.2.jpg and a.2.txt are one sample.
    A sample that has an image without a second dot is left as it is.
    """
    names = {name: name.rpartition(".") for name in files}
    if any(name in IMAGES for name in files) or not any(
        prefix and suffix in IMAGES for prefix, _, suffix in names.values()
    ):
        yield key, files
        return
    pairs: dict[str, dict[str, bytes]] = {}
    for name, (prefix, _, suffix) in names.items():
        pairs.setdefault(prefix, {})[suffix] = files[name]
    for prefix, sample in pairs.items():
        yield f"{key}.{prefix}" if prefix else key, sample


def _sample(
    key: str, files: dict[str, bytes], shard: InputShard, options: SourceOptions
) -> Document | Skipped:
    meta = {}
    complaint = "no caption"
    try:
        meta = json.loads(clean.decode_text(files["json"])) if "json" in files else {}
    except (ValueError, RecursionError):
        complaint = "the .json file is broken"
    meta = meta if isinstance(meta, dict) else {}
    caption = ""
    if "txt" in files:
        try:
            caption = clean.decode_text(files["txt"])
        except ValueError as error:
            complaint = f"caption: {error}"
    image = next((files[name] for name in IMAGES if name in files), None)
    if not caption.strip():
        caption = meta.get("caption")
    return _pair(key, image, caption, meta, complaint, shard, options)


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
        message = meta.get("error_message")
        reason = f": {clean.collapse_whitespace(str(message))}" if message else ""
        return Skipped(key, f"no image{reason}")
    if not isinstance(image, bytes) or not image:
        return Skipped(key, "image is empty")
    caption = clean.collapse_whitespace(caption) if isinstance(caption, str) else ""
    if not caption:
        return Skipped(key, complaint)
    if not options.min_chars <= len(caption) <= options.max_chars:
        return Skipped(
            key,
            f"caption length is not between {options.min_chars} and {options.max_chars} characters",
        )
    if reason := clean.junk_reason(caption):
        return Skipped(key, reason)
    scores = [
        value
        for name, value in meta.items()
        if name.lower() in SCORES and isinstance(value, (int, float))
    ]
    # `not (x >= y)` also skips NaN, which img2dataset writes if there was no image to compare.
    if scores and not scores[0] >= options.min_score:
        return Skipped(key, f"CLIP score under {options.min_score}")
    provenance = {name: meta[name] for name in PROVENANCE if isinstance(meta.get(name), str)}
    return Document(key, (Pair(Picture(image), caption),), shard.name, provenance)
