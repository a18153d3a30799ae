"""Benchmark of importing a LLaMA from sharded safetensors: time and peak memory.

    python -m benchmarks.import_weights [--size=emu-1b] [--json=FILE]

Writes random bfloat16 shards to a temporary folder (2.3 GB for emu-1b; the checkpoint is as large).
The import runs in a process of its own, whose peak resident memory must stay below 3 x the largest
tensor + 1 GiB, because tensors are streamed from disk to disk. Then the checkpoint is exported
under the same bound and compared with the source, tensor by tensor. Run from the repository's root.
Results: benchmarks/results/import_weights.md.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from emu_jax import config
from emu_jax.models import emu
from emu_jax.weights import convert, files, llama

ROOT = Path(__file__).resolve().parent.parent
# Size of a shard in bytes.
SHARD = 500_000_000
MIB = 2**20


def make(folder: Path, c) -> tuple[int, int]:
    """Write random shards, index and config.json of the config's LLaMA.

    Returns the bytes of all tensors and of the largest.
    """
    folder.mkdir()
    model = c.model.to_dict()
    model_config = emu.EmuConfig.of(model)
    dtype = np.dtype(ml_dtypes.bfloat16)
    m = model_config.llama
    rng = np.random.default_rng(0)
    D = m.width
    d = m.width // m.heads
    L = m.depth
    ours = {
        "llama/embed/base": (m.vocab, D),
        "llama/lm_head/base": (m.vocab, D),
        "llama/norm/scale": (D,),
        "llama/blocks/norm1/scale": (L, D),
        "llama/blocks/norm2/scale": (L, D),
        "llama/blocks/attn/q/w": (L, D, m.heads, d),
        "llama/blocks/attn/o/w": (L, m.heads, d, D),
        **{f"llama/blocks/attn/{name}/w": (L, D, m.kv, d) for name in "kv"},
        **{f"llama/blocks/ffn/{name}/w": (L, D, m.ffn) for name in ("gate", "up")},
        "llama/blocks/ffn/down/w": (L, m.ffn, D),
    }
    shapes = convert.foreign_shapes(llama.table(model_config), ours)
    # This is a generator, so that only one tensor at a time is in memory.
    arrays = (
        (name, rng.standard_normal(shape, np.float32).astype(dtype))
        for name, shape in shapes.items()
    )
    headers = {name: (shape, dtype) for name, shape in shapes.items()}
    files.write(folder, "model", headers, arrays, SHARD)
    (folder / "config.json").write_text(json.dumps(llama.config_json(model, 2048)))
    sizes = [int(np.prod(shape)) * dtype.itemsize for shape in shapes.values()]
    return sum(sizes), max(sizes)


def run(*arguments: str) -> tuple[float, int]:
    """Run `python -m emu_jax.weights`: (seconds, peak resident bytes).

    The peak is polled from the kernel until the process ends. wait4 is not used, because it may
    report the peak of this process, from which the other one is forked.
    """
    began = time.perf_counter()
    peak = 0
    process = subprocess.Popen(
        [sys.executable, "-m", "emu_jax.weights", *arguments], stdout=subprocess.DEVNULL, cwd=ROOT
    )
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        if found:
            peak = int(found[1]) * 1024
        time.sleep(0.02)
    if process.returncode:
        sys.exit(f"{arguments[0]} failed")
    return time.perf_counter() - began, peak


def different_tensors(one: Path, other: Path) -> list[str]:
    """Names of the tensors that differ in the two folders, or are in only one of them."""
    a = files.read([str(one)]).tensors
    b = files.read([str(other)]).tensors
    differing = sorted(a.keys() ^ b.keys())
    for name in a.keys() & b.keys():
        if np.asarray(a[name]).tobytes() != np.asarray(b[name]).tobytes():
            differing.append(name)
    return differing


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="emu-1b", help="a name in configs/sizes.py (emu-1b)")
    parser.add_argument("--json", metavar="FILE", help="also write the table to this file")
    flags = parser.parse_args()
    config_flag = f"--config={ROOT}/configs/pretrain.py:{flags.size}"
    c = config.load([config_flag])
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source")
        imported = Path(folder, "imported")
        exported = Path(folder, "exported")
        total, largest = make(source, c)
        found = {
            "import": run("import", "--family=llama", str(source), config_flag, f"--to={imported}"),
            "export": run("export", "--family=llama", f"--from={imported}", f"--to={exported}"),
        }
        differing = different_tensors(source, exported)
    bound = 3 * largest + 2**30
    shards = -(-total // SHARD)
    print(
        f"{flags.size}'s LLaMA: {total / 2**30:.2f} GiB in {shards} shards, "
        f"the largest tensor {largest / MIB:.0f} MiB\n"
    )
    print("| | seconds | MiB/s | peak MiB | bound MiB |")
    print("|---|---|---|---|---|")
    for name, (seconds, peak) in found.items():
        rate = total / MIB / seconds
        print(f"| {name} | {seconds:.1f} | {rate:.0f} | {peak / MIB:.0f} | {bound / MIB:.0f} |")
    if differing:
        print(f"\nexport of import: {len(differing)} tensors DIFFER: {differing[:3]}")
    else:
        print("\nexport of import: bit for bit the source")
    if flags.json:
        numbers = {"size": flags.size, "bytes": total, "largest": largest, "bound": bound}
        for name, (seconds, peak) in found.items():
            numbers[name] = {"seconds": seconds, "peak": peak}
        Path(flags.json).write_text(json.dumps(numbers, indent=1) + "\n")
    exceeded = max(peak for _, peak in found.values()) > bound
    return int(bool(differing) or exceeded)


if __name__ == "__main__":
    sys.exit(main())
