"""The one record format, read and written: a document as a tensorflow-datasets example in an
ArrayRecord file.

A record's `layout` says how its texts and images, each in order, become the parts of a document:
"T" a text, "I" an image, "P" a pair of both whose order is drawn anew in every epoch. So "P" is a
captioned picture, "TITI" a story. Conversations have a role and videos a time for each letter of
it; `source` and `provenance` (JSON) say where it comes from. Builders yield `make_example(...)` under
`features()`; `RecordSource` reads, through Grain, without TensorFlow. Read next: ../builders/.
"""

import io
import json
import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from emu_jax.config import UserError
from emu_jax.data import images
from emu_jax.data.documents import Document, Image, Pair, Picture, Text
from emu_jax.data.sources import CorruptRecord

# readers of a file that are kept open
IDLE = 4
# every builder's metadata has it: how `RecordSource` knows its own
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
    """What a builder yields: the id that is unique in the dataset, what sort of document it is, the
    combination of factors that it shows (for what is held out), and its parts, the images as
    encoded files. `roles` and `times` are empty, or one a part.
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
    """`make_example` of a document as sources yield it, under the id `id`: files stay as they are,
    frames of videos become JPEGs.
    """
    layout = ""
    texts = []
    encoded = []
    roles = []
    times = []
    for part in document.parts:
        pair = isinstance(part, Pair)
        text = part.text if pair else part if isinstance(part, (str, Text)) else None
        picture = part.image if pair else part if text is None else None
        layout += "P" if pair else "I" if text is None else "T"
        if text is not None:
            text = Text(text) if isinstance(text, str) else text
            texts.append(text.text)
        if picture is not None:
            picture = Picture(picture) if isinstance(picture, np.ndarray) else picture
            encoded.append(
                images.encode(picture.data)
                if isinstance(picture.data, np.ndarray)
                else picture.data
            )
        roles.append((picture or text).role)
        times.append((picture or text).time)
    return make_example(
        id,
        kind,
        "",
        layout,
        texts,
        encoded,
        source=document.source,
        provenance=document.provenance,
        roles=roles if any(roles) else (),
        times=times if any(time is not None for time in times) else (),
    )


class RecordSource:
    """The documents of one split of the dataset in `folder` (where dataset_info.json lies)."""

    def __init__(self, folder: Path, split: str, image_size: int, fit: str = "squash"):
        try:
            info = tfds.builder_from_directory(str(folder)).info
        # whatever a damaged JSON makes tfds raise
        except Exception as error:
            raise UserError(
                f"the dataset in '{folder}' cannot be opened: {' '.join(str(error).split())}"
            ) from error
        if not METADATA.items() <= dict(info.metadata or {}).items():
            raise UserError(
                f"the dataset in '{folder}' was not written by emu_jax: its records are not documents"
            )
        if split not in info.splits or not info.splits[split].num_examples:
            raise UserError(
                f"no records in split '{split}' of '{folder}'; it has {', '.join(info.splits) or 'none'}"
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
        # the reader's errors have no common type
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
        """Document 0 <= index < len; its arrays are read-only. Raises CorruptRecord, and IndexError
        beyond the end.
        """
        if not 0 <= index < self._length:
            raise IndexError(
                f"{self.name} has {self._length} documents; there is no number {index}"
            )
        id = f"{self.name}[{index}]"
        try:
            raw = self._raw[index]
        # a checksum that does not match, a disk that does not answer
        except (RuntimeError, OSError) as error:
            raise CorruptRecord(
                id, " ".join(str(error).split()), disk=isinstance(error, OSError)
            ) from error
        try:
            fields = tf_example_pb2.Example.FromString(raw).features.feature
            texts = [text.decode() for text in fields["texts"].bytes_list.value]
            id, layout = (fields[name].bytes_list.value[0].decode() for name in ("id", "layout"))
            source, provenance = (
                next((value.decode() for value in fields[name].bytes_list.value), "")
                for name in ("source", "provenance")
            )
            roles = [role.decode() for role in fields["roles"].bytes_list.value]
            times = [
                None if math.isnan(time) else time for time in fields["times"].float_list.value
            ]
            _check(layout, texts, fields["images"].bytes_list.value, roles, times)
            pixels = [
                images.decode(data, self._size, self._fit)
                for data in fields["images"].bytes_list.value
            ]
            provenance = json.loads(provenance or "{}")
        except IndexError:
            raise CorruptRecord(id, "the record has no id or no layout") from None
        except (DecodeError, ValueError) as error:
            raise CorruptRecord(id, " ".join(str(error).split())) from error
        for image in pixels:
            image.flags.writeable = False
        told = iter(
            _told(text, *about) for text, about in zip(texts, _of_texts(layout, roles, times))
        )
        image = iter(
            _shown(array, *about) for array, about in zip(pixels, _of_images(layout, roles, times))
        )
        part = {
            "T": lambda: next(told),
            "I": lambda: next(image),
            "P": lambda: Pair(next(image), next(told)),
        }
        return Document(id, tuple(part[letter]() for letter in layout), source, provenance)


class RecordReader:
    """The bytes of the records of ArrayRecord files, one file after another; threads may share it.
    `lengths`: records of each file.

    A reader seeks: what Grain asks of it, a list of records, takes time in proportion to all that
    its file holds (array-record 0.8.6: 8 ms of a million, against microseconds). Each reader is one
    thread's at a time, so that one that hangs holds nobody up; one that fails is dropped.
    """

    def __init__(self, files: list[str], lengths: list[int]):
        self._files = files
        self._lengths = lengths
        self._ends = list(accumulate(lengths))
        self._idle: list[list[ArrayRecordReader]] = [[] for _ in files]

    def __reduce__(self) -> tuple:
        # a process opens its own
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
        if len(self._idle[file]) < IDLE:
            self._idle[file].append(reader)
        return record


def _told(text: str, role: str, time: float | None) -> str | Text:
    return Text(text, role=role, time=time) if role or time is not None else text


def _shown(image: Image, role: str, time: float | None) -> Image | Picture:
    return Picture(image, role, time) if role else image


def _of_images(
    layout: str, roles: Sequence[str], times: Sequence[float | None]
) -> list[tuple[str, float | None]]:
    """(role, time) of the parts that have an image; that of a pair has none, its text has."""
    about = zip(roles or [""] * len(layout), times or [None] * len(layout))
    return [
        pair if letter == "I" else ("", None)
        for letter, pair in zip(layout, about)
        if letter != "T"
    ]


def _of_texts(
    layout: str, roles: Sequence[str], times: Sequence[float | None]
) -> list[tuple[str, float | None]]:
    """(role, time) of the parts that have a text."""
    about = zip(roles or [""] * len(layout), times or [None] * len(layout))
    return [pair for letter, pair in zip(layout, about) if letter != "I"]


def _check(
    layout: str, texts: Sequence, encoded: Sequence, roles: Sequence = (), times: Sequence = ()
) -> None:
    count = [sum(letter in kinds for letter in layout) for kinds in ("TP", "IP")]
    if not layout or set(layout) - set("TIP") or count != [len(texts), len(encoded)]:
        raise ValueError(
            f"the layout {layout!r} does not fit {len(texts)} texts and {len(encoded)} images"
        )
    if {len(roles), len(times)} - {0, len(layout)}:
        raise ValueError(
            f"the layout {layout!r} does not fit {len(roles)} roles and {len(times)} times"
        )
