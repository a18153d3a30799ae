"""Shared by the commands: a parser whose errors are one line, exit statuses, output files."""

import argparse
import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

from emu_jax.config import UserError
from emu_jax.files import atomic_write


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError instead of exiting; no abbreviations."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def run(command: Callable[[list[str]], int | None], arguments: list[str] | None = None) -> int:
    """Run a command; its exit status, or 2 for a user's mistake and 130 for Ctrl-C.

    arguments: None takes those of the process. A UserError or OSError is printed as one line.
    """
    try:
        return command(sys.argv[1:] if arguments is None else arguments) or 0
    except BrokenPipeError:
        # `| head` has read enough. Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130


@contextmanager
def output_file(path: Path, mode: str = "w") -> Generator[IO[Any]]:
    """Open a file for a user, as `atomic_write` does, and make its folder.

    Raises UserError, which names the file, if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, mode) as file:
            yield file
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
