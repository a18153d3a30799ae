"""Files that appear when they are complete, and errors in one line."""

import os

import pytest

from emu_jax import files


@pytest.mark.parametrize(("mode", "content"), [("w", "now"), ("wb", b"now")])
def test_a_file_appears_when_it_is_complete(tmp_path, mode, content):
    path = tmp_path / "a.txt"
    path.write_text("before")
    with files.atomic_write(path, mode) as file:
        file.write(content)
        file.flush()
        assert path.read_text() == "before"
    assert path.read_text() == "now"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")
    with pytest.raises(ValueError), files.atomic_write(path) as file:
        file.write("half")
        raise ValueError
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_the_bytes_are_on_disk_before_the_name(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(os, "fsync", lambda _: order.append("sync"))
    rename = files.Path.replace
    monkeypatch.setattr(
        files.Path, "replace", lambda *paths: (order.append("rename"), rename(*paths))[1]
    )
    with files.atomic_write(tmp_path / "a") as file:
        file.write("x")
    assert order == ["sync", "rename", "sync"]


def test_an_error_is_one_line():
    assert files.one_line(ValueError("a\n  b")) == "ValueError: a b"
    assert len(files.one_line(ValueError("x" * 1000))) == 300
