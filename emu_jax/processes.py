"""How the processes of a run find one another, and what they exchange besides arrays.

There is one process per host of TPUs, and one per node or per GPU on GPUs. Each feeds its own
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
# Seconds that `exit_process` waits for the other processes.
SHUTDOWN_TIMEOUT = 5.0


def initialize() -> None:
    """Join the other processes of the run, if there are any, before touching a device.

    The environment variables COORDINATOR_VARIABLES describe the processes (launch/local.sh,
    launch/gke.yaml). Without these variables, JAX detects SLURM, a TPU pod or Open MPI. Raises
    UserError for variables that are incomplete or wrong.
    """
    given = [name for name in COORDINATOR_VARIABLES if name in os.environ]
    if len(given) > 1 and len(given) < len(COORDINATOR_VARIABLES):
        raise UserError(
            f"{' and '.join(given)} are set, but each of several processes needs "
            f"{', '.join(COORDINATOR_VARIABLES)}"
        )
    try:
        if len(given) == len(COORDINATOR_VARIABLES):
            address, count, number = (os.environ[name] for name in COORDINATOR_VARIABLES)
            jax.distributed.initialize(
                address, int(count), int(number), cluster_detection_method="deactivate"
            )
        else:
            gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
            jax.distributed.initialize(
                local_device_ids=slurm_local_gpus(dict(os.environ), present=gpus)
            )
    except ValueError as error:
        if given:
            values = ", ".join(f"{name}={os.environ[name]}" for name in given)
            raise UserError(f"{values}: {error}") from error
        # JAX found no cluster: this is the only process.
        if "coordinator_address" not in str(error):
            raise


def exit_process(status: int) -> None:
    """Exit within SHUTDOWN_TIMEOUT seconds if this is one of several processes.

    A normal exit would wait for the other processes, which may be blocked in a collective that
    needs this process. If there is only one process, returns without exiting.
    """
    if not jax.distributed.is_initialized():
        return
    shutdown = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    shutdown.start()
    shutdown.join(SHUTDOWN_TIMEOUT)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def data_shard(mesh: jax.sharding.Mesh, rows: int) -> tuple[int, int]:
    """(index, count): this process reads shard index of the count shards of a batch.

    rows: rows of the batch. Processes whose devices differ only along `tensor` read the same shard.
    On TPUs the rows of a shard may not be contiguous; the rows that a process reads fill them in
    ascending order. Raises UserError if shards overlap partly.
    """
    starts_of: dict[int, set[int]] = {}
    indices = sharding.batch_sharding(mesh).devices_indices_map((rows,))
    for device, (where, *_) in indices.items():
        starts_of.setdefault(device.process_index, set()).add(where.start or 0)
    shards = sorted({tuple(sorted(starts)) for starts in starts_of.values()})
    if sum(len(shard) for shard in shards) > len(set().union(*shards)):
        raise UserError(
            f"mesh {dict(mesh.shape)}: some processes share only part of their rows; let "
            f"mesh.tensor divide the {mesh.local_mesh.size} devices of a process, "
            "or be a multiple of them"
        )
    mine = tuple(sorted(starts_of[jax.process_index()]))
    return shards.index(mine), len(shards)


def slurm_local_gpus(environ: dict[str, str], present: int) -> list[int] | None:
    """Under SLURM, the indices of this process's GPUs among those it sees; None: JAX decides.

    JAX would assign the n-th GPU to the n-th process of a node. That is wrong if a node has a
    single process, or if SLURM shows each process only its own GPU. present: GPUs of the node.
    """
    if "SLURM_STEP_TASKS_PER_NODE" not in environ or not present:
        return None
    # "8(x2),4" means two nodes with 8 tasks and one with 4.
    counts = re.findall(r"(?:^|,)(\d+)", environ["SLURM_STEP_TASKS_PER_NODE"])
    tasks = max(int(count) for count in counts)
    on_node = int(environ.get("SLURM_GPUS_ON_NODE", present))
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    seen = len(visible.split(",")) if visible else on_node
    if seen < on_node:
        # SLURM shows this process only its own GPUs.
        return list(range(seen))
    if seen % tasks:
        raise UserError(
            f"{tasks} processes on a node of {seen} GPUs: start one per node "
            "(--ntasks-per-node=1), or one per GPU"
        )
    first = int(environ["SLURM_LOCALID"]) * (seen // tasks)
    return list(range(first, first + seen // tasks))


def allgather_json(value: Any) -> list[Any]:
    """The JSON-able `value` of each process, in process order. All processes must call this."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.pad(text, (0, int(sizes.max()) - len(text)))
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


def to_host(x: jax.Array) -> np.ndarray:
    """Copy all of an array to the host.

    If other processes hold a part of it, every process must call this.
    """
    if x.is_fully_addressable:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


class StopConsensus:
    """Agreement on stopping: all processes get the same answer at the same step.

    A call returns whether any process wanted to stop at the previous call. That result has already
    been computed, so no process waits for the device. If there is only one process, a call returns
    its own argument.
    """

    def __init__(self, mesh: jax.sharding.Mesh):
        self._sharding = NamedSharding(mesh, P(sharding.AXES))
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))
        self._previous: jax.Array | None = None

    def __call__(self, mine: bool) -> bool:
        if jax.process_count() == 1:
            return mine
        wishes = jax.make_array_from_process_local_data(
            self._sharding, np.full(jax.local_device_count(), mine)
        )
        previous = self._previous
        self._previous = self._any(wishes)
        return previous is not None and bool(previous)
