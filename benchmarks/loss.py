"""Benchmark of the fused loss against the plain one: memory, time and communication.

    python -m benchmarks.loss [--json=FILE]

Computes value and gradient at T = 2048 and V = 32006 in float32 on this machine's CPU. Then it
compiles the fused loss for meshes of 8 fake devices, and reads the collectives in its loop from the
HLO. The exit status is 1 if a bound is violated. Run from the repository's root. Results:
benchmarks/results/loss.md.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from emu_jax import hlo, losses, sharding

# Tokens per row, size of the vocabulary, added tokens, and visual tokens per row (8 images of 32).
T = 2048
V = 32000
ADDED = 6
K = 256
# Tokens per chunk of the fused loss.
CHUNK = 256
# Width of the model -> number of pairs of timings.
ROUNDS = {512: 9, 2048: 5}
# Meshes: sizes of the axes data, fsdp and tensor.
MESHES = ((1, 4, 2), (2, 2, 2), (1, 2, 4), (1, 8, 1))
# Bounds on the ratios fused / plain of memory and time, and on the largest difference.
BOUNDS = {"memory_ratio": 1 / 8, "time_ratio": 1.1, "difference": 1e-4}


def shapes(B, D):
    """Shapes of the arguments of `fused`: (trained, given)."""

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    trained = array(B, T, D), {"base": array(V, D), "added": array(ADDED, D)}, {"w": array(D, D)}
    given = (
        array(B, T, dtype=jnp.int32),
        array(B, T),
        array(B, K, dtype=jnp.int32),
        array(B, K, D),
        array(B, K),
        array(),
        array(),
    )
    return trained, given


def fused(trained, given):
    return losses.fused(*trained, *given, chunk=CHUNK)[0]


def plain(trained, given):
    """The loss from all logits at once, in float32, with one table of V + n rows."""
    hidden, table, regress = trained
    labels, label_weights, predictors, targets, target_weights, text_scale, image_scale = given
    logits = jnp.einsum("BTD,VD->BTV", hidden, table)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]
    at = jnp.take_along_axis(hidden, predictors[..., None], 1)
    error = jnp.square(jnp.einsum("BKD,DE->BKE", at, regress["w"]) - targets).mean(-1)
    return text_scale * (label_weights * nll).sum() + image_scale * (target_weights * error).sum()


def one_table(trained):
    """Convert the arguments of `fused` to those of `plain`."""
    hidden, head, regress = trained
    return hidden, jnp.concatenate([head["base"], head["added"]]), regress


def fill(shapes, D):
    """Random arguments of these shapes."""
    rng = np.random.default_rng(0)
    trained, given = jax.tree.map(
        lambda x: rng.standard_normal(x.shape, np.float32) if x.dtype == jnp.float32 else x, shapes
    )
    trained = trained[0], *jax.tree.map(lambda w: w / D**0.5, trained[1:])
    labels, _, predictors, targets, *_ = given
    given = (
        rng.integers(0, V + ADDED, labels.shape, np.int32),
        np.ones(labels.shape, np.float32),
        rng.integers(0, T, predictors.shape, np.int32),
        targets,
        np.ones(predictors.shape, np.float32),
        np.float32(1 / T),
        np.float32(1 / K),
    )
    return jax.device_put((trained, given))


def seconds(function, arguments):
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def race(D):
    """A row of the table: memory of temporaries without one V x D gradient, and seconds."""
    trained, given = fill(shapes(1, D), D)
    arguments = {"plain": (one_table(trained), given), "fused": (trained, given)}
    buffer = (V + ADDED) * D * 4
    compiled = {}
    temporaries = {}
    for name, function in (("plain", plain), ("fused", fused)):
        gradient = jax.jit(jax.value_and_grad(function))
        compiled[name] = gradient.lower(*arguments[name]).compile()
        stats = compiled[name].memory_analysis()
        assert stats
        temporaries[name] = (stats.temp_size_in_bytes - buffer) / 2**20

    # These calls also warm up both functions.
    results = {name: c(*arguments[name]) for name, c in compiled.items()}
    value, gradient = results["fused"]
    pairs = zip(
        jax.tree.leaves((value, one_table(gradient))),
        jax.tree.leaves(results["plain"]),
        strict=True,
    )
    difference = max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)
    del results, value, gradient, pairs

    times = {"plain": [], "fused": []}
    for turn in range(ROUNDS[D]):
        # The two alternate in which one comes first.
        for name in sorted(times, reverse=turn % 2 == 0):
            times[name].append(seconds(compiled[name], arguments[name]))
    ratios = np.array(times["fused"]) / np.array(times["plain"])
    return {
        "D": D,
        "plain_mib": temporaries["plain"],
        "fused_mib": temporaries["fused"],
        "memory_ratio": temporaries["fused"] / temporaries["plain"],
        "plain_s": float(np.median(times["plain"])),
        "fused_s": float(np.median(times["fused"])),
        "time_ratio": float(np.median(ratios)),
        "time_ratio_min": float(ratios.min()),
        "time_ratio_max": float(ratios.max()),
        "difference": difference,
    }


def on_mesh(sizes, D=512):
    """A row of the table: collectives in the compiled loop, and those over other axes too."""
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)))
    trained, given = shapes(8, D)
    row = P(sharding.ROWS)
    specs = (row, losses.HEAD_SPECS, losses.REGRESS_SPECS), (row, row, row, row, row, P(), P())
    placed = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
        (trained, given),
        specs,
    )
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.value_and_grad(fused)).lower(*placed).compile()
    text = compiled.as_text()
    assert text
    found = hlo.Module(text).collectives()
    inside = [c for c in found if c.in_loop]
    tensor = np.arange(mesh.size).reshape(-1, sizes[2]).tolist()
    strangers = [c for c in inside if sorted(map(list, c.groups)) != tensor]
    return {
        "mesh": list(sizes),
        "inside": len(inside),
        "inside_not_tensor": len(strangers),
        "outside": len(found) - len(inside),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="also write the tables to this file")
    flags = parser.parse_args()
    print(
        f"T {T}, V {V + ADDED}, B 1, K {K}, chunk {CHUNK}, float32, "
        f"jax {jax.__version__}, {os.cpu_count()} cores"
    )
    print(
        "temporaries are beyond one V x D float32 gradient; "
        "times are medians, plain and fused taking turns"
    )

    print(
        "\n| mesh (data, fsdp, tensor) | collectives in the loop | not over tensor alone "
        "| outside |"
    )
    print("|---" * 4 + "|")
    meshes = []
    for sizes in MESHES:
        found = on_mesh(sizes)
        meshes.append(found)
        columns = ("mesh", "inside", "inside_not_tensor", "outside")
        print("| " + " | ".join(str(found[name]) for name in columns) + " |", flush=True)

    print(
        "\n| D | plain MiB | fused MiB | ratio | plain s | fused s | ratio (least to most) "
        "| largest difference |"
    )
    print("|---" * 8 + "|")
    races = []
    for D in ROUNDS:
        found = race(D)
        races.append(found)
        print(race_row(found), flush=True)

    violated = violations(meshes, races)
    if flags.json:
        tables = {"meshes": meshes, "races": races, "violated": violated}
        Path(flags.json).write_text(json.dumps(tables, indent=1) + "\n")
    print("\n" + ("\n".join(violated) or "every bound holds"))
    sys.exit(1 if violated else 0)


def race_row(found):
    times = "{time_ratio:.2f} ({time_ratio_min:.2f} to {time_ratio_max:.2f})".format(**found)
    columns = (
        f"{found['D']}",
        f"{found['plain_mib']:.0f}",
        f"{found['fused_mib']:.0f}",
        f"{found['memory_ratio']:.3f}",
        f"{found['plain_s']:.2f}",
        f"{found['fused_s']:.2f}",
        times,
        f"{found['difference']:.0e}",
    )
    return "| " + " | ".join(columns) + " |"


def violations(meshes, races):
    """Messages for the bounds that the rows violate."""
    found = []
    for row in meshes:
        splits_tensor = row["mesh"][2] > 1
        if row["inside_not_tensor"] or (row["inside"] > 0) != splits_tensor:
            found.append(
                f"mesh {row['mesh']}: a collective in the loop is not over tensor, "
                "or one is missing"
            )
    for row in races:
        for name, bound in BOUNDS.items():
            # Written with `not`, so that NaN violates a bound too.
            if not row[name] <= bound:
                found.append(f"D {row['D']}: {name} is {row[name]:.3g}, over {bound:.3g}")
    return found


if __name__ == "__main__":
    main()
