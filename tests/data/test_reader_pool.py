"""Readers that hang, die or cannot start, as threads and as processes."""

import contextlib
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from emu_jax.config import UserError
from emu_jax.data.reader_pool import ReaderPool, RetryingSource
from emu_jax.data.sources import CorruptRecord
from tests.support.memory import Disk


@pytest.fixture(params=[False, True], ids=["threads", "processes"])
def patient(tmp_path, request):
    """patient(faults, ...) makes a RetryingSource of a Disk, read by one thread or process."""
    with contextlib.ExitStack() as stack:

        def make(faults, seconds=5.0, retries=0, unreadable="skip", times=10**9):
            readers = ReaderPool([Disk(tmp_path, faults, times)], 1, seconds, request.param)
            stack.callback(readers.close)
            return RetryingSource(readers, 0, "web", retries, unreadable)

        yield make
        (tmp_path / "free").touch()


def is_alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def becomes_true(condition) -> bool:
    """Whether `condition()` holds within ten seconds."""
    for _ in range(500):
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_a_hung_read_is_reported_and_skipped_or_ends_the_run(patient, caplog):
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(CorruptRecord, match="no answer within 0.1 seconds"),
    ):
        patient({0: "hang"}, 0.1, 1)[0]
    assert "source web: record 0: no answer within 0.1 seconds (attempt 2 of 2)" in caplog.text
    message = "source 'web': record 0 cannot be read: no answer within 0.1 seconds; .*=skip"
    with pytest.raises(UserError, match=message):
        patient({0: "hang"}, 0.1, 0, "stop")[0]


def test_after_a_hang_the_next_records_come(patient):
    each = patient({0: "hang"}, 0.3)
    for _ in range(2):
        with pytest.raises(CorruptRecord):
            each[0]
        assert each[1].id == "d1"


def test_a_failing_disk_is_read_again_and_a_bad_record_is_not(patient):
    each = patient({0: "fail", 2: "bad"}, retries=2, unreadable="stop", times=2)
    disk = each.readers.sources[0]
    assert each[0].id == "d0"
    assert len(disk.readers(0)) == 3
    with pytest.raises(CorruptRecord, match="d2: not a PNG") as caught:
        each[2]
    assert len(disk.readers(2)) == 1
    assert len(each) == 3
    assert not caught.value.disk


def test_closing_the_pool_ends_its_threads(tmp_path):
    # Threads left over from other tests may end during this test.
    before = set(threading.enumerate())
    readers = ReaderPool([Disk(tmp_path, {})], 3, 0.0, False)
    assert [readers.read(0, index).id for index in (0, 1, 2)] == ["d0", "d1", "d2"]
    mine = set(threading.enumerate()) - before
    assert len(mine) == 3
    readers.close()
    assert becomes_true(lambda: not any(thread.is_alive() for thread in mine))


@pytest.fixture
def processes(tmp_path):
    """processes(faults, ...) makes a RetryingSource of a Disk, read by `count` processes."""

    with contextlib.ExitStack() as stack:

        def make(faults, count=1, retries=2, unreadable="skip", times=10**9):
            readers = ReaderPool([Disk(tmp_path, faults, times)], count, 20.0, True)
            stack.callback(readers.close)
            return RetryingSource(readers, 0, "web", retries, unreadable)

        yield make


def test_a_process_that_dies_is_replaced_and_the_record_comes(processes, caplog):
    each = processes({0: "die"}, times=1)
    with caplog.at_level(logging.WARNING):
        assert each[0].id == "d0"
    assert [record.getMessage() for record in caplog.records] == [
        "source web: record 0: its process died (SIGKILL) (attempt 1 of 3)"
    ]
    first, second = each.readers.sources[0].readers(0)
    assert first != second != os.getpid()


def test_a_record_that_kills_every_reader_is_skipped_or_ends_the_run(processes):
    with pytest.raises(CorruptRecord, match=r"record 0: its process died \(SIGKILL\)"):
        processes({0: "die"}, retries=1)[0]
    with pytest.raises(UserError, match="record 0 cannot be read: its process died"):
        processes({0: "die"}, retries=0, unreadable="stop")[0]


def test_a_stopped_process_counts_as_one_that_hangs(tmp_path, processes):
    each = processes({})
    each.readers.seconds = 0.3
    # Reader processes do not import JAX.
    assert each[0].parts == ("a", "jax: False")
    (pid,) = each.readers.sources[0].readers(0)
    os.kill(pid, signal.SIGSTOP)
    assert each[1].id == "d1"
    assert not is_alive(pid)


def test_readers_ignore_signals_to_the_process_group(processes):
    each = processes({})
    assert each[0].id == "d0"
    (pid,) = each.readers.sources[0].readers(0)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, number)
    assert each[1].id == "d1"
    assert each.readers.sources[0].readers(1) == [pid]
    each.readers.close()
    assert not is_alive(pid)
    assert each[2].id == "d2"
    assert each.readers.sources[0].readers(2) != [pid]


def test_a_bug_in_a_reader_process_comes_with_its_traceback(processes):
    with pytest.raises(
        RuntimeError, match="(?s)in a reader process:.*memory.py.*ZeroDivisionError"
    ):
        processes({0: "wrong"})[0]


def test_reader_processes_end_with_the_trainer(tmp_path):
    program = f"""
import os, signal
from pathlib import Path
from emu_jax.data.reader_pool import ReaderPool
from tests.support.memory import Disk
readers = ReaderPool([Disk(Path({str(tmp_path)!r}), {{}})], 2, 0.0, True)
readers.read(0, 0), readers.read(0, 1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", program], env=environment)
    assert done.returncode == -signal.SIGKILL
    disk = Disk(tmp_path, {})
    pids = disk.readers(0) + disk.readers(1)
    assert len(set(pids)) == 2
    assert becomes_true(lambda: not any(map(is_alive, pids)))


def test_a_process_that_does_not_start_is_started_again_and_then_reported(
    processes, tmp_path, monkeypatch
):
    each = processes({})
    python = tmp_path / "python"
    start = sys.executable
    python.write_text(
        f'#!/bin/sh\nmkdir {tmp_path}/once 2>/dev/null && exit 3\nexec {start} "$@"\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert each[0].id == "d0"
    each.readers.close()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(
        UserError,
        match=r"^a reader process did not start: its process died \(exit 1\); data.readers=0",
    ):
        each[0]


def test_corrupt_records_can_be_pickled():
    error = pickle.loads(pickle.dumps(CorruptRecord("a", "b", disk=True)))
    assert (error.id, error.reason, error.disk, str(error)) == ("a", "b", True, "a: b")
