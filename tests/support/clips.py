"""Small CLIPs for the tests, in folders in the format of transformers."""

import json
from typing import Any

import numpy as np
from tokenizers import pre_tokenizers

from emu_jax import tree
from emu_jax.weights import clip, convert
from tests.support import foreign

TEXT: dict[str, Any] = dict(
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
)
VISION: dict[str, Any] = dict(
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=32,
    image_size=16,
    patch_size=4,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
    projection_dim=12,
)
# Like the first releases, whose eos_token_id is not the id of their </s>.
CLIP1: dict[str, Any] = dict(projection_dim=12, text_config=TEXT, vision_config=VISION)
# Another activation, other heads, and the right eos_token_id.
CLIP2: dict[str, Any] = dict(
    projection_dim=12,
    text_config=TEXT | dict(eos_token_id=518, hidden_act="gelu", num_attention_heads=4),
    vision_config=VISION | dict(hidden_act="gelu", layer_norm_eps=1e-3),
)

MERGES = (("t", "h"), ("th", "e</w>"), ("d", "o"), ("do", "g</w>"), ("a", "t</w>"))


def folder(path, fields=CLIP1, dtype=np.float32, seed=0):
    """Write a CLIPModel in transformers' format, with the files of OpenAI's tokenizer.

    fields: the content of its config.json. Returns {name: array} of its tensors.
    """
    model_config = clip.make_config({"clip": _config(fields)})
    rng = np.random.default_rng(seed)
    ours = {
        leaf: np.asarray(0.3 * rng.standard_normal(shape), np.float32)
        for leaf, shape in clip.shapes(model_config).items()
    }
    reader = convert.reader(tree.unflatten(ours))
    theirs = convert.to_theirs(clip.table(model_config), reader)
    arrays = {name: array.astype(dtype) for name, array in theirs}
    path.mkdir()
    foreign.write(path, arrays)
    (path / "config.json").write_text(json.dumps(fields | {"model_type": "clip"}))
    _write_tokenizer(path)
    return arrays


def _config(fields):
    """config.model.clip for a config.json."""
    text = fields["text_config"]
    vision = fields["vision_config"]
    return dict(
        features=fields["projection_dim"],
        image=vision["image_size"],
        patch=vision["patch_size"],
        vocab=text["vocab_size"],
        context=text["max_position_embeddings"],
        eos=text["eos_token_id"],
        text=_tower(text),
        vision=_tower(vision),
    )


def _tower(fields):
    return dict(
        width=fields["hidden_size"],
        depth=fields["num_hidden_layers"],
        heads=fields["num_attention_heads"],
        ffn=fields["intermediate_size"],
        eps=fields["layer_norm_eps"],
        activation=fields["hidden_act"],
    )


def _write_tokenizer(path):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        *map("".join, MERGES),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = "".join(f"{left} {right}\n" for left, right in MERGES)
    (path / "vocab.json").write_text(json.dumps(vocabulary))
    (path / "merges.txt").write_text(f"#version: 0.2\n{merges}")
