"""Modules and plain trees: outside this package a model is a nested dict of parameters.

`init` makes the parameters, `abstract` only their shapes, and `bind` turns parameters back into a
module inside a jitted function. LoRA and quantized storage (lora.py) are added and resolved here,
so that modules need no code for them. Read next: layers.py.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, TypeVar

import jax
from flax import nnx
from jaxtyping import Array

from emu_jax.models import layers, lora
from emu_jax.models.lora import LoraConfig

M = TypeVar("M", bound=nnx.Module)


def init(module: Callable[..., nnx.Module], config: Any, key: Array) -> dict:
    """Make fresh parameters of `module(config, rngs)`, including LoRA's, as a nested dict."""
    made = module(config, layers.Rngs(key))
    return lora.init(_lora(config), nnx.to_pure_dict(nnx.state(made)), _inputs(made), key)


def abstract(module: Callable[..., nnx.Module], config: Any) -> dict:
    """Return the shapes and dtypes of the parameters that `init` makes; allocate nothing."""
    made = _abstract(module, config)
    add_lora = partial(lora.init, _lora(config), inputs=_inputs(made))
    return jax.eval_shape(add_lora, nnx.to_pure_dict(nnx.state(made)), key=jax.random.key(0))


def bind(module: type[M], config: Any, params: dict, key: Array | None = None) -> M:
    """Make the module whose parameters are `params`, for use inside a jitted function.

    key: random key of LoRA's dropout, which is off if this is None.
    """
    return nnx.merge(_graphdef(module, config), lora.apply(_lora(config), params, key))


# Cached, since this takes a second or two for a large model and every trace needs the result.
@cache
def _abstract(module: Callable[..., nnx.Module], config: Any) -> nnx.Module:
    return jax.eval_shape(lambda key: module(config, layers.AbstractRngs(key)), jax.random.key(0))


@cache
def _graphdef(module: Callable[..., nnx.Module], config: Any) -> nnx.GraphDef:
    return nnx.graphdef(_abstract(module, config))


def _inputs(made: nnx.Module) -> dict[str, int]:
    """Map the path of each matrix of a block to the number of its axes that are summed over.

    LoRA's factor a has these axes, and its factor b has the others.
    """
    inputs = {}
    for path, part in nnx.iter_modules(made):
        name = "/".join(map(str, path))
        if isinstance(part, layers.Linear) and "/blocks/" in f"{name}/":
            inputs[f"{name}/w"] = part.inputs
    return inputs


def _lora(config: Any) -> LoraConfig | None:
    """The LoRA of a config with an Emu; None for other configs, such as a U-Net's."""
    return getattr(config, "lora", None)
