"""A small training state with everything that a checkpoint holds.

As a program, it starts to save such a state and kills itself before that is done:

    python -m tests.support.checkpoints WORKDIR
"""

import os
import signal
import sys
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from emu_jax.checkpoint import CheckpointManager

DATA = {
    "streams": {
        "0": {"draw": 7, "epochs": [1, 2], "pending": [["names", 0, 5]]},
        "10": {"draw": 0, "share": 0.1},
        "2": {},
    }
}
CONFIG = {
    "stage": "emu",
    "optim": {"b1": 0.9, "steps": 10, "ema": None},
    "rules": [[".*", True], [".*", 1e-4]],
}


@flax.struct.dataclass
class State:
    step: Any
    trainable: Any
    frozen: Any
    opt_state: Any
    ema: Any
    skipped: Any


def make_state(step=1, rows=64, ema=True):
    keys = jax.random.split(jax.random.key(step), 2)
    odd = jnp.array([-0.0, jnp.nan, jnp.inf, 1e-40], jnp.float32)
    trainable = {
        "llama": {"w": jax.random.normal(keys[0], (rows, 64)), "norm": odd},
        "head": jnp.arange(8, dtype=jnp.bfloat16),
    }
    frozen = {
        "llama": {"ids": jnp.arange(6, dtype=jnp.int8)},
        "vision": {"w": jax.random.normal(keys[1], (rows, 8))},
    }
    # An optimizer state with masked nodes, empty states and None.
    labels = {"llama": {"w": "a", "norm": "b"}, "head": "b"}
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.multi_transform(
            {"a": optax.adamw(1e-3, mu_dtype=jnp.bfloat16), "b": optax.sgd(1e-2)}, labels
        ),
    )
    gradient = jax.tree.map(
        lambda x: jnp.cos(step * jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), trainable
    )
    _, opt_state = optimizer.update(gradient, optimizer.init(trainable), trainable)
    return State(
        jnp.int32(step),
        trainable,
        frozen,
        opt_state,
        jax.tree.map(lambda x: x + 1, trainable) if ema else None,
        jnp.uint32(2**31 + 5),
    )


def save_and_die(workdir):
    """Start to save a large state as step 3, and kill this process before that is done."""
    noise = jnp.asarray(np.random.default_rng(0).random((24, 2**20), np.float32))
    run = CheckpointManager(workdir, keep=5, keep_every=0)
    run.save(3, make_state(3).replace(frozen={"noise": noise}), DATA, CONFIG)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    save_and_die(sys.argv[1])
