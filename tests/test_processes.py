"""Several processes of one run: launch/local.sh starts two, over Gloo, and they train as one
does.
"""

import json
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
from test_train import arguments

from emu_jax import checkpoint, processes, sharding, train
from emu_jax.config import UserError
from tests.support import fixtures, layouts

# one process of pytest: what two processes compile, others of two load
pytestmark = pytest.mark.xdist_group("processes")

# A model of one block a tower, whose program does not depend on the number of steps: the compiler's
# time is the tests'.
SHALLOW = (
    "model.vision.depth=1",
    "model.resampler.depth=1",
    "model.llama.depth=1",
    "objective.chunk=64",
    "optim.schedule=constant",
    "mesh.data=-1",
    "mesh.fsdp=1",
)


def command(data, workdir, count, *overrides):
    return [
        "launch/local.sh",
        str(count),
        sys.executable,
        "-m",
        "emu_jax.train",
        *arguments(data, workdir, *SHALLOW, *overrides),
    ]


def environ(devices):
    """For a process with so many devices."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    return os.environ | {
        "XLA_FLAGS": " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"])
    }


def trained(data, workdir, count, devices, *overrides):
    """(lines of metrics.jsonl, saved state of the data) of a run on `count` processes of `devices`
    devices; the only one is this process.
    """
    if count > 1:
        done = subprocess.run(
            command(data, workdir, count, *overrides),
            env=environ(devices),
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    else:
        with pytest.MonkeyPatch.context() as patch:
            make = sharding.make_mesh
            few = jax.devices()[:devices]
            patch.setattr(
                sharding, "make_mesh", lambda sizes, devices=None: make(sizes, devices or few)
            )
            assert train.main(arguments(data, workdir, *SHALLOW, *overrides)) == 0
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return lines, checkpoint.read_metadata(str(workdir)).data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    to = tmp_path_factory.mktemp("data")
    fixtures.write_tiny(to)
    return to


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


def assert_same_losses(lines, others, rtol):
    assert [line["step"] for line in lines] == [line["step"] for line in others]
    for line, other in zip(lines, others, strict=True):
        here, there = ({key: line[key] for key in LOSSES if key in line} for line in (line, other))
        assert len(here) > 1 and here == pytest.approx(there, rel=rtol)


def said(workdir):
    """Of the first pictures, as TensorBoard holds it."""
    board = b"".join(path.read_bytes() for path in (workdir / "tensorboard").iterdir())
    return re.search(rb"\D0\. (.*)\n\n7\. ", board, re.DOTALL)[1]


def shown(workdir):
    return (workdir / "pictures/20.png").read_bytes()


def test_two_processes_are_one(data, tmp_path):
    """Packed, mixed, interleaved documents on 2 x 4 (and two readers of each process), 1 x 8 and 1
    x 1 devices: the same of them in every batch (the state of the streams says how far each is),
    the same losses, held out too, a benchmark's numbers, pictures, and what is said of them.
    """
    layouts.visdial(tmp_path / "visdial", count=8, rounds=1)
    more = (
        "optim.steps=20",
        "eval.every=20",
        "eval.batches=2",
        f"data.eval_mixture={fixtures.mixture(data, 'held_out')!r}",
        f"eval.tasks=(('visdial', '{tmp_path}/visdial', 8),)",
        "log.pictures_every=20",
    )

    def run(name, *of):
        return trained(data, tmp_path / name, *of, *more)

    (two, there) = run("two", 2, 4, "data.readers=2")
    (one, here) = run("one", 1, 8)
    (single, alone) = run("single", 1, 1)
    assert there == here == alone and there["streams"].keys() == {"0", "1", "2", "3"}
    assert [line["step"] for line in two] == [*range(1, 21), 20]
    for other in (one, single):
        assert_same_losses(two, other, rtol=1e-4)
    assert said(tmp_path / "two") == said(tmp_path / "one") and shown(tmp_path / "two") == shown(
        tmp_path / "one"
    )


def test_a_signal_to_one_process_stops_all_at_one_step_with_everything_saved(data, tmp_path):
    pid = 'echo $$ > "$0-$JAX_PROCESS_ID"; exec "$@"'
    launch = command(data, tmp_path / "run", 2, "optim.steps=10000")
    run = subprocess.Popen(
        [*launch[:2], "bash", "-c", pid, str(tmp_path / "pid"), *launch[2:]],
        env=environ(4),
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "run/metrics.jsonl"
    while run.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        time.sleep(0.1)
    os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGTERM)
    _, err = run.communicate(timeout=300)
    assert run.returncode == 0 and "Traceback" not in err, err[-3000:]
    stop = r"stopped by (.*) at step (\d+) of 10000; the checkpoint is saved"
    told = [re.search(rf"\[{process}\] .*{stop}", err).groups() for process in (0, 1)]
    assert told[0][0] == "another process" and told[1][0] == "SIGTERM" and told[0][1] == told[1][1]
    assert checkpoint.latest_step(str(tmp_path / "run")) == int(told[0][1])
    assert re.search(r"data's state in \d+ bytes; goodput of \d+ s: steps ", err)


def test_one_that_leaves_after_an_error_ends_all_of_them():
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


def test_processes_along_tensor_have_their_rows_in_common(monkeypatch):
    """(process of each device in the mesh's order) -> share of each process."""

    def shares(processes_of, data, tensor):
        mesh = sharding.make_mesh({"data": data, "fsdp": 1, "tensor": tensor}, jax.devices())
        layout = sharding.batch_sharding(mesh).devices_indices_map((16,))
        stands_for = dict(zip(mesh.devices.flat, processes_of, strict=True))
        faked = SimpleNamespace(
            devices_indices_map=lambda _: {
                Device(stands_for[device], device.id): at for device, at in layout.items()
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

    assert shares([0, 0, 0, 0, 1, 1, 1, 1], data=8, tensor=1) == [(0, 2), (1, 2)]
    assert shares([0, 0, 1, 1, 2, 2, 3, 3], data=2, tensor=4) == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert shares([0, 0, 1, 1, 2, 2, 3, 3], data=1, tensor=8) == [(0, 1)] * 4
    # as a TPU's axes may fall
    assert shares([0, 1, 0, 1, 2, 3, 2, 3], data=8, tensor=1) == [(0, 4), (1, 4), (2, 4), (3, 4)]
    with pytest.raises(UserError, match="a part of their rows in common"):
        shares([0, 0, 0, 1, 1, 1, 1, 1], data=4, tensor=2)


@pytest.mark.parametrize(
    ("given", "gpus"),
    [
        ({}, None),
        # a process a node
        (
            {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0", "SLURM_GPUS_ON_NODE": "8"},
            [0, 1, 2, 3, 4, 5, 6, 7],
        ),
        # a process a GPU
        (
            {"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "3", "SLURM_GPUS_ON_NODE": "8"},
            [3],
        ),
        # and sees no other
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


def test_gpus_that_do_not_share_out_are_one_line():
    with pytest.raises(UserError, match="3 processes on a node of 8 GPUs: start one a node"):
        processes.slurm_local_gpus(
            {"SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_LOCALID": "0"}, present=8
        )


def test_half_of_the_variables_are_one_line(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    with pytest.raises(
        UserError,
        match="JAX_NUM_PROCESSES and JAX_PROCESS_ID are set: of several processes each needs JAX_COORDINATOR_ADDRESS",
    ):
        processes.initialize()


def test_alone_a_vote_counts_at_once():
    should_stop = processes.StopConsensus(
        sharding.make_mesh({"data": 1, "fsdp": 8, "tensor": 1}, jax.devices())
    )
    assert (
        should_stop(True)
        and not should_stop(False)
        and processes.allgather_json({"a": 1}) == [{"a": 1}]
    )
