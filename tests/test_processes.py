"""Several processes of one run, started by launch/local.sh, train like a single process."""

import os
import re
import signal
import subprocess
import sys
import time
from collections import namedtuple
from types import SimpleNamespace

import jax
import pytest

from emu_jax import checkpoint, processes, sharding
from emu_jax.config import UserError
from tests.support import fixtures, layouts
from tests.support.processes import (
    assert_same_losses,
    command,
    environ,
    metrics,
    train_here,
)

STEPS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    to = tmp_path_factory.mktemp("data")
    fixtures.write_tiny(to)
    return to


def captions(workdir):
    """The captions of the images that a run has logged to TensorBoard."""
    board = b"".join(path.read_bytes() for path in (workdir / "tensorboard").iterdir())
    found = re.search(rb"\D0\. (.*?)\n\n7\. ", board, re.DOTALL)
    assert found
    return found[1]


def evaluated(data, tmp_path):
    """Overrides of a run that evaluates, writes image samples and saves after STEPS steps."""
    visdial = tmp_path / "visdial"
    if not visdial.exists():
        layouts.visdial(visdial, count=8, rounds=1)
    return (
        f"eval.every={STEPS}",
        "eval.batches=2",
        f"data.eval_mixture={fixtures.mixture(data, 'held_out')!r}",
        f"eval.tasks=(('visdial', '{visdial}', 8),)",
        f"log.pictures_every={STEPS}",
        f"checkpoint.every={STEPS}",
        "checkpoint.keep=9",
    )


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """(workdir, standard error) of two processes of two devices and a reader process each.

    One of them gets a SIGTERM once step STEPS is saved.
    """
    folder = tmp_path_factory.mktemp("stopped")
    workdir = folder / "run"
    overrides = evaluated(data, folder)
    launch = command(data, workdir, 2, *overrides, "optim.steps=10000", "data.readers=1")
    note_pid = 'echo $$ > "$0-$JAX_PROCESS_ID"; exec "$@"'
    run = subprocess.Popen(
        [*launch[:2], "bash", "-c", note_pid, str(folder / "pid"), *launch[2:]],
        env=environ(2),
        stderr=subprocess.PIPE,
        text=True,
    )
    while run.poll() is None and not (workdir / f"checkpoints/{STEPS}").exists():
        time.sleep(0.02)
    if run.poll() is None:
        os.kill(int((folder / "pid-1").read_text()), signal.SIGTERM)
    _, err = run.communicate(timeout=300)
    assert run.returncode == 0 and "Traceback" not in err, err[-3000:]
    return workdir, err


def test_two_processes_are_one(data, stopped, tmp_path):
    """Runs of 2 processes x 2 devices, 1 x 4 and 1 x 1 give the same results.

    Each of the two processes has a reader process. Documents are packed, mixed and interleaved.
    Every batch holds the same documents (the state of the streams counts them). Losses, held-out
    losses and benchmark scores are equal. Images and captions are compared only between equal
    numbers of devices.
    """
    workdir, _ = stopped
    lines = [line for line in metrics(workdir) if line["step"] <= STEPS]
    assert [line["step"] for line in lines] == [*range(1, STEPS + 1), STEPS]
    streams = checkpoint.read_metadata(str(workdir), STEPS).data
    assert streams["streams"].keys() == {"0", "1", "2", "3"}
    # On one device, samples are not compared. They would need a program of their own, so they are
    # off.
    for devices, samples in ((4, ()), (1, ("log.pictures_every=0",))):
        other = tmp_path / f"{devices}"
        overrides = (f"optim.steps={STEPS}", *evaluated(data, tmp_path), *samples)
        others = train_here(data, other, devices, *overrides)
        assert_same_losses(lines, others, rtol=1e-4)
        assert checkpoint.read_metadata(str(other)).data == streams
    images = f"pictures/{STEPS}.png"
    assert (workdir / images).read_bytes() == (tmp_path / "4" / images).read_bytes()
    assert captions(workdir) == captions(tmp_path / "4")


def test_a_signal_to_one_process_stops_all_at_one_step_with_everything_saved(stopped):
    workdir, err = stopped
    message = r"\[(\d)\] .*stopped by (.*) at step (\d+) of 10000; the checkpoint is saved"
    step = checkpoint.latest_step(str(workdir))
    logged = sorted(re.findall(message, err))
    assert logged == [("0", "another process", f"{step}"), ("1", "SIGTERM", f"{step}")]
    assert re.search(r"goodput of \d+ s: steps ", err)


