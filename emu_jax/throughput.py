"""The speed of a run in tokens, images and FLOPs per second. Read next: loop.py."""

import time
from typing import Any

import jax

from emu_jax import hardware, stages, tree
from emu_jax.data.loader import LoadedBatch
from emu_jax.models import flops
from emu_jax.step import Program, State


class Throughput:
    """Measures the time from the end of one step to the end of the next.

    batch_rows: rows of a global batch.
    """

    def __init__(self, program: Program, state: State, batch_rows: int):
        self.program = program
        self.trained = flops.trained(path for path, _ in tree.leaves(state.trainable))
        self.towers = stages.flops_towers(tree.merge(state.trainable, state.frozen))
        self.peak = hardware.peak_flops(jax.devices()[0].device_kind)
        self.batch_rows = batch_rows
        self.last_end: float | None = None

    def pause(self) -> None:
        """Exclude the time since the last step from the time of the next step."""
        self.last_end = None

    def measure(self, item: LoadedBatch, waited: float) -> dict[str, float]:
        """Metrics of the step that just ended; waited: seconds it waited for its batch.

        Speeds are left out for the first step, which compiles, and the first one after a pause.
        """
        now = time.perf_counter()
        seconds = None if self.last_end is None else now - self.last_end
        self.last_end = now

        values = {"padding": 1 - float((item.batch.segments > 0).mean()), "input_wait": waited}
        for name in ("cut_documents", "cut_turns"):
            if name in item.stats:
                values[name] = item.stats[name]
        values |= {f"epochs/{name}": value for name, value in item.stats["epochs"].items()}
        if seconds:
            values |= self._speeds(item, seconds)
        return values

    def _speeds(self, item: LoadedBatch, seconds: float) -> dict[str, float]:
        counts = self._count(item)
        work = self.program.stage.step_flops(self.program.model_config, self.trained, **counts)
        work = {tower: value for tower, value in work.items() if tower in self.towers}
        total = sum(work.values())
        values = {
            "step_time": seconds,
            "tokens_per_second": counts["tokens"] / seconds,
            "images_per_second": counts["images"] / seconds,
            "flops_per_second": total / seconds,
        }
        values |= {f"flops_per_second/{tower}": value / seconds for tower, value in work.items()}
        if self.peak:
            values["mfu"] = total / seconds / (self.peak * jax.device_count())
        return values

    def _count(self, item: LoadedBatch) -> dict[str, Any]:
        """Arguments of flops.forward, extrapolated from this process's rows to the batch."""
        batch = item.batch
        held = batch.segments > 0
        scale = self.batch_rows / len(held)
        slots = self.program.stage.emu_config(self.program.model_config).resampler.tokens
        return {
            "images": scale * int(batch.has_image.sum()),
            "tokens": scale * int(held.sum()),
            "pairs": scale * int((batch.positions + 1)[held].sum()),
            "labels": scale * float(batch.text_weights.sum()),
            "regressed": scale * float(batch.image_weights.sum()) * slots,
        }
