"""The families by the name that --family gives them, the most telling first: an Emu holds an
EVA-CLIP.
"""

import re
from collections.abc import Iterable

from emu_jax.weights import clip, emu1, eva_clip, inception, llama, peft, stable_diffusion, t5
from emu_jax.weights.family import Family

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        emu1.FAMILY,
        llama.FAMILY,
        peft.FAMILY,
        t5.FAMILY,
        eva_clip.FAMILY,
        stable_diffusion.FAMILY,
        inception.FAMILY,
        clip.FAMILY,
    )
}


def guess(names: Iterable[str]) -> Family | None:
    """The family that these names look like."""
    return next(
        (
            family
            for family in FAMILIES.values()
            if any(re.fullmatch(family.signature, name) for name in names)
        ),
        None,
    )
