"""Small CLIPs for the tests, in folders as the transformers library has them."""

import json

import numpy as np
from tokenizers import pre_tokenizers

from emu_jax import tree
from emu_jax.weights import clip, convert, files

# As the first releases say it, whose </s> is no token of theirs; and with another activation, other
# heads and the true </s>.
CLIP1 = dict(
    projection_dim=12,
    text_config=dict(
        vocab_size=519,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=20,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
        eos_token_id=2,
        projection_dim=12,
    ),
    vision_config=dict(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=32,
        image_size=16,
        patch_size=4,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
        projection_dim=12,
    ),
)
CLIP2 = CLIP1 | dict(
    text_config=CLIP1["text_config"]
    | dict(eos_token_id=518, hidden_act="gelu", num_attention_heads=4),
    vision_config=CLIP1["vision_config"] | dict(hidden_act="gelu", layer_norm_eps=1e-3),
)


MERGES = (("t", "h"), ("th", "e</w>"), ("d", "o"), ("do", "g</w>"), ("a", "t</w>"))


def folder(path, said=CLIP1, dtype=np.float32, seed=0):
    """A folder as the transformers library has a CLIPModel, with OpenAI's files of a tokenizer;
    {name: array}.
    """
    text = said["text_config"]
    vision = said["vision_config"]

    def tower(of):
        return dict(
            width=of["hidden_size"],
            depth=of["num_hidden_layers"],
            heads=of["num_attention_heads"],
            ffn=of["intermediate_size"],
            eps=of["layer_norm_eps"],
            activation=of["hidden_act"],
        )

    size = clip.make_config(
        {
            "clip": dict(
                features=said["projection_dim"],
                image=vision["image_size"],
                patch=vision["patch_size"],
                vocab=text["vocab_size"],
                context=text["max_position_embeddings"],
                eos=text["eos_token_id"],
                text=tower(text),
                vision=tower(vision),
            )
        }
    )
    rng = np.random.default_rng(seed)
    ours = {
        leaf: np.asarray(0.3 * rng.standard_normal(shape), np.float32)
        for leaf, shape in clip.shapes(size).items()
    }
    arrays = {
        name: array.astype(dtype)
        for name, array in convert.to_theirs(clip.table(size), convert.reader(tree.unflatten(ours)))
    }
    path.mkdir()
    files.write(
        path,
        "model",
        {name: (array.shape, array.dtype) for name, array in arrays.items()},
        iter(arrays.items()),
    )
    (path / "config.json").write_text(json.dumps(said | {"model_type": "clip"}))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        *map("".join, MERGES),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    (path / "vocab.json").write_text(
        json.dumps({piece: number for number, piece in enumerate(pieces)})
    )
    (path / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MERGES))
    return arrays
