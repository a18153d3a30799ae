"""Read files of a folder, zip or tar by name, and stream the samples of a WebDataset tar.

Nothing outside the given folder or archive is ever read, whatever file names say: links out of a
folder are not followed, and links in archives not at all. Files over a size limit are not read
either. Read next: kinds.py.
"""

import tarfile
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath

from emu_jax.config import UserError
from emu_jax.data.images import MAX_BYTES
from emu_jax.files import one_line

# Size limit of a video or a table, in bytes.
MAX_FILE = 2 * 2**30
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
ZIPS = (".zip",)


class Files:
    """The files of `root`, a folder or an archive, by relative names with "/".

    Raises UserError if `root` is neither, or a damaged archive.
    """

    def __init__(self, root: Path):
        self.root = root
        self._zip: zipfile.ZipFile | None = None
        self._tar: tarfile.TarFile | None = None
        self._zip_members: dict[str, zipfile.ZipInfo] = {}
        self._tar_members: dict[str, tarfile.TarInfo] = {}
        try:
            if root.name.endswith(ZIPS):
                self._zip = zipfile.ZipFile(root)
                self._zip_members = {
                    member.filename: member
                    for member in self._zip.infolist()
                    if not member.is_dir()
                }
            elif root.name.endswith(TARS):
                self._tar = tarfile.open(root)
                self._tar_members = {
                    member.name.removeprefix("./"): member for member in self._tar if member.isreg()
                }
            elif not root.is_dir():
                raise UserError(
                    f"'{root}' is neither a folder nor an archive ({', '.join(ZIPS + TARS)})"
                )
        except UserError:
            raise
        # zipfile and tarfile raise nearly anything for damaged files.
        except Exception as error:
            raise UserError(f"the archive '{root}' cannot be read: {one_line(error)}") from error

    def names(self, suffixes: tuple[str, ...]) -> list[str]:
        """The sorted names that end with one of `suffixes`, ignoring case."""
        if self._zip or self._tar:
            names = [*self._zip_members, *self._tar_members]
        else:
            names = [
                path.relative_to(self.root).as_posix()
                for path in self.root.rglob("*")
                if path.is_file()
            ]
        return sorted(name for name in names if name.lower().endswith(suffixes))

    def __contains__(self, name: str) -> bool:
        try:
            if self._zip:
                return _normalise(name) in self._zip_members
            if self._tar:
                return _normalise(name) in self._tar_members
            return self._inside(name).is_file()
        except (ValueError, OSError):
            return False

    def read(self, name: str, limit: int = MAX_FILE) -> bytes:
        """The bytes of a file.

        Raises a one-line ValueError for a missing file, a name that leads outside, and a file of
        more than `limit` bytes.
        """
        try:
            if self._zip:
                return self._read_zip(self._zip, name, limit)
            if self._tar:
                return self._read_tar(self._tar, name, limit)
            path = self._inside(name)
            _check_size(name, path.stat().st_size, limit)
            return path.read_bytes()
        except (KeyError, FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise ValueError(f"no file '{name}'") from error
        except ValueError:
            raise
        # For example a wrong checksum, a truncated archive, or a name that the file system rejects.
        except Exception as error:
            raise ValueError(f"'{name}' cannot be read: {one_line(error)}") from error

    def _read_zip(self, archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
        member = self._zip_members[_normalise(name)]
        _check_size(name, member.file_size, limit)
        with archive.open(member) as file:
            # Read no more than the limit, because the size in the header may be wrong.
            return file.read(limit)

    def _read_tar(self, archive: tarfile.TarFile, name: str, limit: int) -> bytes:
        member = self._tar_members[_normalise(name)]
        _check_size(name, member.size, limit)
        file = archive.extractfile(member)
        assert file is not None, "only regular files are listed"
        return file.read()

    def _inside(self, name: str) -> Path:
        path = (self.root / _normalise(name)).resolve()
        if not path.is_relative_to(self.root.resolve()):
            raise ValueError(f"'{name}' leads outside of '{self.root.name}'")
        return path


def _check_size(name: str, size: int, limit: int) -> None:
    if size > limit:
        raise ValueError(f"'{name}' has {size} bytes, over the limit of {limit}")


def _normalise(name: str) -> str:
    """Resolve "." and ".." in a name: "a/./b/../c.png" becomes "a/c.png".

    Raises ValueError if the name leads outside.
    """
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
    """`Files(root)`, kept open so that each process scans a tar only once."""
    return Files(root)


def media_archives(given: str, folder: Path, names: list[str]) -> list[Files]:
    """The folders and archives to look up media files in.

    given: the value of --images, a folder or archive; if it is "", the `names` that exist in
    `folder` are used, in this order. Raises UserError if `given` does not exist.
    """
    if given:
        if not Path(given).exists():
            raise UserError(f"--images: '{given}' does not exist")
        return [open_archive(Path(given))]
    return [
        open_archive(folder / name)
        for name in dict.fromkeys(names)
        if (folder / name).is_dir() or (name != "." and (folder / name).is_file())
    ]


def find_file(name: str, archives: list[Files]) -> tuple[Files, str] | None:
    """The first archive with the file `name`, and the file's name in it; None if none has it.

    `zip -r a.zip a` stores names that start with "a/", so archives are also searched for "a/NAME".
    """
    for archive in archives:
        if name in archive:
            return archive, name
        if archive.root.is_file() and ".." not in name:
            in_folder = f"{archive.root.name.split('.')[0]}/{name}"
            if in_folder in archive:
                return archive, in_folder
    return None


def fetch_image(name: str, archives: list[Files]) -> bytes | str:
    """The bytes of an image file, or the reason why it cannot be read."""
    found = find_file(name, archives)
    if found is None:
        return "image file is missing"
    archive, inside = found
    try:
        return archive.read(inside, MAX_BYTES)
    except ValueError as error:
        return f"image file cannot be read: {error}"


def webdataset_samples(path: Path, limit: int = MAX_FILE) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield (key, {extension: bytes}) for each sample of a WebDataset tar, in its order.

    A sample consists of the files whose names agree up to the first dot of the last path component;
    extensions are lower-cased. Files over `limit` bytes are left out. Raises a one-line ValueError
    where the archive is damaged, after the good samples before it.
    """
    scattered = _scattered_samples(path)
    if scattered:
        yield from _read_scattered(path, scattered, limit)
        return
    key = None
    files: dict[str, bytes] = {}
    try:
        # Reading the tar as a stream also works for compressed tars, and for any size.
        with tarfile.open(path, "r|*") as tar:
            for member in tar:
                name, _ = _sample_name(member)
                if not name:
                    continue
                if name != key:
                    if key is not None and files:
                        yield key, files
                    key = name
                    files = {}
                _add_file(files, tar, member, limit)
    # tarfile and the decompressors raise nearly anything for broken files.
    except Exception as error:
        where = "at its start, or is not a tar" if key is None else f"after the sample {key!r}"
        raise ValueError(f"the archive is damaged {where}: {one_line(error)}") from error
    if key is not None and files:
        yield key, files


def _scattered_samples(path: Path) -> dict[str, list[tarfile.TarInfo]]:
    """The members of each sample, if the files of some sample are not next to each other.

    `tar -cf a.tar -C FOLDER .` writes files in directory order, so an image and its caption may be
    far apart. Returns {} if each sample's files are next to each other, and for a compressed or
    damaged tar, which is read as a stream.
    """
    samples: dict[str, list[tarfile.TarInfo]] = {}
    last = ""
    is_scattered = False
    try:
        # This reads only the headers and seeks over the files.
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name, _ = _sample_name(member)
                if not name:
                    continue
                is_scattered |= name != last and name in samples
                samples.setdefault(name, []).append(member)
                last = name
    # tarfile raises nearly anything for broken files.
    except Exception:
        return {}
    return samples if is_scattered else {}


def _read_scattered(
    path: Path, samples: dict[str, list[tarfile.TarInfo]], limit: int
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield samples whose members may be far apart. Raises ValueError for a damaged member."""
    with tarfile.open(path, "r:") as tar:
        for key, members in samples.items():
            files: dict[str, bytes] = {}
            try:
                for member in members:
                    _add_file(files, tar, member, limit)
            # tarfile raises nearly anything for broken files.
            except Exception as error:
                raise ValueError(
                    f"the archive is damaged at the sample {key!r}: {one_line(error)}"
                ) from error
            if files:
                yield key, files


def _add_file(
    files: dict[str, bytes], tar: tarfile.TarFile, member: tarfile.TarInfo, limit: int
) -> None:
    """Read a member into `files`, unless it is too large or its extension is already there."""
    _, extension = _sample_name(member)
    if member.size <= limit and extension not in files:
        file = tar.extractfile(member)
        assert file is not None, "only regular files have a sample name"
        files[extension] = file.read()


def _sample_name(member: tarfile.TarInfo) -> tuple[str, str]:
    """(key, extension) of a member of a WebDataset; ("", "") if it is not part of a sample."""
    folder, _, base = member.name.removeprefix("./").rpartition("/")
    stem, dot, extension = base.partition(".")
    is_special = stem.startswith("__") and stem.endswith("__")
    if not member.isreg() or not dot or not stem or is_special:
        return "", ""
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def list_files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The sorted files in the folder `path`, at any depth, that end with one of `suffixes`.

    Links that lead outside are left out. If `path` is a file, returns only that file, whatever its
    suffix. Raises UserError if nothing is found.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"'{path}' does not exist")
    root = path.resolve()
    files = [
        file
        for file in path.rglob("*")
        if file.name.lower().endswith(suffixes)
        and file.is_file()
        and file.resolve().is_relative_to(root)
    ]
    if not files:
        raise UserError(f"'{path}' contains no file ending in {' or '.join(suffixes)}")
    return sorted(files)
