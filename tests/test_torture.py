"""The short form of torture.py: killed inside a save and in a step, on one process and on two; and
its verdict can be against a run.
"""

import json

import pytest

from tests import torture


def test_a_run_that_is_killed_loses_nothing(tmp_path):
    line = torture.torture(
        tmp_path, [("same", "save"), ("2 processes", "step")], last="same", steps=24
    )
    assert line.startswith("24 batches, exactly those of the undisturbed run")
    for damage in (
        lambda line: line | {"loss": line["loss"] * 1.01},
        lambda line: line | {"step": line["step"] + 1},
    ):
        lines = torture.metrics(tmp_path / "killed")
        (tmp_path / "whole" / "metrics.jsonl").write_text(
            "".join(json.dumps(damage(line)) + "\n" for line in lines)
        )
        whole = torture.Start("same", None, {step: {0: [[]]} for step in range(1, 25)})
        with pytest.raises(AssertionError):
            torture.verdict(tmp_path / "whole", whole, tmp_path / "killed", [whole], 24)
