"""Built data sets: random access, caching, and damaged files."""

import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2

from emu_jax.config import UserError
from emu_jax.data import sources
from emu_jax.data.documents import Document, Pair
from emu_jax.data.sources import records
from tests.support import fixtures
from tests.support.fixtures import shard


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    to = tmp_path_factory.mktemp("tiny")
    fixtures.write_tiny(to)
    return to


@pytest.fixture
def copy(tiny, tmp_path):
    """A copy of the tiny data that a test may damage."""
    return shutil.copytree(tiny, tmp_path / "tiny")


def rewrite(folder, change):
    """Rewrite the training records of `folder`, changing the third one by `change(fields)`.

    If `change` returns bytes, they replace the record.
    """
    file = shard(folder)
    reader = ArrayRecordReader(str(file))
    raw = reader.read_all()
    reader.close()
    record = tf_example_pb2.Example.FromString(raw[2])
    raw[2] = change(record.features.feature) or record.SerializeToString()
    file.unlink()
    writer = ArrayRecordWriter(str(file), "group_size:1")
    for one in raw:
        writer.write(one)
    writer.close()


def test_pairs_and_stories(tiny):
    for number in range(16):
        (pair,) = sources.open_source(f"{tiny}/scenes:train", 28)[number].parts
        assert isinstance(pair, Pair) and isinstance(pair.text, str)
        assert pair.image.shape == (28, 28, 3) and pair.image.dtype == np.uint8
    orders = set()
    for story in sources.open_source(f"{tiny}/stories:train", 28):
        kinds = "".join("I" if isinstance(part, np.ndarray) else "T" for part in story.parts)
        orders.add(kinds[:2])
        assert kinds in ("IT" * (len(kinds) // 2), "TI" * (len(kinds) // 2)) and len(kinds) in (
            4,
            6,
        )
        assert [part for part in story.parts if isinstance(part, str)][1].endswith("comes")
    assert orders == {"IT", "TI"}


def test_images_take_the_size_asked_for(tiny):
    assert sources.open_source(f"{tiny}/names:train", 16)[0].parts[0].image.shape == (16, 16, 3)


def test_ids_are_unique_and_stable(tiny):
    for _, _, path in fixtures.mixture(tiny, "train"):
        source = sources.open_source(path, 28)
        ids = [document.id for document in source]
        assert len(set(ids)) == len(source) == len(ids)
        assert ids == [document.id for document in sources.open_source(path, 28)]


def test_random_access_from_threads_equals_a_pass_in_order(tiny):
    path = f"{tiny}/scenes:train"
    order = [document.parts[0] for document in sources.open_source(path, 28)]
    source = sources.open_source(path, 28)
    asked = np.random.default_rng(0).integers(len(source), size=500)
    with ThreadPoolExecutor(8) as pool:
        for index, document in zip(asked, pool.map(source.__getitem__, map(int, asked))):
            (pair,) = document.parts
            assert pair.text == order[index].text and (pair.image == order[index].image).all()


def test_cache_is_bounded_and_changes_nothing(tiny, monkeypatch):
    source = sources.open_source(f"{tiny}/scenes:train", 28)
    cached = sources.CachedSource(source)
    assert (
        cached[3] is cached[3]
        and source[3] is not source[3]
        and not cached[3].parts[0].image.flags.writeable
    )
    monkeypatch.setattr(sources, "CACHE_BYTES", 2 * (28 * 28 * 3 + sources.RECORD_BYTES + 100))
    bounded = sources.CachedSource(source)
    kept = [bounded[index] is bounded[index] for index in range(len(bounded))]
    assert sum(kept) == 2
    for index in range(len(bounded)):
        assert (bounded[index].parts[0].image == cached[index].parts[0].image).all()


def test_texts_fill_the_cache_too(memory, monkeypatch):
    monkeypatch.setattr(sources, "CACHE_BYTES", 10 * sources.RECORD_BYTES)
    cached = sources.CachedSource(
        memory([Document(f"d{k}", ("x" * sources.RECORD_BYTES,)) for k in range(20)])
    )
    # The source is itself in memory, so records that are not cached are the same objects too.
    assert sum(cached[index] is cached[index] for index in range(20)) == 20
    assert len(cached._kept) == 5


def test_a_source_can_be_sent(tiny):
    source = sources.open_source(f"{tiny}/scenes:train", 28)
    again = pickle.loads(pickle.dumps(source))
    assert (
        len(again) == len(source)
        and again[5].id == source[5].id
        and (again[5].parts[0].image == source[5].parts[0].image).all()
    )


def test_beyond_the_end(tiny):
    source = sources.open_source(f"{tiny}/names:train", 28)
    for index in (-1, len(source)):
        with pytest.raises(IndexError):
            source[index]


def test_files_are_read_as_one_by_many_threads(tmp_path):
    lengths = [3, 0, 200]
    wanted = [f"record {number}".encode() for number in range(203)]
    files = [str(tmp_path / f"{number}.array_record") for number in range(3)]
    for file, some in zip(files, (wanted[:3], [], wanted[3:]), strict=True):
        writer = ArrayRecordWriter(file, "group_size:1")
        for record in some:
            writer.write(record)
        writer.close()
    raw = records.RecordReader(files, lengths)
    order = np.random.default_rng(0).permutation(203).tolist() * 5
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(raw.__getitem__, order)) == [wanted[index] for index in order]
    assert pickle.loads(pickle.dumps(raw))[202] == wanted[202]


