"""A CLIP that scores pictures: python -m emu_jax.weights import --family=clip, whose files say the
sizes. Nothing here trains.
"""

from ml_collections import ConfigDict

from configs.base import get_config as base


def get_config(size: str = "emu-14b"):
    c = base(size)
    tower = dict(eps=1e-5, activation="quick_gelu")
    # ViT-L/14's
    c.model.clip = ConfigDict(
        dict(
            features=768,
            image=224,
            patch=14,
            vocab=49408,
            context=77,
            # 2: the largest id of a text, whatever its number (config.json of the first releases)
            eos=49407,
            text=dict(width=768, depth=12, heads=12, ffn=3072, **tower),
            vision=dict(width=1024, depth=24, heads=16, ffn=4096, **tower),
        )
    )
    return c
