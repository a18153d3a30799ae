"""Watching over a run: where its time goes, whether a step hangs, whether it dies in the same batch
again and again, and a trace of some steps.

Each process watches itself and says in its log what it sees; only process 0 writes. Read next:
loop.py.
"""

import faulthandler
import json
import logging
import platform
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax

from emu_jax import processes
from emu_jax.config import UserError

log = logging.getLogger(__name__)

# "restart": all before the first batch
PHASES = ("steps", "input wait", "compile", "checkpoint", "evaluation", "restart")
# deaths of runs
REMEMBERED = 5


class Watchdog:
    """What this process does, a phase at a time. A context: left without an error, or with a
    UserError, the run has not died.

    hang: seconds in one phase after which it is said, with the place of every thread; again
    whenever the time has doubled. 0: never. began: `perf_counter` when it began; None: now.
    """

    def __init__(self, workdir: Path, hang: float, began: float | None = None):
        self.step = 0
        self.now = "restart"
        self.since = time.perf_counter() if began is None else began
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.ended = threading.Event()
        # there while a run is under way, or has died
        self.path = workdir / "running.json"
        found = processes.allgather_json(_read(self.path))[0]
        self.deaths: list[int | None] = (
            [*found["deaths"], found["step"]][-REMEMBERED:] if found else []
        )
        self.file = self.path.open("w") if jax.process_index() == 0 else None
        self._note(None)
        died = self.deaths[-1] if self.deaths else None
        self.times = next(
            (n for n, at in enumerate(reversed(self.deaths)) if at != died), len(self.deaths)
        )
        self.suspect = died if self.times > 1 else None
        if self.suspect is not None:
            log.error(
                "the last %d runs died in step %d: its documents will be named; a process that was killed for its memory, or a record that "
                "crashes a decoder, look like this",
                self.times,
                self.suspect,
            )
        if hang:
            threading.Thread(target=self._watch, args=(hang,), name="watchdog", daemon=True).start()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, kind: type | None, _error: Any, _traceback: Any) -> None:
        self.ended.set()
        if self.file:
            with suppress(OSError):
                self.file.close()
            if kind is None or issubclass(kind, (UserError, KeyboardInterrupt)):
                self.path.unlink(missing_ok=True)

    def begin_step(self, step: int, documents: list[list[str]]) -> None:
        """The batch that makes step `step` is about to be trained on; `documents`: this process's,
        a row each.
        """
        self.step = step
        self._note(step)
        if step == self.suspect:
            log.error(
                "step %d, in which the last %d runs died, holds the documents %s",
                step,
                self.times,
                ", ".join(document for row in documents for document in row),
            )

    def enter_phase(self, phase: str) -> None:
        """From now on, until the next."""
        now = time.perf_counter()
        self.seconds[self.now] += now - self.since
        self.now = phase
        self.since = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """`enter_phase`, and back to the phase before."""
        before = self.now
        self.enter_phase(name)
        try:
            yield
        finally:
            self.enter_phase(before)

    def goodput(self) -> str:
        """One line: the shares of this process's time since it began."""
        self.enter_phase(self.now)
        total = sum(self.seconds.values())
        shares = ", ".join(
            f"{name} {seconds / total:.1%}" for name, seconds in self.seconds.items()
        )
        return f"goodput of {total:.0f} s: {shares}"

    def _note(self, step: int | None) -> None:
        # of one length, and in one write: it is whole whenever the process is killed
        if self.file:
            # a full disk: no reason to end here
            with suppress(OSError):
                self.file.seek(0)
                self.file.write(
                    json.dumps({"step": step, "deaths": self.deaths}).ljust(32 + 16 * REMEMBERED)
                    + "\n"
                )
                self.file.flush()

    def _watch(self, hang: float) -> None:
        who = f"process {jax.process_index()} of {jax.process_count()} on {platform.node()}"
        since = self.since
        told = hang
        while not self.ended.wait(hang / 8):
            if self.since != since:
                since = self.since
                told = hang
            if (late := time.perf_counter() - since) >= told:
                told = 2 * late
                log.error(
                    "%s hangs: %s of step %d has taken %.0f s so far; its threads are at:",
                    who,
                    self.now,
                    self.step,
                    late,
                )
                faulthandler.dump_traceback(sys.__stderr__)


def _read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    # none, or cut off at its very start
    except (OSError, ValueError):
        return None
