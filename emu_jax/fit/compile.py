"""Compiles a train step for devices that need not be present, to learn whether it fits.

Read next: report.py.
"""

import re
from dataclasses import dataclass

import jax

from emu_jax.config import UserError
from emu_jax.hardware import GIB, Accelerator
from emu_jax.plan import RunPlan, bytes_per_device
from emu_jax.step import jit_train_step

# Compilation effort on TPUs, from -1 (little) to 1. A run compiles with effort 0, which takes two
# to four times as long as -1. The peak memory of four programs differed by up to 12 % between these
# two efforts (benchmarks/results/fit.md). So if a peak differs from the limit by less than the
# share CLOSE, the program is compiled again with a run's effort.
QUICK = -1.0
CLOSE = 0.15
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    parameters: int
    # Optimizer state and moving average of the parameters.
    optimizer: int
    batch: int
    # The gradients, which are part of the temporaries.
    gradients: int
    temporaries: int
    code: int
    # The most memory in use at any time, as the compiler reports it.
    peak: int


@dataclass(frozen=True)
class Attempt:
    """The outcome of one compilation."""

    fits: bool
    # Compilation effort of this attempt.
    effort: float
    # Bytes that the step needs, and that a device has; None if unknown.
    peak: int | None = None
    limit: int | None = None
    # None if the compiler refused the program.
    compiled: jax.stages.Compiled | None = None

    def __str__(self) -> str:
        return format_verdict(self.fits, self.peak, self.limit)


def format_verdict(fits: bool, peak: int | None, limit: int | None) -> str:
    """Whether a step fits, in words such as "fits: 12.30 GiB of 15.75 GiB"."""
    verdict = "fits" if fits else "does not fit"
    if not peak:
        return verdict
    of_limit = f" of {limit / GIB:.2f} GiB" if limit else ""
    return f"{verdict}: {peak / GIB:.2f} GiB{of_limit}"


def compile_step(p: RunPlan, effort: float = 0.0) -> jax.stages.Compiled:
    """Compile the train step as a run does, or with another compilation effort."""
    options = {"exec_time_optimization_effort": effort} if effort else None
    with jax.set_mesh(p.mesh):
        lowered = jit_train_step(p.state).lower(p.program, p.state, p.batch)
        # The type stubs allow strings only, but options may be numbers.
        return lowered.compile(options)  # ty: ignore[invalid-argument-type]


def attempt(p: RunPlan, accelerator: Accelerator | None, effort: float = 0.0) -> Attempt:
    """Compile the train step, and compare its peak with the accelerator's memory.

    Raises UserError if the compiler fails for a reason other than memory.
    """
    limit = accelerator.memory if accelerator else None
    try:
        compiled = compile_step(p, effort)
    except jax.errors.JaxRuntimeError as error:
        # The TPU compiler refuses a program that does not fit.
        used = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT])", str(error))
        if used:
            peak = int(float(used[1]) * _UNITS[used[2]])
            return Attempt(False, effort, peak, limit=int(float(used[3]) * _UNITS[used[4]]))
        if "RESOURCE_EXHAUSTED" in str(error):
            return Attempt(False, effort, limit=limit)
        reason = " ".join(str(error).split())[:500]
        raise UserError(f"the compiler failed: {reason}") from error
    peak = measure_memory(p, compiled).peak
    return Attempt(limit is None or peak <= limit, effort, peak, limit, compiled)


def quick_attempt(p: RunPlan, accelerator: Accelerator | None) -> Attempt:
    """Call `attempt`, on TPUs first with little compilation effort.

    If the peak is then unknown or close to the limit, compiles again with a run's effort.
    """
    if p.mesh.devices.flat[0].platform != "tpu":
        return attempt(p, accelerator)
    tried = attempt(p, accelerator, QUICK)
    close = tried.peak and tried.limit and abs(tried.peak / tried.limit - 1) < CLOSE
    if tried.peak and not close:
        return tried
    print(f"{tried}, too close to be sure; compiling again with a run's effort", flush=True)
    # Free the program first: it holds gigabytes of the host's memory.
    del tried
    return attempt(p, accelerator)


def measure_memory(p: RunPlan, compiled: jax.stages.Compiled) -> Memory:
    """The memory of one device: arguments by their shapes, the rest as the compiler reports."""
    stats = compiled.memory_analysis()
    assert stats
    parameters = bytes_per_device((p.state.trainable, p.state.frozen))
    # Outputs that reuse the memory of arguments are counted twice, hence the subtraction.
    peak = (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes
    )
    return Memory(
        parameters=parameters,
        optimizer=bytes_per_device(p.state) - parameters,
        batch=bytes_per_device(p.batch),
        gradients=p.gradient_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        peak=peak,
    )
