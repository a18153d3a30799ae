"""Search for what fits: changes to a config that save memory, and its largest batch.

Read next: compile.py, which compiles each candidate.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from emu_jax import config, sharding
from emu_jax.config import UserError
from emu_jax.fit.compile import Attempt, attempt
from emu_jax.fit.report import remat_policies
from emu_jax.hardware import Accelerator
from emu_jax.plan import batch_shards, make_plan

# The most compilations of a search.
COMPILATIONS = 8
# Remat policies, from the least memory to the most.
POLICIES = ("full", "dots", "none")
# The most changes to try on a config that does not fit.
TRIES = 4


def changes(c: ConfigDict, mesh: jax.sharding.Mesh) -> Iterator[dict[str, Any]]:
    """Changes {field: value} that save memory, cheapest first; each includes the earlier ones."""
    steps: list[dict[str, Any]] = []
    # Costs one more forward pass.
    recompute = {field: "full" for field, policy in remat_policies(c).items() if policy != "full"}
    if recompute:
        steps.append(recompute)
    # Makes matrix products smaller, and so less efficient.
    rows = c.data.batch // batch_shards(mesh)
    finer = [n for n in range(c.optim.accumulate + 1, rows + 1) if rows % n == 0]
    for n in dict.fromkeys((*finer[:1], *finer[-1:])):
        steps.append({"optim.accumulate": n})
    if c.objective.chunk >= 256:
        steps.append({"objective.chunk": c.objective.chunk // 2})
    # Changes which documents fit into a row.
    if c.data.images > 1:
        steps.append({"data.images": c.data.images // 2})
    # Changes the training recipe.
    if rows % 2 == 0:
        steps.append({"data.batch": c.data.batch // 2, "optim.accumulate": rows // 2})
    change: dict[str, Any] = {}
    for step in steps[:TRIES]:
        change = change | step
        yield change


def with_change(c: ConfigDict, change: dict[str, Any]) -> ConfigDict:
    """A copy of `c` with {"a.b": value} set in it."""
    c = copy.deepcopy(c)
    for key, value in change.items():
        *parents, name = key.split(".")
        node = c
        for parent in parents:
            node = node[parent]
        node[name] = value
    return c


def search_batch(
    c: ConfigDict, accelerator: Accelerator | None, devices: list[jax.Device]
) -> dict[str, Any]:
    """Find the largest batch that fits under each remat policy, and print each attempt."""
    if accelerator is None:
        raise UserError(
            "a search needs a topology whose devices have a known memory, like v5e:16x16"
        )
    shards = batch_shards(sharding.make_mesh(c.mesh.to_dict(), devices))

    def measure(policy: str, rows: int) -> int | None:
        change: dict[str, Any] = dict.fromkeys(remat_policies(c), policy)
        change |= {"data.batch": rows * shards, "optim.accumulate": 1}
        tried: Attempt = attempt(make_plan(with_change(c, change), devices), accelerator)
        print(f"remat {policy:5} {rows:3} rows per device: {tried}", flush=True)
        return tried.peak if tried.fits else None

    best = largest_batches(measure, accelerator.memory, COMPILATIONS)
    for policy, rows in best.items():
        if rows:
            print(f"remat {policy}: {rows} rows per device fit, data.batch={rows * shards}")
        else:
            print(f"remat {policy}: nothing fits")
    return {
        "config": config.to_dict(c),
        "fits": any(best.values()),
        "rows_a_device": best,
        "rows_of_the_mesh": shards,
    }


def largest_batches(
    measure: Callable[[str, int], int | None],
    limit: int,
    budget: int,
    policies: tuple[str, ...] = POLICIES,
) -> dict[str, int]:
    """{policy: the most rows per device that were found to fit, 0 for none}.

    measure(policy, rows) returns the peak in bytes, or None if it exceeds `limit`; it is called at
    most `budget` times. policies: from the least memory to the most. If nothing fits under a
    policy, the result has no entries for the policies after it.
    """
    best: dict[str, int] = {}
    for later, policy in zip(reversed(range(len(policies))), policies):
        peaks: dict[int, int] = {}
        refused = None
        rows = 1
        # Keep at least one compilation for each later policy.
        while rows and budget > later:
            budget -= 1
            peak = measure(policy, rows)
            if peak is None:
                refused = rows
            else:
                peaks[rows] = peak
            rows = _next_rows(peaks, refused, limit)
        best[policy] = max(peaks, default=0)
        if not peaks:
            break
    return best


def _next_rows(peaks: dict[int, int], refused: int | None, limit: int) -> int | None:
    """The number of rows to try next; None if the answer is known.

    Memory grows nearly linearly with rows, so the last two peaks predict how many fit.
    """
    most = max(peaks, default=0)
    if not peaks or refused == most + 1:
        return None
    if len(peaks) == 1:
        guess = 2 * most
    else:
        (a, low), (b, high) = sorted(peaks.items())[-2:]
        guess = b + int((limit - high) * (b - a) / max(high - low, 1))
    if refused is not None:
        guess = min(guess, refused - 1)
    return guess if guess > most else None
