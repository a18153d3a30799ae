"""A small run that is killed again and again loses nothing.

    python -m tests.torture [--kills=30] [--seed=0]

SIGKILL hits all its processes or one of them in a step, inside a save or during the start, and the
run restarts on another mesh or number of processes. Its batches are exactly those of an undisturbed
run, and so are its losses, bit for bit until the first change of layout.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

# (processes, devices of each, overrides)
LAYOUTS = {
    "same": (1, 2, ()),
    "other mesh": (1, 2, ("mesh.data=2",)),
    "2 processes": (2, 1, ()),
    "1 device": (1, 1, ()),
}
MOMENTS = ("step", "save", "start")
# Steps between saves.
SAVE_EVERY = 3
# Enough that the run is not over before the last kill.
STEPS_PER_KILL = 8
# Largest relative difference of losses between layouts.
TOLERANCE = 1e-3
LOSSES = ("loss", "text_loss", "image_loss")
FLAGS = (
    "--xla_backend_optimization_level=0 --xla_cpu_collective_call_terminate_timeout_seconds=1800"
)


@dataclass
class Attempt:
    """One start of the run, and the batches that its processes consumed."""

    layout: str
    # The moment when the run is killed; None lets it run to the end.
    moment: str | None
    # {step: {first row: ids of rows}}
    batches: dict[int, dict[int, list]] = field(default_factory=dict)


def worker(notes: str, arguments: list[str]) -> int:
    """A process of the run: the training command, recording every batch that it consumes."""
    from emu_jax import train
    from emu_jax.data.loader import Loader

    number = os.environ.get("JAX_PROCESS_ID", "0")
    Path(f"{notes}-{number}.pid").write_text(str(os.getpid()))
    file = open(f"{notes}-{number}.jsonl", "w", buffering=1)
    batches = Loader.__iter__

    def recorded(self):
        for item in batches(self):
            rows = next(iter(item.state["streams"].values()))["counts"]["rows"]
            note = {
                "step": rows // self._rows,
                "first": self.owned.start * self._rows,
                "ids": item.ids,
            }
            file.write(json.dumps(note) + "\n")
            yield item

    Loader.__iter__ = recorded
    sys.argv = ["train", *arguments]
    return train.main()


def command(
    folder: Path, workdir: Path, layout: str, steps: int, save_every: int
) -> tuple[list[str], dict[str, str]]:
    """The command of a start, with NOTES for the path of its records, and its environment."""
    processes, devices, overrides = LAYOUTS[layout]
    mixture = tuple(
        (name, weight, f"{folder}/data/{name}:train")
        for name, weight in (("names", 1.0), ("scenes", 2.0), ("stories", 1.0))
    )
    fields = (
        f"workdir={workdir}",
        f"data.tokenizer={folder}/data/tokenizer.json",
        f"data.mixture={mixture!r}",
        f"optim.steps={steps}",
        "data.batch=8",
        "data.tokens=64",
        "data.images=4",
        "data.num_streams=4",
        "data.pack_lookahead=2",
        "data.workers=2",
        "objective.chunk=64",
        "model.vision.depth=1",
        "model.resampler.depth=1",
        "model.llama.depth=1",
        "model.vision.remat=none",
        "model.resampler.remat=none",
        "model.llama.remat=none",
        "log.pictures_every=0",
        f"checkpoint.every={save_every}",
        "checkpoint.keep=2",
        "rules.peak_lr=(('.*', 1e-3),)",
        *overrides,
    )
    inherited = os.environ.get("XLA_FLAGS", "").split()
    flags = [flag for flag in inherited if "device_count" not in flag]
    flags.append(f"--xla_force_host_platform_device_count={devices}")
    compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR", f"{folder}/compiled")
    environ = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": compiled,
        "GRACE": "1",
        "XLA_FLAGS": " ".join((FLAGS, *flags)),
    }
    launch = ["launch/local.sh", str(processes)] if processes > 1 else []
    return [
        *launch,
        sys.executable,
        "-m",
        "tests.torture",
        "worker",
        "NOTES",
        "--config=configs/base.py:debug",
        *(f"--config.{field}" for field in fields),
    ], environ


def run_attempt(
    folder: Path,
    workdir: Path,
    number: int,
    attempt: Attempt,
    steps: int,
    chance: random.Random,
    save_every: int = SAVE_EVERY,
) -> None:
    """Start the run, kill it at its moment, and read the batches that it consumed."""
    notes = folder / "notes" / f"{workdir.name}-{number}"
    notes.parent.mkdir(exist_ok=True)
    argv, environ = command(folder, workdir, attempt.layout, steps, save_every)
    with open(f"{notes}.log", "w") as log:
        run = subprocess.Popen(
            [word.replace("NOTES", str(notes)) for word in argv],
            env=environ,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        if attempt.moment is None:
            run.wait()
        elif moment_has_come(run, notes, workdir, attempt.moment, chance):
            kill(run, notes, chance)
    if run.returncode and attempt.moment is None:
        raise AssertionError(
            f"start {number} on {attempt.layout} ended with {run.returncode}:\n"
            f"{Path(f'{notes}.log').read_text()[-3000:]}"
        )
    if run.returncode == 0 and attempt.moment is not None:
        raise AssertionError(f"start {number} was not killed: the run was over")
    for path in notes.parent.glob(f"{notes.name}-*.jsonl"):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                note = json.loads(line)
                attempt.batches.setdefault(note["step"], {})[note["first"]] = note["ids"]


def moment_has_come(
    run: subprocess.Popen, notes: Path, workdir: Path, moment: str, chance: random.Random
) -> bool:
    """Wait for the moment; returns whether the run is still alive.

    Some starts complete a save first, so that the run makes progress.
    """

    def consumed():
        return sum(
            path.read_bytes().count(b"\n") for path in notes.parent.glob(f"{notes.name}-0.jsonl")
        )

    began = time.time()
    saves = chance.randint(1, 2)
    seen = set()

    def saving() -> bool:
        now = {
            path.name
            for path in workdir.glob("checkpoints/*.orbax-checkpoint-tmp")
            if _changed(path) > began
        }
        seen.update(now)
        return bool(now) and len(seen) >= saves

    wanted = chance.randint(2, 3 * SAVE_EVERY)

    def has_come() -> bool:
        if moment == "step":
            return consumed() >= wanted
        return moment == "start" or saving()

    pause = {
        "step": chance.uniform(0, 0.5),
        "save": chance.uniform(0, 0.03),
        "start": chance.uniform(0, 8),
    }[moment]
    while run.poll() is None and not has_come():
        time.sleep(0.002)
    time.sleep(pause)
    return run.poll() is None


def _changed(path: Path) -> float:
    try:
        return path.stat().st_ctime
    # A save that ends at this moment renames its folder.
    except FileNotFoundError:
        return 0.0


def kill(run: subprocess.Popen, notes: Path, chance: random.Random) -> None:
    """Kill all processes at once, or one of them, without which the others cannot continue."""
    pids = [int(path.read_text() or 0) for path in sorted(notes.parent.glob(f"{notes.name}-*.pid"))]
    if pids and all(pids) and chance.random() < 0.5:
        try:
            os.kill(chance.choice(pids), signal.SIGKILL)
        except ProcessLookupError:
            pass
    else:
        os.killpg(run.pid, signal.SIGKILL)
    run.wait(120)


def metrics(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def data_state(workdir: Path) -> dict:
    newest = max(
        (path for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()),
        key=lambda path: int(path.name),
    )
    return json.loads((newest / "data" / "data.json").read_text())


def all_rows(parts: dict[int, list]) -> list:
    """Ids of the rows of a batch, of which each process consumed a part."""
    return [row for _, ids in sorted(parts.items()) for row in ids]


def verdict(
    reference: Path, undisturbed: Attempt, workdir: Path, attempts: list[Attempt], steps: int
) -> str:
    """Compare both runs; returns one line. Raises AssertionError where they differ."""
    rows = {step: all_rows(parts) for step, parts in undisturbed.batches.items()}
    assert sorted(rows) == list(range(1, steps + 1))
    assert len({len(ids) for ids in rows.values()}) == 1
    survived: dict[int, dict[int, list]] = {}
    for number, attempt in enumerate(attempts):
        for step, parts in attempt.batches.items():
            for first, ids in parts.items():
                assert ids == rows[step][first : first + len(ids)], (
                    f"start {number} on {attempt.layout}: other documents in step {step}"
                )
            survived[step] = parts
    survived_rows = {step: all_rows(parts) for step, parts in survived.items()}
    assert survived_rows == rows, "batches are missing"
    assert data_state(workdir) == data_state(reference)

    got = metrics(workdir)
    wanted = metrics(reference)
    for lines in (got, wanted):
        assert [line["step"] for line in lines] == list(range(1, steps + 1))
    other_layouts = [attempt for attempt in attempts if attempt.layout != "same"]
    firsts = [min(attempt.batches, default=steps + 1) for attempt in other_layouts]
    # The last step before the first change of layout.
    changed = min(firsts, default=steps + 1) - 1
    apart = 0.0
    for line, want in zip(got, wanted, strict=True):
        for name in LOSSES:
            if line["step"] <= changed:
                assert line[name] == want[name], (
                    f"step {line['step']}: {name} is {line[name]} and was {want[name]}"
                )
            apart = max(apart, abs(line[name] - want[name]) / abs(want[name]))
    assert apart < TOLERANCE, f"losses are {apart:.1e} apart"
    again = sum(len(attempt.batches) for attempt in attempts) - steps
    return (
        f"{steps} batches, exactly those of the undisturbed run; {again} repeated; losses equal "
        f"bit for bit to step {changed}, then within {apart:.1e}; metrics.jsonl has every step once"
    )


def torture(
    folder: Path,
    plan: list[tuple[str, str]],
    last: str,
    steps: int,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
) -> str:
    """Compare an undisturbed run with one that is killed, and return the verdict.

    plan: (layout, moment) of each killed start. last: the layout on which the run ends.
    """
    from tests.support import fixtures

    fixtures.write_tiny(folder / "data")
    chance = random.Random(seed)
    reference = folder / "reference"
    workdir = folder / "killed"
    undisturbed = Attempt("same", None)
    # The undisturbed run saves only at its end, because saves must not change a run.
    run_attempt(folder, reference, 0, undisturbed, steps, chance, save_every=steps)
    attempts = [Attempt(layout, moment) for layout, moment in plan] + [Attempt(last, None)]
    for number, attempt in enumerate(attempts):
        run_attempt(folder, workdir, number, attempt, steps, chance)
        done = "no step"
        if attempt.batches:
            done = f"steps {min(attempt.batches)} to {max(attempt.batches)}"
        killed = f", killed ({attempt.moment})" if attempt.moment else ""
        log(f"start {number + 1} on {attempt.layout}: {done}{killed}")
    return verdict(reference, undisturbed, workdir, attempts, steps)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    chance = random.Random(flags.seed)
    began = time.time()
    layouts = [
        "same" if number < flags.kills // 3 else chance.choice(list(LAYOUTS))
        for number in range(flags.kills + 1)
    ]
    plan = [(layout, chance.choices(MOMENTS, (3, 3, 1))[0]) for layout in layouts[:-1]]
    with tempfile.TemporaryDirectory() as folder:
        line = torture(
            Path(folder),
            plan,
            layouts[-1],
            STEPS_PER_KILL * flags.kills,
            flags.seed,
            lambda line: print(line, flush=True),
        )

    chosen = Counter(name for pair in plan for name in pair)

    def counts(names):
        return ", ".join(f"{chosen[name]} {name}" for name in names)

    kills = f"{flags.kills} kills ({counts(MOMENTS)}) on {counts(LAYOUTS)}"
    print(f"{kills}, in {time.time() - began:.0f} s: {line}")
    return 0


if __name__ == "__main__":
    sys.exit(worker(sys.argv[2], sys.argv[3:]) if sys.argv[1:2] == ["worker"] else main())
