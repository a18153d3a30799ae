"""OBELICS (huggingface.co/datasets/HuggingFaceM4/OBELICS): parquet of texts and images.

`texts` and `images` are lists of equal length; at each position one of the two is None.

In the public release, `images` holds URLs. With --images=DIR they are looked up in the output of
img2dataset (NNNNN.parquet with url and key, next to NNNNN.tar or the folder NNNNN), and images that
are not there are dropped and counted. Other copies embed the images, as bytes or as structs of
bytes and path. Read next: webpages.py.
"""

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from emu_jax.config import UserError
from emu_jax.data.documents import Document, Picture, Skipped, Text
from emu_jax.data.sources import archives, tables
from emu_jax.data.sources.options import SourceOptions
from emu_jax.data.sources.pairs import IMAGES
from emu_jax.data.sources.tables import InputShard
from emu_jax.files import one_line


def list_shards(path: Path) -> list[InputShard]:
    """One shard per about 4096 rows."""
    return [
        shard
        for file in archives.list_files(path, (".parquet",))
        for shard in tables.parquet_shards(file)
    ]


def read_documents(shard: InputShard, options: SourceOptions) -> Iterator[Document | Skipped]:
    """The documents of one shard; ids are FILE:ROW."""
    for number, row in tables.parquet_rows(shard):
        yield (
            row
            if isinstance(row, Skipped)
            else _document(f"{shard.name}:{number}", row, shard, options)
        )


def _document(
    id: str, row: dict[str, Any], shard: InputShard, options: SourceOptions
) -> Document | Skipped:
    texts = row.get("texts")
    images = row.get("images")
    if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
        return Skipped(id, "texts and images are not lists of equal length")
    parts: list[Text | Picture] = []
    dropped = []
    for text, image in zip(texts, images):
        if image is not None:
            picture = _picture(image, options.images)
            if isinstance(picture, str):
                dropped.append(picture)
            else:
                parts.append(picture)
        if isinstance(text, str) and text.strip():
            parts.append(Text(text))
    try:
        general = json.loads(row.get("general_metadata") or "{}")
        provenance = {"url": general["url"]} if isinstance(general.get("url"), str) else {}
    except (ValueError, AttributeError, TypeError):
        provenance = {}
    return Document(id, tuple(parts), shard.name, provenance, tuple(dropped))


def _picture(image: Any, folder: str) -> Picture | str:
    if isinstance(image, dict):
        image = image.get("bytes") if image.get("bytes") is not None else image.get("path")
    if isinstance(image, bytes):
        return Picture(image) if image else "image is empty"
    if not isinstance(image, str):
        return "image is neither bytes nor a URL"
    if not folder:
        return "only the URL of the image is known"
    place = _index(Path(folder)).get(image)
    if place is None:
        return "image was not downloaded"
    shard, key = place
    files = archives.open_archive(shard)
    names = [f"{key}.{suffix}" for suffix in IMAGES]
    name = next((name for name in names if name in files), "")
    data = archives.fetch_image(name, [files]) if name else "image was not downloaded"
    return data if isinstance(data, str) else Picture(data)


@lru_cache(1)
def _index(folder: Path) -> dict[str, tuple[Path, str]]:
    """URL -> (tar or folder, key) of each image that img2dataset downloaded into `folder`."""
    import pyarrow.parquet

    index = {}
    for file in archives.list_files(folder, (".parquet",)):
        shard = next(
            (place for place in (file.with_suffix(".tar"), file.with_suffix("")) if place.exists()),
            None,
        )
        try:
            table = pyarrow.parquet.read_table(
                file,
                columns=[
                    name
                    for name in ("url", "key", "status")
                    if name in tables.parquet_columns(file)
                ],
            ).to_pydict()
        # Errors of pyarrow have no common type.
        except Exception as error:
            raise UserError(f"--images: '{file}' cannot be read: {one_line(error)}") from error
        if shard is None or not {"url", "key"} <= table.keys():
            raise UserError(
                f"--images: '{file}' was not written by img2dataset: it needs the columns url "
                f"and key, and {file.stem}.tar or {file.stem}/ next to it"
            )
        for url, key, status in zip(
            table["url"], table["key"], table.get("status", ["success"] * len(table["url"]))
        ):
            if status == "success":
                index.setdefault(url, (shard, str(key)))
    return index
