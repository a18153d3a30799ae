"""A source that is waited for: what a hung or failing file system does to the loader is said, tried again, and then skipped or an error.

A thread that hangs in a read cannot be ended, only left alone: so each thread of the loader reads through a helper thread of its own,
and takes a new one where the old has not answered in time. Read next: loader.py.
"""
import logging
import queue
import threading
from typing import Any

from emu_jax.config import UserError
from emu_jax.data.documents import Document
from emu_jax.data.sources import Corrupt, Source

log = logging.getLogger(__name__)


class Patient:
    """`source`, each record of which has `seconds` to come, and is asked for `retries` times more if it does not, or if the disk fails.

    Then, with `unreadable="skip"`, it counts as corrupt; with "stop" it ends the run (UserError).
    """

    def __init__(self, source: Source, name: str, seconds: float, retries: int, unreadable: str):
        self.source, self.name, self.seconds, self.retries, self.unreadable = source, name, seconds, retries, unreadable
        self._own = threading.local()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Document:
        """As that of `source`."""
        for attempt in range(1 + self.retries):
            try:
                return self._ask(index)
            except TimeoutError:
                reason = f"no answer within {self.seconds:g} seconds"
            except Corrupt as error:
                if not isinstance(error.__cause__, OSError):      # what is read is bad, and will be again
                    raise
                reason = error.reason
            log.warning("source %s: record %d: %s (attempt %d of %d)", self.name, index, reason, attempt + 1, 1 + self.retries)
        if self.unreadable == "stop":
            raise UserError(f"source {self.name!r}: record {index} cannot be read: {reason}; is the file system well? "
                            "data.unreadable=skip goes on without it")
        raise Corrupt(f"record {index}", reason)

    def _ask(self, index: int) -> Document:
        helper = getattr(self._own, "helper", None)
        if helper is None:
            helper = self._own.helper = _Helper(self.source)
        helper.questions.put(index)
        try:
            answer, error = helper.answers.get(timeout=self.seconds)
        except queue.Empty:
            self._own.helper = None                               # it may answer one day: nobody listens
            raise TimeoutError from None
        if error is not None:
            raise error
        return answer


class _Helper:
    """A thread that reads for one other thread, and ends when that one is gone."""

    def __init__(self, source: Source):
        self.questions: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=_serve, args=(source, self.questions, self.answers), name="reader", daemon=True).start()

    def __del__(self):
        self.questions.put(None)


def _serve(source: Source, questions: queue.SimpleQueue, answers: queue.SimpleQueue) -> None:
    while (index := questions.get()) is not None:
        try:
            answers.put((source[index], None))
        except Exception as error:                                # handed on, whatever it is
            answers.put((None, error))
