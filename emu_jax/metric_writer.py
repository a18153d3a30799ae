"""What a run tells: metrics.jsonl (one object a line), TensorBoard, pictures/STEP.png, and how long
it still takes: a bar on a terminal, else a line of the log a minute. On process 0 only.

Read next: loop.py, which calls it a step late, so that it never waits for the device.
"""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float
from PIL import Image
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tqdm import tqdm

from emu_jax.config import UserError

log = logging.getLogger(__name__)

# seconds between lines of the log that say how far the run is, and after which TensorBoard sees
# what is new
EVERY = 60.0


def means(
    metrics: dict[str, tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]],
    sources: tuple[str, ...],
) -> dict[str, float]:
    """sum / weight of each metric (types.Metrics, on the host); `x_by_source` becomes x/SOURCE for
    the sources that were there.
    """
    out: dict[str, float] = {}
    for name, (total, weight) in metrics.items():
        total = np.asarray(total, np.float64)
        weight = np.asarray(weight, np.float64)
        if name.endswith("_by_source"):
            out |= {
                f"{name.removesuffix('_by_source')}/{source}": float(t / w)
                for source, t, w in zip(sources, total, weight, strict=True)
                if w
            }
        elif weight:
            out[name] = float(total / weight)
    return out


class MetricWriter:
    """Lines of a run in `workdir`; those after step `start`, of a run that was cut off there, are
    taken out.

    All of it raises UserError where the disk does not take it.
    """

    def __init__(self, workdir: Path, *, start: int, steps: int):
        self.active = jax.process_index() == 0
        self.path = workdir / "metrics.jsonl"
        if not self.active:
            return
        with self._writing():
            if self.path.exists():
                lines = [
                    line for line in self.path.read_text().splitlines() if _step(line) <= start
                ]
                part = self.path.with_suffix(".part")
                part.write_text("".join(line + "\n" for line in lines))
                part.replace(self.path)
            self.file = self.path.open("a", buffering=1)
            self.board = Board(workdir / "tensorboard", start)
        self.bar = tqdm(total=steps, initial=start, unit="step", disable=not sys.stderr.isatty())
        self.steps = steps
        # the first step told, which was compiled for, and when
        self.first: tuple[int, float] | None = None
        self.told = 0.0

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line, for `step` batches consumed. Numbers that are not finite are null in the line
        (JSON has none).
        """
        if not self.active:
            return
        line = {"step": step} | {
            name: value if math.isfinite(value) else None for name, value in values.items()
        }
        with self._writing():
            self.file.write(json.dumps(line) + "\n")
            self.board.add(
                step,
                summary.Summary(
                    value=[summary.scalar(name, value).value[0] for name, value in values.items()]
                ),
            )
        self.bar.set_postfix(
            {
                name: f"{values[name]:.3g}"
                for name in ("loss", "text_loss", "image_loss")
                if name in values
            },
            refresh=False,
        )
        self.bar.update(step - self.bar.n)
        if self.bar.disable and "loss" in values:
            self._tell(step, values["loss"], time.monotonic())

    def _tell(self, step: int, loss: float, now: float) -> None:
        if self.first is None:
            self.first = (step, now)
            self.told = now
        elif now - self.told >= EVERY:
            first, began = self.first
            left = (now - began) / (step - first) * (self.steps - step)
            log.info(
                "step %d of %d, loss %.4g, about %d minutes left",
                step,
                self.steps,
                loss,
                math.ceil(left / 60),
            )
            self.told = now

    def write_images(self, step: int, images: np.ndarray, captions: list[str]) -> None:
        """Images [M, h, w, 3], if there are any, and what was said of them, to TensorBoard; the
        images also to disk, one below the other.
        """
        if self.active and len(images):
            try:
                self.path.with_name("pictures").mkdir(exist_ok=True)
                Image.fromarray(np.concatenate(images)).save(
                    self.path.with_name("pictures") / f"{step}.png"
                )
            except OSError as error:
                log.warning(
                    "the pictures of step %d are not on disk: %s", step, error.strerror or error
                )
            with self._writing():
                self.board.add(step, summary.image("images", images, dataformats="NHWC"))
                self.board.add(
                    step,
                    summary.text(
                        "captions",
                        "\n\n".join(f"{number}. {text}" for number, text in enumerate(captions)),
                    ),
                )

    def flush(self) -> None:
        """All of it is on the disk, or in the bucket that is mounted as one: for a checkpoint,
        after which nobody tells it again.
        """
        if self.active:
            with self._writing():
                os.fsync(self.file.fileno())
                self.board.events.flush()

    def close(self) -> None:
        if self.active:
            self.bar.close()
            for file in (self.board, self.file):
                # what does not fit on the disk has been said
                with suppress(OSError):
                    file.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write what is told of the run into {self.path.parent}: {error.strerror or error}; "
                "once it can be, the same command goes on from the last checkpoint"
            ) from error


class Board:
    """TensorBoard's file. Written by whom it is told: the thread of tensorboardX's own
    SummaryWriter ends with the first error of the disk, and all who tell it more wait for ever.
    """

    def __init__(self, folder: Path, start: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.events = EventsWriter(str(folder / "events"))
        self.flushed = 0.0
        # hides what was told of later steps
        if start:
            self.events.write_event(
                Event(step=start + 1, session_log=SessionLog(status=SessionLog.START))
            )

    def add(self, step: int, what: summary.Summary) -> None:
        self.events.write_event(Event(wall_time=time.time(), step=step, summary=what))
        if time.monotonic() - self.flushed >= EVERY:
            self.events.flush()
            self.flushed = time.monotonic()

    def close(self) -> None:
        self.events.close()


def _step(line: str) -> int | float:
    try:
        return int(json.loads(line)["step"])
    # half a line, of a run that was killed while writing
    except (ValueError, KeyError, TypeError):
        log.warning("metrics.jsonl: left out a line that is not whole")
        return math.inf
