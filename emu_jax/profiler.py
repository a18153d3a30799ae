"""XLA traces of some steps of a run. Read next: loop.py."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from emu_jax.config import UserError

log = logging.getLogger(__name__)


def parse_steps(text: str) -> range:
    """ "10:13", the steps 10, 11 and 12; "" is none. Raises UserError."""
    first, colon, end = text.partition(":")
    if not text:
        return range(0)
    if not (colon and first.isdigit() and end.isdigit() and 0 < int(first) < int(end)):
        raise UserError(
            f"profile.steps={text!r} is not FIRST:END, like 10:13 for the steps 10, 11 and 12"
        )
    return range(int(first), int(end))


@contextmanager
def trace_steps(steps: range, to: Path) -> Iterator[Callable[[int, Any], None]]:
    """before(step, state): to be called before each step. An XLA trace of `steps` is written to
    `to`, for TensorBoard and Perfetto.
    """
    under_way = False

    def before(step: int, state: Any) -> None:
        nonlocal under_way
        if step in (steps.start, steps.stop):
            jax.block_until_ready(state)
        if step in steps and not under_way:
            jax.profiler.start_trace(to)
            under_way = True
        if step == steps.stop and under_way:
            end()

    def end() -> None:
        nonlocal under_way
        under_way = False
        jax.profiler.stop_trace()
        log.info("a trace of the steps %d to %d is in %s", steps.start, steps.stop - 1, to)

    try:
        yield before
    finally:
        # the run ended within
        if under_way:
            end()