def test_damaged_bytes_are_one_corrupt_record(copy):
    file = shard(copy / "scenes")
    data = bytearray(file.read_bytes())
    place = data.index(b"\x89PNG") + 40
    data[place] ^= 255
    file.write_bytes(data)
    source = sources.open_source(f"{copy}/scenes:train", 28)
    bad = []
    for index in range(len(source)):
        try:
            source[index]
        except sources.CorruptRecord as corrupt:
            bad.append((index, corrupt))
    ((index, corrupt),) = bad
    assert (
        corrupt.id == f"scenes:train[{index}]"
        and "mismatch" in corrupt.reason
        and "\n" not in str(corrupt)
    )


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda fields: b"no protocol buffer", "scenes:train[2]: "),
        (lambda fields: fields["id"].bytes_list.Clear(), "has no id or no layout"),
        (
            lambda fields: fields["layout"].bytes_list.value.__setitem__(0, b"X"),
            "the layout 'X' does not fit 1 texts and 1 images",
        ),
        (
            lambda fields: fields["texts"].bytes_list.value.append(b"more"),
            "the layout 'P' does not fit 2 texts and 1 images",
        ),
        (lambda fields: fields["texts"].bytes_list.value.__setitem__(0, b"\xff\xfe"), "utf-8"),
        (
            lambda fields: fields["images"].bytes_list.value.__setitem__(0, b"GIF89a"),
            "not a usable image",
        ),
        (
            lambda fields: fields["images"].bytes_list.value.__setitem__(
                0, fields["images"].bytes_list.value[0][:-60]
            ),
            "not a usable image",
        ),
    ],
)
def test_records_that_are_not_documents(copy, change, reason):
    rewrite(copy / "scenes", change)
    source = sources.open_source(f"{copy}/scenes:train", 28)
    with pytest.raises(sources.CorruptRecord) as caught:
        source[2]
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    for index in range(len(source)):
        if index != 2:
            source[index]


def test_a_layout_that_does_not_fit_is_not_written():
    with pytest.raises(ValueError, match="does not fit"):
        records.make_example("a", "b", "c", "TI", ["text"], [])


def test_paths_that_lead_nowhere(tiny, tmp_path):
    for path, message in [
        (f"{tiny}/names", "has no split"),
        (f"{tmp_path}/none:train", "no dataset in"),
        (f"{tiny}/names:validation", "no records in split 'validation' .* it has train, held_out"),
        (f"{tiny}:train", "no dataset in"),
    ]:
        with pytest.raises(UserError, match=message):
            sources.open_source(path, 28)


def test_a_folder_of_several_datasets(copy):
    with pytest.raises(UserError, match="contains several datasets; choose one: .*scenes.*stories"):
        for name in ("scenes", "stories"):
            shutil.move(next((copy / name).iterdir()), copy / "names" / name)
        sources.open_source(f"{copy}/names:train", 28)


def test_a_half_written_dataset_is_not_read(copy):
    (version,) = (copy / "names").glob("*/*")
    version.rename(version.parent / "incomplete.ABC_1.0.0")
    with pytest.raises(UserError, match="no dataset in"):
        sources.open_source(f"{copy}/names:train", 28)


def test_datasets_of_others(copy):
    (file,) = (copy / "names").glob("*/*/metadata.json")
    file.write_text(json.dumps({}))
    with pytest.raises(UserError, match="was not written by emu_jax"):
        sources.open_source(f"{copy}/names:train", 28)


def test_missing_truncated_and_empty_files(copy):
    shard(copy / "names").unlink()
    with pytest.raises(UserError, match="lacks its file 'names-train.array_record-00000-of-00001'"):
        sources.open_source(f"{copy}/names:train", 28)
    for name, length in (("scenes", 70_000), ("stories", 0)):
        file = shard(copy / name)
        file.write_bytes(file.read_bytes()[:length])
        with pytest.raises(UserError, match="damaged|hold"):
            sources.open_source(f"{copy}/{name}:train", 28)
    (info,) = (copy / "scenes").glob("*/*/dataset_info.json")
    info.write_text("{")
    with pytest.raises(UserError, match="cannot be opened"):
        sources.open_source(f"{copy}/scenes:train", 28)
