"""XLA traces of some steps of a run, for TensorBoard and Perfetto. Read next: loop.py."""

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from emu_jax.config import UserError

log = logging.getLogger(__name__)


def parse_steps(text: str) -> range:
    """Parse "FIRST:END": "10:13" gives the steps 10, 11 and 12, "" none. Raises UserError."""
    if not text:
        return range(0)
    first, colon, end = text.partition(":")
    if not (colon and first.isdigit() and end.isdigit() and 0 < int(first) < int(end)):
        raise UserError(
            f"profile.steps={text!r} is not FIRST:END, like 10:13 for the steps 10, 11 and 12"
        )
    return range(int(first), int(end))


@contextmanager
def trace_steps(steps: range, folder: Path) -> Generator[Callable[[int, Any], None]]:
    """Write a trace of `steps` to `folder`.

    Yields before(step, state), to be called before each step. If the run stops before the end of
    `steps`, the trace ends with the context.
    """
    tracing = False

    def before(step: int, state: Any) -> None:
        nonlocal tracing
        if step in (steps.start, steps.stop):
            jax.block_until_ready(state)
        if step in steps and not tracing:
            jax.profiler.start_trace(folder)
            tracing = True
        if step == steps.stop and tracing:
            end()

    def end() -> None:
        nonlocal tracing
        tracing = False
        jax.profiler.stop_trace()
        log.info("wrote a trace of steps %d to %d to %s", steps.start, steps.stop - 1, folder)

    try:
        yield before
    finally:
        if tracing:
            end()
