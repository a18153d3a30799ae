"""python -m emu_jax.fit --config=FILE --topology=NAME [--search] [--json=FILE]
[--config.FIELD=VALUE ...]: does it fit, before you rent it?

Compiles the real train step for devices that need not be here and says what each will hold, send
and compute, and how fast that can be at best. NAME is v5e:16x16, 2xv5e:8x16 (two slices), h100:8x8
(nodes x GPUs), ...; no data is opened. Read next: hardware.py, hlo.py.
"""

import argparse
import copy
import ctypes
import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from emu_jax import config, hardware, hlo, sharding, stages, tree
from emu_jax.config import UserError
from emu_jax.hardware import GIB
from emu_jax.models import flops
from emu_jax.plan import RunPlan, batch_shards, bytes_per_device, make_plan, parameter_table
from emu_jax.step import jit_train_step

# The TPU compiler's effort for a fast program, from -1 to 1. A run's is 0 and takes two to four
# times as long. Of four programs the peaks were up to 12 % apart (benchmarks/results/fit.md): where
# peak and memory are as close as this share, the step is compiled as for a run.
QUICK = -1.0
CLOSE = 0.15
# of a search
COMPILATIONS = 8
# of remat, as they rise in need of memory
POLICIES = ("full", "dots", "none")
# changes that are tried on a config that does not fit
TRIES = 4
# groups of config.model that have a remat
TOWERS = ("vision", "resampler", "llama", "decoder.vae", "decoder.unet")


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. `gradients` are part of `temporaries`; `peak` is what the compiler says
    all of it takes.
    """

    parameters: int
    optimizer: int
    batch: int
    gradients: int
    temporaries: int
    code: int
    peak: int


@dataclass(frozen=True)
class Roofline:
    """Seconds that a step takes at least, by each of what it needs; were all of it to run at once,
    it takes the longest of them.
    """

    compute: float
    memory: float
    # inside a slice or a node
    links: float
    # between slices or nodes
    network: float

    @property
    def bound(self) -> str:
        return max(asdict(self), key=asdict(self).get)

    @property
    def seconds(self) -> float:
        return max(asdict(self).values())


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 it fits; 1 it does not; 2 for what the user can put right."""
    try:
        flags, rest = _parse(sys.argv[1:] if arguments is None else arguments)
        c = config.load(rest)
        _without_devices()
        _in_few_heaps()
        row, devices = hardware.topology_devices(flags.topology)
        found = search(c, row, devices) if flags.search else fit(c, row, devices)
        if flags.json:
            Path(flags.json).write_text(
                json.dumps({"topology": flags.topology} | found, indent=1) + "\n"
            )
        return 0 if found["fits"] else 1
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def fit(
    c: ConfigDict, row: hardware.Accelerator | None, devices: list[jax.Device]
) -> dict[str, Any]:
    """The report on `c`, printed as it comes; where it does not fit, also what would."""
    p = make_plan(c, devices)
    print(parameter_table(p.params))
    parts = f", in {c.optim.accumulate} micro-batches" if c.optim.accumulate > 1 else ""
    print(
        f"{len(devices)} x {devices[0].device_kind}, mesh {dict(p.mesh.shape)}; {c.data.batch} rows of {c.data.tokens} tokens and "
        f"{c.data.images} images, {c.data.batch // batch_shards(p.mesh)} a device{parts}\n",
        flush=True,
    )
    limit = row.memory if row else None
    least = bytes_per_device(p.state)
    if limit and least > limit:
        raise UserError(
            f"the parameters and the optimizer alone need {least / GIB:.1f} GiB a device and a device has {limit / GIB:.1f} GiB: "
            f"take at least {-(-least * len(devices) // limit)} devices, more mesh.fsdp, or a smaller model (pretrain.py:emu-1b)"
        )
    found = report(p, row)
    print(table(found, row), flush=True)
    if not found["fits"]:
        found["changes"] = []
        for change in changes(c, p.mesh):
            tried = quick_attempt(make_plan(changed(c, change), devices), row)
            found["changes"].append(
                {"change": change, "peak": tried.get("peak"), "fits": tried["fits"]}
            )
            print(
                f"{'fits' if tried['fits'] else 'does not fit'} with {_flags(change)}{_of(tried)}",
                flush=True,
            )
            if tried["fits"]:
                break
    return found


