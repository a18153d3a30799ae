"""What a run says of itself: where its time went, that it hangs, that it dies in the same batch
again and again; and its traces.
"""

import logging
import re
import time

import pytest

from emu_jax import watchdog
from emu_jax.config import UserError

DOCUMENTS = [["names/cat", "names/dog"], ["scenes/7"]]


def test_the_shares_of_the_time_are_all_of_it(tmp_path):
    with watchdog.Watchdog(tmp_path, 0) as watching:
        watching.enter_phase("steps")
        with watching.phase("checkpoint"), watching.phase("evaluation"):
            time.sleep(0.02)
        time.sleep(0.01)
        line = watching.goodput()
        assert (
            watching.now == "steps"
            and 0.02 <= watching.seconds["evaluation"] < watching.seconds["steps"] + 10
        )
    assert set(re.findall(r"([a-z ]+) [\d.]+%", line)) == {f" {name}" for name in watchdog.PHASES}
    assert sum(map(float, re.findall(r"([\d.]+)%", line))) == pytest.approx(100, abs=0.5)


def test_a_hang_is_said_with_process_and_phase(tmp_path, caplog, capfd):
    with watchdog.Watchdog(tmp_path, 0.1) as watching:
        watching.begin_step(7, DOCUMENTS)
        watching.enter_phase("steps")
        while not caplog.records:
            time.sleep(0.01)
        with watching.phase("input wait"):
            while len(caplog.records) < 2:
                time.sleep(0.01)
    steps, wait = (record.getMessage() for record in caplog.records[:2])
    assert (
        re.match(r"process 0 of 1 on \S+ hangs: steps of step 7 has taken 0 s so far", steps)
        and "hangs: input wait of step 7" in wait
    )
    # where its threads are
    assert "test_watchdog.py" in capfd.readouterr().err


def killed(workdir, step):
    """A run that has died in a step, as the file system sees it."""
    watching = watchdog.Watchdog(workdir, 0)
    for number in range(1, step + 1):
        watching.begin_step(number, DOCUMENTS)
    return watching


def test_dying_in_the_same_batch_again_is_said_and_its_documents_named(tmp_path, caplog):
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
            "step 7, in which the last 2 runs died, holds the documents names/cat, names/dog, scenes/7"
            in caplog.text
        )
    assert again.suspect is None


def test_dying_before_the_first_step_is_not_dying_in_the_last_one(tmp_path, caplog):
    for _ in range(2):
        killed(tmp_path, 7)
        killed(tmp_path, 0)
    assert watchdog.Watchdog(tmp_path, 0).suspect is None and not caplog.records


@pytest.mark.parametrize(
    ("error", "dead"),
    [(None, False), (UserError("put right"), False), (RuntimeError("out of memory"), True)],
)
def test_a_run_that_ends_has_not_died(tmp_path, error, dead):
    try:
        with watchdog.Watchdog(tmp_path, 0) as watching:
            watching.begin_step(3, DOCUMENTS)
            if error:
                raise error
    except (UserError, RuntimeError):
        pass
    assert (tmp_path / "running.json").exists() == dead
    assert watchdog.Watchdog(tmp_path, 0).deaths == ([3] if dead else [])


def test_a_note_that_was_cut_off_is_none(tmp_path):
    (tmp_path / "running.json").write_text('{"step": 3, "dea')
    assert watchdog.Watchdog(tmp_path, 0).deaths == []
