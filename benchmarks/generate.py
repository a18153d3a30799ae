"""Benchmark of generation with a KV cache and, like the release, without one.

    python -m benchmarks.generate [--rounds=3] [--json=FILE]

For each visual token of an image, the release processes the complete prefix again. `without_cache`
does the same with our code, padded to one shape so that it is compiled once (3 % more work). With
and without a cache, the 60M model generates an image after the same 512-token prompt; the two take
turns and must agree. Then text is generated for 1 and 8 prompts at a time: time to the first token
after a 512-token prompt, and tokens per second. Compilation is timed separately. The exit status is
1 if the cache makes images less than 10 times as fast. Run from the repository's root, on an idle
machine. Results: benchmarks/results/generate.md.
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

from emu_jax import config
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.generate import text_decoding
from emu_jax.generate.generation_config import GenerationConfig
from emu_jax.generate.processor import Prompt
from emu_jax.generate.session import Session
from emu_jax.models import emu, module

# Number of tokens in a prompt.
PREFIX = 512
# Number of visual tokens in an image, as in the release.
N = 32
# Number of new tokens in an answer.
NEW = 64
# The cache must make images at least this many times as fast.
WANTED = 10


def without_cache(model_config, params, x):
    """N visual tokens [B, N, D] after x [B, PREFIX, D], each from a full forward pass."""
    model = module.bind(emu.Emu, model_config, params)
    positions = jnp.tile(jnp.arange(PREFIX + N), (len(x), 1))

    def next_token(x, n):
        hidden, _ = model.llama(
            x, positions, jnp.ones_like(positions), kernel=model_config.attention
        )
        z = model.regress_head(jax.lax.dynamic_slice_in_dim(hidden, PREFIX - 1 + n, 1, 1))
        return jax.lax.dynamic_update_slice_in_dim(x, z, PREFIX + n, 1), z[:, 0]

    padded = jnp.pad(x, ((0, 0), (0, N), (0, 0)))
    _, visual = jax.lax.scan(next_token, padded, jnp.arange(N))
    return jnp.moveaxis(visual, 0, 1)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Time a call: (seconds, result)."""
    began = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - began, result


def prompts(session: Session, count: int, rng: np.random.Generator) -> list[Prompt]:
    """Random prompts of PREFIX tokens."""
    vocab = session.model_config.llama.vocab
    return [Prompt([1, *rng.integers(3, vocab, PREFIX - 1).tolist()]) for _ in range(count)]


def image_loop(session: Session, rounds: int, rng: np.random.Generator) -> dict[str, float]:
    """Median seconds of an image after PREFIX tokens, with and without a cache."""
    (prompt,) = prompts(session, 1, rng)
    # The session appends [IMG].
    opened = Prompt(prompt.tokens[:-1])
    x, _ = session.embed([Prompt([*opened.tokens, session.tokenizer.img])])
    slow = partial(jax.jit(without_cache, static_argnums=0), session.model_config, session.params)

    def cached():
        return session.generate_images([opened])

    def whole():
        return slow(x)

    cached_compile, a = timed(cached)
    whole_compile, b = timed(whole)
    difference = np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max()

    # The two take turns.
    seconds = [(timed(cached)[0], timed(whole)[0]) for _ in range(rounds)]
    ratios = sorted(slow / fast for fast, slow in seconds)
    return {
        "cached_compile": cached_compile,
        "whole_compile": whole_compile,
        "difference": float(difference),
        "cached": statistics.median(fast for fast, _ in seconds),
        "whole": statistics.median(slow for _, slow in seconds),
        "ratio": statistics.median(ratios),
        "ratio_least": ratios[0],
        "ratio_most": ratios[-1],
    }


def writing(session: Session, rows: int, rounds: int, rng: np.random.Generator) -> dict[str, float]:
    """Seconds to the first token of `rows` prompts, and tokens per second after it."""
    some = prompts(session, rows, rng)
    generation = GenerationConfig(max_new_tokens=NEW, min_new_tokens=NEW)
    metadata = session.sampling_metadata(some, generation, rows=rows, allowed=session.text_ids())
    keys = jax.random.split(jax.random.key(0), rows)

    def once() -> tuple[float, float]:
        """Seconds to the first token, and from there to the last."""
        began = time.perf_counter()
        prefill = session.prefill_batch(some, room=NEW)
        answers = text_decoding.start(
            session.model_config, session.params, prefill, keys, NEW, metadata
        )
        jax.block_until_ready(answers)
        first = time.perf_counter()
        answers = text_decoding.decode(
            session.model_config, session.params, answers, jnp.int32(NEW), metadata
        )
        jax.block_until_ready(answers)
        end = time.perf_counter()
        assert int(answers.count) == NEW
        return first - began, end - first

    with_compiling = once()
    runs = [once() for _ in range(rounds)]
    first = statistics.median(first for first, _ in runs)
    rest = statistics.median(rest for _, rest in runs)
    return {
        "first_token_s": first,
        "tokens_per_second": rows * (NEW - 1) / rest,
        "compile_s": sum(with_compiling) - first - rest,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="timings to take medians of (3)")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to this file")
    flags = parser.parse_args()
    c = config.load(["--config=configs/base.py:emu-60m", f"--config.model.resampler.tokens={N}"])
    model_config = emu.EmuConfig.of(c.model.to_dict())
    rng = np.random.default_rng(0)
    params = jax.jit(partial(module.init, emu.Emu, model_config))(jax.random.key(0))
    session = Session(
        model_config, params, Tokenizer(model_config.llama.vocab, list, str), context=2048
    )
    image = image_loop(session, flags.rounds, rng)
    results = {"image": image}
    for rows in (1, 8):
        results[f"text_{rows}"] = writing(session, rows, flags.rounds, rng)

    millions = sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6
    print(
        f"one image of {N} visual tokens after {PREFIX} tokens, "
        f"{millions:.0f}M parameters, {model_config.compute}"
    )
    for key, what in (("cached", "with a cache"), ("whole", "full prefix")):
        first_call = image[f"{key}_compile"]
        print(f"  {what:12}{image[key]:13.3f} s   (first call, with compiling {first_call:.1f} s)")
    print(
        f"  ratio       {image['ratio']:13.1f}     "
        f"({image['ratio_least']:.1f} to {image['ratio_most']:.1f}); "
        f"largest difference {image['difference']:.1e}"
    )
    for rows in (1, 8):
        text = results[f"text_{rows}"]
        print(
            f"text, batch {rows}: first token after {text['first_token_s']:.3f} s, "
            f"then {text['tokens_per_second']:.1f} tokens a second "
            f"(compiling {text['compile_s']:.1f} s)"
        )
    if flags.json:
        Path(flags.json).write_text(json.dumps(results, indent=1) + "\n")
    if image["ratio"] < WANTED or image["difference"] > 1e-3:
        message = f"the cache must be {WANTED} times as fast, and give the same image"
        print(f"FAILED: {message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
