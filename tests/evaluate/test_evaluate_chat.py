"""What tuning taught is told by its command: before it, after it, and what answering the same always would reach."""
import json

import jax
import jax.numpy as jnp
import make
import numpy as np
import pytest

from emu_jax.evaluate import __main__ as command
from emu_jax.evaluate import chat
from tests.data import fixtures

DATA = f"data.tokens=96 data.system=none model.llama.vocab={fixtures.VOCAB}".split()
TUNED = ("model.llama.added=6", "model.lora.rank=2")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    to = tmp_path_factory.mktemp("data")
    fixtures.write_tiny(to)
    return to


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    c = make.cfg(*DATA)
    make.written(folder / "emu", c, make.params(make.program(c)))
    c = make.cfg(*DATA, *TUNED, f"init={folder}/emu")
    params = make.params(make.program(c))
    params = jax.tree.map_with_path(lambda at, x: jnp.ones_like(x) if at[-1].key == "b" else x, params)
    make.written(folder / "tuned", c, params)
    return folder


def test_the_command(data, runs, capsys):
    assert command.main(["--task=demo-chat", f"--checkpoint={runs}/tuned", f"--data={data}"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == f"{runs}/tuned/report.html" and out[0].split() == "held-out questions number before after most common answer".split()
    results = json.loads((runs / "tuned/results.json").read_text())
    numbers, answers = results["numbers"], results["answers"]
    assert numbers["all_count"] == len(answers) >= 2 * 16
    for when in ("before", "after"):
        assert numbers[f"all_{when}"] == pytest.approx(np.mean([answer["true"] == answer[when] for answer in answers]))
    assert any(answer["before"] != answer["after"] for answer in answers) and 0 < numbers["all_most_common"] < 1
    page = (runs / "tuned/report.html").read_text()
    assert page.count("<img") >= chat.SHOWN and "<script" not in page and "CC BY-SA" in page


def test_shares_by_hand():
    told = [chat.Told("1", 0, "what", "what is this?", "a cat", "a dog", "a cat", ()),
            chat.Told("1", 1, "there", "is there a cat?", "yes", "no", "no", ()),
            chat.Told("2", 0, "what", "what is this?", "a pig", "", "a cat", ())]
    numbers = chat._numbers(told, {"what": "a pig", "there": "yes"})
    assert numbers["all_count"] == 3 and numbers["all_before"] == 0 and numbers["all_after"] == pytest.approx(1 / 3)
    assert numbers["all_most_common"] == pytest.approx(2 / 3) and numbers["later_turns_count"] == 1 and numbers["there_after"] == 0
    assert "animal_count" not in numbers


def test_a_checkpoint_that_was_not_tuned_is_one_line(data, runs, capsys):
    assert command.main(["--task=demo-chat", f"--checkpoint={runs}/emu", f"--data={data}"]) == 2
    assert "was not tuned to chat from another (model.llama.added=4, init='')" in capsys.readouterr().err
