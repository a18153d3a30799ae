"""The short form of torture.py: one kill inside a save, one of one of two processes.

Its verdict also finds damage.
"""

import json

import pytest

from tests import torture

# Resumes from a save after each kill, and the kills are over by step 12.
SEED = 16
STEPS = 16


def test_a_killed_run_loses_nothing(tmp_path):
    plan = [("same", "save"), ("2 processes", "step")]
    line = torture.torture(tmp_path, plan, last="same", steps=STEPS, seed=SEED)
    assert line.startswith(f"{STEPS} batches, exactly those of the undisturbed run")
    for damage in (
        lambda line: line | {"loss": line["loss"] * 1.01},
        lambda line: line | {"step": line["step"] + 1},
    ):
        lines = torture.metrics(tmp_path / "killed")
        (tmp_path / "whole" / "metrics.jsonl").write_text(
            "".join(json.dumps(damage(line)) + "\n" for line in lines)
        )
        whole = torture.Start("same", None, {step: {0: [[]]} for step in range(1, STEPS + 1)})
        with pytest.raises(AssertionError):
            torture.verdict(tmp_path / "whole", whole, tmp_path / "killed", [whole], STEPS)
