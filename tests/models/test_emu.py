"""Images fill their slots only, packed documents are independent, remat is exact."""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emu_jax import tree
from emu_jax.models import emu, module
from emu_jax.models.contrast import ContrastiveModel
from tests.support import make
from tests.support.trees import assert_close

C = make.cfg()
P = make.program(C)
PARAMS = make.random_params(P)
N = C.model.resampler.tokens


def model(params=PARAMS, config=P.model_config):
    return module.bind(emu.Emu, config, params)


@pytest.fixture(scope="module")
def forward():
    """batch -> (hidden, visual tokens), in NumPy."""
    compiled = jax.jit(lambda batch: model()(batch))
    return lambda batch: jax.device_get(compiled(batch))


# Slots


def test_visual_tokens_fill_their_slots_and_nothing_else():
    T = 12
    tokens = np.random.default_rng(0).integers(0, 516, (3, T), np.int32)
    visual = np.random.default_rng(1).standard_normal((3, 2, N, 32)).astype(np.float32)
    # The rows have two images, no image, and an image that ends the row.
    slots = np.array([[2, 7], [T, T], [T - N, T]])

    def both(tokens, visual, slots):
        found = model()
        return (
            found.interleave(tokens, visual, slots),
            found.llama.embeddings(tokens, jnp.float32),
        )

    got, want = map(np.array, jax.jit(both)(tokens, visual, slots))
    want[0, 2 : 2 + N] = visual[0, 0]
    want[0, 7 : 7 + N] = visual[0, 1]
    want[2, T - N :] = visual[2, 0]
    np.testing.assert_array_equal(got, want)


def test_an_image_that_is_not_there_changes_nothing(forward):
    batch = make.batch(C)
    absent = batch.image_slots == C.data.tokens
    assert absent.any() and not absent.all()
    other = batch.replace(
        images=np.where(absent[..., None, None, None], 255 - batch.images, batch.images)
    )
    np.testing.assert_array_equal(forward(other)[0], forward(batch)[0])
    present = batch.replace(
        images=np.where(absent[..., None, None, None], batch.images, 255 - batch.images)
    )
    changed = np.abs(forward(present)[0] - forward(batch)[0]).max((1, 2)) > 1e-3
    np.testing.assert_array_equal(changed, ~absent.all(1))


# Packing


def test_packed_rows_are_separate_documents(forward):
    """Eight documents have the same outputs packed in three rows as in a row each."""
    packed, separate, places = make.packed_and_separate(C)
    (hidden, visual) = forward(packed)
    (hidden_alone, visual_alone) = forward(separate)
    for number, (row, start, first) in enumerate(places):
        length = int((separate.segments[number] > 0).sum())
        images = int((separate.image_slots[number] < C.data.tokens).sum())
        np.testing.assert_allclose(
            hidden[row, start : start + length], hidden_alone[number, :length], atol=1e-4
        )
        np.testing.assert_allclose(
            visual[row, first : first + images], visual_alone[number, :images], atol=1e-5
        )
    assert max(start for _, start, _ in places) > 0 and max(first for *_, first in places) > 0


def test_a_document_does_not_see_the_one_before_it_in_the_row(forward):
    packed, _, places = make.packed_and_separate(C)
    row, start, _ = places[1]
    assert start > 0
    changed = np.array(packed.tokens)
    changed[row, 1 : start - 1] = np.where(
        changed[row, 1 : start - 1] < 512,
        (changed[row, 1 : start - 1] + 7) % 512,
        changed[row, 1 : start - 1],
    )
    before = forward(packed)[0]
    after = forward(packed.replace(tokens=changed))[0]
    assert np.abs(before[row, :start] - after[row, :start]).max() > 0.01
    np.testing.assert_array_equal(before[row, start:], after[row, start:])


# Visual tokens


def test_standardised_visual_tokens_are_the_raw_ones_in_other_units():
    c = make.cfg("model.standardise=true")
    p = make.program(c)
    params = make.random_params(p)
    encode = jax.jit(
        lambda params, images: module.bind(emu.Emu, p.model_config, params).encode(images)
    )
    params = jax.device_get(params)
    images = make.batch(c).images[:, 0]
    stats = params["visual_stats"]
    still = params | {
        "visual_stats": {"mean": np.zeros_like(stats["mean"]), "std": np.ones_like(stats["std"])}
    }
    np.testing.assert_allclose(
        encode(params, images), (encode(still, images) - stats["mean"]) / stats["std"], atol=1e-4
    )


