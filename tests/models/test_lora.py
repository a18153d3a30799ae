"""LoRA is a kind of weight: it starts as nothing, learns as w + a b would, and is w + a b; stored matrices are what their codes say."""
from functools import partial

import jax
import jax.numpy as jnp
import make
import numpy as np
import pytest

from emu_jax import loop, sharding, train, tree
from emu_jax.config import UserError
from emu_jax.models import emu, layers, lora

ROWS = "rules.train=(('.*/(a|b)', True), ('llama/(embed|lm_head)/added', (4, 6)), ('.*', False))"
TUNED = ("model.llama.added=6", "model.lora.rank=3", "model.lora.alpha=6.0", "rules.peak_lr=(('.*', 1e-2),)", "optim.warmup=0.0")
C = make.cfg(*TUNED, "model.lora.dropout=0.0", ROWS)
P = make.program(C)
PARAMS = make.random_params(P)
BATCH = jax.tree.map(jnp.asarray, make.batch(C))
TRAINS = train.what_trains(C, PARAMS)
X = jnp.asarray(np.random.default_rng(1).standard_normal((2, 12, 32)), jnp.float32)
AT = jnp.tile(jnp.arange(12), (2, 1))


def plain(params):
    """(program without LoRA, the parameters with a b merged in)."""
    flat = dict(tree.leaves(params))
    for path in [path for path in flat if path.endswith("/a")]:
        where = path.removesuffix("/a")
        w, a, b = (flat.pop(f"{where}/{name}") for name in "wab")
        flat[f"{where}/w"] = jnp.stack([lora.baked(P.size.lora, *layer) for layer in zip(w, a, b)])
    return make.program(make.cfg("model.llama.added=6")), tree.unflatten(flat)


def llama(program, params, key=None):
    return program.module(params, key).llama(X, AT, jnp.ones_like(AT))[0]


def hidden(program, params, key=None):
    return jax.jit(partial(llama, program, key=key))(params)


@pytest.mark.parametrize(("equation", "down", "up"), [
    ("btD,Dhd->bthd", "btD,DR->btR", "btR,Rhd->bthd"), ("bthd,hdD->btD", "bthd,hdR->btR", "btR,RD->btD"),
    ("btf,fD->btD", "btf,fR->btR", "btR,RD->btD")])
def test_the_two_products(equation, down, up):
    assert lora.equations(equation) == (down, up)


def test_its_leaves_are_beside_the_targets_and_start_as_nothing():
    fresh = dict(make.flat(make.params(P)))
    without = dict(make.flat(make.params(make.program(make.cfg("model.llama.added=6")))))
    added = fresh.keys() - without.keys()
    assert added == {f"llama/blocks/attn/{name}/{half}" for name in "qkvo" for half in "ab"}
    for path, leaf in without.items():
        np.testing.assert_array_equal(fresh[path], leaf)            # the same model, whether or not there is LoRA
    assert fresh["llama/blocks/attn/q/a"].shape == (2, 32, 3) and fresh["llama/blocks/attn/q/b"].shape == (2, 3, 4, 8)
    assert fresh["llama/blocks/attn/o/a"].shape == (2, 4, 8, 3) and fresh["llama/blocks/attn/o/b"].shape == (2, 3, 32)
    assert all((leaf == 0).all() == path.endswith("/b") for path, leaf in fresh.items() if path in added)
    reach = 32 ** -0.5
    assert 0.9 * reach < np.abs(fresh["llama/blocks/attn/q/a"]).max() < reach
    program, params = plain(make.params(P))
    np.testing.assert_array_equal(hidden(P, make.params(P)), hidden(program, params))


