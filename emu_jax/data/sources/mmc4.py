"""Multimodal C4 (github.com/allenai/mmc4): JSONL with `text_list` and `image_info`.

Its download script, scripts/download_images.py, puts the images of SHARD.jsonl into SHARD_images/,
and those of SHARD.jsonl.zip into SHARD.jsonl_images/, next to the file. An image and the sentence
that it is matched with become a `Pair` in the sentence's place. Images with a similarity under 0.32
are dropped, as in the paper. Read next: obelics.py.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from emu_jax.data.documents import Document, Pair, Picture, Skipped, Text
from emu_jax.data.sources import archives, tables
from emu_jax.data.sources.options import SourceOptions
from emu_jax.data.sources.tables import InputShard

SUFFIXES = (".jsonl", ".jsonl.zip", ".jsonl.gz")


def list_shards(path: Path) -> list[InputShard]:
    """One shard per file."""
    return [InputShard(file) for file in archives.list_files(path, SUFFIXES)]


def read_documents(shard: InputShard, options: SourceOptions) -> Iterator[Document | Skipped]:
    """The documents of one shard; ids are SHARD:LINE."""
    stem = shard.path.name.split(".")[0]
    places = archives.media_archives(
        options.images,
        shard.path.parent,
        [
            f"{stem}_images",
            f"{shard.path.stem}_images",
            f"{stem}_images.zip",
            f"{stem}_images.tar",
            f"{stem}.zip",
            "images",
            ".",
        ],
    )
    for number, record in tables.json_records(shard.path):
        yield (
            record
            if isinstance(record, Skipped)
            else _document(f"{shard.name}:{number}", record, places, shard, options)
        )


def _document(
    id: str, record: Any, places: list[archives.Files], shard: InputShard, options: SourceOptions
) -> Document | Skipped:
    if (
        not isinstance(record, dict)
        or not isinstance(record.get("text_list"), list)
        or not isinstance(record.get("image_info"), list)
    ):
        return Skipped(id, "text_list or image_info is missing")
    sentences = record["text_list"]
    if not all(isinstance(sentence, str) for sentence in sentences):
        return Skipped(id, "text_list contains something other than text")
    at: dict[int, list[Picture]] = {}
    dropped = []
    for info in record["image_info"]:
        picture = _picture(info, len(sentences), places, options)
        if isinstance(picture, str):
            dropped.append(picture)
        else:
            at.setdefault(info["matched_text_index"], []).append(picture)
    parts: list[Text | Picture | Pair] = []
    for number, sentence in enumerate(sentences):
        matched = at.get(number, [])
        if not sentence.strip():
            parts += matched
        elif matched:
            # If a sentence has several images, the last one forms the pair with it.
            parts += matched[:-1]
            parts.append(Pair(matched[-1], Text(sentence)))
        else:
            parts.append(Text(sentence))
    provenance = {"url": record["url"]} if isinstance(record.get("url"), str) else {}
    return Document(id, tuple(parts), shard.name, provenance, tuple(dropped))


def _picture(
    info: Any, sentences: int, places: list[archives.Files], options: SourceOptions
) -> Picture | str:
    """The image, or the reason why it is dropped."""
    if (
        not isinstance(info, dict)
        or not isinstance(info.get("image_name"), str)
        or not isinstance(info.get("matched_sim"), (int, float))
    ):
        return "image_info without image_name or matched_sim"
    # `not (x >= y)` also drops NaN, which Python's JSON parser accepts.
    if not info["matched_sim"] >= options.min_similarity:
        return f"similarity under {options.min_similarity}"
    if (
        type(info.get("matched_text_index")) is not int
        or not 0 <= info["matched_text_index"] < sentences
    ):
        return "image matched to no sentence"
    data = archives.fetch_image(info["image_name"], places)
    return data if isinstance(data, str) else Picture(data)
