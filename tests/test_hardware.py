"""The table of accelerators, and the messages for unknown ones and missing compilers."""

import pytest

from emu_jax import hardware
from emu_jax.config import UserError


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40g"),
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
    ],
)
def test_kinds(kind, name):
    assert (
        hardware.accelerator_of(kind) is hardware.ACCELERATORS[name]
        and hardware.peak_flops(kind) == hardware.ACCELERATORS[name].flops
    )


def test_a_cpu_has_no_figures():
    assert hardware.accelerator_of("cpu") is None and hardware.peak_flops("cpu") is None


def test_figures_have_plausible_units():
    """A wrong unit would break the ratio of FLOPs to bytes, or the order of bandwidths."""
    for name, row in hardware.ACCELERATORS.items():
        assert (
            70 < row.flops / row.bandwidth < 700
            and row.network < row.link < row.bandwidth
            and 10 < row.memory / hardware.GIB < 200
        ), name


def test_cpu_devices_are_the_simulated_ones():
    row, devices = hardware.topology_devices("cpu:8")
    assert row is None and len(devices) == 8


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5e", "is not KIND:SHAPE or"),
        ("v9:4x4", "kinds are v4, v5e, v5p, v6e, tpu7x, a100-40g, a100, h100, h200 and cpu"),
        ("v5e:4by4", "is not KIND:SHAPE"),
        ("2xh100:8x8", "is not KIND:SHAPE"),
        ("h100:2x8x8", "is not KIND:SHAPE"),
        ("2xcpu:4", "is not KIND:SHAPE"),
        (
            "cpu:9",
            "there are 8 CPU devices here; "
            "XLA_FLAGS=--xla_force_host_platform_device_count=9 makes more",
        ),
        ("cpu:2x2", "there are 8 CPU"),
    ],
)
def test_an_invalid_topology_is_one_line(topology, message):
    with pytest.raises(UserError, match=message) as error:
        hardware.topology_devices(topology)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("topology", "needs"),
    [("v5e:4x4", "requirements-tpu.txt"), ("h100:1x8", "requirements-cuda12.txt")],
)
def test_a_missing_compiler_is_one_line(topology, needs, monkeypatch):
    def missing(*_, **__):
        raise (
            RuntimeError("JAX TPU support not installed; cannot generate TPU topology.")
            if "tpu" in needs
            else NotImplementedError("topology not implemented for cuda")
        )

    monkeypatch.setattr(hardware.topologies, "get_topology_desc", missing)
    with pytest.raises(UserError, match=f"the compiler is not installed: pip install -r {needs}"):
        hardware.topology_devices(topology)


def test_the_compilers_refusal_of_a_shape_is_one_line(monkeypatch):
    def refuse(*_, **__):
        raise ValueError("Invalid topology:\n 3x5 is not supported")

    monkeypatch.setattr(hardware.topologies, "get_topology_desc", refuse)
    with pytest.raises(
        UserError, match="topology 'v5e:3x5': Invalid topology: 3x5 is not supported"
    ):
        hardware.topology_devices("v5e:3x5")
