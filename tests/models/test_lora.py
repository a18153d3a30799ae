"""Laws of LoRA, and of matrices stored in few bits.

A fresh adapter changes nothing. A trained one has the outputs and the gradients of w + a b.
"""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emu_jax import sharding, tree
from emu_jax.config import UserError
from emu_jax.models import emu, layers, lora, module
from emu_jax.step import cast_frozen, init_state
from tests.support import make
from tests.support.trees import assert_close

ROWS = "rules.train=(('.*/(a|b)', True), ('llama/(embed|lm_head)/added', (4, 6)), ('.*', False))"
TUNED = (
    "model.llama.added=6",
    "model.lora.rank=3",
    "model.lora.alpha=6.0",
    "rules.peak_lr=(('.*', 1e-2),)",
    "optim.warmup=0.0",
)
C = make.cfg(*TUNED, "model.lora.dropout=0.0", ROWS)
P = make.program(C)
# The same model without LoRA.
PLAIN = make.program(make.cfg("model.llama.added=6"))
PARAMS = jax.device_get(make.random_params(P))
X = jax.device_put(np.random.default_rng(1).standard_normal((4, 12, 32)).astype(np.float32))
AT = jax.device_put(np.tile(np.arange(12), (4, 1)))


def plain(params):
    """Parameters of PLAIN, in which a b is merged into w."""
    flat = dict(tree.leaves(params))
    for path in [path for path in flat if path.endswith("/a")]:
        where = path.removesuffix("/a")
        w, a, b = (flat.pop(f"{where}/{name}") for name in "wab")
        flat[f"{where}/w"] = np.stack(
            [lora.merge(P.model_config.lora, *layer) for layer in zip(w, a, b)]
        )
    return tree.unflatten(flat)


def without_b(params):
    return jax.tree.map_with_path(lambda at, x: 0 * x if at[-1].key == "b" else x, params)


@functools.cache
def compiled(config):
    """A jitted function (parameters, dropout key) -> (hidden states over X, gradients).

    The gradients are those of the product of hidden states and X by attention's matrices: by a and
    b with LoRA, by w without it.
    """

    def loss(trains, frozen, key):
        hidden = module.bind(emu.Emu, config, tree.merge(trains, frozen), key).llama(
            X, AT, jnp.ones_like(AT)
        )[0]
        return (hidden * X).sum(), hidden

    def both(params, key):
        trains = {
            path: bool(
                re.fullmatch("llama/blocks/attn/./" + ("[ab]" if config.lora.rank else "w"), path)
            )
            for path, _ in tree.leaves(params)
        }
        grads, hidden = jax.grad(loss, has_aux=True)(
            *tree.split(params, tree.unflatten(trains)), key
        )
        return hidden, grads["llama"]["blocks"]["attn"]

    return jax.jit(both)


def hidden(program, params, key=None):
    return compiled(program.model_config)(params, key)[0]


@pytest.mark.parametrize(
    ("equation", "down", "up"),
    [
        ("btD,Dhd->bthd", "btD,DR->btR", "btR,Rhd->bthd"),
        ("bthd,hdD->btD", "bthd,hdR->btR", "btR,RD->btD"),
        ("btf,fD->btD", "btf,fR->btR", "btR,RD->btD"),
    ],
)
def test_the_two_products(equation, down, up):
    assert lora.equations(equation) == (down, up)


def test_its_leaves_are_beside_the_targets_and_start_as_nothing():
    fresh, without = jax.device_get(
        jax.jit(lambda: tuple(make.params(program)["llama"] for program in (P, PLAIN)))()
    )
    fresh = dict(make.flat(fresh))
    without = dict(make.flat(without))
    added = fresh.keys() - without.keys()
    assert added == {f"blocks/attn/{name}/{half}" for name in "qkvo" for half in "ab"}
    # LoRA does not change the initial values of other parameters.
    chex.assert_trees_all_equal({path: fresh[path] for path in without}, without)
    assert fresh["blocks/attn/q/a"].shape == (2, 32, 3) and fresh["blocks/attn/q/b"].shape == (
        2,
        3,
        4,
        8,
    )
    assert fresh["blocks/attn/o/a"].shape == (2, 4, 8, 3) and fresh["blocks/attn/o/b"].shape == (
        2,
        3,
        32,
    )
    assert all(
        (leaf == 0).all() == path.endswith("/b") for path, leaf in fresh.items() if path in added
    )
    reach = 32**-0.5
    assert 0.9 * reach < np.abs(fresh["blocks/attn/q/a"]).max() < reach
    nothing = without_b(PARAMS)
    np.testing.assert_array_equal(hidden(P, nothing), hidden(PLAIN, plain(nothing)))