def test_a_process_that_exits_after_an_error_ends_all_of_them():
    script = (
        "import os, time; from emu_jax import processes; processes.initialize(); "
        "processes.exit_process(2) if os.environ['JAX_PROCESS_ID'] == '1' else time.sleep(600)"
    )
    began = time.time()
    done = subprocess.run(
        ["launch/local.sh", "2", sys.executable, "-c", script],
        env=os.environ | {"GRACE": "1"},
        stderr=subprocess.PIPE,
    )
    assert done.returncode == 2 and time.time() - began < 300


Device = namedtuple("Device", ("process_index", "id"))


def test_processes_along_tensor_read_the_same_rows(monkeypatch):
    def shards(processes_of, data, tensor):
        """Shard of each process; processes_of: the process of each device in the mesh's order."""
        mesh = sharding.make_mesh({"data": data, "fsdp": 1, "tensor": tensor}, jax.devices())
        layout = sharding.batch_sharding(mesh).devices_indices_map((16,))
        process_of = dict(zip(mesh.devices.flat, processes_of, strict=True))
        faked = SimpleNamespace(
            devices_indices_map=lambda _: {
                Device(process_of[device], device.id): at for device, at in layout.items()
            }
        )
        monkeypatch.setattr(sharding, "batch_sharding", lambda _: faked)
        try:
            found = []
            for process in sorted(set(processes_of)):
                monkeypatch.setattr(jax, "process_index", lambda process=process: process)
                found.append(processes.data_shard(mesh, 16))
            return found
        finally:
            monkeypatch.undo()

    assert shards([0, 0, 0, 0, 1, 1, 1, 1], data=8, tensor=1) == [(0, 2), (1, 2)]
    assert shards([0, 0, 1, 1, 2, 2, 3, 3], data=2, tensor=4) == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert shards([0, 0, 1, 1, 2, 2, 3, 3], data=1, tensor=8) == [(0, 1)] * 4
    # The devices of a TPU may come in this order.
    assert shards([0, 1, 0, 1, 2, 3, 2, 3], data=8, tensor=1) == [(0, 4), (1, 4), (2, 4), (3, 4)]
    with pytest.raises(UserError, match="some processes share only part of their rows"):
        shards([0, 0, 0, 1, 1, 1, 1, 1], data=4, tensor=2)


@pytest.mark.parametrize(
    ("given", "gpus"),
    [
        ({}, None),
        # One process per node.
        (
            {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0", "SLURM_GPUS_ON_NODE": "8"},
            [0, 1, 2, 3, 4, 5, 6, 7],
        ),
        # One process per GPU.
        (
            {"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "3", "SLURM_GPUS_ON_NODE": "8"},
            [3],
        ),
        # One process per GPU, which sees only its own.
        (
            {
                "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
                "SLURM_LOCALID": "3",
                "SLURM_GPUS_ON_NODE": "8",
                "CUDA_VISIBLE_DEVICES": "3",
            },
            [0],
        ),
        (
            {
                "SLURM_STEP_TASKS_PER_NODE": "2,1",
                "SLURM_LOCALID": "1",
                "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
            },
            [4, 5, 6, 7],
        ),
    ],
)
def test_gpus_under_slurm(given, gpus):
    assert processes.slurm_local_gpus(given, present=8) == gpus
    assert processes.slurm_local_gpus(given, present=0) is None


def test_processes_that_do_not_divide_the_gpus_of_a_node_are_an_error():
    with pytest.raises(UserError, match="3 processes on a node of 8 GPUs: start one per node"):
        processes.slurm_local_gpus(
            {"SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_LOCALID": "0"}, present=8
        )


def test_an_incomplete_set_of_coordinator_variables_is_an_error(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    with pytest.raises(
        UserError,
        match="JAX_NUM_PROCESSES and JAX_PROCESS_ID are set, but each of several processes needs",
    ):
        processes.initialize()


def test_a_single_process_needs_no_consensus():
    should_stop = processes.StopConsensus(
        sharding.make_mesh({"data": 1, "fsdp": 8, "tensor": 1}, jax.devices())
    )
    assert should_stop(True) and not should_stop(False)
    assert processes.allgather_json({"a": 1}) == [{"a": 1}]
