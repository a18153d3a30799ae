"""Metrics of a run: metrics.jsonl, TensorBoard, pictures/STEP.png and the time left.

Only process 0 writes. On a terminal the time left is a progress bar; elsewhere it is logged once a
minute. Read next: loop.py, which writes one step late, so that it never waits for the device.
"""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float
from PIL import Image
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # ty: ignore[missing-module-member]
from tqdm import tqdm

from emu_jax.config import UserError
from emu_jax.files import atomic_write

log = logging.getLogger(__name__)

# Seconds between log lines with the time left, and between flushes of TensorBoard's file.
INTERVAL = 60.0


def means(
    metrics: dict[str, tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]],
    sources: tuple[str, ...],
) -> dict[str, float]:
    """The mean, sum / weight, of each metric (types.Metrics, on the host).

    A metric NAME_by_source becomes one NAME/SOURCE for each source. Metrics and sources whose
    weight is 0 are left out.
    """
    out: dict[str, float] = {}
    for name, (total, weight) in metrics.items():
        total = np.asarray(total, np.float64)
        weight = np.asarray(weight, np.float64)
        if name.endswith("_by_source"):
            base = name.removesuffix("_by_source")
            for source, t, w in zip(sources, total, weight, strict=True):
                if w:
                    out[f"{base}/{source}"] = float(t / w)
        elif weight:
            out[name] = float(total / weight)
    return out


class MetricWriter:
    """Writes the metrics of a run into `workdir`.

    First removes the lines of metrics.jsonl about steps after `start`, which a killed run has left.
    Every method but `close` raises UserError if the disk is full or cannot be written.
    """

    def __init__(self, workdir: Path, *, start: int, steps: int):
        """start: the step from which the run resumes. steps: the last step of the run."""
        self.active = jax.process_index() == 0
        self.path = workdir / "metrics.jsonl"
        if not self.active:
            return
        with self._disk_errors():
            if self.path.exists():
                lines = self.path.read_text().splitlines()
                with atomic_write(self.path) as file:
                    file.writelines(f"{line}\n" for line in lines if _step_of(line) <= start)
            self.file = self.path.open("a", buffering=1)
            self.board = Board(workdir / "tensorboard", start)
        self.bar = tqdm(total=steps, initial=start, unit="step", disable=not sys.stderr.isatty())
        self.steps = steps
        # The first step that was written, and the time of writing. The time left is estimated from
        # the speed since then, which excludes compilation.
        self.first: tuple[int, float] | None = None
        self.logged = 0.0

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write the metrics after `step` steps; numbers that are not finite become null in JSON."""
        if not self.active:
            return
        line: dict[str, float | None] = {"step": step}
        for name, value in values.items():
            line[name] = value if math.isfinite(value) else None
        scalars = [summary.scalar(name, value).value[0] for name, value in values.items()]
        with self._disk_errors():
            self.file.write(json.dumps(line) + "\n")
            self.board.add(step, summary.Summary(value=scalars))
        shown = [name for name in ("loss", "text_loss", "image_loss") if name in values]
        self.bar.set_postfix({name: f"{values[name]:.3g}" for name in shown}, refresh=False)
        self.bar.update(step - self.bar.n)
        if self.bar.disable and "loss" in values:
            self._log_progress(step, values["loss"], time.monotonic())

    def _log_progress(self, step: int, loss: float, now: float) -> None:
        if self.first is None:
            self.first = (step, now)
            self.logged = now
        elif now - self.logged >= INTERVAL:
            first_step, began = self.first
            left = (now - began) / (step - first_step) * (self.steps - step)
            log.info(
                "step %d of %d, loss %.4g, about %d min left",
                step,
                self.steps,
                loss,
                math.ceil(left / 60),
            )
            self.logged = now

    def write_images(self, step: int, images: np.ndarray, captions: list[str]) -> None:
        """Write images [M, h, w, 3] and their captions to TensorBoard.

        The images also go to pictures/STEP.png, one below the other; failing to write this file is
        only logged.
        """
        if not (self.active and len(images)):
            return
        folder = self.path.with_name("pictures")
        try:
            folder.mkdir(exist_ok=True)
            Image.fromarray(np.concatenate(images)).save(folder / f"{step}.png")
        except OSError as error:
            log.warning("cannot save the pictures of step %d: %s", step, error.strerror or error)
        text = "\n\n".join(f"{number}. {caption}" for number, caption in enumerate(captions))
        with self._disk_errors():
            self.board.add(step, summary.image("images", images, dataformats="NHWC"))
            self.board.add(step, summary.text("captions", text))

    def flush(self) -> None:
        """Write everything to disk, or to the bucket that is mounted there.

        Called before a checkpoint, since a run that resumes from the checkpoint will not write
        these steps again.
        """
        if self.active:
            with self._disk_errors():
                os.fsync(self.file.fileno())
                self.board.events.flush()

    def close(self) -> None:
        """Close the files; call this last. Ignores disk errors: `write` has reported them."""
        if self.active:
            self.bar.close()
            for file in (self.board, self.file):
                with suppress(OSError):
                    file.close()

    @contextmanager
    def _disk_errors(self) -> Generator[None]:
        """Turn an OSError into a UserError."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write metrics to {self.path.parent}: {error.strerror or error}; once "
                "that is fixed, the same command resumes from the last checkpoint"
            ) from error


class Board:
    """TensorBoard's event file, written synchronously.

    Replaces tensorboardX's SummaryWriter, whose thread dies at the first disk error and whose
    methods then block forever.
    """

    def __init__(self, folder: Path, start: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.events = EventsWriter(str(folder / "events"))
        self.flushed = 0.0
        if start:
            # Make TensorBoard hide what a killed run wrote about later steps.
            restart = SessionLog(status=SessionLog.START)
            self.events.write_event(Event(step=start + 1, session_log=restart))

    def add(self, step: int, content: summary.Summary) -> None:
        """Write an event, and flush the file if INTERVAL seconds have passed."""
        self.events.write_event(Event(wall_time=time.time(), step=step, summary=content))
        if time.monotonic() - self.flushed >= INTERVAL:
            self.events.flush()
            self.flushed = time.monotonic()

    def close(self) -> None:
        """Close the file."""
        self.events.close()


def _step_of(line: str) -> int | float:
    """The step of a line of metrics.jsonl; infinity for a line that a kill has truncated."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        log.warning("metrics.jsonl: removed an incomplete line")
        return math.inf