def test_wrapped_equals_baked():
    """Outputs are equal, and the chain rule turns the merged matrix's gradient into a's."""
    (ours, grads) = compiled(P.model_config)(PARAMS, None)
    (theirs, merged) = compiled(PLAIN.model_config)(plain(PARAMS), None)
    assert_close(ours, theirs, 2e-5)
    assert np.abs(ours - hidden(P, without_b(PARAMS))).max() > 0.01
    for name, by_chain in (("q", "LDhd,Lrhd->LDr"), ("o", "Lhde,Lre->Lhdr")):
        want = (
            6
            / 3
            * np.einsum(by_chain, merged[name]["w"], PARAMS["llama"]["blocks"]["attn"][name]["b"])
        )
        assert_close(grads[name]["a"], want, 1e-4)


def test_dropout_is_of_lora_alone_differs_by_layer_and_needs_a_key():
    p = make.program(make.cfg(*TUNED, "model.lora.dropout=0.5", ROWS))
    keys = [jax.random.key(seed) for seed in range(2)]
    one, two = (hidden(p, PARAMS, key) for key in keys)
    assert np.abs(one - two).max() > 0.01 < np.abs(one - hidden(P, PARAMS)).max()
    np.testing.assert_array_equal(
        hidden(p, without_b(PARAMS), keys[0]), hidden(P, without_b(PARAMS))
    )
    bound, without = (
        lora.apply(p.model_config.lora, PARAMS, key)["llama"]["blocks"]["attn"]
        for key in (keys[0], None)
    )
    drawn = np.concatenate([jax.random.key_data(bound[name]["w"].keys) for name in "qkvo"])
    assert len(np.unique(drawn, axis=0)) == 4 * 2 and without["q"]["w"].keys is None


def test_the_optimizer_knows_what_trains_alone():
    """tests/test_instruct.py checks what moves, and that other rows do not."""
    state = jax.eval_shape(lambda params: init_state(P, cast_frozen(P, params)), PARAMS)
    moments = {
        path for part in state.opt_state if hasattr(part, "mu") for path, _ in make.flat(part.mu)
    }
    assert (
        moments
        == {path for path, _ in make.flat(state.trainable)}
        == {path for path, chosen in make.flat(P.trains.unfreeze()) if chosen}
    )
    assert len(moments) == 10


# Storage

STORED = make.program(make.cfg(*TUNED, "model.lora.dropout=0.0", "model.lora.storage=nf4", ROWS))


@functools.cache
def stored():
    """PARAMS with the matrices of the LLM's blocks stored as codes of NF4."""

    def quantized(flat):
        for path in [path for path in flat if re.fullmatch("llama/blocks.*/w", path)]:
            flat |= lora.quantize_leaf(path, flat.pop(path), "nf4")
        return flat

    return tree.unflatten(jax.device_get(jax.jit(quantized)(dict(make.flat(PARAMS)))))