# What is compiled


def compiled(p: RunPlan, effort: float = 0.0) -> jax.stages.Compiled:
    """The train step, as the loop would run it; with another effort of the compiler's than a run's,
    if asked.
    """
    with jax.set_mesh(p.mesh):
        lowered = jit_train_step(p.state).lower(p.program, p.state, p.batch)
        return lowered.compile({"exec_time_optimization_effort": effort} if effort else None)


def quick_attempt(p: RunPlan, row: hardware.Accelerator | None) -> dict[str, Any]:
    """`attempt`; for TPUs with little of the compiler's effort, where that is enough to say what
    fits.
    """
    if p.mesh.devices.flat[0].platform != "tpu":
        return attempt(p, row)
    tried = attempt(p, row, QUICK)
    limit = tried.get("limit", row and row.memory)
    if "peak" in tried and not (limit and abs(tried["peak"] / limit - 1) < CLOSE):
        return tried
    print(
        f"too close to say{_of(tried | {'limit': limit})}; it is compiled again with a run's effort",
        flush=True,
    )
    # gigabytes, on the host
    tried.pop("compiled", None)
    return attempt(p, row)


def attempt(p: RunPlan, row: hardware.Accelerator | None, effort: float = 0.0) -> dict[str, Any]:
    """Compiles, and says {"fits", "effort", "peak", "compiled"}; the last only where the compiler
    could.
    """
    refused = {"fits": False, "effort": effort}
    try:
        done = compiled(p, effort)
    # the TPU's compiler refuses what does not fit
    except jax.errors.JaxRuntimeError as error:
        if not (used := re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT])", str(error))):
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise UserError(
                    f"the compiler failed: {' '.join(str(error).split())[:500]}"
                ) from error
            return refused
        scale = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
        return refused | {
            "peak": int(float(used[1]) * scale[used[2]]),
            "limit": int(float(used[3]) * scale[used[4]]),
        }
    peak = memory(p, done).peak
    return {
        "fits": row is None or peak <= row.memory,
        "effort": effort,
        "peak": peak,
        "compiled": done,
    }


# What is said of it


