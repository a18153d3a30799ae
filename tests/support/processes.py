"""Runs of one or several processes, on as many devices as a test wants."""

import json
import os
import sys

import jax
import pytest

from emu_jax import sharding, train
from tests.support.runs import arguments

# One block per tower, since compiling takes most of the time, and a constant schedule, so that the
# compiled step does not depend on the number of steps.
SHALLOW = (
    "model.vision.depth=1",
    "model.resampler.depth=1",
    "model.llama.depth=1",
    "objective.chunk=64",
    "optim.schedule=constant",
    "mesh.data=-1",
    "mesh.fsdp=1",
)
LOSSES = (
    "loss",
    "text_loss",
    "image_loss",
    "grad_norm",
    "eval/text_loss",
    "eval/image_loss",
    "eval/visdial/mrr",
    "eval/visdial/ndcg",
)


def command(data, workdir, count, *overrides):
    """The command line that starts a run of `count` processes on this machine."""
    train_command = [sys.executable, "-m", "emu_jax.train"]
    return [
        *("launch/local.sh", str(count)),
        *train_command,
        *arguments(data, workdir, *SHALLOW, *overrides),
    ]


def environ(devices):
    """The environment of a process with this many devices."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    flags.append(f"--xla_force_host_platform_device_count={devices}")
    return os.environ | {"XLA_FLAGS": " ".join(flags)}


def train_here(data, workdir, devices, *overrides):
    """Train in this process on its first `devices` devices; returns metrics.jsonl's lines."""
    make_mesh = sharding.make_mesh
    first = jax.devices()[:devices]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda sizes, few=None: make_mesh(sizes, few or first))
        assert train.main(arguments(data, workdir, *SHALLOW, *overrides)) == 0
    return metrics(workdir)


def metrics(workdir):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_same_losses(lines, others, rtol):
    """Compare the losses and scores of every line of two runs."""
    assert [line["step"] for line in lines] == [line["step"] for line in others]
    for line, other in zip(lines, others, strict=True):
        losses = {key: line[key] for key in LOSSES if key in line}
        assert len(losses) > 1
        assert losses == pytest.approx(
            {key: other[key] for key in LOSSES if key in other}, rel=rtol
        )
