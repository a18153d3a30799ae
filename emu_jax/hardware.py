"""Accelerators by name: published figures, compiler options, and devices to compile for.

Figures are per JAX device: a chip, except on TPU7x, where a device is one of a chip's two
TensorCores. The manufacturers or clouds publish them; `source` names the page. Read next: fit,
which compiles for accelerators that are not present.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.experimental import topologies

from emu_jax.config import UserError

GIB = 2**30

# Compiler options that overlap the collectives of a layer's weights with arithmetic. libtpu enables
# them by default; setting them here keeps them on if its defaults change.
# Source: AI-Hypercomputer/maxtext, benchmarks/xla_flags_library.py.
_TPU_OVERLAP: dict[str, str | bool] = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
}
# Source: docs.nvidia.com/jax-toolbox, environment variables. The GPU compiler wants a bool here and
# refuses the string "true".
_GPU_OVERLAP: dict[str, str | bool] = {"xla_gpu_enable_latency_hiding_scheduler": True}

# XLA_FLAGS to compile for a GPU that is not present. Kernels cannot be timed without the GPU, so
# matrix products use cuBLAS instead of the fastest of several kernels.
ABSENT_GPU_FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"


@dataclass(frozen=True)
class Accelerator:
    """Published figures of one JAX device; bandwidths are in bytes per second."""

    # "tpu" or "cuda".
    platform: str
    # Prefix of `jax.Device.device_kind`, or several prefixes.
    kind: str | tuple[str, ...]
    # Dense bfloat16 FLOP/s.
    flops: float
    # Bytes of device memory.
    memory: int
    # Device memory bandwidth.
    bandwidth: float
    # Total bandwidth at which the links inside a slice or node bring data into the device.
    link: float
    # The device's share of the bandwidth of the network between slices or nodes.
    network: float
    # Where the figures were published.
    source: str
    # Arguments of `get_topology_desc`.
    topology: dict[str, Any] = field(default_factory=dict)
    # Options for `jax.jit(compiler_options=)`.
    compiler_options: dict[str, str | bool] = field(default_factory=dict)


# The pages on TPUs give the sum of both directions of the links; `link` is half of that sum, the
# rate at which a device receives. The first row whose kind matches a device is used.
ACCELERATORS = {
    "v4": Accelerator(
        platform="tpu",
        kind="TPU v4",
        flops=275e12,
        memory=32 * GIB,
        bandwidth=1200e9,
        link=300e9,
        network=6.25e9,
        source="cloud.google.com/tpu/docs/v4; links: arXiv 2304.01433",
        topology={
            "chip_config_name": "megacore",
            "chips_per_host_bounds": (2, 2, 1),
            "wrap": (True, True, True),
        },
        compiler_options=_TPU_OVERLAP,
    ),
    "v5e": Accelerator(
        platform="tpu",
        kind=("TPU v5 lite", "TPU v5e"),
        flops=197e12,
        memory=16 * GIB,
        bandwidth=819e9,
        link=200e9,
        network=3.125e9,
        source="cloud.google.com/tpu/docs/v5e",
        compiler_options=_TPU_OVERLAP,
    ),
    "v5p": Accelerator(
        platform="tpu",
        kind="TPU v5",
        flops=459e12,
        memory=95 * GIB,
        bandwidth=2765e9,
        link=600e9,
        network=6.25e9,
        source="cloud.google.com/tpu/docs/v5p",
        topology={"chips_per_host_bounds": (2, 2, 1), "wrap": (True, True, True)},
        compiler_options=_TPU_OVERLAP,
    ),
    "v6e": Accelerator(
        platform="tpu",
        kind="TPU v6 lite",
        flops=918e12,
        memory=32 * GIB,
        bandwidth=1638e9,
        link=400e9,
        network=12.5e9,
        source="cloud.google.com/tpu/docs/v6e",
        compiler_options=_TPU_OVERLAP,
    ),
    "tpu7x": Accelerator(
        platform="tpu",
        kind="TPU7x",
        flops=2307e12 / 2,
        memory=96 * GIB,
        bandwidth=7380e9 / 2,
        link=600e9 / 2,
        network=12.5e9 / 2,
        source="cloud.google.com/tpu/docs/tpu7x",
        compiler_options=_TPU_OVERLAP,
    ),
    "a100-40g": Accelerator(
        platform="cuda",
        kind=("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
        flops=312e12,
        memory=40 * GIB,
        bandwidth=1555e9,
        link=300e9,
        network=25e9,
        source="nvidia.com: data sheets of A100 40GB SXM and DGX A100",
        compiler_options=_GPU_OVERLAP,
    ),
    "a100": Accelerator(
        platform="cuda",
        kind="NVIDIA A100",
        flops=312e12,
        memory=80 * GIB,
        bandwidth=2039e9,
        link=300e9,
        network=25e9,
        source="nvidia.com: data sheets of A100 80GB SXM and DGX A100",
        compiler_options=_GPU_OVERLAP,
    ),
    "h100": Accelerator(
        platform="cuda",
        kind="NVIDIA H100",
        flops=989e12,
        memory=80 * GIB,
        bandwidth=3350e9,
        link=450e9,
        network=50e9,
        source="nvidia.com: data sheets of H100 SXM and DGX H100",
        compiler_options=_GPU_OVERLAP,
    ),
    "h200": Accelerator(
        platform="cuda",
        kind="NVIDIA H200",
        flops=989e12,
        memory=141 * 10**9,
        bandwidth=4800e9,
        link=450e9,
        network=50e9,
        source="nvidia.com: data sheets of H200 SXM and DGX H200",
        compiler_options=_GPU_OVERLAP,
    ),
}
_NAME = re.compile(r"(?:(\d+)x)?([a-z]+\d+[a-z]*(?:-\d+g)?|cpu):(\d+(?:x\d+)*)")


def accelerator_of(device_kind: str) -> Accelerator | None:
    """The accelerator of a `jax.Device.device_kind`; None if it is not listed, like a CPU."""
    for row in ACCELERATORS.values():
        if device_kind.startswith(row.kind):
            return row
    return None


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device; None if unknown, as for a CPU."""
    row = accelerator_of(device_kind)
    return row.flops if row else None


