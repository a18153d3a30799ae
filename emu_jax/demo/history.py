"""Read a run's metrics.jsonl: curves, speed, variance of the visual tokens.

../metric_writer.py writes that file. Read next: evaluation.py.
"""

import json
from pathlib import Path
from statistics import fmean, median
from typing import Any

from emu_jax import checkpoint

Number = int | float
Line = dict[str, Any]
# (step, value)
Curve = list[tuple[Number, Number]]


def read(directory: str) -> list[Line]:
    """The lines of the metrics.jsonl of a run, or of a checkpoint up to its step.

    Returns [] if the file does not exist.
    """
    workdir, last = checkpoint.split_step(Path(directory).resolve())
    path = workdir / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = [_parsed(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line and (last is None or line["step"] <= last)]


def curve(lines: list[Line], name: str) -> Curve:
    """The points of one metric, without non-finite values, which are null in the file."""
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None]


def speed(lines: list[Line]) -> dict[str, Number]:
    """Medians over the timed steps; {} if no step was timed.

    The first step, which compiles, and steps after an evaluation are not timed. `input_wait_share`
    is the share of the time spent waiting for data. `wall_s` is the mean step time multiplied by
    the number of steps, so it excludes compilation, evaluations and sampling.
    """
    timed = [line for line in lines if line.get("step_time")]
    if not timed:
        return {}

    def values(name):
        return [line[name] for line in timed if line.get(name) is not None]

    steps = lines[-1]["step"]
    seconds = values("step_time")
    numbers = {
        "steps": steps,
        "wall_s": steps * fmean(seconds),
        "step_time_s": median(seconds),
    }
    for name in timed[0]:
        if name.endswith("_per_second") or name.startswith(("flops_per_second/", "mfu")):
            numbers[name] = median(values(name))
    numbers["input_wait_share"] = sum(values("input_wait")) / sum(seconds)
    numbers["padding_share"] = fmean(values("padding"))
    return numbers


def variance(lines: list[Line]) -> dict[str, Number]:
    """Variance of the visual tokens across a batch's images: first, least, and least / first.

    Returns {} if it was not logged.
    """
    values = [value for _, value in curve(lines, "visual_variance")]
    if not values or not values[0]:
        return {}
    least = min(values)
    return {
        "visual_variance_first": values[0],
        "visual_variance_least": least,
        "visual_variance_ratio": least / values[0],
    }


def _parsed(line: str) -> Line | None:
    """Parse a line; None for an incomplete one, if the run is writing it or was killed."""
    try:
        return json.loads(line)
    except ValueError:
        return None
