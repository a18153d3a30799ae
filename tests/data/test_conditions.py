"""Conditions of a decoder: what was written is found by the document's id, for the image's own document."""
import json

import make
import numpy as np
import pytest

from emu_jax.config import UserError
from emu_jax.data.conditions import NOTES, Conditions, path_of

C = make.decoder_cfg()
BATCH = make.pack(C, [[sequence] for sequence in make.sequences(C, 8)])
IDS = [[f"a/d{row}"] for row in range(8)]
VISUAL = np.random.default_rng(0).standard_normal((8, 4, 32)).astype(np.float16)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / NOTES).write_text(json.dumps({"shape": [4, 32]}))
    path = path_of(tmp_path, "mixture", "a", 0)
    path.parent.mkdir(parents=True)
    np.save(path, VISUAL)
    path.with_suffix(".json").write_text(json.dumps([f"d{row}" for row in range(8)]))
    return tmp_path


def test_every_image_gets_its_documents(folder):
    batch = Conditions(str(folder), "mixture", {"a": 8}).attached(BATCH, IDS)
    held = BATCH.image_slots[:, 0] < C.data.tokens
    assert 0 < held.sum() < 8 and batch.conditions.shape == (8, 1, 4, 32)
    np.testing.assert_array_equal(batch.conditions[:, 0], np.where(held[:, None, None], VISUAL, 0))
    np.testing.assert_array_equal(batch.images, BATCH.images)


def test_in_a_row_of_several_documents_the_images_own_counts(folder):
    text, image = (next(s for s in make.sequences(C, 8) if len(s.image_slots) == count and len(s.tokens) < 12) for count in (0, 1))
    batch = Conditions(str(folder), "mixture", {"a": 8}).attached(make.pack(C, [[text, image]]), [["a/d3", "a/d5"]])
    np.testing.assert_array_equal(batch.conditions[0, 0], VISUAL[5])


@pytest.mark.parametrize(("spoil", "told"), [
    (lambda folder: (folder / NOTES).unlink(), "no conditions in .* precompute"),
    (lambda folder: (folder / NOTES).write_text("{"), "conditions.json is damaged"),
    (lambda folder: (folder / "mixture/a/00000.json").unlink(), "source 'a' are not whole .* it makes what is missing"),
    (lambda folder: (folder / "mixture/a/00000.npy").write_bytes(b"\x93NUMPY"), "are not whole"),
    (lambda folder: np.save(folder / "mixture/a/00000.npy", VISUAL[:3]), r"holds \[3, 4, 32\], not \[8, 4, 32\]")])
def test_what_is_damaged_is_one_line(folder, spoil, told):
    spoil(folder)
    with pytest.raises(UserError, match=told):
        Conditions(str(folder), "mixture", {"a": 8})


def test_other_data_is_one_line(folder):
    with pytest.raises(UserError, match="lack the document 'a/d9'"):
        Conditions(str(folder), "mixture", {"a": 8}).of("a/d9")
    with pytest.raises(UserError, match="are not whole"):
        Conditions(str(folder), "mixture", {"a": 2000})
