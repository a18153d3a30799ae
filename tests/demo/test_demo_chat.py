"""Accuracies before and after tuning, and of the baseline.

tests/test_instruct.py runs the command on a tuned run.
"""

import numpy as np
import pytest

from emu_jax.demo import __main__ as command
from emu_jax.demo import chat
from tests.support import make


def test_shares_by_hand():
    told = [
        chat.Answered("1", 0, "what", "what is this?", "a cat", "a dog", "a cat", ()),
        chat.Answered("1", 1, "there", "is there a cat?", "yes", "no", "no", ()),
        chat.Answered("2", 0, "what", "what is this?", "a pig", "", "a cat", ()),
    ]
    numbers = chat.accuracies(told, {"what": "a pig", "there": "yes"})
    assert (
        numbers["all_count"] == 3
        and numbers["all_before"] == 0
        and numbers["all_after"] == pytest.approx(1 / 3)
    )
    assert (
        numbers["all_most_common"] == pytest.approx(2 / 3)
        and numbers["later_turns_count"] == 1
        and numbers["there_after"] == 0
    )
    assert "animal_count" not in numbers


def test_a_checkpoint_that_was_not_tuned_is_one_line(tmp_path, capsys):
    make.written(
        tmp_path / "emu", make.cfg(), {"regress_head": {"w": np.ones((32, 32), np.float32)}}
    )
    assert command.main(["chat", f"--checkpoint={tmp_path}/emu"]) == 2
    assert (
        "was not tuned to chat from another checkpoint (model.llama.added=4, init='')"
        in capsys.readouterr().err
    )
