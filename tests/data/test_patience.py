import logging
import threading
import time

import pytest

from emu_jax.config import UserError
from emu_jax.data.documents import Document
from emu_jax.data.patience import Patient
from emu_jax.data.sources import Corrupt


class Disk:
    """A source of three documents whose records in `hangs` never come while `event` is unset, and in `fails` are as often unreadable."""

    def __init__(self, hangs=(), fails=()):
        self.hangs, self.fails, self.event, self.reads = set(hangs), dict(fails), threading.Event(), []

    def __len__(self):
        return 3

    def __getitem__(self, index):
        self.reads.append(index)
        if index in self.hangs:
            self.event.wait()
        if self.fails.get(index, 0) > 0:
            self.fails[index] -= 1
            raise Corrupt(f"d{index}", "Input/output error") from OSError("Input/output error")
        if index == 2:
            raise Corrupt("d2", "not a PNG") from ValueError("not a PNG")
        return Document(f"d{index}", ("a",))


def test_a_hung_read_is_reported_and_skipped_or_ends_the_run(caplog):
    disk = Disk(hangs=(0,))
    with caplog.at_level(logging.WARNING):
        with pytest.raises(Corrupt, match="no answer within 0.05 seconds"):
            Patient(disk, "web", 0.05, 1, "skip")[0]
    assert "source web: record 0: no answer within 0.05 seconds (attempt 2 of 2)" in caplog.text
    with pytest.raises(UserError, match="source 'web': record 0 cannot be read: no answer within 0.05 seconds; .* data.unreadable=skip"):
        Patient(disk, "web", 0.05, 0, "stop")[0]
    assert Patient(disk, "web", 5.0, 0, "stop")[1].id == "d1"
    disk.event.set()


def test_after_a_hang_the_next_records_come(caplog):
    disk = Disk(hangs=(0,))
    patient = Patient(disk, "web", 0.05, 0, "skip")
    for index, good in ((0, False), (1, True), (0, False), (1, True)):
        if good:
            assert patient[index].id == "d1"
        else:
            with pytest.raises(Corrupt):
                patient[index]
    disk.event.set()


def test_a_failing_disk_is_asked_again_and_a_bad_record_is_not():
    disk = Disk(fails={0: 2})
    patient = Patient(disk, "web", 5.0, 2, "stop")
    assert patient[0].id == "d0" and disk.reads == [0, 0, 0]
    with pytest.raises(Corrupt, match="not a PNG"):
        patient[2]
    assert disk.reads == [0, 0, 0, 2] and len(patient) == 3


def test_the_helper_ends_with_its_thread():
    patient = Patient(Disk(), "web", 5.0, 0, "stop")
    thread = threading.Thread(target=lambda: patient[1])
    before = threading.active_count()
    thread.start()
    thread.join()
    for _ in range(100):
        if threading.active_count() == before:
            return
        time.sleep(0.02)
    raise AssertionError("the reader is still there")
