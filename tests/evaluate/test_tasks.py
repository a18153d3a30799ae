"""A benchmark's folder: what lies wherever in it, by name, and videos by the names that they have
on the web.
"""

import pytest

from emu_jax.config import UserError
from emu_jax.evaluate.annotations import Example
from emu_jax.evaluate.tasks import TASKS, Folder, examples_of
from tests.support import layouts


def test_files_are_found_wherever_they_lie(tmp_path):
    layouts.vqa(tmp_path / "some" / "where", "v2_")
    folder = Folder(str(tmp_path))
    examples = examples_of("vqav2", folder, "val2014")
    assert (
        folder.picture(examples[1])
        == tmp_path / "some" / "where" / "val2014" / "COCO_val2014_000000000001.jpg"
    )
    assert len(examples) == len(examples_of("vqav2", folder, "train2014")) == 4
    assert folder.picture(Example("1", "none.jpg")) is None
    with pytest.raises(
        UserError,
        match=r"no v2_OpenEnded_mscoco_test_questions.json anywhere in it, .*\(another --split has another name\)",
    ):
        examples_of("vqav2", folder, "test")


def test_videos_may_have_the_names_of_the_web(tmp_path):
    for name in ("mv89psg6zh4_33_46.avi", "3238737531.mp4"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "youtube_mapping.txt").write_text("mv89psg6zh4_33_46 vid1\n\n")
    layouts.put(tmp_path / "map_vid_vidorID.json", {"400": "1164/3238737531"})
    folder = Folder(str(tmp_path))
    assert folder.picture(Example("1", "vid1.avi")) == tmp_path / "mv89psg6zh4_33_46.avi"
    assert (
        folder.picture(Example("1", "400.mp4")) == tmp_path / "3238737531.mp4"
        and folder.picture(Example("1", "401.mp4")) is None
    )


def test_what_is_kept_of_an_answer():
    said = " It is a Dog. And more\n"
    assert {
        name: task.clean(said)
        for name, task in TASKS.items()
        if name in ("coco-caption", "vqav2", "mmvet")
    } == {"coco-caption": "it is a dog", "vqav2": "dog", "mmvet": "It is a Dog. And more"}
