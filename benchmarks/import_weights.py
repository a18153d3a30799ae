"""Import of a LLaMA from sharded safetensors: time and peak memory.

    python -m benchmarks.import_weights [--size=emu-1b] [--json=FILE]

Writes random bfloat16 shards to a temporary folder (2.3 GB for emu-1b, and as much for the
checkpoint). The import runs in a process of its own; its peak resident memory must stay below 3 x
the largest tensor + 1 GiB, the bound of streaming from disk to disk. The checkpoint is exported
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
SHARD = 500_000_000


def make(folder: Path, c) -> tuple[int, int]:
    """Random shards, index and config.json of the config's LLaMA: (bytes in all, of the largest
    tensor).
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
    arrays = (
        (name, rng.standard_normal(shape, np.float32).astype(dtype))
        for name, shape in shapes.items()
    )
    files.write(
        folder, "model", {name: (shape, dtype) for name, shape in shapes.items()}, arrays, SHARD
    )
    (folder / "config.json").write_text(json.dumps(llama.config_json(model, 2048)))
    sizes = [int(np.prod(shape)) * dtype.itemsize for shape in shapes.values()]
    return sum(sizes), max(sizes)


def run(*arguments: str) -> tuple[float, int]:
    """(seconds, peak resident bytes) of `python -m emu_jax.weights`. The peak is the kernel's own,
    asked for until the process ends: what wait4 tells may be the peak of this process, which it was
    split from.
    """
    began = time.perf_counter()
    peak = 0
    process = subprocess.Popen(
        [sys.executable, "-m", "emu_jax.weights", *arguments], stdout=subprocess.DEVNULL, cwd=ROOT
    )
    while process.poll() is None:
        if found := re.search(
            r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text()
        ):
            peak = int(found[1]) * 1024
        time.sleep(0.02)
    if process.returncode:
        sys.exit(f"{arguments[0]} failed")
    return time.perf_counter() - began, peak


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="emu-1b", help="of configs/sizes.py")
    parser.add_argument("--json", metavar="FILE", help="write the table there as well")
    flags = parser.parse_args()
    named = f"--config={ROOT}/configs/pretrain.py:{flags.size}"
    c = config.load([named])
    with tempfile.TemporaryDirectory() as where:
        source, ours, theirs = (Path(where) / name for name in ("source", "ours", "theirs"))
        total, largest = make(source, c)
        found = {
            "import": run("import", "--family=llama", str(source), named, f"--to={ours}"),
            "export": run("export", "--family=llama", f"--from={ours}", f"--to={theirs}"),
        }
        one = files.read([str(source)]).tensors
        two = files.read([str(theirs)]).tensors
        differ = [
            name
            for name in one
            if np.asarray(one[name]).tobytes() != np.asarray(two[name]).tobytes()
        ] + sorted(one.keys() ^ two.keys())
    bound = 3 * largest + 2**30
    print(
        f"{flags.size}'s LLaMA: {total / 2**30:.2f} GiB in {-(-total // SHARD)} shards, the largest tensor {largest / 2**20:.0f} MiB\n"
    )
    print("| | seconds | MiB/s | peak MiB | bound MiB |\n|---|---|---|---|---|")
    for name, (seconds, peak) in found.items():
        print(
            f"| {name} | {seconds:.1f} | {total / 2**20 / seconds:.0f} | {peak / 2**20:.0f} | {bound / 2**20:.0f} |"
        )
    print(
        f"\nexport of import: {'bit for bit the source' if not differ else f'{len(differ)} tensors DIFFER: {differ[:3]}'}"
    )
    if flags.json:
        rows = {name: {"seconds": seconds, "peak": peak} for name, (seconds, peak) in found.items()}
        Path(flags.json).write_text(
            json.dumps(
                {"size": flags.size, "bytes": total, "largest": largest, "bound": bound, **rows},
                indent=1,
            )
            + "\n"
        )
    return 1 if differ or max(peak for _, peak in found.values()) > bound else 0


if __name__ == "__main__":
    sys.exit(main())
