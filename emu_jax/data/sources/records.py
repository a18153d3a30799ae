"""The record format: a document as a tensorflow-datasets example in an ArrayRecord file.

A record's `layout` has one letter per part: "T" for a text, "I" for an image, and "P" for a pair of
both, whose order is drawn in every epoch. A captioned image is "P", a story may be "TITI". The
record's `texts` and `images` fill the letters in order; `roles` and `times` have one entry per
letter, or are empty. Builders write what `make_example` returns; `RecordSource` reads it, with
Grain and without TensorFlow. Read next: ../builders/.
"""

import io
import json
import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from emu_jax.config import UserError
from emu_jax.data import images
from emu_jax.data.documents import Document, Image, Pair, Picture, Text, flat_parts, texts_of
from emu_jax.data.sources import CorruptRecord

# Number of open readers that are kept for each file.
MAX_IDLE = 4
# An entry in the metadata of every dataset, by which `RecordSource` knows that it can read it.
METADATA = {"emu_jax": "documents"}


def features() -> tfds.features.FeaturesDict:
    text = tfds.features.Text
    image = tfds.features.Image(shape=(None, None, 3))
    return tfds.features.FeaturesDict(
        dict(
            id=text(),
            kind=text(),
            combination=text(),
            source=text(),
            provenance=text(),
            layout=text(),
            texts=tfds.features.Sequence(text()),
            images=tfds.features.Sequence(image),
            roles=tfds.features.Sequence(text()),
            times=tfds.features.Sequence(tfds.features.Scalar(np.float32)),
        )
    )


def make_example(
    id: str,
    kind: str,
    combination: str,
    layout: str,
    texts: Sequence[str],
    encoded: Sequence[bytes],
    *,
    source: str = "",
    provenance: dict[str, Any] | None = None,
    roles: Sequence[str] = (),
    times: Sequence[float | None] = (),
) -> dict:
    """The example of one document.

    combination: what the document combines, if some combinations are held out. encoded: image
    files. roles, times: empty, or one entry per letter of `layout`. Raises ValueError if `layout`
    and the other arguments do not match.
    """
    _check(layout, texts, encoded, roles, times)
    return dict(
        id=id,
        kind=kind,
        combination=combination,
        source=source,
        provenance=json.dumps(provenance or {}, sort_keys=True),
        layout=layout,
        texts=list(texts),
        images=[io.BytesIO(data) for data in encoded],
        roles=list(roles),
        times=[math.nan if time is None else time for time in times],
    )


def document_example(document: Document, id: str, kind: str) -> dict:
    """The example of a document, under `id`.

    Image files are stored unchanged, video frames as JPEG.
    """
    parts = list(document.parts)
    layout = ""
    roles = []
    times = []
    for part in parts:
        # The role and time of a pair are those of its image.
        labelled = part.image if isinstance(part, Pair) else part
        roles.append(labelled.role if isinstance(labelled, (Text, Picture)) else "")
        times.append(labelled.time if isinstance(labelled, (Text, Picture)) else None)
        if isinstance(part, Pair):
            layout += "P"
        else:
            layout += "T" if isinstance(part, (str, Text)) else "I"
    texts = [text.text for text in texts_of(document)]
    pictures = [part.data for part in flat_parts(document) if isinstance(part, Picture)]
    return make_example(
        id,
        kind,
        "",
        layout,
        texts,
        [data if isinstance(data, bytes) else images.encode(data) for data in pictures],
        source=document.source,
        provenance=document.provenance,
        roles=roles if any(roles) else (),
        times=times if any(time is not None for time in times) else (),
    )


