"""The accelerators by name: their published figures, how to ask for them when they are not there,
and their compiler's options.

A device is what JAX calls one: a chip, but on TPU7x half a chip (a TensorCore). Figures are the
makers' own; `source` says whose page. Read next: fit.py, which compiles for them.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.experimental import topologies

from emu_jax.config import UserError

GIB = 2**30

# Options of the compilers under which the collectives of a layer's weights run behind the
# arithmetic. libtpu has these on by default; they stand here so that a change of its defaults is
# none of ours. Source: AI-Hypercomputer/maxtext, benchmarks/xla_flags_library.py.
_TPU_OVERLAP = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
}
# Source: docs.nvidia.com/jax-toolbox, environment variables.
# not "true", which XLA refuses there
_GPU_OVERLAP = {"xla_gpu_enable_latency_hiding_scheduler": True}

# XLA_FLAGS for a GPU that is not there, on which nothing can be timed: products are cuBLAS's, in
# place of the fastest that is found.
ABSENT_GPU_FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"


@dataclass(frozen=True)
class Accelerator:
    """One accelerator. Rates are bytes a second into a device; `link` is all its links to its slice
    or node together, `network` its share of what joins slices or nodes. `ask` are arguments of
    `get_topology_desc`.
    """

    platform: str
    # how jax's `device_kind` begins
    kind: str | tuple[str, ...]
    # dense bfloat16 FLOP/s
    flops: float
    # bytes
    memory: int
    # of the memory
    bandwidth: float
    link: float
    network: float
    source: str
    ask: dict[str, Any] = field(default_factory=dict)
    options: dict[str, str | bool] = field(default_factory=dict)


# A TPU's page gives its links in both directions: half of that is what it can receive. The first
# row whose kind matches counts.
ACCELERATORS = {
    "v4": Accelerator(
        "tpu",
        "TPU v4",
        275e12,
        32 * GIB,
        1200e9,
        300e9,
        6.25e9,
        "cloud.google.com/tpu/docs/v4; links: arXiv 2304.01433",
        {
            "chip_config_name": "megacore",
            "chips_per_host_bounds": (2, 2, 1),
            "wrap": (True, True, True),
        },
        _TPU_OVERLAP,
    ),
    "v5e": Accelerator(
        "tpu",
        ("TPU v5 lite", "TPU v5e"),
        197e12,
        16 * GIB,
        819e9,
        200e9,
        3.125e9,
        "cloud.google.com/tpu/docs/v5e",
        {},
        _TPU_OVERLAP,
    ),
    "v5p": Accelerator(
        "tpu",
        "TPU v5",
        459e12,
        95 * GIB,
        2765e9,
        600e9,
        6.25e9,
        "cloud.google.com/tpu/docs/v5p",
        {"chips_per_host_bounds": (2, 2, 1), "wrap": (True, True, True)},
        _TPU_OVERLAP,
    ),
    "v6e": Accelerator(
        "tpu",
        "TPU v6 lite",
        918e12,
        32 * GIB,
        1638e9,
        400e9,
        12.5e9,
        "cloud.google.com/tpu/docs/v6e",
        {},
        _TPU_OVERLAP,
    ),
    "tpu7x": Accelerator(
        "tpu",
        "TPU7x",
        2307e12 / 2,
        96 * GIB,
        7380e9 / 2,
        600e9 / 2,
        12.5e9 / 2,
        "cloud.google.com/tpu/docs/tpu7x",
        {},
        _TPU_OVERLAP,
    ),
    "a100-40g": Accelerator(
        "cuda",
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
        312e12,
        40 * GIB,
        1555e9,
        300e9,
        25e9,
        "nvidia.com: data sheets of A100 40GB SXM and DGX A100",
        options=_GPU_OVERLAP,
    ),
    "a100": Accelerator(
        "cuda",
        "NVIDIA A100",
        312e12,
        80 * GIB,
        2039e9,
        300e9,
        25e9,
        "nvidia.com: data sheets of A100 80GB SXM and DGX A100",
        options=_GPU_OVERLAP,
    ),
    "h100": Accelerator(
        "cuda",
        "NVIDIA H100",
        989e12,
        80 * GIB,
        3350e9,
        450e9,
        50e9,
        "nvidia.com: data sheets of H100 SXM and DGX H100",
        options=_GPU_OVERLAP,
    ),
    "h200": Accelerator(
        "cuda",
        "NVIDIA H200",
        989e12,
        141 * 10**9,
        4800e9,
        450e9,
        50e9,
        "nvidia.com: data sheets of H200 SXM and DGX H200",
        options=_GPU_OVERLAP,
    ),
}
_NAME = re.compile(r"(?:(\d+)x)?([a-z]+\d+[a-z]*(?:-\d+g)?|cpu):(\d+(?:x\d+)*)")


def accelerator_of(device_kind: str) -> Accelerator | None:
    """The row of jax's `device_kind`, or None for one that is not in the table (a CPU)."""
    return next((row for row in ACCELERATORS.values() if device_kind.startswith(row.kind)), None)


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device, or None where it is not known (a CPU)."""
    row = accelerator_of(device_kind)
    return row and row.flops


def compiler_options(device: jax.Device) -> dict[str, str | bool] | None:
    """The compiler's options for a step on such devices, for `jax.jit(compiler_options=)`."""
    row = accelerator_of(device.device_kind)
    return row and row.options


