"""Traces of a run's steps, and the option that chooses the steps."""

import jax
import pytest

from emu_jax import profiler
from emu_jax.config import UserError


@pytest.mark.parametrize("text", ["10", "10-13", "13:10", "5:5", "0:2", "a:b", ":3"])
def test_wrong_steps_are_an_error(text):
    assert profiler.parse_steps("10:13") == range(10, 13)
    assert profiler.parse_steps("") == range(0)
    with pytest.raises(UserError, match="is not FIRST:END, like 10:13"):
        profiler.parse_steps(text)


def test_a_trace_is_written_even_if_the_run_ends_during_it(tmp_path, small_traces):
    step = jax.jit(lambda x: x + 1)
    for number, last in enumerate((6, 3)):
        with profiler.trace_steps(range(3, 5), tmp_path / str(number)) as before:
            state = jax.numpy.zeros(4)
            for count in range(1, last + 1):
                before(count, state)
                state = step(state)
        assert len(list((tmp_path / str(number)).rglob("*.xplane.pb"))) == 1
    with profiler.trace_steps(range(0), tmp_path / "none") as before:
        before(1, state)
    assert not (tmp_path / "none").exists()
