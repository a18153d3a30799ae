"""Files of a benchmark's folder, found by name at any depth."""

import pytest

from emu_jax.config import UserError
from emu_jax.evaluate.annotations import Example
from emu_jax.evaluate.tasks import TASKS, Folder, read_examples
from tests.support import layouts


def test_files_are_found_at_any_depth(tmp_path):
    layouts.vqa(tmp_path / "some" / "where", "v2_")
    folder = Folder(str(tmp_path))
    examples = read_examples("vqav2", folder, "val2014")
    assert (
        folder.media(examples[1])
        == tmp_path / "some" / "where" / "val2014" / "COCO_val2014_000000000001.jpg"
    )
    assert len(examples) == len(read_examples("vqav2", folder, "train2014")) == 4
    assert folder.media(Example("1", "none.jpg")) is None
    with pytest.raises(
        UserError,
        match=r"no v2_OpenEnded_mscoco_test_questions.json anywhere in it, .*"
        r"\(another --split has another name\)",
    ):
        read_examples("vqav2", folder, "test")


def test_videos_may_have_the_names_of_their_source(tmp_path):
    for name in ("mv89psg6zh4_33_46.avi", "3238737531.mp4"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "youtube_mapping.txt").write_text("mv89psg6zh4_33_46 vid1\n\n")
    layouts.put(tmp_path / "map_vid_vidorID.json", {"400": "1164/3238737531"})
    folder = Folder(str(tmp_path))
    assert folder.media(Example("1", "vid1.avi")) == tmp_path / "mv89psg6zh4_33_46.avi"
    assert (
        folder.media(Example("1", "400.mp4")) == tmp_path / "3238737531.mp4"
        and folder.media(Example("1", "401.mp4")) is None
    )


def test_clean_depends_on_the_kind_of_task():
    text = " It is a Dog. And more\n"
    assert {
        name: task.clean(text)
        for name, task in TASKS.items()
        if name in ("coco-caption", "vqav2", "mmvet")
    } == {"coco-caption": "it is a dog", "vqav2": "dog", "mmvet": "It is a Dog. And more"}
