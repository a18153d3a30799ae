"""Sources that are waited for: what a hung file system, a failing disk or a crashing decoder does
to the loader is said, tried again, and then skipped or an error.

The loader's threads read through readers: threads, which can only be left alone where they hang, or
processes, which can be ended and which may die of what they read. Whoever reads, the documents are
the same. Read next: reader_process.py, the process, then loader.py.
"""

import contextlib
import logging
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

from emu_jax.config import UserError
from emu_jax.data.documents import Document
from emu_jax.data.sources import CorruptRecord, Source

log = logging.getLogger(__name__)

# seconds that a process may take to start: its imports come from a file system, too
START = 300.0
# how often one is started that does not live to its first question
STARTS = 3


class ReaderDied(Exception):
    """A reader did not answer, and why, in one line."""


class RetryingSource:
    """Source `number` of `readers`, each record of which is asked for `retries` times more if its
    reader is lost, or if the disk fails.

    Then, with `unreadable="skip"`, it counts as corrupt; with "stop" it ends the run (UserError).
    """

    def __init__(
        self, readers: "ReaderPool", number: int, name: str, retries: int, unreadable: str
    ):
        self.readers = readers
        self.number = number
        self.name = name
        self.retries = retries
        self.unreadable = unreadable

    def __len__(self) -> int:
        return len(self.readers.sources[self.number])

    def __getitem__(self, index: int) -> Document:
        """As that of the source."""
        for attempt in range(1 + self.retries):
            try:
                return self.readers.ask(self.number, index)
            except ReaderDied as error:
                reason = str(error)
            except CorruptRecord as error:
                # what is read is bad, and will be again
                if not error.disk:
                    raise
                reason = error.reason
            log.warning(
                "source %s: record %d: %s (attempt %d of %d)",
                self.name,
                index,
                reason,
                attempt + 1,
                1 + self.retries,
            )
        if self.unreadable == "stop":
            raise UserError(
                f"source {self.name!r}: record {index} cannot be read: {reason}; is the file system well? "
                "data.unreadable=skip goes on without it"
            )
        raise CorruptRecord(f"record {index}", reason)


class ReaderPool:
    """`count` readers of `sources`, threads or `processes`, started when they are needed: so many
    questions are asked at a time, and a record each is all that they hold. One that does not answer
    within `seconds` (0: it is waited for), or dies, is replaced. Thread-safe.
    """

    def __init__(self, sources: Sequence[Source], count: int, seconds: float, processes: bool):
        self.sources = sources
        self.seconds = seconds
        # None: one that is not started
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._make = _Process if processes else _Thread
        for _ in range(count):
            self._idle.put(None)

    def ask(self, number: int, index: int) -> Document:
        """Document `index` of source `number`. Raises what that raises, ReaderDied, and UserError where
        no process can be started.
        """
        reader = self._idle.get()
        try:
            reader = reader or self._start()
            document, error = reader.ask(number, index)
        # whatever it was: what it answers next may be to this question
        except BaseException:
            # None: the next question starts another
            reader = reader and reader.end()
            raise
        finally:
            self._idle.put(reader)
        if error is not None:
            raise error
        return document

    def _start(self) -> "_Thread | _Process":
        for attempt in range(STARTS):
            try:
                return self._make(self.sources, self.seconds)
            except ReaderDied as error:
                reason = str(error)
                log.warning(
                    "a process that reads for the loader does not start: %s (attempt %d of %d)",
                    reason,
                    attempt + 1,
                    STARTS,
                )
        raise UserError(
            f"a process that reads for the loader does not start: {reason}; data.readers=0 does without"
        )

    def close(self) -> None:
        """Ends the readers that are idle; `ask` starts new ones."""
        idle = []
        with contextlib.suppress(queue.Empty):
            while True:
                idle.append(self._idle.get_nowait())
        for reader in idle:
            self._idle.put(reader.end() if reader else None)


class _Thread:
    """Ends when it is told to, if it ever comes back from what it reads."""

    def __init__(self, sources: Sequence[Source], seconds: float):
        self.seconds = seconds or None
        self.questions: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(
            target=_serve, args=(sources, self.questions, self.answers), name="reader", daemon=True
        ).start()

    def ask(self, number: int, index: int) -> tuple[Document | None, Exception | None]:
        self.questions.put((number, index))
        try:
            return self.answers.get(timeout=self.seconds)
        except queue.Empty:
            raise ReaderDied(f"no answer within {self.seconds:g} seconds") from None

    def end(self) -> None:
        self.questions.put(None)


def _serve(
    sources: Sequence[Source], questions: queue.SimpleQueue, answers: queue.SimpleQueue
) -> None:
    while (question := questions.get()) is not None:
        number, index = question
        try:
            answers.put((sources[number][index], None))
        # handed on, whatever it is
        except Exception as error:
            answers.put((None, error))


class _Process:
    """A Python of its own that knows reader_process.py and the sources, and no accelerator. Not forked, for
    JAX's threads hold locks, and not multiprocessing's, which would import the program that trains.
    Raises ReaderDied where it does not start.
    """

    def __init__(self, sources: Sequence[Source], seconds: float):
        self.seconds = seconds
        self.link, theirs = socket.socketpair()
        with theirs:
            program = f"import sys; sys.path[:] = {sys.path!r}; from emu_jax.data import reader_process; reader_process.main({theirs.fileno()})"
            self.process = subprocess.Popen(
                [sys.executable, "-c", program],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
            )
        self.file = self.link.makefile("rwb")
        self.link.settimeout(START)
        try:
            self._exchange(list(sources))
        except ReaderDied:
            self.end()
            raise
        self.link.settimeout(seconds or None)

    def ask(self, number: int, index: int) -> tuple[Document | None, Exception | None]:
        return self._exchange((number, index))

    def end(self) -> None:
        """It holds nothing that could be lost. One that hangs in the kernel ends when that lets
        it.
        """
        self.process.kill()
        # half a question may be left in it
        with contextlib.suppress(OSError):
            self.file.close()
        self.link.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)

    def _exchange(self, question: Any) -> Any:
        try:
            pickle.dump(question, self.file, pickle.HIGHEST_PROTOCOL)
            self.file.flush()
            return pickle.load(self.file)
        except TimeoutError:
            raise ReaderDied(f"no answer within {self.link.gettimeout():g} seconds") from None
        # a broken pipe, or half an answer
        except (EOFError, OSError, pickle.UnpicklingError):
            raise ReaderDied(f"its process died ({self._fate()})") from None

    def _fate(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self.process.wait(1)
            return signal.Signals(-code).name if code < 0 else f"exit {code}"
        return "it hung up"
