"""The short form of torture.py: a kill inside a save, then one in a step of two processes.

The verdict must also find damage.
"""

import json

import pytest

from tests import torture

# With this seed and number of steps, each kill comes after a save, and the last by step 12.
SEED = 16
STEPS = 16


def test_a_killed_run_loses_nothing(tmp_path):
    plan = [("same", "save"), ("2 processes", "step")]
    line = torture.torture(tmp_path, plan, last="same", steps=STEPS, seed=SEED)
    assert line.startswith(f"{STEPS} batches, exactly those of the undisturbed run")
    attempt = torture.Attempt("same", None, {step: {0: [[]]} for step in range(1, STEPS + 1)})
    reference = tmp_path / "reference"
    killed = tmp_path / "killed"

    def compare(lines):
        (reference / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        torture.verdict(reference, attempt, killed, [attempt], STEPS)

    lines = torture.metrics(killed)
    compare(lines)
    with pytest.raises(AssertionError):
        compare([line | {"loss": line["loss"] * 1.01} for line in lines])
    with pytest.raises(AssertionError):
        compare([line | {"step": line["step"] + 1} for line in lines])
