"""The visual decoder's train step, and its sampling.

    python -m benchmarks.decoder [--steps=5] [--sampling=50] [--json=FILE]

Stable Diffusion 1.5's U-Net at a quarter of its width, with heads as wide as the original's and so
a quarter as many, on 64 x 64 positions, the size of the latents of 512 x 512 pixels. It works on 3
channels: pixels, without an autoencoder. Conditions of 32 visual tokens come with the batch. The
train step is the loop's, for one image; sampling is PNDM with guidance, so two inputs a step, for
one image. Compilation is timed separately. FLOP/s are counted by models/flops.py, as a share of
what this machine reaches in one large float32 matrix product. Run from the repository's root, on an
idle machine (about 10 minutes on two cores). Results: benchmarks/results/decoder.md.
"""

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.train_step import matmul_peak
from emu_jax import config, sharding
from emu_jax.generate import diffusion_decoder, samplers
from emu_jax.models import flops
from emu_jax.plan import make_program
from emu_jax.step import init_params, init_state, jit_train_step
from emu_jax.types import DecoderBatch

# of the places; of the condition: a quarter of the 14B's width
SIDE = 64
TOKENS = 32
WIDTH = 1280
SAMPLER = "pndm"
GUIDANCE = 7.5


def quarter() -> config.ConfigDict:
    """configs/decoder.py at a quarter of its width.

    The Emu in it is small: conditions come with the batch.
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


def batch(c) -> DecoderBatch:
    rng = np.random.default_rng(0)
    T = c.data.tokens
    return DecoderBatch(
        tokens=np.zeros((1, T), np.int32),
        segments=np.ones((1, T), np.int32),
        positions=np.arange(T, dtype=np.int32)[None],
        text_weights=np.zeros((1, T), np.float32),
        images=rng.integers(0, 256, (1, 1, SIDE, SIDE, 3), np.uint8),
        image_slots=np.zeros((1, 1), np.int32),
        image_weights=np.ones((1, 1), np.float32),
        sources=np.zeros((1, T), np.int32),
        conditions=rng.standard_normal((1, 1, TOKENS, WIDTH), np.float32),
    )


def timed(call) -> tuple[float, object]:
    began = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - began, result


def compiled(function, *arguments):
    """(seconds, the compiled function)."""
    return timed(lambda: function.lower(*arguments).compile())


def measure(steps: int, sampling: int) -> dict[str, float]:
    c = quarter()
    program = make_program(c)
    model_config = program.model_config
    params = jax.jit(init_params, static_argnums=0)(program, jax.random.key(0))
    state = init_state(program, params)
    peak = matmul_peak()
    once = flops.unet(model_config.unet, SIDE, TOKENS)
    rows = batch(c)

    train_compile, step = compiled(jit_train_step(state), program, state, rows)
    seconds = []
    for _ in range(steps + 1):
        took, (state, _) = timed(lambda: step(state, rows))
        seconds.append(took)
    train_s = statistics.median(seconds[1:])

    canvas = {"unet": state.trainable["unet"]}
    condition = jnp.asarray(rows.conditions[0])
    seeds = jnp.zeros(1, jnp.int32)
    draw_compile, draw = compiled(
        jax.jit(
            partial(
                diffusion_decoder.sample,
                model_config,
                sampler=SAMPLER,
                steps=sampling,
                guidance=GUIDANCE,
            )
        ),
        canvas,
        condition,
        seeds,
    )
    draw_s, _ = timed(lambda: draw(canvas, condition, seeds))
    evaluations = 2 * len(samplers.pndm_evaluations(sampling))
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params["unet"])),
        "matmul_peak": peak,
        "forward_flops": once,
        "train_compile_s": train_compile,
        "train_step_s": train_s,
        "train_flops_per_second": 3 * once / train_s,
        "train_share_of_peak": 3 * once / train_s / peak,
        "sampling_compile_s": draw_compile,
        "sampling_s": draw_s,
        "sampling_flops_per_second": evaluations * once / draw_s,
        "sampling_share_of_peak": evaluations * once / draw_s / peak,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=5, help="training steps that are timed (5)")
    parser.add_argument("--sampling", type=int, default=50, help="steps of the sampler (50)")
    parser.add_argument("--json", metavar="FILE", help="the numbers, as JSON")
    flags = parser.parse_args()
    with jax.set_mesh(sharding.make_mesh(dict(data=1, fsdp=1, tensor=1), jax.devices()[:1])):
        found = measure(flags.steps, flags.sampling)
    print(
        f"U-Net of {found['parameters'] / 1e6:.1f}M parameters on {SIDE} x {SIDE} places, {found['forward_flops'] / 1e9:.1f} GFLOP forward; "
        f"float32 matrix product {found['matmul_peak'] / 1e9:.1f} GFLOP/s"
    )
    for name, what in (
        ("train", "training step, 1 image"),
        ("sampling", f"{flags.sampling} steps of {SAMPLER}, 1 picture"),
    ):
        seconds = found["train_step_s" if name == "train" else "sampling_s"]
        print(
            f"{what:32}{seconds:9.2f} s  {found[f'{name}_flops_per_second'] / 1e9:8.1f} GFLOP/s "
            f"{100 * found[f'{name}_share_of_peak']:6.1f} % of that  (compiling {found[f'{name}_compile_s']:.1f} s)"
        )
    if flags.json:
        Path(flags.json).write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
