"""Files that appear only when they are complete, and errors in one line."""

import os
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

# Suffix of unfinished files. If a killed process leaves one behind, it is safe to delete.
PART = ".part"


@contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Generator[IO[Any]]:
    """Open a file that appears at `path` only when the block ends without an error.

    The bytes go to a file next to `path`, are synced to disk and renamed over it, so a crash at any
    moment leaves the old file or the new one. mode: "w" (UTF-8 text) or "wb". Raises OSError.
    """
    path = Path(path)
    part = part_of(path)
    try:
        with part.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        commit(part, path)
    finally:
        part.unlink(missing_ok=True)


def part_of(path: Path) -> Path:
    """A new name next to `path` for a library to write to; `commit` then renames it to `path`."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{PART}")


def commit(part: Path, path: Path) -> None:
    """Rename the finished file or folder `part` to `path`, and sync the folder that holds it."""
    part.replace(path)
    # Ignore file systems that cannot open or sync a folder: the rename is atomic even there.
    with suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def made_by(*paths: str) -> str:
    """Name the command that makes the demo's files, if one of `paths` is such a file; else ""."""
    folders = ("data/demo/", "runs/demo/")
    if any(Path(path).as_posix().startswith(folders) for path in paths):
        return " (`make demo` makes what is in data/demo and runs/demo)"
    return ""


def one_line(error: BaseException, limit: int = 300) -> str:
    """An error's class and message in one line of at most `limit` characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:limit]
