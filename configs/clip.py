"""A CLIP that scores images against texts. Nothing here trains.

python -m emu_jax.weights import --family=clip takes its sizes from the files.
"""

from ml_collections import ConfigDict

from configs.base import get_config as base


def get_config(size: str = "emu-14b"):
    c = base(size)
    # CLIP ViT-L/14 (arXiv 2103.00020), for CLIP scores.
    c.model.clip = clip()
    return c


def clip() -> ConfigDict:
    """The sizes of CLIP ViT-L/14."""
    return ConfigDict(
        dict(
            # Width of the features that both towers map to.
            features=768,
            # Side of the input image, in pixels.
            image=224,
            # Side of a patch, in pixels.
            patch=14,
            # Size of the vocabulary.
            vocab=49408,
            # The most tokens of a text.
            context=77,
            # Id of the token at which a text's features are read. 2, as in the config.json of the
            # first releases, means the token with the largest id.
            eos=49407,
            # Text tower.
            text=dict(
                # Width of the hidden states.
                width=768,
                # Number of transformer blocks.
                depth=12,
                # Attention heads.
                heads=12,
                # Hidden width of the feed-forward layers.
                ffn=3072,
                # Epsilon of the layer norms.
                eps=1e-5,
                # Activation: "quick_gelu" (OpenAI's) or "gelu".
                activation="quick_gelu",
            ),
            # Vision tower.
            vision=dict(
                # Width of the hidden states.
                width=1024,
                # Number of transformer blocks.
                depth=24,
                # Attention heads.
                heads=16,
                # Hidden width of the feed-forward layers.
                ffn=4096,
                # Epsilon of the layer norms.
                eps=1e-5,
                # Activation: "quick_gelu" (OpenAI's) or "gelu".
                activation="quick_gelu",
            ),
        )
    )
