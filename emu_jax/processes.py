"""The processes of a run: how they find one another, and what they tell each other beside arrays.

One process a host of TPUs, and on GPUs one a node or one a GPU; each feeds and sees its own
devices, and all run the same program. Read next: loop.py.
"""

import json
import os
import re
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from emu_jax import sharding
from emu_jax.config import UserError

COORDINATOR_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# seconds for the others to end as well
SHUTDOWN_TIMEOUT = 5.0


def initialize() -> None:
    """Joins the processes of the run, if this is one of several: those that the COORDINATOR_VARIABLES variables
    name (launch/local.sh, launch/gke.yaml), else what JAX finds out on SLURM, on a TPU pod or under
    Open MPI. Comes before anything touches a device. Raises UserError.
    """
    given = [name for name in COORDINATOR_VARIABLES if name in os.environ]
    if len(given) > 1 and len(given) < len(COORDINATOR_VARIABLES):
        raise UserError(
            f"{' and '.join(given)} are set: of several processes each needs {', '.join(COORDINATOR_VARIABLES)}"
        )
    try:
        if len(given) == len(COORDINATOR_VARIABLES):
            address, *numbers = (os.environ[name] for name in COORDINATOR_VARIABLES)
            count, number = map(int, numbers)
            jax.distributed.initialize(
                address, count, number, cluster_detection_method="deactivate"
            )
        else:
            jax.distributed.initialize(
                local_device_ids=slurm_local_gpus(
                    dict(os.environ), len(list(Path("/dev").glob("nvidia[0-9]*")))
                )
            )
    except ValueError as error:
        if given:
            raise UserError(
                f"{', '.join(f'{name}={os.environ[name]}' for name in given)}: {error}"
            ) from error
        if "coordinator_address" not in str(error):
            # no cluster was found: alone
            raise


def exit_process(status: int) -> None:
    """Ends this process of several within SHUTDOWN_TIMEOUT seconds: by itself it would wait for the others
    to end, and they perhaps for it in a step. Does nothing where it is alone.
    """
    if jax.distributed.is_initialized():
        farewell = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        farewell.start()
        farewell.join(SHUTDOWN_TIMEOUT)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def data_shard(mesh: jax.sharding.Mesh, rows: int) -> tuple[int, int]:
    """(number, of how many): which share of a global batch of `rows` rows is this process's.
    Processes whose devices differ along `tensor` only have the same one. (On TPUs the rows of a
    share may lie apart: they are the share's in order.) Raises UserError where shares overlap in
    part.
    """
    held: dict[int, set[int]] = {}
    for device, (where, *_) in sharding.batch_sharding(mesh).devices_indices_map((rows,)).items():
        held.setdefault(device.process_index, set()).add(where.start or 0)
    shares = sorted({tuple(sorted(starts)) for starts in held.values()})
    if sum(map(len, shares)) > len(set().union(*shares)):
        raise UserError(
            f"mesh {dict(mesh.shape)}: some processes have a part of their rows in common; let mesh.tensor divide the "
            f"{mesh.local_mesh.size} devices of a process, or be a multiple of them"
        )
    return shares.index(tuple(sorted(held[jax.process_index()]))), len(shares)


def slurm_local_gpus(environ: dict[str, str], present: int) -> list[int] | None:
    """Which of the GPUs that it sees are those of a process under SLURM, on a node where `present`
    are; None where there is nothing to say. (JAX gives the n-th process of a node the n-th GPU:
    wrong for a process a node, and where SLURM shows each process its own alone.)
    """
    if "SLURM_STEP_TASKS_PER_NODE" not in environ or not present:
        return None
    tasks = max(
        int(count) for count in re.findall(r"(?:^|,)(\d+)", environ["SLURM_STEP_TASKS_PER_NODE"])
    )
    on_node = int(environ.get("SLURM_GPUS_ON_NODE", present))
    seen = (
        len(environ["CUDA_VISIBLE_DEVICES"].split(","))
        if environ.get("CUDA_VISIBLE_DEVICES")
        else on_node
    )
    # its own alone
    if seen < on_node:
        return list(range(seen))
    if seen % tasks:
        raise UserError(
            f"{tasks} processes on a node of {seen} GPUs: start one a node (--ntasks-per-node=1), or one a GPU"
        )
    first = int(environ["SLURM_LOCALID"]) * (seen // tasks)
    return list(range(first, first + seen // tasks))


def allgather_json(value: Any) -> list[Any]:
    """The JSON-able `value` of every process, in order. Every process calls it."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    rows = multihost_utils.process_allgather(np.pad(text, (0, int(sizes.max()) - len(text))))
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


def to_host(x: jax.Array) -> np.ndarray:
    """The whole of an array, also where other processes hold a part of it: then every process calls
    it.
    """
    return (
        np.asarray(x)
        if x.is_fully_addressable
        else multihost_utils.process_allgather(x, tiled=True)
    )


class StopConsensus:
    """Whether any process wants something: the same answer in all processes at the same step, so
    that none goes on alone.

    Several processes are told the outcome of their call before, which is there by then: nobody
    waits for the device.
    """

    def __init__(self, mesh: jax.sharding.Mesh):
        self.place = NamedSharding(mesh, P(sharding.AXES))
        self.any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))
        self.last: jax.Array | None = None

    def __call__(self, mine: bool) -> bool:
        if jax.process_count() == 1:
            return mine
        votes = jax.make_array_from_process_local_data(
            self.place, np.full(jax.local_device_count(), mine)
        )
        before = self.last
        self.last = self.any(votes)
        return before is not None and bool(before)
