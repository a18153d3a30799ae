"""The report on a compiled train step: memory, communication, FLOPs, and least time.

Read next: hlo.py for communication, models/flops.py for arithmetic.
"""

import re
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from emu_jax import config, hlo, sharding, stages, tree
from emu_jax.fit.compile import Memory, format_verdict, measure_memory, quick_attempt
from emu_jax.hardware import GIB, Accelerator
from emu_jax.models import flops
from emu_jax.plan import RunPlan, bytes_per_device, count_parameters

# Groups of config.model that have a remat policy.
TOWERS = ("vision", "resampler", "llama", "decoder.vae", "decoder.unet")
# Matches calls of attention kernels, on TPU (splash) and GPU (Pallas, cuDNN).
_KERNELS = r'custom_call_target="(?:tpu_custom_call|__gpu\$xla\.gpu\.triton|__cudnn\$fmha\w*)"'


@dataclass(frozen=True)
class Roofline:
    """Lower bounds of a step's time in seconds, one for each resource.

    If all resources were used at the same time without a pause, the step would take the largest.
    """

    compute: float
    memory: float
    # Inside a slice or a node.
    links: float
    # Between slices or nodes.
    network: float

    @property
    def bound(self) -> str:
        """Name of the resource with the largest bound."""
        times = asdict(self)
        return max(times, key=times.__getitem__)

    @property
    def seconds(self) -> float:
        return max(asdict(self).values())


