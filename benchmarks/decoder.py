"""Benchmark of the visual decoder's training step and of sampling.

    python -m benchmarks.decoder [--steps=5] [--sampling=50] [--json=FILE]

The network is Stable Diffusion 1.5's U-Net at a quarter of its width, with heads as wide as the
original's and so a quarter as many. It works on 64 x 64 positions, the size of the latents of
512 x 512 pixels, with 3 channels and without an autoencoder. Conditions of 32 visual tokens are
part of the batch. The training step has one image. Sampling draws one image with PNDM and guidance,
which evaluates two inputs per step. Compilation is timed separately. FLOPs are counted by
models/flops.py; FLOP/s are given as a share of what this machine reaches in one large float32
matrix product. Run from the repository's root, on an idle machine (about 10 minutes on two cores).
Results: benchmarks/results/decoder.md.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks.train_step import matmul_peak
from emu_jax import config, sharding
from emu_jax.generate import diffusion_decoder, samplers
from emu_jax.models import flops
from emu_jax.plan import make_program
from emu_jax.step import init_params, init_state, jit_train_step
from emu_jax.types import DecoderBatch

# Side of the square of positions that the U-Net works on.
SIDE = 64
# Number and width of the visual tokens of a condition. The width is a quarter of the 14B's LLM.
TOKENS = 32
WIDTH = 1280
SAMPLER = "pndm"
GUIDANCE = 7.5


def quarter() -> ConfigDict:
    """configs/decoder.py at a quarter of its width.

    The Emu in it is small, because it is not used: conditions are part of the batch.
    """
    c = config.load(
        [
            "--config=configs/decoder.py:debug",
            "--config.model.compute=float32",
            f"--config.model.resampler.tokens={TOKENS}",
            f"--config.model.llama.width={WIDTH}",
            "--config.model.llama.heads=8",
            "--config.model.llama.depth=1",
            "--config.data.batch=1",
            f"--config.model.decoder.image={SIDE}",
            "--config.model.decoder.condition=generated",
        ]
    )
    with c.unlocked():
        c.model.decoder.vae = {}
        c.model.decoder.unet.update(
            dict(
                channels_in=3,
                channels_out=3,
                widths=(80, 160, 320, 320),
                heads=(2, 2, 2, 2),
                time=320,
                groups=8,
                condition=WIDTH,
            )
        )
    return c


def make_batch(c: ConfigDict) -> DecoderBatch:
    """One image of noise, with a random condition."""
    rng = np.random.default_rng(0)
    T = c.data.tokens
    images = rng.integers(0, 256, (1, 1, SIDE, SIDE, 3), np.uint8)
    conditions = rng.standard_normal((1, 1, TOKENS, WIDTH), np.float32)
    return DecoderBatch(
        tokens=jnp.zeros((1, T), jnp.int32),
        segments=jnp.ones((1, T), jnp.int32),
        positions=jnp.arange(T, dtype=jnp.int32)[None],
        text_weights=jnp.zeros((1, T)),
        images=jnp.asarray(images),
        image_slots=jnp.zeros((1, 1), jnp.int32),
        image_weights=jnp.ones((1, 1)),
        sources=jnp.zeros((1, T), jnp.int32),
        conditions=jnp.asarray(conditions),
    )


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Time a call: (seconds, result)."""
    began = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - began, result


def compiled(function: Any, *arguments: Any) -> tuple[float, Any]:
    """Compile a jitted function: (seconds, compiled function)."""
    return timed(lambda: function.lower(*arguments).compile())


def measure(steps: int, sampling: int) -> dict[str, float]:
    """Time the training step (median of `steps`) and `sampling` steps of the sampler."""
    c = quarter()
    program = make_program(c)
    model_config = program.model_config
    params = jax.jit(init_params, static_argnums=0)(program, jax.random.key(0))
    state = init_state(program, params)
    peak = matmul_peak()
    forward = flops.unet(model_config.unet, SIDE, TOKENS)
    batch = make_batch(c)
    assert batch.conditions is not None

    train_compile, step = compiled(jit_train_step(state), program, state, batch)
    seconds = []
    for _ in range(steps + 1):
        took, (state, _) = timed(lambda: step(state, batch))
        seconds.append(took)
    train_s = statistics.median(seconds[1:])
    train_rate = 3 * forward / train_s

    sample = partial(
        diffusion_decoder.sample, model_config, sampler=SAMPLER, steps=sampling, guidance=GUIDANCE
    )
    arguments = (
        {"unet": state.trainable["unet"]},
        batch.conditions[0],
        jnp.zeros(1, jnp.int32),
    )
    sampling_compile, sample = compiled(jax.jit(sample), *arguments)
    sampling_s, _ = timed(lambda: sample(*arguments))
    # Guidance evaluates the U-Net with and without the condition.
    evaluations = 2 * len(samplers.pndm_evaluations(sampling))
    sampling_rate = evaluations * forward / sampling_s
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params["unet"])),
        "matmul_peak": peak,
        "forward_flops": forward,
        "train_compile_s": train_compile,
        "train_step_s": train_s,
        "train_flops_per_second": train_rate,
        "train_share_of_peak": train_rate / peak,
        "sampling_compile_s": sampling_compile,
        "sampling_s": sampling_s,
        "sampling_flops_per_second": sampling_rate,
        "sampling_share_of_peak": sampling_rate / peak,
    }


def print_row(what: str, seconds: float, found: dict[str, float], prefix: str) -> None:
    rate = found[f"{prefix}_flops_per_second"] / 1e9
    share = 100 * found[f"{prefix}_share_of_peak"]
    compiling = found[f"{prefix}_compile_s"]
    print(
        f"{what:32}{seconds:9.2f} s  {rate:8.1f} GFLOP/s {share:6.1f} % of the matrix product's  "
        f"(compiling {compiling:.1f} s)"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=5, help="timed training steps (5)")
    parser.add_argument("--sampling", type=int, default=50, help="steps of the sampler (50)")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to this file")
    flags = parser.parse_args()
    with jax.set_mesh(sharding.make_mesh(dict(data=1, fsdp=1, tensor=1), jax.devices()[:1])):
        found = measure(flags.steps, flags.sampling)
    print(
        f"U-Net of {found['parameters'] / 1e6:.1f}M parameters on {SIDE} x {SIDE} positions, "
        f"{found['forward_flops'] / 1e9:.1f} GFLOP forward; "
        f"float32 matrix product {found['matmul_peak'] / 1e9:.1f} GFLOP/s"
    )
    print_row("training step, 1 image", found["train_step_s"], found, "train")
    what = f"{flags.sampling} steps of {SAMPLER}, 1 image"
    print_row(what, found["sampling_s"], found, "sampling")
    if flags.json:
        Path(flags.json).write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
