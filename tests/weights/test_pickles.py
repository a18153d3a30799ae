"""PyTorch's files are read without running code: tensors are exact, all else is refused."""

import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from emu_jax.config import UserError
from emu_jax.weights import pickles
from tests.support.foreign import (
    Raw,
    Window,
    name,
    opcodes,
    saved,
    torch_file,
)
from tests.support.trees import assert_bitwise_equal

RNG = np.random.default_rng(0)
NUMBERS = np.arange(24, dtype=np.float32)


def read(path):
    return {key: pickles.read(path, place) for key, place in pickles.places(path).items()}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.bin"


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int64, np.uint8]
)
def test_tensors_are_read_bit_for_bit(path, dtype):
    arrays = {
        "a.weight": (100 * RNG.random((3, 5))).astype(dtype),
        "b": np.array(7, dtype),
        "none": np.zeros((0, 4), dtype),
    }
    saved(path, arrays)
    got = read(path)
    assert list(got) == list(arrays)
    assert_bitwise_equal(got, arrays)


def test_offsets_and_strides_are_respected_and_storages_shared(path):
    torch_file(
        path,
        {
            "t": Window("0", 0, (6, 4), (1, 6)),
            "row": Window("0", 6, (6,), (1,)),
            "column": Window("0", 3, (4,), (6,)),
        },
        {"0": NUMBERS},
    )
    got = read(path)
    square = NUMBERS.reshape(4, 6)
    np.testing.assert_array_equal(got["t"], square.T)
    np.testing.assert_array_equal(got["row"], square[1])
    np.testing.assert_array_equal(got["column"], square[:, 3])
    assert all(array.flags.c_contiguous for array in got.values())


@pytest.mark.parametrize("wrapper", ["module", "model", "state_dict"])
def test_the_file_of_a_training_run_is_read_as_its_model(path, wrapper):
    window = Window("0", 0, (24,), (1,))
    value = {
        "epoch": 3,
        "args": ("x", None, True),
        wrapper: {"a.b": window},
        "optimizer": {"0": window},
    }
    torch_file(path, value, {"0": NUMBERS})
    assert list(read(path)) == ["a.b"]


def test_parameters_and_ordered_dicts_with_attributes(path):
    storages = {"0": NUMBERS}
    tensor = opcodes(Window("0", 0, (24,), (1,)), storages)
    arguments = opcodes((Raw(tensor), False, None), storages)
    parameter = name("torch._utils._rebuild_parameter") + arguments + b"R"
    item = opcodes("w", storages) + parameter
    attributes = opcodes("_metadata", storages) + b"}"
    ordered = name("collections.OrderedDict") + b")R(" + item + b"u" + b"}(" + attributes + b"ub"
    torch_file(path, None, storages, pickle=b"\x80\x02" + ordered + b".")
    np.testing.assert_array_equal(read(path)["w"], NUMBERS)


# Code


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_in_a_zip_is_refused_by_name_and_not_run(path, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch_file(path, None, {"0": NUMBERS}, pickle=pickle.dumps({"w": Evil()}, protocol=protocol))
    refused = "which is not part of a tensor; refused, and nothing in it was run"
    with pytest.raises(UserError, match=rf"its pickle names (posix|os)\.system, {refused}"):
        pickles.places(path)
    path.write_bytes(pickle.dumps({"w": Evil()}, protocol=max(protocol, 2)))
    with pytest.raises(UserError, match=r"names (posix|os)\.system"):
        pickles.places(path)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        (b"cbuiltins\neval\n(X\x01\x00\x00\x001tR", "names builtins.eval"),
        (b"cnumpy.core.multiarray\nscalar\n", "names numpy.core.multiarray.scalar"),
        (b"ctorch._utils\n_rebuild_tensor_v3\n", "names torch._utils._rebuild_tensor_v3"),
        (b"(iposix\nsystem\n", "has the opcode INST"),
        (b"ccollections\nOrderedDict\n)\x81", "has the opcode NEWOBJ"),
        (b"\x82\x01", "has the opcode EXT1"),
        (b"ccollections\nOrderedDict\n}b", "sets the attributes of an object"),
        (b"](ctorch\nFloatStorage\n)R", "is called"),
    ],
)
def test_anything_but_tensors_is_refused_by_name(path, inside, message):
    torch_file(path, None, {}, pickle=b"\x80\x02" + inside + b".")
    with pytest.raises(UserError, match=message):
        pickles.places(path)