def report(p: RunPlan, row: hardware.Accelerator | None) -> dict[str, Any]:
    """Everything that is known of the compiled step, JSON-able."""
    began = time.perf_counter()
    tried = quick_attempt(p, row)
    work, again = step_flops(p)
    found = {
        "config": config.to_dict(p.config),
        "devices": p.mesh.size,
        "kind": p.mesh.devices.flat[0].device_kind,
        "mesh": dict(p.mesh.shape),
        "parameters": {
            tower: sum(leaf.size for leaf in jax.tree.leaves(part))
            for tower, part in p.params.items()
        },
        "flops": work,
        "recomputed_flops": again,
        "fits": tried["fits"],
        "effort": tried["effort"],
        "peak": tried.get("peak"),
        "limit": tried.get("limit", row and row.memory),
        "compile_seconds": time.perf_counter() - began,
        "host_peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }
    if "compiled" in tried:
        held = memory(p, tried["compiled"])
        module = hlo.Module(tried["compiled"].as_text())
        collectives = module.collectives()
        found |= {
            "memory": asdict(held),
            "collectives": by_kind(collectives),
            "padded_gathers": padded_gathers(p, collectives),
            "kernels": len(
                re.findall(
                    r'custom_call_target="(?:tpu_custom_call|__gpu\$xla\.gpu\.triton|__cudnn\$fmha\w*)"',
                    module.text,
                )
            ),
        }
        if row:
            line = roofline(p, row, held, collectives, sum(work.values()) + sum(again.values()))
            found |= {
                "roofline": asdict(line) | {"bound": line.bound},
                "step_seconds": line.seconds,
                "mfu": sum(work.values()) / (line.seconds * row.flops * p.mesh.size),
            }
    return found


def memory(p: RunPlan, done: jax.stages.Compiled) -> Memory:
    """What a device holds: the arguments from their shapes, the rest from the compiler."""
    stats = done.memory_analysis()
    parameters = bytes_per_device((p.state.trainable, p.state.frozen))
    code = stats.generated_code_size_in_bytes
    peak = (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
        + code
    )
    return Memory(
        parameters=parameters,
        optimizer=bytes_per_device(p.state) - parameters,
        batch=bytes_per_device(p.batch),
        gradients=bytes_per_device(p.state.trainable),
        temporaries=stats.temp_size_in_bytes,
        code=code,
        peak=peak,
    )


def step_flops(p: RunPlan) -> tuple[dict[str, float], dict[str, float]]:
    """(model FLOPs, FLOPs of what is computed again for the backward pass) of a step by tower,
    every row one document full of tokens and images.
    """
    data = p.config.data
    size = p.program.model_config
    stage = p.program.stage
    rows = data.batch
    images = data.batch * data.images
    N = stage.emu_config(size).resampler.tokens
    counts = dict(
        images=images,
        tokens=rows * data.tokens,
        pairs=rows * data.tokens * (data.tokens + 1) / 2,
        labels=rows * max(data.tokens - data.images * (N + 2), 0),
        regressed=images * (N + p.config.objective.regress_end),
    )
    trained = flops.trained(path for path, _ in tree.leaves(p.state.trainable))
    towers = stages.flops_towers(p.params)
    once, work = (
        {
            tower: value
            for tower, value in stage.step_flops(size, trains, **counts).items()
            if tower in towers
        }
        for trains in ({}, trained)
    )
    full = {field.split(".")[-2] for field, policy in remats(p.config).items() if policy == "full"}
    return work, {
        tower: value for tower, value in once.items() if tower in full and work[tower] > value
    }


def remats(c: ConfigDict) -> dict[str, str]:
    """{field: its value} of the policies of remat in a config."""
    found = {}
    for name in TOWERS:
        *parents, tower = name.split(".")
        group = c.model if not parents else c.model.get(parents[0], {})
        if group.get(tower):
            found[f"model.{name}.remat"] = group[tower].remat
    return found


def roofline(
    p: RunPlan, row: hardware.Accelerator, held: Memory, collectives: list[hlo.Collective], work: float
) -> Roofline:
    """Each time a lower bound: all FLOPs at the peak rate; the state read and, but for what is
    frozen, written once, and the gathered weights of a layer written and read in each pass; the
    bytes that must come over the network between slices or nodes, and the others over the links.
    """
    place = [_neighbourhood(device) for device in p.mesh.devices.flat]
    received = sum(c.runs * c.bytes_received for c in collectives)
    crossing = sum(c.runs * c.bytes_between(place) for c in collectives)
    gathered = sum(c.runs * c.bytes for c in collectives if c.kind == "all-gather")
    state = 2 * (held.parameters + held.optimizer) - bytes_per_device(p.state.frozen)
    return Roofline(
        compute=work / (row.flops * p.mesh.size),
        memory=(state + 2 * gathered) / row.bandwidth,
        links=(received - crossing) / row.link,
        network=crossing / row.network,
    )


def _neighbourhood(device: jax.Device) -> int:
    """Devices of one number reach each other without the network: those of a TPU slice, of a GPU
    node.
    """
    return (
        getattr(device, "slice_index", 0) or 0 if device.platform == "tpu" else device.process_index
    )


def by_kind(collectives: list[hlo.Collective]) -> dict[str, dict[str, float]]:
    """{kind: how many there are, how often they run a step, the bytes that reach a device a step,
    and the share that is asynchronous}.
    """
    found = {}
    for kind in sorted({c.kind for c in collectives}):
        some = [c for c in collectives if c.kind == kind]
        received = [c.runs * c.bytes_received for c in some]
        found[kind] = {
            "count": len(some),
            "runs": sum(c.runs for c in some),
            "bytes": sum(received),
            "asynchronous": sum(b for c, b in zip(some, received) if c.asynchronous)
            / max(sum(received), 1),
        }
    return found


def padded_gathers(p: RunPlan, collectives: list[hlo.Collective]) -> list[dict[str, Any]]:
    """All-reduces over the shards of parameters that are as large as a block's matrix: weights
    gathered as zeros and a sum, or gradients summed whole. There should be none.
    """
    least = min(
        2 * leaf.size // leaf.shape[0]
        for path, leaf in tree.leaves(p.params)
        if re.fullmatch(r"\w+/blocks/.*/w", path)
    )

    def shard(device):
        return np.unravel_index(device, p.mesh.devices.shape)[sharding.AXES.index("fsdp")]

    return [
        {"name": c.name, "bytes": c.bytes, "runs": c.runs, "source": c.source}
        for c in collectives
        if c.kind == "all-reduce"
        and c.bytes >= least
        and len({shard(device) for device in c.groups[0]}) > 1
    ]


def table(found: dict[str, Any], row: hardware.Accelerator | None) -> str:
    """The report, for people."""
    lines = []
    if "memory" in found:
        lines += ["a device holds"] + [
            f"  {name:12}{size / GIB:9.3f} GiB{'  of the temporaries' if name == 'gradients' else ''}"
            for name, size in found["memory"].items()
        ]
        lines += ["a device receives, a step"] + [
            f"  {kind:20}{c['bytes'] / GIB:9.3f} GiB  in {c['runs']:,} runs of {c['count']}, {c['asynchronous']:.0%} behind arithmetic"
            for kind, c in found["collectives"].items()
        ]
        lines += [
            f"  gathered by zeros and a sum, or summed whole: {one['bytes'] / 2**20:.0f} MiB x {one['runs']}, {one['name']}"
            for one in found["padded_gathers"]
        ]
        lines += [
            f"attention runs in {found['kernels']} kernels of its own"
            if found["kernels"]
            else "attention is dense: no kernel of its own"
        ]
    again = {
        tower: f"  and {value / 1e15:.3f} P again"
        for tower, value in found["recomputed_flops"].items()
    }
    lines += ["FLOPs of a full step"] + [
        f"  {tower:12}{value / 1e15:9.3f} P{again.get(tower, '')}"
        for tower, value in found["flops"].items()
    ]
    if "roofline" in found:
        times = [
            f"{name} {found['roofline'][name] * 1e3:.0f} ms"
            for name in ("compute", "memory", "links", "network")
        ]
        lines += [
            f"a step takes at least: {', '.join(times)}; bound by {found['roofline']['bound']}, highest possible MFU {found['mfu']:.1%}"
            f" ({row.source})"
        ]
    quick = (
        " with little effort (a run's peak may be a tenth more or less)" if found["effort"] else ""
    )
    lines += [
        f"compiled in {found['compile_seconds']:.0f} s{quick}; host memory {found['host_peak'] / GIB:.1f} GiB",
        ("fits" if found["fits"] else "does not fit") + _of(found),
    ]
    return "\n".join(lines)


# What would fit


def changes(c: ConfigDict, mesh: jax.sharding.Mesh) -> Iterator[dict[str, Any]]:
    """Changes that save memory, cheapest first, each with all before it; {field: value}."""
    local = c.data.batch // batch_shards(mesh)
    parts = c.optim.accumulate
    images = c.data.images
    # a forward pass more
    steps = [{field: "full" for field, policy in remats(c).items() if policy != "full"}]
    finer = [n for n in range(parts + 1, local + 1) if local % n == 0]
    # smaller products
    steps += [{"optim.accumulate": n} for n in dict.fromkeys((*finer[:1], *finer[-1:]))]
    steps += [{"objective.chunk": c.objective.chunk // 2}] if c.objective.chunk >= 256 else []
    # another mixture in a row
    steps += [{"data.images": images // 2}] if images > 1 else []
    # another recipe
    steps += (
        [{"data.batch": c.data.batch // 2, "optim.accumulate": local // 2}]
        if local % 2 == 0
        else []
    )
    change: dict[str, Any] = {}
    for step in list(filter(None, steps))[:TRIES]:
        change = change | step
        yield change


def changed(c: ConfigDict, change: dict[str, Any]) -> ConfigDict:
    """A copy of `c` with {"a.b": value} in it."""
    c = copy.deepcopy(c)
    for key, value in change.items():
        *parents, name = key.split(".")
        node = c
        for parent in parents:
            node = node[parent]
        node[name] = value
    return c


def search(
    c: ConfigDict, row: hardware.Accelerator | None, devices: list[jax.Device]
) -> dict[str, Any]:
    """The largest batch a device of each remat policy that fits, heaviest first, within
    COMPILATIONS; printed as they come.
    """
    if row is None:
        raise UserError(
            "a search needs a topology whose devices have a memory to fill, like v5e:16x16"
        )
    shares = batch_shards(sharding.make_mesh(c.mesh.to_dict(), devices))

    def measure(policy: str, local: int) -> int | None:
        remat = dict.fromkeys(remats(c), policy)
        tried = attempt(
            make_plan(
                changed(c, remat | {"data.batch": local * shares, "optim.accumulate": 1}), devices
            ),
            row,
        )
        print(
            f"remat {policy:5} {local:3} rows a device: {'fits' if tried['fits'] else 'does not fit'}{_of(tried)}",
            flush=True,
        )
        return tried["peak"] if tried["fits"] else None

    best = largest(measure, row.memory, COMPILATIONS)
    for policy, local in best.items():
        print(
            f"remat {policy}: "
            + (
                f"at most {local} rows a device were seen to fit, data.batch={local * shares}"
                if local
                else "nothing fits"
            )
        )
    return {
        "config": config.to_dict(c),
        "fits": any(best.values()),
        "rows_a_device": best,
        "rows_of_the_mesh": shares,
    }


def largest(
    measure: Callable[[str, int], int | None],
    limit: int,
    budget: int,
    policies: tuple[str, ...] = POLICIES,
) -> dict[str, int]:
    """{policy: the most rows a device that fit}, 0 for none; `measure(policy, rows)` gives the peak
    in bytes, or None where it does not fit, and is asked at most `budget` times. Policies rise in
    need of memory: after one that fits nothing, none is tried.
    """
    best: dict[str, int] = {}
    for later, policy in zip(reversed(range(len(policies))), policies):
        peaks: dict[int, int] = {}
        refused = None
        rows = 1
        # each later policy is tried at least once
        while rows and budget > later:
            budget -= 1
            peak = measure(policy, rows)
            if peak is None:
                refused = rows
            else:
                peaks[rows] = peak
            rows = _next(peaks, refused, limit)
        best[policy] = max(peaks, default=0)
        if not peaks:
            break
    return best


def _next(peaks: dict[int, int], refused: int | None, limit: int) -> int | None:
    """The rows to try next, None where the answer is known: memory grows linearly, so two peaks
    foretell the rest.
    """
    most = max(peaks, default=0)
    if not peaks or refused == most + 1:
        return None
    if len(peaks) == 1:
        guess = 2 * most
    else:
        (a, low), (b, high) = sorted(peaks.items())[-2:]
        guess = b + int((limit - high) * (b - a) / max(high - low, 1))
    guess = guess if refused is None else min(guess, refused - 1)
    return guess if guess > most else None


# Small things


def _of(found: dict[str, Any]) -> str:
    peak = found.get("peak")
    limit = found.get("limit")
    return (
        (f": {peak / GIB:.2f} GiB" + (f" of {limit / GIB:.2f} GiB" if limit else ""))
        if peak
        else ""
    )


def _flags(change: dict[str, Any]) -> str:
    return " ".join(f"--config.{key}={value}" for key, value in change.items())


def _without_devices() -> None:
    """This machine's accelerators, if it has any, stay free; and libtpu asks no metadata server who
    it is.
    """
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} {hardware.ABSENT_GPU_FLAGS}",
    )
    jax.config.update("jax_platforms", "cpu")


def _in_few_heaps() -> None:
    """glibc, where it is: the compilers' threads share two heaps, which keep what is freed. Their
    own ones hold a sixth more memory than they use.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        arena_max = -8
        trim_threshold = -1
        mmap_threshold = -3
        for option, value in ((arena_max, 2), (trim_threshold, GIB), (mmap_threshold, GIB // 32)):
            mallopt(option, value)


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m emu_jax.fit", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.error = _fail
    parser.add_argument(
        "--topology", required=True, help="v5e:16x16, v5p:4x4x4, 2xv5e:8x16, h100:8x8, cpu:8, ..."
    )
    parser.add_argument("--json", metavar="FILE", help="write the report there as well")
    parser.add_argument(
        "--search",
        action="store_true",
        help=f"the largest batch of each remat policy, in at most {COMPILATIONS} compilations",
    )
    return parser.parse_known_args(arguments)


def _fail(message: str) -> None:
    raise UserError(message)


if __name__ == "__main__":
    sys.exit(main())
