"""Paths of the steps of a run: DIR/checkpoints/STEP, in a folder or a bucket."""

from pathlib import PurePath
from typing import TypeVar

from etils import epath

from emu_jax.checkpoint.format import root_cause
from emu_jax.config import UserError
from emu_jax.files import made_by, one_line

AnyPath = TypeVar("AnyPath", bound=PurePath)


def resolve(directory: str) -> epath.Path:
    """The absolute path of a folder or a Google Cloud Storage bucket.

    Raises UserError for a bucket that cannot be reached, and for buckets of other providers, where
    `is_complete` could not recognise a finished save.
    """
    if "://" not in str(directory):
        return epath.Path(directory).resolve()
    if not str(directory).startswith("gs://"):
        raise UserError(
            f"cannot keep checkpoints in {directory!r}: use a folder or a bucket gs://NAME/..."
        )
    path = epath.Path(directory)
    try:
        # By default gcsfs caches listings for as long as the process lives, but other processes
        # write to the bucket and delete from it.
        import fsspec.config

        fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
        path.exists()
    # A missing package, a wrong name, a permission and the network raise errors of no common class.
    except Exception as error:
        raise UserError(
            f"cannot reach {directory!r}: {one_line(root_cause(error))} "
            "(gs:// needs credentials, and pip install '.[gcs]')"
        ) from error
    return path


def split_step(path: AnyPath) -> tuple[AnyPath, int | None]:
    """(workdir, STEP) of workdir/checkpoints/STEP; (path, None) of any other absolute path."""
    if path.parent.name == "checkpoints" and path.name.isdigit():
        return path.parent.parent, int(path.name)
    return path, None


def find_steps(directory: str, step: int | None) -> tuple[epath.Path, int | None]:
    """The folder that holds the steps of a run, and the step to read; None: the newest.

    directory: a run's workdir, workdir/checkpoints, or workdir/checkpoints/STEP, which overrides
    `step`. Raises UserError if it does not exist.
    """
    path = resolve(directory)
    if not path.is_dir():
        raise UserError(
            f"no directory {str(directory)!r}; give a run's workdir, "
            f"or one of its checkpoints, workdir/checkpoints/1000{made_by(str(directory))}"
        )
    if path.name == "checkpoints" and not (path / "checkpoints").is_dir():
        # The user has given the folder of the checkpoints in place of the workdir.
        path = path.parent
    workdir, own_step = split_step(path)
    return workdir / "checkpoints", step if own_step is None else own_step


def complete_steps(root: epath.Path) -> list[int]:
    """The steps in `root` whose save has finished, in ascending order."""
    if not root.is_dir():
        return []
    folders = [path for path in root.iterdir() if path.name.isdigit()]
    return sorted(int(path.name) for path in folders if is_complete(path))


def is_complete(path: epath.Path) -> bool:
    """Whether the save into a step's folder has finished.

    In a file system, Orbax renames the finished folder to its final name. A bucket cannot rename
    folders; there, Orbax writes the file commit_success.txt last.
    """
    return "://" not in str(path) or (path / "commit_success.txt").exists()