def test_wrapped_equals_baked():
    """Outputs, and the gradient of a by the chain rule from that of the merged matrix."""
    program, params = plain(PARAMS)
    ours, theirs = hidden(P, PARAMS), hidden(program, params)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())
    assert np.abs(ours - hidden(P, jax.tree.map_with_path(lambda at, x: 0 * x if at[-1].key == "b" else x, PARAMS))).max() > 0.01
    loss = lambda program, params: (llama(program, params) * X).sum()
    grads, merged = (jax.jit(jax.grad(partial(loss, program)))(params) for program, params in ((P, PARAMS), (program, params)))
    for name, by_chain in (("q", "LDhd,Lrhd->LDr"), ("o", "Lhde,Lre->Lhdr")):
        want = 6 / 3 * np.einsum(by_chain, merged["llama"]["blocks"]["attn"][name]["w"], PARAMS["llama"]["blocks"]["attn"][name]["b"])
        np.testing.assert_allclose(grads["llama"]["blocks"]["attn"][name]["a"], want, rtol=0, atol=1e-4 * np.abs(want).max())


def test_dropout_is_of_lora_alone_differs_by_layer_and_needs_a_key():
    p = make.program(make.cfg(*TUNED, "model.lora.dropout=0.5", ROWS))
    keys = [jax.random.key(seed) for seed in range(2)]
    one, two, none = (hidden(p, PARAMS, key) for key in (*keys, None))
    np.testing.assert_array_equal(none, hidden(P, PARAMS))
    assert np.abs(one - two).max() > 0.01 < np.abs(one - none).max()
    nothing = jax.tree.map_with_path(lambda at, x: 0 * x if at[-1].key == "b" else x, PARAMS)
    np.testing.assert_array_equal(hidden(p, nothing, keys[0]), hidden(P, nothing))
    bound = lora.bound(p.size.lora, PARAMS, keys[0])["llama"]["blocks"]["attn"]
    drawn = np.concatenate([jax.random.key_data(bound[name]["w"].keys) for name in "qkvo"])
    assert len(np.unique(drawn, axis=0)) == 4 * 2


# Training

def step(c, params, mesh=None, count=2):
    program = make.program(c)
    trains = train.what_trains(c, params)
    state = loop.init_state(program, *tree.split(train.at_rest(c, trains, params), trains))
    if mesh is None:
        state = jax.device_put(state, jax.devices()[0])
        for _ in range(count):
            state, metrics = jax.jit(partial(loop.train_step, program))(state, BATCH)
        return state, metrics
    with jax.set_mesh(mesh):
        state = jax.device_put(state, sharding.of_state(mesh, params, state))
        batch = jax.device_put(BATCH, sharding.batch_sharding(mesh))
        for _ in range(count):
            state, metrics = loop.jitted(program, state)(state, batch)
        return jax.device_get(state), jax.device_get(metrics)


def test_only_what_trains_moves_of_a_matrix_only_its_rows():
    c = make.cfg(*TUNED, ROWS, "rules.decay=(('.*', 0.1),)")        # decay would move the other rows
    state, _ = step(c, PARAMS)
    before, after = (dict(make.flat(part)) for part in (PARAMS, tree.merge(state.trainable, state.frozen)))
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert moved == {path for path, chosen in make.flat(TRAINS) if chosen}
    assert len(moved) == 10
    for table in ("embed", "lm_head"):
        rows = np.abs(after[f"llama/{table}/added"] - before[f"llama/{table}/added"]).max(1) > 0
        assert rows.tolist() == [False] * 4 + [True] * 2
    moments = {path for part in state.opt_state if hasattr(part, "mu") for path, _ in make.flat(part.mu)}
    assert moments == moved == {path for path, _ in make.flat(state.trainable)}                 # the optimizer's tree is the trainable tree


def test_sharded_equals_single():
    c = make.cfg(*TUNED, "model.lora.rank=4", "model.lora.storage=nf4", ROWS)
    params = jax.jit(lambda: emu.init(emu.Emu, make.program(c).size, jax.random.key(1)))()
    params = jax.tree.map_with_path(lambda at, x: 0.1 + x if at[-1].key == "b" else x, params)
    one, _ = step(c, params)
    many, metrics = step(c, params, sharding.make_mesh(dict(data=1, fsdp=4, tensor=2)))
    assert np.isfinite(metrics["loss"][0])
    for (path, want), (_, got) in zip(make.flat(one.trainable), make.flat(many.trainable), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-3 * max(np.abs(want).max(), 0.1), err_msg=path)


# Storage

