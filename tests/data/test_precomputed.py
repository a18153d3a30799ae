"""Precomputed conditions and latents are found by the id of the image's document."""

import json

import numpy as np
import pytest

from emu_jax.config import UserError
from emu_jax.data.precomputed import Precomputed, attach, metadata_path, shard_path
from tests.support import make

C = make.decoder_cfg()
BATCH = make.pack(C, [[sequence] for sequence in make.sequences(C, 8)])
IDS = [[f"a/d{row}"] for row in range(8)]
VISUAL = np.random.default_rng(0).standard_normal((8, 4, 32)).astype(np.float16)


@pytest.fixture
def folder(tmp_path):
    return written(tmp_path, "conditions", VISUAL)


def written(folder, kind, arrays):
    path = shard_path(folder, "mixture", "a", 0)
    path.parent.mkdir(parents=True)
    metadata_path(folder, kind).write_text(json.dumps({"shape": arrays.shape[1:]}))
    np.save(path, arrays)
    path.with_suffix(".json").write_text(json.dumps([f"d{row}" for row in range(8)]))
    return folder


def stored(folder, kind="conditions", documents=8):
    return Precomputed(str(folder), kind, "mixture", {"a": documents})


def test_every_image_gets_its_documents(folder):
    batch = attach(BATCH, IDS, {"conditions": stored(folder)})
    held = BATCH.image_slots[:, 0] < C.data.tokens
    assert 0 < held.sum() < 8 and batch.conditions.shape == (8, 1, 4, 32) and batch.latents is None
    np.testing.assert_array_equal(batch.conditions[:, 0], np.where(held[:, None, None], VISUAL, 0))
    np.testing.assert_array_equal(batch.images, BATCH.images)


def test_in_a_row_of_several_documents_the_images_own_counts(folder):
    text, image = (
        next(s for s in make.sequences(C, 8) if len(s.image_slots) == count and len(s.tokens) < 12)
        for count in (0, 1)
    )
    latents = np.arange(8 * 4 * 4 * 8, dtype=np.float16).reshape(8, 4, 4, 8)
    made = {
        "conditions": stored(folder),
        "latents": stored(written(folder / "of_images", "latents", latents), "latents"),
    }
    batch = attach(make.pack(C, [[text, image]]), [["a/d3", "a/d5"]], made)
    np.testing.assert_array_equal(batch.conditions[0, 0], VISUAL[5])
    np.testing.assert_array_equal(batch.latents[0, 0], latents[5])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: metadata_path(folder, "conditions").unlink(),
            "no conditions in .* precompute",
        ),
        (
            lambda folder: metadata_path(folder, "conditions").write_text("{"),
            "conditions.json is damaged",
        ),
        (
            lambda folder: (folder / "mixture/a/00000.json").unlink(),
            "source 'a' are incomplete .* again to complete them",
        ),
        (
            lambda folder: (folder / "mixture/a/00000.npy").write_bytes(b"\x93NUMPY"),
            "are incomplete",
        ),
        (
            lambda folder: np.save(folder / "mixture/a/00000.npy", VISUAL[:3]),
            r"holds \[3, 4, 32\], not \[8, 4, 32\]",
        ),
    ],
)
def test_what_is_damaged_is_one_line(folder, spoil, message):
    spoil(folder)
    with pytest.raises(UserError, match=message):
        stored(folder)


def test_other_data_is_one_line(folder):
    with pytest.raises(UserError, match="lack the document 'a/d9'"):
        stored(folder).lookup("a/d9")
    with pytest.raises(UserError, match="are incomplete"):
        stored(folder, documents=2000)
    with pytest.raises(UserError, match="no latents in .* precompute --latents"):
        stored(folder, "latents")
