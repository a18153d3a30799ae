"""Files in a folder, a zip or a tar, read by name, and the samples of a WebDataset tar, read in one
pass.

The law: whatever a name says, nothing outside of the named folder or archive is ever read. Links
are not followed out of a folder and not at all in archives; what is larger than a limit is not read
either. Read next: kinds.py.
"""

import tarfile
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath

from emu_jax.config import UserError

# bytes of a video or a table
MAX_FILE = 2 * 2**30
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
ZIPS = (".zip",)


class Files:
    """The files of `root`, a folder or an archive, as names with "/" relative to it."""

    def __init__(self, root: Path):
        self.root = root
        self._zip = self._tar = None
        try:
            if root.name.endswith(ZIPS):
                self._zip = zipfile.ZipFile(root)
                self._members = {
                    member.filename: member
                    for member in self._zip.infolist()
                    if not member.is_dir()
                }
            elif root.name.endswith(TARS):
                self._tar = tarfile.open(root)
                self._members = {
                    member.name.removeprefix("./"): member for member in self._tar if member.isreg()
                }
            elif not root.is_dir():
                raise UserError(
                    f"'{root}' is neither a folder nor an archive ({', '.join(ZIPS + TARS)})"
                )
        # the readers of archives raise nearly anything
        except Exception as error:
            raise (
                error
                if isinstance(error, UserError)
                else UserError(f"the archive '{root}' cannot be read: {_line(error)}")
            ) from error

    def names(self, suffixes: tuple[str, ...]) -> list[str]:
        """The names that end with one of `suffixes`, in any case, sorted."""
        if self._zip or self._tar:
            names = list(self._members)
        else:
            names = [
                path.relative_to(self.root).as_posix()
                for path in self.root.rglob("*")
                if path.is_file()
            ]
        return sorted(name for name in names if name.lower().endswith(suffixes))

    def __contains__(self, name: str) -> bool:
        try:
            return (
                (_plain(name) in self._members)
                if self._zip or self._tar
                else self._inside(name).is_file()
            )
        except (ValueError, OSError):
            return False

    def read(self, name: str, limit: int = MAX_FILE) -> bytes:
        """The bytes of a file. Raises ValueError, in one line, for a name that leads outside, for
        one that is not there, and for more than `limit` bytes.
        """
        try:
            if self._zip or self._tar:
                member = self._members[_plain(name)]
                size = member.file_size if self._zip else member.size
            else:
                path = self._inside(name)
                size = path.stat().st_size
            if size > limit:
                raise ValueError(f"'{name}' has {size} bytes, over the limit of {limit}")
            if self._zip:
                with self._zip.open(member) as file:
                    return file.read(limit)
            return self._tar.extractfile(member).read() if self._tar else path.read_bytes()
        except (KeyError, FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise ValueError(f"no file '{name}'") from error
        except ValueError:
            raise
        # a bad checksum, a cut archive, a name that no file system takes
        except Exception as error:
            raise ValueError(f"'{name}' cannot be read: {_line(error)}") from error

    def _inside(self, name: str) -> Path:
        path = (self.root / _plain(name)).resolve()
        if not path.is_relative_to(self.root.resolve()):
            raise ValueError(f"'{name}' leads outside of '{self.root.name}'")
        return path


def _plain(name: str) -> str:
    """`name` without ".": "a/./b/../c.png" is "a/c.png". Raises ValueError if it climbs out."""
    parts: list[str] = []
    for part in PurePosixPath(name.replace("\\", "/")).parts:
        if part == "/" or "\0" in part:
            raise ValueError(f"'{name}' leads outside")
        if part == "..":
            if not parts:
                raise ValueError(f"'{name}' leads outside")
            parts.pop()
        elif part != ".":
            parts.append(part)
    return "/".join(parts)


@lru_cache(8)
def open_archive(root: Path) -> Files:
    """`Files(root)`, kept open: a tar's table of contents is read once a process."""
    return Files(root)


def media_archives(given: str, folder: Path, names: list[str]) -> list[Files]:
    """Where pictures may be: in the folder or archive `given`, or if that is "", in those of
    `names` that are in `folder`, in this order.
    """
    if given:
        if not Path(given).exists():
            raise UserError(f"--images: there is no '{given}'")
        return [open_archive(Path(given))]
    return [
        open_archive(folder / name)
        for name in dict.fromkeys(names)
        if (folder / name).is_dir() or (name != "." and (folder / name).is_file())
    ]


def fetch(name: str, places: list[Files], limit: int = MAX_FILE) -> bytes | str:
    """The bytes of the file `name` of the first of `media_archives` that has it, or why there are none.
    `zip -r a.zip a` puts a folder into an archive of its name: there it is looked for, too.
    """
    for place in places:
        folded = (
            f"{place.root.name.split('.')[0]}/{name}"
            if place.root.is_file() and ".." not in name
            else name
        )
        for inside in (name, folded):
            if inside in place:
                try:
                    return place.read(inside, limit)
                except ValueError as error:
                    return f"a picture that cannot be read: {error}"
    return "a picture whose file is not there"


def webdataset_samples(path: Path, limit: int = MAX_FILE) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {extension: bytes}) of a WebDataset tar, in its order: neighbouring files whose names
    are equal up to the first dot of the last part are a sample; extensions are in lower case. A
    file over `limit` bytes is as if it were not there.

    Raises ValueError, in one line, where the archive is damaged; what came before is good.
    """
    key = None
    files = {}
    try:
        # one pass, no table of contents: works at any size
        with tarfile.open(path, "r|*") as tar:
            for member in tar:
                folder, _, base = member.name.removeprefix("./").rpartition("/")
                stem, dot, extension = base.partition(".")
                if (
                    not member.isreg()
                    or not dot
                    or not stem
                    or (stem.startswith("__") and stem.endswith("__"))
                ):
                    continue
                name = f"{folder}/{stem}" if folder else stem
                if name != key:
                    if files:
                        yield key, files
                    key = name
                    files = {}
                if member.size <= limit:
                    files.setdefault(extension.lower(), tar.extractfile(member).read())
    # tarfile and the decompressors raise nearly anything on broken files
    except Exception as error:
        raise ValueError(
            f"the archive is damaged after the sample {key!r}: {_line(error)}"
        ) from error
    if files:
        yield key, files


def list_files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """`path` itself if it is a file, or the files below the folder `path` that end with one of
    `suffixes`, sorted. None of them leads out.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"there is no '{path}'")
    root = path.resolve()
    files = [
        file
        for file in path.rglob("*")
        if file.name.lower().endswith(suffixes)
        and file.is_file()
        and file.resolve().is_relative_to(root)
    ]
    if not files:
        raise UserError(f"'{path}' holds no file that ends with {' or '.join(suffixes)}")
    return sorted(files)


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
