"""Monitors a run: goodput, steps that hang, and runs that keep dying in the same step.

Each process watches itself and logs what it finds; only process 0 writes a file. Read next:
loop.py.
"""

import faulthandler
import fcntl
import json
import logging
import os
import platform
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import jax

from emu_jax import processes
from emu_jax.config import UserError

log = logging.getLogger(__name__)

# "restart" is everything before the first batch.
PHASES = ("steps", "input wait", "compile", "checkpoint", "evaluation", "restart")
# Number of earlier deaths that running.json records.
MAX_DEATHS = 5


class Watchdog:
    """Accounts for the time of this process by phase, and reports hangs and repeated deaths.

    A context manager: a run that leaves it without an error, or with a UserError or a
    KeyboardInterrupt, has not died. The file running.json exists in the workdir while a run is in
    progress, and after it has died.
    """

    def __init__(self, workdir: Path, hang: float, began: float | None = None):
        """Start watching a run in `workdir`.

        hang: a phase that lasts longer than this many seconds is logged, with the stack of every
        thread, and again each time its duration has doubled; 0: never. began: `perf_counter` at the
        start of the process; None: now. Raises UserError if another run is using the workdir.
        """
        self.step = 0
        self.current_phase = "restart"
        self.since = time.perf_counter() if began is None else began
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._ended = threading.Event()
        self._path = workdir / "running.json"
        found = processes.allgather_json(_read_json(self._path))[0]
        # The steps in which the last runs died, oldest first; None: before the first step.
        self.deaths: list[int | None] = []
        if found:
            self.deaths = [*found["deaths"], found["step"]][-MAX_DEATHS:]
        self._file = _open_alone(self._path) if jax.process_index() == 0 else None
        self._write_step(None)
        self._same_deaths = 0
        for step in reversed(self.deaths):
            if step != self.deaths[-1]:
                break
            self._same_deaths += 1
        self.suspect = self.deaths[-1] if self._same_deaths > 1 else None
        if self.suspect is not None:
            log.error(
                "the last %d runs died in step %d: its documents will be named; "
                "likely causes are too little memory and a record that crashes a decoder",
                self._same_deaths,
                self.suspect,
            )
        if hang:
            watch = threading.Thread(
                target=self._report_hangs, args=(hang,), name="watchdog", daemon=True
            )
            watch.start()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, kind: type | None, _error: Any, _traceback: Any) -> None:
        self._ended.set()
        if self._file:
            with suppress(OSError):
                self._file.close()
            if kind is None or issubclass(kind, (UserError, KeyboardInterrupt)):
                self._path.unlink(missing_ok=True)

    def begin_step(self, step: int, documents: list[list[str]]) -> None:
        """Note that `step` begins. documents: ids of this process's batch, by row."""
        self.step = step
        self._write_step(step)
        if step == self.suspect:
            log.error(
                "step %d, in which the last %d runs died, holds the documents %s",
                step,
                self._same_deaths,
                ", ".join(document for row in documents for document in row),
            )

    def enter_phase(self, phase: str) -> None:
        """Switch to one of PHASES."""
        now = time.perf_counter()
        self.seconds[self.current_phase] += now - self.since
        self.current_phase = phase
        self.since = now

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Enter a phase, and return to the current one when the context exits."""
        before = self.current_phase
        self.enter_phase(name)
        try:
            yield
        finally:
            self.enter_phase(before)

    def goodput(self) -> str:
        """One line with each phase's share of the time since this process began."""
        self.enter_phase(self.current_phase)
        total = sum(self.seconds.values())
        shares = ", ".join(
            f"{name} {seconds / total:.1%}" for name, seconds in self.seconds.items()
        )
        return f"goodput of {total:.0f} s: {shares}"

    def _write_step(self, step: int | None) -> None:
        if not self._file:
            return
        # Every line has the same length and is one write, so that a kill at any moment leaves a
        # complete line.
        line = json.dumps({"step": step, "deaths": self.deaths}).ljust(32 + 16 * MAX_DEATHS)
        # Ignore a full disk: the run does not need this file.
        with suppress(OSError):
            self._file.seek(0)
            self._file.write(line + "\n")
            self._file.flush()

    def _report_hangs(self, hang: float) -> None:
        process = f"process {jax.process_index()} of {jax.process_count()} on {platform.node()}"
        since = self.since
        limit = hang
        while not self._ended.wait(hang / 8):
            if self.since != since:
                since = self.since
                limit = hang
            elapsed = time.perf_counter() - since
            if elapsed >= limit:
                limit = 2 * elapsed
                log.error(
                    "%s hangs: %s of step %d has taken %.0f s so far; its threads are at:",
                    process,
                    self.current_phase,
                    self.step,
                    elapsed,
                )
                # Write to file descriptor 2: sys.stderr may be an object without a descriptor.
                faulthandler.dump_traceback(2)


def _open_alone(path: Path) -> IO[str]:
    """Open running.json for writing, empty. Raises UserError if another run has it open.

    The kernel releases the lock when the process ends, however it ends.
    """
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise UserError(
            f"another run is writing to {path.parent}: stop it, or choose another workdir"
        ) from error
    except OSError:
        # Some network file systems have no locks.
        pass
    file.truncate(0)
    return file


def _read_json(path: Path) -> dict | None:
    """The content of a file; None if it is missing, or truncated by a kill."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
