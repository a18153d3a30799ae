"""Benchmark of the complete training step, at the demo's size and at 60M parameters.

    python -m benchmarks.train_step [--steps=30] [--json=FILE]

Reports step time, elements (text and visual tokens) per second, input wait, and model FLOP/s
(counted by models/flops.py) as a share of what this machine reaches in one large float32 matrix
product. Checks that nothing is compiled after step 1, and that the demo waits for input less than
2 % of the time. Needs the demo's data: python -m emu_jax.demo build --to=data/demo. Run from the
repository's root, on an idle machine. Results: benchmarks/results/train_step.md.
"""

import argparse
import json
import statistics
import sys
import time

import jax
import jax.numpy as jnp

from emu_jax import cli, config, sharding
from emu_jax.data import tokenizer
from emu_jax.data.loader import Loader
from emu_jax.plan import make_program
from emu_jax.step import init_params, init_state, jit_train_step
from emu_jax.throughput import Throughput

MIXTURE = "(('names',0.5,'data/demo/names:train'),('scenes',0.5,'data/demo/scenes:train'))"
# Name -> arguments of the config. All parameters train, as in pretraining.
RUNS = {
    "demo": ["--config=configs/demo.py", "--config.rules.train=(('.*',True),)"],
    "emu-60m": [
        "--config=configs/base.py:emu-60m",
        f"--config.data.mixture={MIXTURE}",
        "--config.data.tokenizer=data/demo/tokenizer.json",
        "--config.model.llama.vocab=2048",
        "--config.data.batch=4",
        "--config.data.tokens=256",
        "--config.data.images=12",
        "--config.data.num_streams=4",
    ],
}
# Number of steps before the timed ones: the first compiles, and the third is the first with a
# logged speed.
WARM_UP = 3
# Limit of the share of the time that the demo waits for its input.
MOST_INPUT_WAIT = 0.02
# Rows of the printed table: (field, unit, factor from the field's value to the unit).
TABLE = (
    ("parameters", "M", 1e-6),
    ("step_time", "ms", 1e3),
    ("elements_per_second", "", 1),
    ("images_per_second", "", 1),
    ("padding", "%", 100),
    ("input_wait", "%", 100),
    ("flops_per_second", "GFLOP/s", 1e-9),
    ("matmul_peak", "GFLOP/s", 1e-9),
    ("share_of_peak", "%", 100),
)


def matmul_peak(size: int = 2048) -> float:
    """FLOP/s of a float32 product of two size x size matrices, the best of several runs."""
    x = jnp.ones((size, size))
    product = jax.jit(lambda x: jnp.einsum("ij,jk->ik", x, x, precision="highest"))
    product(x).block_until_ready()

    def once() -> float:
        began = time.perf_counter()
        product(x).block_until_ready()
        return time.perf_counter() - began

    return 2 * size**3 / min(once() for _ in range(10))


def measure(arguments: list[str], steps: int) -> dict[str, float]:
    """Medians over `steps` training steps, run by the loop on one device."""
    c = config.load(arguments)
    program = make_program(c)
    model_config = program.model_config
    params = jax.jit(init_params, static_argnums=0)(program, jax.random.key(0))
    state = init_state(program, params)
    step = jit_train_step(state)
    loader = Loader(
        c.data,
        0,
        tokenizer.load(c.data.tokenizer, model_config.llama.vocab),
        model_config.resampler.tokens,
        model_config.vision.image,
    )
    throughput = Throughput(program, state, c.data.batch)
    rows = []
    batches = iter(loader)
    for number in range(steps + WARM_UP):
        began = time.perf_counter()
        item = next(batches)
        waited = time.perf_counter() - began
        state, metrics = step(program, state, item.batch)
        jax.block_until_ready(metrics)
        row = throughput.measure(item, waited)
        if number >= WARM_UP - 1:
            rows.append(row)
    loader.close()
    compilations = step._cache_size()  # ty: ignore[missing-attribute]
    assert compilations == 1, f"train_step was compiled {compilations} times"

    def median(name: str) -> float:
        return float(statistics.median(row[name] for row in rows))

    waiting = sum(row["input_wait"] for row in rows)
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "step_time": median("step_time"),
        "elements_per_second": median("tokens_per_second"),
        "images_per_second": median("images_per_second"),
        "padding": statistics.fmean(row["padding"] for row in rows),
        "flops_per_second": median("flops_per_second"),
        "input_wait": waiting / sum(row["step_time"] for row in rows),
    }


def main(arguments: list[str]) -> int:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="timed steps (30)")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to this file")
    flags = parser.parse_args(arguments)
    found = {}
    with jax.set_mesh(sharding.make_mesh(dict(data=1, fsdp=1, tensor=1), jax.devices()[:1])):
        for name, arguments in RUNS.items():
            peak = matmul_peak()
            run = measure(arguments, flags.steps)
            run["matmul_peak"] = peak
            run["share_of_peak"] = run["flops_per_second"] / peak
            found[name] = run
    print(f"{'':22}" + "".join(f"{name:>12}" for name in found))
    for field, unit, scale in TABLE:
        values = "".join(f"{run[field] * scale:12.1f}" for run in found.values())
        print(f"{field:22}{values}  {unit}")
    if flags.json:
        with open(flags.json, "w") as file:
            json.dump(found, file, indent=1)
    if found["demo"]["input_wait"] >= MOST_INPUT_WAIT:
        print("FAILED: the demo waits for its input 2 % of the time or more", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