def topology_devices(topology: str) -> tuple[Accelerator | None, list[jax.Device]]:
    """The row and the devices of a topology that need not be there: "v5e:16x16", "2xv5e:8x16" (two
    slices), "h100:8x8" (nodes x GPUs), and "cpu:8" (no row: this machine's fake devices). Raises
    UserError, in one line, for what is no topology and for a missing plugin.
    """
    match = _NAME.fullmatch(topology)
    tpu = match and match[2] in ACCELERATORS and ACCELERATORS[match[2]].platform == "tpu"
    if (
        not match
        or match[2] not in (*ACCELERATORS, "cpu")
        or (not tpu and (match[1] or match[3].count("x") > 1))
    ):
        raise UserError(
            f"topology {topology!r} is not one: KIND:SHAPE, or SLICESxKIND:SHAPE, like v5e:16x16, v5p:4x4x4, 2xv5e:8x16, h100:8x8; "
            f"kinds are {', '.join(ACCELERATORS)} and cpu"
        )
    slices = int(match[1] or 1)
    kind = match[2]
    shape = match[3]
    if kind == "cpu":
        return None, _cpus(shape)
    row = ACCELERATORS[kind]
    try:
        if row.platform == "cuda":
            nodes, gpus = (["1"] + shape.split("x"))[-2:]
            devices = topologies.get_topology_desc(
                "", "cuda", topology=f"1x{nodes}x{gpus}", target_config=_gpu_config(kind)
            ).devices
        else:
            more = {"num_slices": slices} if slices > 1 else {}
            devices = topologies.get_topology_desc(
                topology_name=f"{kind}:{shape}", platform="tpu", **row.ask, **more
            ).devices
    # a plugin that is missing or refuses; each has exceptions of its own
    except Exception as error:
        needs = "requirements-tpu.txt" if row.platform == "tpu" else "requirements-cuda12.txt"
        missing = isinstance(error, (ImportError, NotImplementedError)) or "not installed" in str(
            error
        )
        why = (
            f"the compiler is not installed: pip install -r {needs}"
            if missing
            else " ".join(str(error).split())
        )
        raise UserError(f"topology {topology!r}: {why}") from error
    return row, list(devices)


def _cpus(shape: str) -> list[jax.Device]:
    if not shape.isdigit() or int(shape) > len(jax.devices("cpu")):
        raise UserError(
            f"topology 'cpu:{shape}': there are {len(jax.devices('cpu'))} CPU devices here; "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={shape} makes more"
        )
    return jax.devices("cpu")[: int(shape)]


def _gpu_config(kind: str) -> str:
    """XLA's description of a GPU that is not there: figures of NVIDIA's CUDA C++ programming guide
    (compute capabilities 8.0 and 9.0).
    """
    row = ACCELERATORS[kind]
    hopper = not kind.startswith("a100")
    name = row.kind if isinstance(row.kind, str) else row.kind[0]
    return f"""gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
        shared_memory_per_core: {233472 if hopper else 167936} shared_memory_per_block_optin: {232448 if hopper else 166912}
        threads_per_core_limit: 2048 core_count: {132 if hopper else 108} fpus_per_core: {128 if hopper else 64}
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {int(row.bandwidth)}
        l2_cache_size: {50 * 2**20 if hopper else 40 * 2**20} clock_rate_ghz: {1.98 if hopper else 1.41} device_memory_size: {row.memory}
        cuda_compute_capability {{ major: {9 if hopper else 8} }} registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{name}" """
