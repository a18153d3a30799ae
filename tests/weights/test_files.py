"""Safetensors: written and read back, lazily; wrong headers are refused in one line."""

import json

import ml_dtypes
import numpy as np
import pytest

from emu_jax.config import UserError
from emu_jax.weights import files
from tests.support.foreign import saved
from tests.support.foreign import write as write_tensors
from tests.support.trees import assert_bitwise_equal

RNG = np.random.default_rng(0)
ARRAYS: dict[str, np.ndarray] = {
    "a": RNG.standard_normal((3, 5), np.float32),
    "b.w": RNG.standard_normal((7, 2)).astype(ml_dtypes.bfloat16),
    "c": np.arange(3),
    "d": np.zeros((0, 2), np.float16),
    "e": np.array([1.5]),
}


def floats(*numbers):
    return np.array(numbers, np.float32)


def write(folder, arrays=ARRAYS, shard=10**9):
    """Write arrays to a folder; returns its files."""
    write_tensors(folder, arrays, shard=shard)
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize(("shard", "count"), [(10**9, 1), (60, 2), (59, 3), (1, 5)])
def test_written_tensors_are_read_back(tmp_path, shard, count):
    paths = write(tmp_path, shard=shard)
    assert [path.name for path in paths] == [
        f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(ARRAYS)
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in ARRAYS.values())
    for sources in ([tmp_path], [tmp_path / "model.safetensors.index.json"], paths):
        tensors = files.read(list(map(str, sources))).tensors
        assert list(tensors) == list(ARRAYS)
        assert_bitwise_equal(tensors, ARRAYS)
        for name, tensor in tensors.items():
            assert (tensor.shape, tensor.dtype) == (ARRAYS[name].shape, ARRAYS[name].dtype)


def test_data_is_read_on_demand(tmp_path):
    (path,) = write(tmp_path)
    tensor = files.read([str(tmp_path)]).tensors["a"]
    content = bytearray(path.read_bytes())
    at = content.index(ARRAYS["a"].tobytes())
    content[at : at + 4] = floats(42).tobytes()
    path.write_bytes(content)
    assert np.asarray(tensor)[0, 0] == 42


def test_files_follow_the_format(tmp_path):
    """A file has 8 bytes of length, JSON, and the bytes of the tensors in order."""
    (path,) = write(tmp_path, {"x": floats(1, 2)})
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert json.loads(content[8 : 8 + length]) == {
        "__metadata__": {"format": "pt"},
        "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    }
    assert length % 8 == 0
    assert content[8 + length :] == floats(1, 2).tobytes()


def header(entries, data=b"", length=None):
    """Content of a file whose header has these entries or is this text."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "wrong header"),
        (b"abc", "wrong header"),
        (header({}, length=2**60), "wrong header: it claims 1152921504606846976 bytes"),
        (header(b"{nonsense"), "wrong header: JSONDecodeError"),
        (header(b"[]"), "wrong header: "),
        (header(b"\xff\xfe{}"), "wrong header"),
        (header({"w": 3}), "wrong header"),
        (header(b"[" * 100_000), "wrong header: RecursionError"),
        (
            header(b'{"w": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 8]}}', bytes(8)),
            "wrong header: OverflowError",
        ),
        (header({"w": ONE | {"dtype": "F33"}}, bytes(8)), "wrong header: KeyError: 'F33'"),
        (header({"w": {"dtype": "F32"}}), "wrong header: KeyError: 'shape'"),
        (header({"w": ONE | {"shape": [3]}}, bytes(8)), r"w is float32\[3\] at bytes 0 to 8"),
        (header({"w": ONE | {"shape": [-1, -2]}}, bytes(8)), "wrong header: w"),
        (header({"w": ONE | {"data_offsets": [8, 16]}}, bytes(16)), "at bytes 8 to 16, after 0"),
        (header({"v": ONE, "w": ONE}, bytes(8)), "at bytes 0 to 8, after 8"),
        (header({"w": ONE}, bytes(7)), "describes 8 bytes of tensors and 7 follow: truncated"),
        (header({"w": ONE}, bytes(9)), "and 9 follow"),
    ],
)
def test_a_wrong_header_is_one_line(tmp_path, content, message):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        files.read([str(path)])
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_missing_files_and_tensors_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no \.safetensors"):
        files.read([str(tmp_path / "empty")])
    with pytest.raises(UserError, match="no file or folder '.*nowhere'"):
        files.read([str(tmp_path / "nowhere")])
    first, *_ = write(tmp_path, shard=60)
    with pytest.raises(UserError, match=r"a is in .*00001.* and in .*00001"):
        files.read([str(first), str(first)])
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": weight_map | {"lost": first.name}}))
    with pytest.raises(UserError, match=r"lists 1 tensors that its files lack: lost \(model-00001"):
        files.read([str(tmp_path)])
    first.unlink()
    with pytest.raises(UserError, match="lists files that do not exist: model-00001"):
        files.read([str(tmp_path)])
    for text, message in (
        ("{", "is not JSON"),
        ("[]", "does not hold a JSON object"),
        ("{}", "no weight_map"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "no weight_map"),
    ):
        index.write_text(text)
        with pytest.raises(UserError, match=message):
            files.read([str(tmp_path)])


def test_of_several_variants_the_one_without_a_suffix_is_read(tmp_path):
    for name, value in (("model.fp16", 2), ("model", 1)):
        folder = tmp_path / name
        folder.mkdir()
        (path,) = write(folder, {"w": floats(value)})
        path.rename(tmp_path / f"{name}.safetensors")
    assert np.asarray(files.read([str(tmp_path)]).tensors["w"]) == 1


def test_components_of_a_model_are_read_as_one(tmp_path):
    for number, name in enumerate(("unet", "vae")):
        (tmp_path / name).mkdir()
        write(tmp_path / name, {"conv.weight": floats(number)})
        (tmp_path / name / "config.json").write_text(json.dumps({"number": number}))
    foreign = files.read_components(str(tmp_path), ("unet", "vae"))
    assert foreign.config == {"unet": {"number": 0}, "vae": {"number": 1}, "scheduler": {}}
    want = {"unet.conv.weight": floats(0), "vae.conv.weight": floats(1)}
    assert_bitwise_equal(foreign.tensors, want)


def test_safetensors_are_preferred_to_pickles(tmp_path):
    saved(tmp_path / "pytorch_model.bin", {"old": floats(1)})
    assert list(files.read([str(tmp_path)]).tensors) == ["old"]
    write(tmp_path)
    assert "a" in files.read([str(tmp_path)]).tensors