@pytest.mark.parametrize(
    ("storage", "bytes_each", "worst", "typical"),
    [("int8", 1, 1 / 127, 0.01), ("nf4", 0.5, 0.16, 0.11)],
)
def test_stored_matrices(storage, bytes_each, worst, typical):
    w = np.random.default_rng(0).standard_normal((3, 8, 4, 128)).astype(np.float32)
    codes, absmax = jax.device_get(lora.quantize(w, storage))
    assert codes.nbytes == w.size * bytes_each and absmax.shape == (3, 8, 4, 2)
    again = np.asarray(lora.dequantize(codes, absmax))
    error = np.abs(again - w).reshape(*absmax.shape, 64)
    assert (error <= 0.5 * 2 * worst * absmax[..., None] + 1e-6).all()
    assert np.sqrt(np.square(again - w).mean() / np.square(w).mean()) < typical
    twice = lora.dequantize(*lora.quantize(again, storage))
    # Quantizing dequantized values again changes nothing.
    np.testing.assert_allclose(twice, again, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(lora.dequantize(*lora.quantize(0 * w, storage)), 0 * w)
    by_layer = lora.quantize(w[1], storage)
    np.testing.assert_array_equal(by_layer[0], codes[1])


def test_the_levels_of_nf4_are_the_papers():
    levels = lora.nf4()
    assert len(levels) == 16 and levels[7] == 0 and levels[0] == -1 and levels[-1] == 1
    np.testing.assert_allclose(
        levels[[1, 6, 8, 14]], [-0.6961928, -0.0910500, 0.0795803, 0.7229568], atol=1e-6
    )


def test_a_stored_model_is_the_model_of_what_the_codes_say():
    params = stored()
    flat = dict(make.flat(params))
    said = {path: leaf for path, leaf in flat.items() if not path.endswith(("/absmax", "/nf4"))}
    codes = [path for path in flat if path.endswith("/nf4")]
    said |= {
        sharding.matrix_path(path): lora.dequantize(flat[path], flat[path.replace("nf4", "absmax")])
        for path in codes
    }
    assert said.keys() == dict(make.flat(PARAMS)).keys()
    fresh = dict(make.flat(make.abstract(STORED)))
    chex.assert_trees_all_equal_shapes_and_dtypes(fresh, flat)
    np.testing.assert_allclose(
        hidden(STORED, params), hidden(P, tree.unflatten(said)), rtol=0, atol=1e-4
    )


def test_a_sharded_stored_model_equals_a_single_one():
    params = stored()
    want, grads = compiled(STORED.model_config)(params, None)
    with jax.set_mesh(mesh := sharding.make_mesh(dict(data=1, fsdp=4, tensor=2))):
        at = jax.device_put(params, sharding.shardings(mesh, sharding.specs(params)))
        codes = at["llama"]["blocks"]["attn"]["q"]["nf4"]
        assert codes.addressable_shards[0].data.size == codes.size // 8
        got, sharded = compiled(STORED.model_config)(at, None)
    assert_close(got, want, 1e-4)
    assert_close(sharded, grads, 1e-3)


# Bad input


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ("model.lora.targets=(('llama/norm/scale', True), ('.*', False))",),
            "model.lora.targets: llama/norm/scale is not a matrix of a tower's blocks",
        ),
        (
            ("model.lora.targets=(('llama/blocks/attn/x/w', True), ('.*', False))",),
            "no parameter needs the row 'llama/blocks/attn/x/w'",
        ),
        (("model.lora.storage=int4",), "model.lora.storage='int4' is not one of '', int8, nf4"),
        (
            ("model.lora.storage=nf4", "rules.train=(('.*', True),)"),
            "llama/blocks/attn/k/w is stored as nf4 and cannot train",
        ),
        (
            ("rules.train=(('llama/embed/added', (4, 9)), ('.*', False))",),
            r"(4, 9) is neither True, nor False, nor (start, stop) of the rows of",
        ),
        (("model.lora.dropout=1.0",), "dropout=1.0 at least 0 and below 1"),
    ],
)
def test_bad_input_is_one_line(overrides, told):
    with pytest.raises(UserError) as error:
        make.program(make.cfg(*TUNED, ROWS, *overrides))
    assert told in str(error.value) and "\n" not in str(error.value)


def test_products_of_layers():
    x, w, a, b = (
        np.random.default_rng(k).standard_normal(shape).astype(np.float32)
        for k, shape in enumerate(((2, 3, 4), (4, 6), (4, 2), (2, 6)))
    )

    product = jax.jit(lambda w: layers.einsum("btD,Df->btf", jnp.asarray(x), w))
    np.testing.assert_allclose(
        product(lora.Lora(w, a, b, None, 0.5, 0.1)),
        x @ (w + 0.5 * a @ b),
        rtol=1e-5,
    )
    codes, absmax = lora.quantize(w, "int8")
    np.testing.assert_allclose(
        product(lora.Quantized(codes, absmax)),
        x @ np.asarray(lora.dequantize(codes, absmax)),
        rtol=1e-5,
    )
