"""A process that reads for the loader: it is sent the sources, then (source, index) after (source,
index), and answers each with its document.

reader_pool.py starts it, and ends it too: signals of the terminal or of a scheduler, which go to all
processes, are for the one that trains. It also ends when that one is gone. JAX comes into it with
Grain, and sees no accelerator. Read next: sources/records.py.
"""

import pickle
import signal
import socket
import traceback

from emu_jax.data.documents import Document
from emu_jax.data.sources import CorruptRecord, Source


def main(descriptor: int) -> None:
    """Answers at the socket `descriptor` until its other end is closed."""
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


def _send(answer, file) -> None:
    pickle.dump(answer, file, pickle.HIGHEST_PROTOCOL)
    file.flush()


def _answer(source: Source, index: int) -> tuple[Document | None, Exception | None]:
    try:
        return source[index], None
    except CorruptRecord as error:
        return None, error
    # a fault of ours: where it was must not be lost on the way
    except Exception:
        return None, RuntimeError(f"in a process that reads:\n{traceback.format_exc()}")
