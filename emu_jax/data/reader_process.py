"""A process that reads documents for the loader.

It receives the list of sources, and then requests (source, index), each of which it answers with
the document. reader_pool.py starts and kills it. It ignores signals from a terminal or a scheduler,
which reach all processes but are meant for the trainer, and exits when the trainer is gone. It does
not need JAX. Read next: sources/records.py.
"""

import io
import pickle
import signal
import socket
import traceback
from typing import Any

from emu_jax.data import images
from emu_jax.data.documents import Document
from emu_jax.data.sources import CorruptRecord, Source


def main(descriptor: int) -> None:
    """Answer requests at the socket `descriptor` until its other end is closed."""
    images.silence_pillow()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=descriptor) as link, link.makefile("rwb") as file:
        try:
            sources = pickle.load(file)
            _send(None, file)
            while True:
                number, index = pickle.load(file)
                _send(_answer(sources[number], index), file)
        except (EOFError, ConnectionError):
            return


def _send(answer: Any, file: io.BufferedRWPair) -> None:
    pickle.dump(answer, file, pickle.HIGHEST_PROTOCOL)
    file.flush()


def _answer(source: Source, index: int) -> tuple[Document | None, Exception | None]:
    try:
        return source[index], None
    except CorruptRecord as error:
        return None, error
    # Any other exception is a bug. A traceback cannot be pickled, so its text is sent.
    except Exception:
        return None, RuntimeError(f"in a reader process:\n{traceback.format_exc()}")