# Damage, and wrong views


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (Window("0", 1, (24,), (1,)), "reaches to element 24 of a storage of 24"),
        (Window("0", 0, (2, 12), (13, 1)), "reaches to element 24"),
        (Window("0", 0, (3, 4), (0, 1)), "more than once"),
        (Window("0", 0, (3, 4), (2, 1)), "more than once"),
        (Window("0", 0, (2**40,), (0,)), "more than once"),
        (Window("0", -1, (2,), (1,)), "damaged"),
        (Window("0", 0, (2,), (-1,)), "damaged"),
        (Window("0", 0, (2, 2), (1,)), "damaged"),
        (Window("0", 0, (30,), (1,), 30), "has 96 bytes, not 30 x 4"),
    ],
)
def test_a_view_that_cannot_be_one_is_refused(path, window, message):
    torch_file(path, {"w": window}, {"0": NUMBERS})
    with pytest.raises(UserError, match=message):
        pickles.places(path)


def test_a_missing_or_compressed_storage_is_refused(path):
    window = {"w": Window("0", 0, (24,), (1,))}
    for keywords, message in (
        ({"left_out": ("0",)}, "data/0 is missing"),
        ({"compression": zipfile.ZIP_DEFLATED}, "compressed"),
        ({"byteorder": "big"}, "big-endian"),
    ):
        torch_file(path, window, {"0": NUMBERS}, **keywords)
        with pytest.raises(UserError, match=message):
            pickles.places(path)


def test_storages_that_overlap_are_refused(path):
    """Two entries of the zip's central directory point to one place."""
    torch_file(
        path,
        {"a": Window("0", 0, (24,), (1,)), "b": Window("1", 0, (24,), (1,))},
        {"0": NUMBERS, "1": NUMBERS},
    )
    content = bytearray(path.read_bytes())
    first, second = (content.rindex(f"archive/data/{key}".encode()) - 46 for key in "01")
    content[second + 42 : second + 46] = content[first + 42 : first + 46]
    path.write_bytes(content)
    with pytest.raises(UserError, match="overlaps what follows it"):
        pickles.places(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_truncated_file_is_one_line(path, share):
    saved(path, {"a": RNG.random((40, 40))})
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match="truncated or damaged, or not a PyTorch file") as error:
        pickles.places(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cut", [0, 1, 2, 10, 40, -1])
def test_a_damaged_pickle_is_one_line(path, cut):
    whole = b"\x80\x02" + opcodes({"w": Window("0", 0, (24,), (1,))}, {"0": NUMBERS}) + b"."
    torch_file(path, None, {"0": NUMBERS}, pickle=whole[:cut])
    with pytest.raises(UserError, match="its pickle is damaged"):
        pickles.places(path)


def test_other_kinds_of_files_are_refused(path):
    old = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    path.write_bytes(b"".join(pickle.dumps(value, protocol=2) for value in old))
    advice = r"load it there and torch\.save it again"
    with pytest.raises(UserError, match=rf"before version 1\.6; {advice}"):
        pickles.places(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "text")
    with pytest.raises(UserError, match="a zip, but not a torch.save file"):
        pickles.places(path)
    torch_file(path, {"epoch": 3}, {})
    with pytest.raises(UserError, match="holds no tensors"):
        pickles.places(path)
    # A dictionary that contains itself.
    torch_file(path, None, {}, pickle=b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.")
    with pytest.raises(UserError, match="contain each other"):
        pickles.places(path)
