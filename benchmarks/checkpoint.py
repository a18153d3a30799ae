"""Benchmark of saving and restoring a training state: time, bytes and peak memory.

    python -m benchmarks.checkpoint [--devices=1] [--to=DIR] [--config=FILE ...]

On a CPU the state itself is in the host's memory; the exit status is 1 if saving or restoring needs
more than 1.3 x the size of the state in addition. Each runs in a process of its own. The state is
random bits, which do not compress, because trained weights hardly do. --to: a folder on the disk to
measure. --config: configs/pretrain.py:emu-1b by default. Run from the repository's root. Results:
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
# Limit of the memory in addition to the state, as a multiple of the state's size.
MOST = 1.3


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=1, help="CPU devices (1)")
    parser.add_argument("--to", metavar="DIR", help="folder to write to (a temporary one)")
    flags, rest = parser.parse_known_args()
    arguments = rest or ["--config=configs/pretrain.py:emu-1b"]
    exceeded = False
    with tempfile.TemporaryDirectory(dir=flags.to) as folder:
        for action in ("save", "restore"):
            found = in_process(action, folder, arguments, flags.devices)
            state = found["state"]
            on_top = (found["peak"] - max(found["before"], state)) / state
            exceeded |= on_top > MOST
            print(row(action, found, on_top), flush=True)
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        on_disk = sum(path.stat().st_size for path in files)
        print(f"on disk {on_disk / GIB:8.2f} GiB")
    return int(exceeded)


def in_process(action: str, folder: str, arguments: list[str], devices: int) -> dict[str, float]:
    """Run `measure` in a process of its own, and return what it prints."""
    environ = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, "-m", "benchmarks.checkpoint", action, folder, *arguments]
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def row(action: str, found: dict[str, float], on_top: float) -> str:
    state = found["state"]
    rate = state / GIB / found["seconds"]
    warning = f": more than {MOST}" if on_top > MOST else ""
    return (
        f"{action:8}{state / GIB:8.2f} GiB of state in {found['seconds']:.1f} s, {rate:.2f} GiB/s; "
        f"memory: {found['before'] / state:.2f} x the state before, "
        f"{found['peak'] / state:.2f} x at most, {on_top:.2f} x on top of it{warning}"
    )


def measure(action: str, folder: str, arguments: list[str]) -> None:
    """Save or restore once, and print seconds and bytes as JSON."""
    import jax

    from emu_jax import config
    from emu_jax.checkpoint import CheckpointManager
    from emu_jax.plan import make_plan

    c = config.load([*arguments, "--config.mesh.data=1"])
    plan = make_plan(c)
    like = plan.state
    with jax.set_mesh(plan.mesh):
        checkpoints = CheckpointManager(folder, keep=1, keep_every=0)
        state = jax.tree.map(random, like) if action == "save" else None
        jax.block_until_ready(state)
        # Reset the peak memory that Linux records.
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        began = time.perf_counter()
        if action == "save":
            checkpoints.save(1, state, {}, config.to_dict(c), wait=True)
        else:
            restored = checkpoints.restore(like)
            assert restored, "nothing was saved"
            jax.block_until_ready(restored[1])
        found = {
            "seconds": time.perf_counter() - began,
            "state": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(like)),
            "before": before,
            "peak": memory("VmHWM"),
        }
        print(json.dumps(found))


def random(leaf):
    """Random bits with the shape, dtype and sharding of `leaf`."""
    import jax
    import jax.numpy as jnp

    word = {4: jnp.uint32, 2: jnp.uint16, 1: jnp.uint8}[leaf.dtype.itemsize]

    def make():
        bits = jax.random.bits(jax.random.key(1), leaf.shape, word)
        return jax.lax.bitcast_convert_type(bits, leaf.dtype)

    return jax.block_until_ready(jax.jit(make, out_shardings=leaf.sharding)())


def memory(name: str) -> int:
    """Bytes of this process as Linux counts them: "VmRSS", current, or "VmHWM", peak."""
    status = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in status if line.startswith(name))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    if sys.argv[1:2] in (["save"], ["restore"]):
        measure(sys.argv[1], sys.argv[2], sys.argv[3:])
    else:
        sys.exit(main())
