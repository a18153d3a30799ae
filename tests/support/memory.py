"""Sources that can be pickled, and that misbehave as files do."""

import os
import signal
import sys
import time
from pathlib import Path

from emu_jax.data.documents import Document
from emu_jax.data.sources import CorruptRecord


class Memory:
    """A source of the given documents; those at `corrupt` cannot be read."""

    def __init__(self, documents, corrupt=()):
        self.documents = documents
        self.corrupt = corrupt

    def __len__(self):
        return len(self.documents)

    def __getitem__(self, index):
        if index in self.corrupt:
            raise CorruptRecord(self.documents[index].id, "not a PNG")
        return self.documents[index]


class Disk:
    """Documents d0, d1, ..., on a disk with `faults`, {index: fault}.

    A fault happens in the first `times` reads of its record. "hang": no answer until the file
    `folder`/free exists; "die": the process is killed; "fail": the disk reports an error; "bad":
    the record is corrupt; "wrong": a bug raises an exception.
    """

    def __init__(self, folder: Path, faults: dict[int, str], times: int = 10**9, size: int = 3):
        self.folder = folder
        self.faults = faults
        self.times = times
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        with (self.folder / f"read{index}").open("a") as file:
            file.write(f"{os.getpid()}\n")
        fault = self.faults.get(index) if len(self.readers(index)) <= self.times else None
        if fault == "hang":
            while not (self.folder / "free").exists():
                time.sleep(0.01)
        if fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault in ("fail", "bad"):
            raise CorruptRecord(
                f"d{index}",
                "Input/output error" if fault == "fail" else "not a PNG",
                disk=fault == "fail",
            )
        if fault == "wrong":
            raise ZeroDivisionError
        return Document(f"d{index}", ("a", f"jax: {'jax' in sys.modules}"))

    def readers(self, index: int) -> list[int]:
        """The processes that have read, or tried to read, this record."""
        file = self.folder / f"read{index}"
        return list(map(int, file.read_text().split())) if file.exists() else []
