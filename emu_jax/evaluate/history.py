"""What a run's metrics.jsonl tells afterwards: curves, speed, and whether the visual tokens kept
their variance.

The lines are metric_writer.py's. Read next: demo.py.
"""

import json
from pathlib import Path
from statistics import fmean, median

Number = int | float
Line = dict[str, Number | None]
# (step, value)
Curve = list[tuple[Number, Number]]


def read(directory: str) -> list[Line]:
    """The lines of a run, up to the checkpoint if `directory` is one; none where there is no
    metrics.jsonl.
    """
    folder, last = workdir(directory)
    path = folder / "metrics.jsonl"
    lines = [_parsed(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [line for line in lines if line and (last is None or line["step"] <= last)]


def workdir(directory: str) -> tuple[Path, int | None]:
    """(a run's workdir, None), or of one of its checkpoints, workdir/checkpoints/1000, (the
    workdir, its step).
    """
    path = Path(directory).resolve()
    return (
        (path.parent.parent, int(path.name))
        if path.parent.name == "checkpoints" and path.name.isdigit()
        else (path, None)
    )


def curve(lines: list[Line], name: str) -> Curve:
    """The points of one metric; null, which stands for a number that was not finite, is left
    out.
    """
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None]


def speed(lines: list[Line]) -> dict[str, Number]:
    """Medians over the steps whose time was taken (not the first, which compiles, nor those after
    an evaluation); {} for no such step.

    `input_wait_share` is all waiting over all time, and `wall_s` the mean step's time by the number
    of steps: without compilation, evaluations and pictures.
    """
    timed = [line for line in lines if line.get("step_time")]
    if not timed:
        return {}
    names = [
        name
        for name in timed[0]
        if name.endswith("_per_second") or name.startswith(("flops_per_second/", "mfu"))
    ]

    def values(name):
        return [line[name] for line in timed if line.get(name) is not None]

    steps = lines[-1]["step"]
    seconds = values("step_time")
    return {
        "steps": steps,
        "wall_s": steps * fmean(seconds),
        "step_time_s": median(seconds),
        **{name: median(values(name)) for name in names},
        "input_wait_share": sum(values("input_wait")) / sum(seconds),
        "padding_share": fmean(values("padding")),
    }


def variance(lines: list[Line]) -> dict[str, Number]:
    """The visual tokens' variance across a batch's images: at the first step, its least over the
    logged steps, and their ratio; {} for none.
    """
    values = [value for _, value in curve(lines, "visual_variance")]
    return (
        {
            "visual_variance_first": values[0],
            "visual_variance_least": min(values),
            "visual_variance_ratio": min(values) / values[0],
        }
        if values and values[0]
        else {}
    )


def _parsed(line: str) -> Line | None:
    try:
        return json.loads(line)
    # half a line: the run is being killed, or is still writing
    except ValueError:
        return None
