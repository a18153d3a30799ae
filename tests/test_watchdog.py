"""Time by phase, hangs, and runs that keep dying in the same step."""

import logging
import re
import subprocess
import sys
import time

import pytest

from emu_jax import watchdog
from emu_jax.config import UserError

DOCUMENTS = [["names/cat", "names/dog"], ["scenes/7"]]


def test_the_shares_of_the_phases_add_up(tmp_path):
    with watchdog.Watchdog(tmp_path, 0) as run:
        run.enter_phase("steps")
        with run.phase("checkpoint"), run.phase("evaluation"):
            time.sleep(0.02)
        time.sleep(0.01)
        line = run.goodput()
        assert run.current_phase == "steps"
        assert 0.02 <= run.seconds["evaluation"] < run.seconds["steps"] + 10
    assert set(re.findall(r"([a-z ]+) [\d.]+%", line)) == {f" {name}" for name in watchdog.PHASES}
    assert sum(map(float, re.findall(r"([\d.]+)%", line))) == pytest.approx(100, abs=0.5)


def test_a_hang_is_logged_with_process_and_phase(tmp_path, caplog, capfd):
    with watchdog.Watchdog(tmp_path, 0.1) as run:
        run.begin_step(7, DOCUMENTS)
        run.enter_phase("steps")
        while not caplog.records:
            time.sleep(0.01)
        with run.phase("input wait"):
            while len(caplog.records) < 2:
                time.sleep(0.01)
    steps, wait = (record.getMessage() for record in caplog.records[:2])
    assert re.match(r"process 0 of 1 on \S+ hangs: steps of step 7 has taken 0 s so far", steps)
    assert "hangs: input wait of step 7" in wait
    # The stacks of this process's threads are printed.
    assert "test_watchdog.py" in capfd.readouterr().err


def killed(workdir, step):
    """Leave the files of a run that was killed in a step."""
    run = watchdog.Watchdog(workdir, 0)
    for number in range(1, step + 1):
        run.begin_step(number, DOCUMENTS)
    return run


def test_a_second_death_in_the_same_step_names_its_documents(tmp_path, caplog):
    for step in (12, 7):
        killed(tmp_path, step)
    assert not caplog.records
    with caplog.at_level(logging.ERROR):
        again = killed(tmp_path, 7)
        assert not caplog.records
        third = watchdog.Watchdog(tmp_path, 0)
        assert "the last 2 runs died in step 7" in caplog.text and third.deaths == [12, 7, 7]
        third.begin_step(6, DOCUMENTS)
        assert "names/cat" not in caplog.text
        third.begin_step(7, DOCUMENTS)
        assert (
            "step 7, in which the last 2 runs died, holds the documents "
            "names/cat, names/dog, scenes/7" in caplog.text
        )
    assert again.suspect is None


def test_a_death_before_the_first_step_is_not_one_in_the_last_step(tmp_path, caplog):
    for _ in range(2):
        killed(tmp_path, 7)
        killed(tmp_path, 0)
    assert watchdog.Watchdog(tmp_path, 0).suspect is None and not caplog.records


@pytest.mark.parametrize(
    ("error", "dead"),
    [(None, False), (UserError("a wrong option"), False), (RuntimeError("out of memory"), True)],
)
def test_a_run_that_ends_has_not_died(tmp_path, error, dead):
    try:
        with watchdog.Watchdog(tmp_path, 0) as run:
            run.begin_step(3, DOCUMENTS)
            if error:
                raise error
    except (UserError, RuntimeError):
        pass
    assert (tmp_path / "running.json").exists() == dead
    assert watchdog.Watchdog(tmp_path, 0).deaths == ([3] if dead else [])


def test_a_truncated_file_is_ignored(tmp_path):
    (tmp_path / "running.json").write_text('{"step": 3, "dea')
    assert watchdog.Watchdog(tmp_path, 0).deaths == []


def test_one_run_at_a_time(tmp_path):
    """A lock of another process refuses the run, leaves its file alone, and ends with it."""
    path = tmp_path / "running.json"
    program = f"""
import fcntl
file = open({str(path)!r}, "w")
file.write("{{}}"); file.flush()
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True); input()
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match=f"another run is writing to {tmp_path}: stop it"):
            watchdog.Watchdog(tmp_path, 0)
        assert path.read_text() == "{}"
        other.kill()
    with watchdog.Watchdog(tmp_path, 0):
        pass
