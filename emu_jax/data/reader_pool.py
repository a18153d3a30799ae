"""Reading that survives hanging file systems, failing disks and crashing decoders.

A failed read is logged and retried; after that, the record is skipped or the run stops.
The loader reads through a pool of readers. A reader is a thread, which can only be abandoned when
it hangs, or a process, which can be killed and whose crash does not end the run. Both give the same
documents. Read next: reader_process.py, then loader.py.
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

# Seconds within which a process must start; its imports may come from a slow file system.
START_TIMEOUT = 300.0
# Number of attempts to start a process that dies before its first request.
START_ATTEMPTS = 3


class ReaderDied(Exception):
    """A reader hung or died. The message gives the reason in one line."""


class RetryingSource:
    """Source `number` of the pool `readers`, with retries.

    A read is retried up to `retries` times if the reader dies or the disk fails. If all attempts
    fail, unreadable="skip" raises CorruptRecord, and unreadable="stop" raises UserError, which ends
    the run.
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
        """Document `index` of the source. Raises CorruptRecord and UserError."""
        for attempt in range(1 + self.retries):
            try:
                return self.readers.read(self.number, index)
            except ReaderDied as error:
                reason = str(error)
            except CorruptRecord as error:
                # A retry helps only if the disk failed, because corrupt data stays corrupt.
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
                f"source {self.name!r}: record {index} cannot be read: {reason}; check the file "
                "system, or skip such records with data.unreadable=skip"
            )
        raise CorruptRecord(f"record {index}", reason)


class ReaderPool:
    """`count` readers of `sources`, threads or `processes`, started when first needed.

    They serve `count` requests at once and hold one record each. A reader that dies, or does not
    answer within `seconds` (0: no limit), is replaced. Thread-safe.
    """

    def __init__(self, sources: Sequence[Source], count: int, seconds: float, processes: bool):
        self.sources = sources
        self.seconds = seconds
        # None stands for a reader that has not been started.
        self._idle: queue.SimpleQueue[_Thread | _Process | None] = queue.SimpleQueue()
        self._reader_type = _Process if processes else _Thread
        for _ in range(count):
            self._idle.put(None)

    def read(self, number: int, index: int) -> Document:
        """Document `index` of source `number`.

        Raises what the source raises, ReaderDied, and UserError if no process can be started.
        """
        reader = self._idle.get()
        try:
            if reader is None:
                reader = self._start()
            document, error = reader.ask(number, index)
        except BaseException:
            # If this reader answers late, its answer must not be taken for that to the next
            # request. So the next request starts another reader.
            if reader is not None:
                reader.end()
            reader = None
            raise
        finally:
            self._idle.put(reader)
        if error is not None:
            raise error
        assert document is not None, "a reader answers with a document or an error"
        return document

    def _start(self) -> "_Thread | _Process":
        for attempt in range(START_ATTEMPTS):
            try:
                return self._reader_type(self.sources, self.seconds)
            except ReaderDied as error:
                reason = str(error)
                log.warning(
                    "a reader process did not start: %s (attempt %d of %d)",
                    reason,
                    attempt + 1,
                    START_ATTEMPTS,
                )
        raise UserError(
            f"a reader process did not start: {reason}; data.readers=0 reads without processes"
        )

    def close(self) -> None:
        """End the idle readers; `read` starts new ones."""
        idle = []
        with contextlib.suppress(queue.Empty):
            while True:
                idle.append(self._idle.get_nowait())
        for reader in idle:
            if reader is not None:
                reader.end()
            self._idle.put(None)


class _Thread:
    """A reader thread. It stops on request, once its current read returns."""

    def __init__(self, sources: Sequence[Source], seconds: float):
        self.seconds = seconds or None
        self.requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(
            target=_serve, args=(sources, self.requests, self.answers), name="reader", daemon=True
        ).start()

    def ask(self, number: int, index: int) -> tuple[Document | None, Exception | None]:
        self.requests.put((number, index))
        try:
            return self.answers.get(timeout=self.seconds)
        except queue.Empty:
            raise ReaderDied(f"no answer within {self.seconds:g} seconds") from None

    def end(self) -> None:
        self.requests.put(None)


def _serve(
    sources: Sequence[Source], requests: queue.SimpleQueue, answers: queue.SimpleQueue
) -> None:
    while (request := requests.get()) is not None:
        number, index = request
        try:
            answers.put((sources[number][index], None))
        # Pass the exception on to the thread that made the request, which raises it.
        except Exception as error:
            answers.put((None, error))


class _Process:
    """A reader process: a new Python interpreter that runs reader_process.py on the CPU.

    A fork would copy locks that JAX's threads hold, and multiprocessing would import the training
    program. Raises ReaderDied if the process does not start.
    """

    def __init__(self, sources: Sequence[Source], seconds: float):
        self.seconds = seconds
        self.link, theirs = socket.socketpair()
        with theirs:
            program = (
                f"import sys; sys.path[:] = {sys.path!r}; "
                "from emu_jax.data import reader_process; "
                f"reader_process.main({theirs.fileno()})"
            )
            self.process = subprocess.Popen(
                [sys.executable, "-c", program],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
            )
        self.file = self.link.makefile("rwb")
        self.link.settimeout(START_TIMEOUT)
        try:
            self._exchange(list(sources))
        except ReaderDied:
            self.end()
            raise
        self.link.settimeout(seconds or None)

    def ask(self, number: int, index: int) -> tuple[Document | None, Exception | None]:
        return self._exchange((number, index))

    def end(self) -> None:
        """Kill the process, which has no state that could be lost.

        If it is blocked in the kernel, it ends as soon as the kernel returns.
        """
        self.process.kill()
        # Closing a pipe flushes it, which fails if the process at the other end is gone.
        with contextlib.suppress(OSError):
            self.file.close()
        self.link.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)

    def _exchange(self, request: Any) -> Any:
        try:
            pickle.dump(request, self.file, pickle.HIGHEST_PROTOCOL)
            self.file.flush()
            return pickle.load(self.file)
        except TimeoutError:
            raise ReaderDied(f"no answer within {self.link.gettimeout():g} seconds") from None
        # The pipe is broken, or the answer is incomplete.
        except (EOFError, OSError, pickle.UnpicklingError):
            raise ReaderDied(f"its process died ({self._fate()})") from None

    def _fate(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self.process.wait(1)
            return signal.Signals(-code).name if code < 0 else f"exit {code}"
        return "it closed its socket"