def compiler_options(device: jax.Device) -> dict[str, str | bool] | None:
    """Options for `jax.jit(compiler_options=)` of a train step on devices like this one."""
    row = accelerator_of(device.device_kind)
    return row.compiler_options if row else None


def topology_devices(topology: str) -> tuple[Accelerator | None, list[jax.Device]]:
    """Figures and devices of a topology whose devices need not be present.

    topology: "v5e:16x16", "2xv5e:8x16" (two slices), "h100:8x8" (nodes x GPUs), or "cpu:8" (this
    machine's simulated devices, with no figures). Raises UserError for an invalid name and for a
    missing compiler.
    """
    match = _NAME.fullmatch(topology)
    if not match or not _is_valid(*match.groups()):
        raise UserError(
            f"topology {topology!r} is not KIND:SHAPE or SLICESxKIND:SHAPE, "
            "like v5e:16x16, v5p:4x4x4, 2xv5e:8x16, h100:8x8; "
            f"kinds are {', '.join(ACCELERATORS)} and cpu"
        )
    slices, kind, shape = match.groups()
    if kind == "cpu":
        return None, _cpus(shape)
    row = ACCELERATORS[kind]
    try:
        if row.platform == "cuda":
            described = _describe_gpus(kind, shape)
        else:
            several = {"num_slices": int(slices)} if int(slices or 1) > 1 else {}
            described = topologies.get_topology_desc(
                topology_name=f"{kind}:{shape}", platform="tpu", **row.topology, **several
            )
    # A missing plugin, or one that refuses a shape, may raise exceptions of any class.
    except Exception as error:
        raise UserError(f"topology {topology!r}: {_reason(error, row.platform)}") from error
    return row, list(described.devices)


def _is_valid(slices: str | None, kind: str, shape: str) -> bool:
    """Whether the kind exists; only a TPU may have slices or more than two axes."""
    if kind in ACCELERATORS and ACCELERATORS[kind].platform == "tpu":
        return True
    return kind in (*ACCELERATORS, "cpu") and not slices and shape.count("x") <= 1


def _reason(error: Exception, platform: str) -> str:
    """Why the topology could not be described, in one line."""
    missing = isinstance(error, (ImportError, NotImplementedError))
    if missing or "not installed" in str(error):
        requirements = "requirements-tpu.txt" if platform == "tpu" else "requirements-cuda12.txt"
        return f"the compiler is not installed: pip install -r {requirements}"
    return " ".join(str(error).split())


def _cpus(shape: str) -> list[jax.Device]:
    present = jax.devices("cpu")
    if not shape.isdigit() or int(shape) > len(present):
        raise UserError(
            f"topology 'cpu:{shape}': there are {len(present)} CPU devices here; "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={shape} makes more"
        )
    return present[: int(shape)]


def _describe_gpus(kind: str, shape: str) -> Any:
    """The topology of "GPUS" or "NODESxGPUS" of a kind."""
    nodes, gpus = (["1"] + shape.split("x"))[-2:]
    return topologies.get_topology_desc(
        "", "cuda", topology=f"1x{nodes}x{gpus}", target_config=_gpu_config(kind)
    )


def _gpu_config(kind: str) -> str:
    """XLA's text description of a GPU (stream_executor's GpuTargetConfigProto).

    The figures are those of NVIDIA's CUDA C++ programming guide for compute capabilities 8.0 and
    9.0.
    """
    row = ACCELERATORS[kind]
    name = row.kind if isinstance(row.kind, str) else row.kind[0]
    hopper = not kind.startswith("a100")
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": 233472 if hopper else 167936,
        "shared_memory_per_block_optin": 232448 if hopper else 166912,
        "threads_per_core_limit": 2048,
        "core_count": 132 if hopper else 108,
        "fpus_per_core": 128 if hopper else 64,
        "block_dim_limit_x": 2147483647,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": int(row.bandwidth),
        "l2_cache_size": 50 * 2**20 if hopper else 40 * 2**20,
        "clock_rate_ghz": 1.98 if hopper else 1.41,
        "device_memory_size": row.memory,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    figures = " ".join(f"{field}: {value}" for field, value in device.items())
    capability = f"cuda_compute_capability {{ major: {9 if hopper else 8} }}"
    return (
        f"gpu_device_info {{ {figures} {capability} }} "
        'platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } '
        f'device_description_str: "{name}"'
    )
