"""The optimizer: AdamW with a learning rate and a weight decay for every parameter.

Both are rules over parameter paths (section 3.2 of the paper). A parameter's learning rate at a
step is its peak (rules.peak_lr) times the schedule's share of the peak. Read next: step.py.
"""

from functools import lru_cache
from itertools import pairwise

import jax
import optax
from flax.core import FrozenDict
from ml_collections import ConfigDict, FrozenConfigDict

from emu_jax.config import UserError
from emu_jax.tree import Tree

SCHEDULES = ("cosine", "linear", "constant", "stepped")


def schedule(c: ConfigDict) -> optax.Schedule:
    """The learning rate by step, as a share of its peak: linear warm-up, then optim.schedule.

    c: config.optim. Raises UserError for invalid settings.
    """
    warmup = round(c.warmup * c.steps)
    if c.schedule not in SCHEDULES:
        raise UserError(f"optim.schedule={c.schedule!r} is not one of {', '.join(SCHEDULES)}")
    if not 0 <= c.warmup <= 1 or c.steps < 1:
        raise UserError(
            f"optim.warmup={c.warmup} must be a share of the steps, 0 to 1, and "
            f"optim.steps={c.steps} at least 1"
        )
    if c.schedule == "stepped" and not _is_rising(warmup, c.boundaries):
        raise UserError(
            f"optim.boundaries={c.boundaries!r} must be (step, share of the peak) pairs, steps "
            f"rising from the warm-up's end, {warmup}"
        )
    rise = optax.linear_schedule(0.0, 1.0, max(warmup, 1))
    return optax.join_schedules([rise, _after_warmup(c, warmup)], [warmup])


def _after_warmup(c: ConfigDict, warmup: int) -> optax.Schedule:
    steps = max(c.steps - warmup, 1)
    if c.schedule == "cosine":
        return optax.cosine_decay_schedule(1.0, steps, alpha=c.final)
    if c.schedule == "linear":
        return optax.linear_schedule(1.0, c.final, steps)
    if c.schedule == "constant":
        return optax.constant_schedule(1.0)
    shares = [1.0, *(share for _, share in c.boundaries)]
    levels = [optax.constant_schedule(share) for share in shares]
    return optax.join_schedules(levels, [step - warmup for step, _ in c.boundaries])


def _is_rising(first: int, boundaries: tuple) -> bool:
    try:
        steps = [first, *(step for step, _ in boundaries)]
    except (TypeError, ValueError):
        return False
    return all(a < b for a, b in pairwise(steps))


def make_optimizer(c: ConfigDict, peak_lr: Tree, decay: Tree) -> optax.GradientTransformation:
    """AdamW of `config.optim`. peak_lr, decay: a number for each parameter that trains.

    Equal arguments give the same object, so that programs that hold it compare equal.
    """
    return _make_optimizer(FrozenConfigDict(c), FrozenDict(peak_lr), FrozenDict(decay))


@lru_cache(maxsize=64)
def _make_optimizer(
    c: FrozenConfigDict, peak_lr: FrozenDict, decay: FrozenDict
) -> optax.GradientTransformation:
    peaks = peak_lr.unfreeze()
    decays = decay.unfreeze()

    def add_decay(updates, params):
        return jax.tree.map(
            lambda update, param, share: update + share * param if share else update,
            updates,
            params,
            decays,
        )

    def scale_by_peak(updates, _params):
        return jax.tree.map(lambda update, peak: -peak * update, updates, peaks)

    return optax.chain(
        optax.clip_by_global_norm(c.clip) if c.clip else optax.identity(),
        optax.scale_by_adam(b1=c.b1, b2=c.b2, eps=c.eps),
        optax.stateless(add_decay),
        optax.scale_by_schedule(schedule(c)),
        optax.stateless(scale_by_peak),
    )