@pytest.mark.parametrize(("storage", "bytes_each", "worst", "typical"), [("int8", 1, 1 / 127, 0.01), ("nf4", 0.5, 0.16, 0.11)])
def test_stored_matrices(storage, bytes_each, worst, typical):
    w = np.random.default_rng(0).standard_normal((3, 8, 4, 128)).astype(np.float32)
    codes, absmax = lora.quantised(w, storage)
    assert codes.nbytes == w.size * bytes_each and absmax.shape == (3, 8, 4, 2)
    again = np.asarray(lora.dequantised(codes, absmax))
    error = np.abs(again - w).reshape(*absmax.shape, 64)
    assert (error <= 0.5 * 2 * worst * np.asarray(absmax)[..., None] + 1e-6).all()
    assert np.sqrt(np.square(again - w).mean() / np.square(w).mean()) < typical
    twice = lora.dequantised(*lora.quantised(again, storage))
    np.testing.assert_allclose(twice, again, rtol=1e-5, atol=1e-6)                              # what it can say, it says again
    np.testing.assert_array_equal(lora.dequantised(*lora.quantised(0 * w, storage)), 0 * w)
    by_layer = lora.quantised(w[1], storage)
    np.testing.assert_array_equal(by_layer[0], codes[1])


def test_the_levels_of_nf4_are_the_papers():
    levels = lora.nf4()
    assert len(levels) == 16 and levels[7] == 0 and levels[0] == -1 and levels[-1] == 1
    np.testing.assert_allclose(levels[[1, 6, 8, 14]], [-0.6961928, -0.0910500, 0.0795803, 0.7229568], atol=1e-6)


@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_a_stored_model_is_the_model_of_what_the_codes_say(storage):
    c = make.cfg(*TUNED, f"model.lora.storage={storage}", ROWS)
    p = make.program(c)
    flat = dict(make.flat(PARAMS))
    said = dict(flat)
    for path in [path for path in flat if path.startswith("llama/blocks") and path.endswith("/w")]:
        leaves = lora.stored(path, flat.pop(path), storage)
        flat |= leaves
        said[path] = lora.dequantised(*leaves.values())
    fresh = {path: (x.shape, x.dtype) for path, x in make.flat(jax.eval_shape(partial(make.params, p)))}
    assert fresh == {path: (x.shape, x.dtype) for path, x in make.flat(tree.unflatten(flat))}
    np.testing.assert_allclose(hidden(p, tree.unflatten(flat)), hidden(P, tree.unflatten(said)), rtol=0, atol=1e-4)


# Bad input

@pytest.mark.parametrize(("overrides", "told"), [
    (("model.lora.targets=(('llama/norm/scale', True), ('.*', False))",), "model.lora.targets: llama/norm/scale is no matrix of a tower's blocks"),
    (("model.lora.targets=(('llama/blocks/attn/x/w', True), ('.*', False))",), "no parameter needs the row 'llama/blocks/attn/x/w'"),
    (("model.lora.storage=int4",), "model.lora.storage='int4' is not one of '', int8, nf4"),
    (("model.lora.storage=nf4", "rules.train=(('.*', True),)"), "llama/blocks/attn/k/w is stored as nf4 and cannot train"),
    (("rules.train=(('llama/embed/added', (4, 9)), ('.*', False))",), r"(4, 9) is neither True, nor False, nor (start, stop) of the rows of"),
    (("model.lora.dropout=1.0",), "dropout=1.0 at least 0 and below 1")])
def test_bad_input_is_one_line(overrides, told):
    with pytest.raises(UserError) as error:
        make.program(make.cfg(*TUNED, ROWS, *overrides))
    assert told in str(error.value) and "\n" not in str(error.value)


def test_a_product_of_layers():
    x, w, a, b = (np.random.default_rng(k).standard_normal(shape).astype(np.float32) for k, shape in enumerate(((2, 3, 4), (4, 5), (4, 2), (2, 5))))
    got = layers.einsum("btD,Df->btf", jnp.asarray(x), lora.Lora(jnp.asarray(w), jnp.asarray(a), jnp.asarray(b), None, 0.5, 0.1))
    np.testing.assert_allclose(got, x @ (w + 0.5 * a @ b), rtol=1e-5)