class RecordSource:
    """The documents of one split of the dataset in `folder`, which has dataset_info.json.

    Raises UserError if the dataset is missing, damaged, incomplete or not written by emu_jax.data.
    """

    def __init__(self, folder: Path, split: str, image_size: int, fit: str = "squash"):
        # Import Grain only here: it imports JAX, which a reader process does not need.
        import grain

        try:
            info = tfds.builder_from_directory(str(folder)).info
        # tensorflow-datasets raises many kinds of errors for damaged metadata.
        except Exception as error:
            raise UserError(
                f"the dataset in '{folder}' cannot be opened: {' '.join(str(error).split())}"
            ) from error
        if not METADATA.items() <= dict(info.metadata or {}).items():
            raise UserError(
                f"the dataset in '{folder}' was not written by emu_jax.data; build it with "
                "python -m emu_jax.data build"
            )
        if split not in info.splits or not info.splits[split].num_examples:
            raise UserError(
                f"no records in split '{split}' of '{folder}'; "
                f"it has {', '.join(info.splits) or 'none'}"
            )
        files = [str(file) for file in info.splits[split].filepaths]
        for file in files:
            if not Path(file).is_file():
                raise UserError(f"the dataset in '{folder}' lacks its file '{Path(file).name}'")
        self.name = f"{info.name}:{split}"
        self._size = image_size
        self._fit = fit
        self._length = info.splits[split].num_examples
        try:
            held = len(grain.sources.ArrayRecordDataSource(files))
        # Errors of the reader have no common type.
        except Exception as error:
            raise UserError(
                f"a file of '{folder}', split '{split}', is damaged: {' '.join(str(error).split())}"
            ) from error
        if held != self._length:
            raise UserError(
                f"the files of '{folder}', split '{split}', hold {held} records, not {self._length}"
            )
        self._raw = RecordReader(files, list(info.splits[split].shard_lengths))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Document:
        """Document `index`, 0 <= index < len; its arrays are read-only.

        Raises CorruptRecord, and IndexError if `index` is out of range.
        """
        if not 0 <= index < self._length:
            raise IndexError(
                f"{self.name} has {self._length} documents; index {index} is out of range"
            )
        id = f"{self.name}[{index}]"
        try:
            raw = self._raw[index]
        # Either the record's checksum is wrong, or the disk failed.
        except (RuntimeError, OSError) as error:
            raise CorruptRecord(
                id, " ".join(str(error).split()), disk=isinstance(error, OSError)
            ) from error
        try:
            example = tf_example_pb2.Example.FromString(raw)  # ty: ignore[missing-attribute]
            fields = example.features.feature
            texts = _strings(fields["texts"])
            id = _strings(fields["id"])[0]
            layout = _strings(fields["layout"])[0]
            source = "".join(_strings(fields["source"])[:1])
            provenance = json.loads("".join(_strings(fields["provenance"])[:1]) or "{}")
            roles = _strings(fields["roles"])
            times = [
                None if math.isnan(time) else time for time in fields["times"].float_list.value
            ]
            encoded = fields["images"].bytes_list.value
            _check(layout, texts, encoded, roles, times)
            pixels = [images.decode(data, self._size, self._fit) for data in encoded]
        except IndexError:
            raise CorruptRecord(id, "the record has no id or no layout") from None
        except (DecodeError, ValueError) as error:
            raise CorruptRecord(id, " ".join(str(error).split())) from error
        for image in pixels:
            image.flags.writeable = False
        return Document(id, _parts(layout, texts, pixels, roles, times), source, provenance)


def _strings(feature: Any) -> list[str]:
    return [value.decode() for value in feature.bytes_list.value]


def _parts(
    layout: str,
    texts: Sequence[str],
    pixels: Sequence[Image],
    roles: Sequence[str],
    times: Sequence[float | None],
) -> tuple[str | Text | Image | Picture | Pair, ...]:
    """The parts of a record: its texts and images in the order of the layout's letters."""
    parts: list[str | Text | Image | Picture | Pair] = []
    next_text = 0
    next_image = 0
    for number, letter in enumerate(layout):
        role = roles[number] if roles else ""
        time = times[number] if times else None
        text: str | Text = ""
        if letter != "I":
            text = texts[next_text]
            next_text += 1
            if role or time is not None:
                text = Text(text, role=role, time=time)
        if letter == "T":
            parts.append(text)
            continue
        image = pixels[next_image]
        next_image += 1
        if letter == "P":
            parts.append(Pair(image, text))
        else:
            parts.append(Picture(image, role, time) if role else image)
    return tuple(parts)


class RecordReader:
    """Reads records of several ArrayRecord files as bytes, by index over all files.

    Thread-safe. `lengths` are the numbers of records in the files. Records are read by seeking,
    which takes microseconds; Grain's own random access takes longer the larger the file is (8 ms at
    a million records with array-record 0.8.6). Each ArrayRecordReader is used by one thread at a
    time, so that one that hangs blocks only its thread. A reader that raises an exception is
    discarded.
    """

    def __init__(self, files: list[str], lengths: list[int]):
        self._files = files
        self._lengths = lengths
        self._ends = list(accumulate(lengths))
        self._idle: list[list[ArrayRecordReader]] = [[] for _ in files]

    def __reduce__(self) -> tuple:
        # Readers cannot be pickled: another process opens its own.
        return RecordReader, (self._files, self._lengths)

    def __getitem__(self, index: int) -> bytes:
        file = bisect_right(self._ends, index)
        try:
            reader = self._idle[file].pop()
        except IndexError:
            reader = ArrayRecordReader(
                self._files[file], options="readahead_buffer_size:0,max_parallelism:0"
            )
        reader.seek(index - self._ends[file] + self._lengths[file])
        record = reader.read()
        if len(self._idle[file]) < MAX_IDLE:
            self._idle[file].append(reader)
        return record


def _check(
    layout: str, texts: Sequence, encoded: Sequence, roles: Sequence = (), times: Sequence = ()
) -> None:
    num_texts = sum(letter in "TP" for letter in layout)
    num_images = sum(letter in "IP" for letter in layout)
    lengths_match = (num_texts, num_images) == (len(texts), len(encoded))
    if not layout or set(layout) - set("TIP") or not lengths_match:
        raise ValueError(
            f"the layout {layout!r} does not fit {len(texts)} texts and {len(encoded)} images"
        )
    if {len(roles), len(times)} - {0, len(layout)}:
        raise ValueError(
            f"the layout {layout!r} does not fit {len(roles)} roles and {len(times)} times"
        )
