"""Small training runs through the command, and what they leave behind."""

import contextlib
import io
import json

import jax

from emu_jax import checkpoint, sharding, train
from tests.support import fixtures
from tests.support.trees import assert_bitwise_equal

STATS_IMAGES = 64
TIMES = (
    "step_time",
    "input_wait",
    "tokens_per_second",
    "images_per_second",
    "flops_per_second",
    "mfu",
)


make_mesh = sharding.make_mesh


def mesh_of_one_device(sizes, devices=None):
    """Replace sharding.make_mesh: use the first device unless `devices` is given."""
    return make_mesh(sizes, devices or jax.devices()[:1])


def mesh_of_two_devices(sizes, devices=None):
    """Replace sharding.make_mesh: use the first two devices unless `devices` is given."""
    return make_mesh(sizes, devices or jax.devices()[:2])


def arguments(data, workdir, *overrides):
    """Arguments of a run of four small steps, whose parameters are sharded over all devices."""
    small = (
        f"workdir={workdir}",
        f"data.tokenizer={data}/tokenizer.json",
        f"data.mixture={fixtures.mixture(data, 'train')!r}",
        "optim.steps=4",
        "optim.warmup=0.0",
        "data.batch=8",
        "data.tokens=64",
        "data.images=4",
        "data.num_streams=4",
        "data.pack_lookahead=2",
        "data.workers=2",
        "objective.chunk=32",
        "model.vision.image=32",
        "model.vision.patch=16",
        "model.vision.remat=none",
        "model.resampler.remat=none",
        "model.llama.remat=none",
        "log.pictures_every=0",
    )
    return [
        "--config=configs/base.py:debug",
        *(f"--config.{override}" for override in (*small, *overrides)),
    ]


def run(arguments):
    """(exit status, standard output)."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        return train.main(arguments), out.getvalue()


# The training command, which kills itself in a given step once a given path exists.
KILLED = f"""
import os, signal, sys, time
from etils import epath
from emu_jax import initial, metric_writer, sharding, train
from tests.support.runs import mesh_of_two_devices

sharding.make_mesh = mesh_of_two_devices
initial.STATS_IMAGES = {STATS_IMAGES}
at, saved, write = int(sys.argv[1]), epath.Path(sys.argv[2]), metric_writer.MetricWriter.write

def told(self, step, values):
    write(self, step, values)
    while step == at:
        if saved.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)

metric_writer.MetricWriter.write = told
sys.exit(train.main(sys.argv[3:]))
"""


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def untimed(workdir):
    return [
        {name: value for name, value in line.items() if not name.startswith(TIMES)}
        for line in lines(workdir)
    ]


def saved(workdir):
    """(parameters, checksums of every array, the data's state) of the newest checkpoint.

    The checksums are those of its manifest.
    """
    metadata = checkpoint.read_metadata(str(workdir))
    return (
        checkpoint.restore_params(str(workdir)),
        {"step": metadata.step, **metadata.arrays},
        metadata.data,
    )


def assert_same_run(workdir, other):
    (params, arrays, data) = saved(workdir)
    (want, arrays_wanted, data_wanted) = saved(other)
    assert (
        arrays == arrays_wanted
        and set(arrays) == {"step", "params", "optimizer", "ema"}
        and data == data_wanted
    )
    assert_bitwise_equal(params, want)
    assert untimed(workdir) == untimed(other)
