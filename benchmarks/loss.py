"""The fused objective against the plain one: memory, time and communication.

    python -m benchmarks.loss [--json=FILE]

Value and gradient at T 2048 and V 32006, float32, on this machine's CPU. Then the fused one is
compiled for meshes of 8 fake devices, and the collectives in its loop are read from the HLO. Exits
1 if a bound is violated. Run from the repository's root. Results: benchmarks/results/loss.md.
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

# K: 8 images of 32 visual tokens
T = 2048
V = 32000
ADDED = 6
K = 256
CHUNK = 256
# D -> pairs of timings
ROUNDS = {512: 9, 2048: 5}
# data, fsdp, tensor
MESHES = ((1, 4, 2), (2, 2, 2), (1, 2, 4), (1, 8, 1))
# the bounds
SHARE = 1 / 8
SLOWER = 1.1
DIFFERENCE = 1e-4


def shapes(B, D):
    """The arguments of `fused` as shapes: (what learns, what is given)."""

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    learnt = array(B, T, D), {"base": array(V, D), "added": array(ADDED, D)}, {"w": array(D, D)}
    given = (
        array(B, T, dtype=jnp.int32),
        array(B, T),
        array(B, K, dtype=jnp.int32),
        array(B, K, D),
        array(B, K),
        array(),
        array(),
    )
    return learnt, given


def fused(learnt, given):
    return losses.fused(*learnt, *given, chunk=CHUNK)[0]


def plain(learnt, given):
    """With one table of V + n rows, as one would write it without added rows; all logits in
    float32.
    """
    hidden, table, regress = learnt
    labels, label_weights, predictors, targets, target_weights, text_scale, image_scale = given
    logits = jnp.einsum("BTD,VD->BTV", hidden, table)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]
    at = jnp.take_along_axis(hidden, predictors[..., None], 1)
    error = jnp.square(jnp.einsum("BKD,DE->BKE", at, regress["w"]) - targets).mean(-1)
    return text_scale * (label_weights * nll).sum() + image_scale * (target_weights * error).sum()


def one_table(learnt):
    hidden, head, regress = learnt
    return hidden, jnp.concatenate([head["base"], head["added"]]), regress


def fill(shapes, D):
    rng = np.random.default_rng(0)
    learnt, given = jax.tree.map(
        lambda x: rng.standard_normal(x.shape, np.float32) if x.dtype == jnp.float32 else x, shapes
    )
    learnt = learnt[0], *jax.tree.map(lambda w: w / D**0.5, learnt[1:])
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
    return jax.device_put((learnt, given))


def seconds(function, arguments):
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def race(D):
    """One row of the table: temporaries (MiB) beyond a float32 gradient of V x D, and seconds, of
    both.
    """
    learnt, given = fill(shapes(1, D), D)
    arguments = {"plain": (one_table(learnt), given), "fused": (learnt, given)}
    compiled = {
        name: jax.jit(jax.value_and_grad(function)).lower(*arguments[name]).compile()
        for name, function in (("plain", plain), ("fused", fused))
    }
    buffer = (V + ADDED) * D * 4
    temporaries = {
        name: (c.memory_analysis().temp_size_in_bytes - buffer) / 2**20
        for name, c in compiled.items()
    }

    # which also warms them up
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
        # taking turns to be first
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
    """One row of the table: how many collectives the compiled loop holds, and how many of them are
    not over tensor alone.
    """
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)))
    learnt, given = shapes(8, D)
    row = P(sharding.ROWS)
    specs = (row, losses.HEAD_SPECS, losses.REGRESS_SPECS), (row, row, row, row, row, P(), P())
    placed = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
        (learnt, given),
        specs,
    )
    with jax.set_mesh(mesh):
        found = hlo.Module(
            jax.jit(jax.value_and_grad(fused)).lower(*placed).compile().as_text()
        ).collectives()
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
    parser.add_argument("--json", metavar="FILE", help="write the tables there as well")
    flags = parser.parse_args()
    print(
        f"T {T}, V {V + ADDED}, B 1, K {K}, chunk {CHUNK}, float32, jax {jax.__version__}, {os.cpu_count()} cores"
    )
    print(
        "temporaries are beyond one V x D float32 gradient; times are medians, plain and fused taking turns\n"
    )

    meshes = []
    print(
        "| mesh (data, fsdp, tensor) | collectives in the loop | not over tensor alone | outside |\n|---|---|---|---|"
    )
    for sizes in MESHES:
        meshes.append(on_mesh(sizes))
        print(
            "| {mesh} | {inside} | {inside_not_tensor} | {outside} |".format(**meshes[-1]),
            flush=True,
        )

    races = []
    print(
        "\n| D | plain MiB | fused MiB | ratio | plain s | fused s | ratio (least to most) | largest difference |\n"
        + "|---" * 8
        + "|"
    )
    for D in ROUNDS:
        races.append(race(D))
        print(
            "| {D} | {plain_mib:.0f} | {fused_mib:.0f} | {memory_ratio:.3f} | {plain_s:.2f} | {fused_s:.2f} | "
            "{time_ratio:.2f} ({time_ratio_min:.2f} to {time_ratio_max:.2f}) | {difference:.0e} |".format(
                **races[-1]
            ),
            flush=True,
        )

    violated = [
        f"mesh {m['mesh']}: a collective in the loop is not over tensor, or one is missing"
        for m in meshes
        if m["inside_not_tensor"] or (m["inside"] > 0) != (m["mesh"][2] > 1)
    ]
    bounds = {"memory_ratio": SHARE, "time_ratio": SLOWER, "difference": DIFFERENCE}
    violated += [
        f"D {r['D']}: {name} is {r[name]:.3g}, over {bound:.3g}"
        for r in races
        for name, bound in bounds.items()
        if not r[name] <= bound
    ]
    if flags.json:
        Path(flags.json).write_text(
            json.dumps({"meshes": meshes, "races": races, "violated": violated}, indent=1) + "\n"
        )
    print("\n" + ("\n".join(violated) or "every bound holds"))
    sys.exit(1 if violated else 0)


if __name__ == "__main__":
    main()
