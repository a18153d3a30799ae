"""The families of foreign checkpoints, by the values of --family."""

import re
from collections.abc import Iterable

from emu_jax.weights import clip, emu1, eva_clip, inception, llama, peft, stable_diffusion, t5
from emu_jax.weights.family import Family

# The order matters: an Emu also contains an EVA-CLIP, so the more specific signature is first.
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
    """Guess the family from tensor names; None if no signature matches."""
    names = list(names)
    for family in FAMILIES.values():
        if any(re.fullmatch(family.signature, name) for name in names):
            return family
    return None