def make_report(p: RunPlan, accelerator: Accelerator | None) -> dict[str, Any]:
    """Everything known about the compiled step, as JSON values."""
    began = time.perf_counter()
    tried = quick_attempt(p, accelerator)
    work, recomputed = step_flops(p)
    found = {
        "config": config.to_dict(p.config),
        "devices": p.mesh.size,
        "kind": p.mesh.devices.flat[0].device_kind,
        "mesh": dict(p.mesh.shape),
        "parameters": count_parameters(p.params),
        "flops": work,
        "recomputed_flops": recomputed,
        "fits": tried.fits,
        "effort": tried.effort,
        "peak": tried.peak,
        "limit": tried.limit,
        "compile_seconds": time.perf_counter() - began,
        "host_peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }
    if not tried.compiled:
        return found
    memory = measure_memory(p, tried.compiled)
    text = tried.compiled.as_text()
    assert text
    collectives = hlo.Module(text).collectives()
    found["memory"] = asdict(memory)
    found["collectives"] = by_kind(collectives)
    found["padded_gathers"] = padded_gathers(p, collectives)
    found["kernels"] = len(re.findall(_KERNELS, text))
    if accelerator:
        model_flops = sum(work.values())
        all_flops = model_flops + sum(recomputed.values())
        line = roofline(p, accelerator, memory, collectives, all_flops)
        found["roofline"] = asdict(line) | {"bound": line.bound}
        found["step_seconds"] = line.seconds
        found["mfu"] = model_flops / (line.seconds * accelerator.flops * p.mesh.size)
    return found


def step_flops(p: RunPlan) -> tuple[dict[str, float], dict[str, float]]:
    """(model FLOPs, FLOPs of forward passes recomputed for remat) of a step, by tower.

    Assumes that every row is one document with as many tokens and images as fit.
    """
    data = p.config.data
    model = p.program.model_config
    stage = p.program.stage
    images = data.batch * data.images
    N = stage.emu_config(model).resampler.tokens
    counts = dict(
        images=images,
        tokens=data.batch * data.tokens,
        pairs=data.batch * data.tokens * (data.tokens + 1) / 2,
        # An image takes N visual tokens between [IMG] and [/IMG].
        labels=data.batch * max(data.tokens - data.images * (N + 2), 0),
        regressed=images * (N + p.config.objective.regress_end),
    )
    towers = stages.flops_towers(p.params)

    def by_tower(trained: dict[str, bool]) -> dict[str, float]:
        found = stage.step_flops(model, trained, **counts)
        return {tower: value for tower, value in found.items() if tower in towers}

    work = by_tower(flops.trained(path for path, _ in tree.leaves(p.state.trainable)))
    recomputed = {}
    for tower, forward in by_tower({}).items():
        # A tower without a backward pass recomputes nothing.
        if tower in _fully_recomputed(p.config) and work[tower] > forward:
            recomputed[tower] = forward
    return work, recomputed


def _fully_recomputed(c: ConfigDict) -> set[str]:
    """Towers whose blocks save only their inputs."""
    policies = remat_policies(c)
    return {field.split(".")[-2] for field, policy in policies.items() if policy == "full"}


def remat_policies(c: ConfigDict) -> dict[str, str]:
    """{field: value} of the remat policies in a config."""
    found = {}
    for name in TOWERS:
        *parents, tower = name.split(".")
        group = c.model.get(parents[0], {}) if parents else c.model
        if group.get(tower):
            found[f"model.{name}.remat"] = group[tower].remat
    return found


def roofline(
    p: RunPlan,
    accelerator: Accelerator,
    memory: Memory,
    collectives: Sequence[hlo.Collective],
    work: float,
) -> Roofline:
    """Lower bounds of the step's time.

    compute: all FLOPs (`work`) at the peak rate. memory: the state is read once and, except for
    frozen parameters, written once; the gathered weights of a layer are written and read in each
    pass. network: the bytes that must come from other slices or nodes. links: all other bytes that
    a device receives.
    """
    place = [_place(device) for device in p.mesh.devices.flat]
    received = sum(c.runs * c.bytes_received for c in collectives)
    crossing = sum(c.runs * c.bytes_between(place) for c in collectives)
    gathered = sum(c.runs * c.bytes for c in collectives if c.kind == "all-gather")
    state = 2 * (memory.parameters + memory.optimizer) - bytes_per_device(p.state.frozen)
    return Roofline(
        compute=work / (accelerator.flops * p.mesh.size),
        memory=(state + 2 * gathered) / accelerator.bandwidth,
        links=(received - crossing) / accelerator.link,
        network=crossing / accelerator.network,
    )


def _place(device: jax.Device) -> int:
    """Index of the TPU slice or GPU node; devices in the same one communicate over links."""
    if device.platform == "tpu":
        return getattr(device, "slice_index", 0) or 0
    return device.process_index


def by_kind(collectives: Sequence[hlo.Collective]) -> dict[str, dict[str, float]]:
    """{kind: count, runs, bytes a device receives per step, and their asynchronous share}."""
    found = {}
    for kind in sorted({c.kind for c in collectives}):
        some = [c for c in collectives if c.kind == kind]
        received = sum(c.runs * c.bytes_received for c in some)
        overlapped = sum(c.runs * c.bytes_received for c in some if c.asynchronous)
        found[kind] = {
            "count": len(some),
            "runs": sum(c.runs for c in some),
            "bytes": received,
            "asynchronous": overlapped / max(received, 1),
        }
    return found


def padded_gathers(p: RunPlan, collectives: Sequence[hlo.Collective]) -> list[dict[str, Any]]:
    """All-reduces over fsdp that are at least as large as a block's matrix; none are expected.

    They mean that weights are gathered as a sum of zero-padded shards, or that gradients are
    all-reduced instead of reduce-scattered.
    """
    smallest = min(
        2 * leaf.size // leaf.shape[0]
        for path, leaf in tree.leaves(p.params)
        if re.fullmatch(r"\w+/blocks/.*/w", path)
    )

    def over_fsdp(group: tuple[int, ...]) -> bool:
        axis = sharding.AXES.index("fsdp")
        return len({np.unravel_index(n, p.mesh.devices.shape)[axis] for n in group}) > 1

    return [
        {"name": c.name, "bytes": c.bytes, "runs": c.runs, "source": c.source}
        for c in collectives
        if c.kind == "all-reduce" and c.bytes >= smallest and over_fsdp(c.groups[0])
    ]


def format_report(found: dict[str, Any], accelerator: Accelerator | None) -> str:
    """The report as lines of text."""
    lines = []
    if "memory" in found:
        lines.append("one device holds")
        for name, size in found["memory"].items():
            note = "  (part of temporaries)" if name == "gradients" else ""
            lines.append(f"  {name:12}{size / GIB:9.3f} GiB{note}")
        lines.append("one device receives, per step")
        for kind, c in found["collectives"].items():
            lines.append(
                f"  {kind:20}{c['bytes'] / GIB:9.3f} GiB  in {c['runs']:,} runs of {c['count']}, "
                f"{c['asynchronous']:.0%} overlapped with arithmetic"
            )
        for one in found["padded_gathers"]:
            lines.append(
                f"  all-reduced where a gather or reduce-scatter would do: "
                f"{one['bytes'] / 2**20:.0f} MiB x {one['runs']}, {one['name']}"
            )
        kernels = found["kernels"]
        lines.append(f"attention kernels: {kernels}" if kernels else "attention is dense")
    lines.append("FLOPs of a full step")
    for tower, value in found["flops"].items():
        again = found["recomputed_flops"].get(tower)
        note = f"  and {again / 1e15:.3f} P recomputed" if again else ""
        lines.append(f"  {tower:12}{value / 1e15:9.3f} P{note}")
    if "roofline" in found and accelerator:
        names = ("compute", "memory", "links", "network")
        times = ", ".join(f"{name} {found['roofline'][name] * 1e3:.0f} ms" for name in names)
        lines.append(
            f"a step takes at least: {times}; bound by {found['roofline']['bound']}, "
            f"highest possible MFU {found['mfu']:.1%} ({accelerator.source})"
        )
    effort = " with little effort (a run's peak may differ by a tenth)" if found["effort"] else ""
    lines.append(
        f"compiled in {found['compile_seconds']:.0f} s{effort}; "
        f"host memory {found['host_peak'] / GIB:.1f} GiB"
    )
    lines.append(format_verdict(found["fits"], found["peak"], found["limit"]))
    return "\n".join(lines)
