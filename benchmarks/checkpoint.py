"""Saving and restoring a complete training state: time, bytes and peak memory.

    python -m benchmarks.checkpoint [--devices=1] [--to=DIR] [--config=FILE ...]

On a CPU the state is itself part of the host's memory: memory on top of it above 1.3 x the state is
a failure (exit status 1). Saving and restoring run in a process each. The state is random bits,
which do not compress; trained weights hardly do. --to: a folder on the disk to measure; --config:
default configs/pretrain.py:emu-1b. Run from the repository's root. Results:
benchmarks/results/checkpoint.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GIB = 2**30
# times the state, on top of it
MOST = 1.3


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--to", metavar="DIR")
    flags, rest = parser.parse_known_args()
    environ = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={flags.devices}",
    }
    with tempfile.TemporaryDirectory(dir=flags.to) as folder:
        above = False
        for what in ("save", "restore"):
            done = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "benchmarks.checkpoint",
                    what,
                    folder,
                    *(rest or ["--config=configs/pretrain.py:emu-1b"]),
                ],
                env=environ,
                stdout=subprocess.PIPE,
                text=True,
            )
            if done.returncode:
                return done.returncode
            found = json.loads(done.stdout.splitlines()[-1])
            state = found["state"]
            seconds = found["seconds"]
            on_top = (found["peak"] - max(found["before"], state)) / state
            above |= on_top > MOST
            print(
                f"{what:8}{state / GIB:8.2f} GiB of state in {seconds:.1f} s, {state / GIB / seconds:.2f} GiB/s; memory: "
                f"{found['before'] / state:.2f} x the state before, {found['peak'] / state:.2f} x at most, {on_top:.2f} x on top of it"
                f"{f': more than {MOST}' if on_top > MOST else ''}",
                flush=True,
            )
        print(
            f"on disk {sum(path.stat().st_size for path in Path(folder).rglob('*') if path.is_file()) / GIB:8.2f} GiB"
        )
    return int(above)


def half(what: str, folder: str, arguments: list[str]) -> None:
    import jax

    from emu_jax import config
    from emu_jax.checkpoint import CheckpointManager
    from emu_jax.plan import make_plan

    c = config.load([*arguments, "--config.mesh.data=1"])
    plan = make_plan(c)
    like = plan.state
    with jax.set_mesh(plan.mesh):
        state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(like))
        run = CheckpointManager(folder, keep=1, keep_every=0)
        state = jax.tree.map(random, like) if what == "save" else None
        jax.block_until_ready(state)
        # the peak from here on
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        began = time.perf_counter()
        if what == "save":
            run.save(1, state, {}, config.to_dict(c), wait=True)
        else:
            jax.block_until_ready(run.restore(like)[1])
        print(
            json.dumps(
                {
                    "seconds": time.perf_counter() - began,
                    "state": state_bytes,
                    "before": before,
                    "peak": memory("VmHWM"),
                }
            )
        )


def random(leaf):
    import jax
    import jax.numpy as jnp

    word = {4: jnp.uint32, 2: jnp.uint16, 1: jnp.uint8}[leaf.dtype.itemsize]

    def make():
        return jax.lax.bitcast_convert_type(
            jax.random.bits(jax.random.key(1), leaf.shape, word), leaf.dtype
        )

    return jax.block_until_ready(jax.jit(make, out_shardings=leaf.sharding)())


def memory(what: str) -> int:
    """Bytes, as Linux counts them for this process: "VmRSS" now, "VmHWM" at most."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)
    )
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    if sys.argv[1:2] in (["save"], ["restore"]):
        half(sys.argv[1], sys.argv[2], sys.argv[3:])
    else:
        sys.exit(main())