# Rematerialisation


def gradients(policy):
    towers = {
        tower: dataclasses.replace(getattr(P.model_config, tower), remat=policy)
        for tower in ("vision", "resampler", "llama")
    }
    config = dataclasses.replace(P.model_config, **towers)
    return partial(
        lambda config, params, batch: sum((x**2).sum() for x in model(params, config)(batch)),
        config,
    )


@pytest.fixture(scope="module")
def without_remat():
    return jax.jit(jax.value_and_grad(gradients("none")))(PARAMS, make.batch(C))


@pytest.mark.parametrize("policy", ["full", "dots"])
def test_remat_changes_nothing(without_remat, policy):
    value, grads = jax.jit(jax.value_and_grad(gradients(policy)))(PARAMS, make.batch(C))
    want_value, want = without_remat
    np.testing.assert_allclose(value, want_value, rtol=1e-6)
    assert_close(grads, want, 1e-5)


def test_remat_saves_what_it_says():
    """Policy "full" saves fewer bytes for the backward pass than "dots"; "none" saves most."""
    images, hidden, positions = jax.device_put(
        (make.batch(C).images[0], np.zeros((2, 12, 32), np.float32), np.zeros((2, 12), int))
    )

    # Some of these configs are equal, so each is traced once.
    @functools.cache
    def saved_by(config, is_encoder):
        def f(params):
            bound = model(params, config)
            if is_encoder:
                return bound.encode(images)
            return bound.llama(hidden, positions, jnp.ones_like(positions))[0]

        return sum(
            leaf.size * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(
                jax.eval_shape(lambda params: jax.vjp(f, params)[1], PARAMS)
            )
        )

    def saved(tower, policy):
        changed = dataclasses.replace(getattr(P.model_config, tower), remat=policy)
        config = dataclasses.replace(P.model_config, **{tower: changed})
        return saved_by(config, tower != "llama")

    for tower in ("vision", "resampler", "llama"):
        assert saved(tower, "full") < saved(tower, "dots") < saved(tower, "none"), tower


# Initial values


def test_a_fresh_model_starts_as_published():
    params = jax.jit(partial(module.init, emu.Emu, P.model_config))(jax.random.key(0))
    fresh = dict(make.flat(jax.device_get(params)))
    C_ = 32
    d = 8
    F = 64
    t5 = {
        "self/q": (C_ * d) ** -0.5,
        "self/k": C_**-0.5,
        "self/v": C_**-0.5,
        "self/o": C_**-0.5,
        "ffn/up": C_**-0.5,
        "ffn/down": F**-0.5,
    }
    t5 |= {name.replace("self", "cross"): std for name, std in t5.items()}
    stds = {f"resampler/blocks/{name}/w": std for name, std in t5.items()}
    for path, leaf in fresh.items():
        if path.endswith("scale"):
            np.testing.assert_array_equal(leaf, 1)
        elif path.endswith("bias"):
            np.testing.assert_array_equal(leaf, 0)
        elif path not in ("vision/pos", "resampler/relative"):
            np.testing.assert_allclose(
                np.std(leaf),
                stds.get(path, 0.02),
                rtol=0.35 if leaf.size < 200 else 0.1,
                err_msg=path,
            )
    # Each layer starts with its own values.
    for path in stds:
        assert np.abs(fresh[path][0] - fresh[path][1]).max() > 1e-3


def test_the_warm_ups_encoder_is_emus():
    def shapes(model):
        return jax.tree.map(lambda x: x.shape, module.abstract(model, P.model_config))

    ours = shapes(emu.Emu)
    warm = shapes(ContrastiveModel)
    encoder = {"vision", "ln_visual", "resampler"}
    assert set(ours) == encoder | {"llama", "regress_head"} and set(warm) == encoder | {"contrast"}
    assert {tower: ours[tower] for tower in encoder} == {tower: warm[tower] for tower in encoder}
    assert dict(tree.leaves(ours))["llama/embed/base"] == (512, 32)
