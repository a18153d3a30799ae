"""Laws of the U-Net and the autoencoder; tests/verify compares them with diffusers."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_flops import products, traced

from emu_jax import sharding, tree
from emu_jax.config import UserError
from emu_jax.models import flops, module
from emu_jax.models.unet import UNet, UNetConfig
from emu_jax.models.vae import Vae, VaeConfig
from tests.support import make
from tests.support.trees import assert_close

SIZE = UNetConfig(
    channels_in=3,
    channels_out=2,
    patch=1,
    widths=(8, 16),
    resnets=(1, 1),
    attends_down=(False, True),
    attends_up=(True, False),
    depths=(1, 2),
    heads=(2, 4),
    condition=12,
    pooled=0,
    side=0,
    time=16,
    cosine_first=True,
    frequency_shift=0.0,
    groups=4,
    eps=1e-5,
    linear=False,
    remat="none",
)
# One level, with a transformer in the middle.
FLAT = dataclasses.replace(
    SIZE,
    widths=(8,),
    resnets=(1,),
    attends_down=(False,),
    attends_up=(False,),
    depths=(1,),
    heads=(2,),
)
VAE = VaeConfig(channels=3, latent=2, widths=(8, 16), resnets=1, groups=4, scale=0.5, remat="none")
rng = np.random.default_rng(0)
X, CONDITION = (
    rng.standard_normal(shape).astype(np.float32) for shape in ((8, 4, 4, 3), (8, 3, 12))
)
TIMES = np.arange(8, dtype=np.float32) * 100


def random(tower, config):
    """Random values for every leaf: layers that start as zero would hide mistakes."""
    shapes = module.abstract(tower, config)

    def noise(path, x):
        return np.float32(rng.standard_normal(x.shape) * 0.3 + path.endswith("scale"))

    leaves = {path: noise(path, x) for path, x in make.flat(shapes)}
    return jax.device_put(tree.unflatten(leaves))


PARAMS = random(UNet, SIZE)


def forward(params, x, times, condition, config=SIZE):
    return module.bind(UNet, config, params)(x, times, condition)


# Traced once for each config.
run = jax.jit(forward, static_argnames="config")


def multiplied(params, config, *inputs):
    """FLOPs per image, counted in the traced program."""
    call = partial(run, config=config)
    return products(jax.make_jaxpr(call)(params, *inputs).jaxpr) / len(inputs[0])


def test_a_fresh_unet_predicts_nothing_yet():
    def largest(key):
        params = module.init(UNet, FLAT, key)
        convs = params["conv_in"], params["conv_out"], params["mid"]["resnets"]["0"]["conv2"]
        return [jnp.abs(conv["w"]).max() for conv in convs]

    into, *out = jax.jit(largest)(jax.random.key(0))
    assert into > 0 and out == [0, 0]


def test_rows_do_not_see_one_another_and_everything_is_seen():
    y = np.asarray(run(PARAMS, X, TIMES, CONDITION))
    assert y.shape == (8, 4, 4, 2)
    turned = np.roll(np.arange(8), 3)
    np.testing.assert_allclose(
        run(PARAMS, X[turned], TIMES[turned], CONDITION[turned]), y[turned], atol=1e-4
    )
    for changed in (
        (X + 1, TIMES, CONDITION),
        (X, TIMES + 50, CONDITION),
        (X, TIMES, CONDITION + 1),
    ):
        assert (np.abs(run(PARAMS, *changed) - y).max((1, 2, 3)) > 1e-3).all()


def test_the_order_of_the_conditions_tokens_says_nothing():
    np.testing.assert_allclose(
        run(PARAMS, X, TIMES, CONDITION[:, ::-1]), run(PARAMS, X, TIMES, CONDITION), atol=1e-4
    )


def test_pooled_the_order_says_something_and_its_map_is_counted():
    config = dataclasses.replace(SIZE, pooled=3)
    params = random(UNet, config)
    call = partial(run, config=config)
    one, other = (np.asarray(call(params, X, TIMES, c)) for c in (CONDITION, CONDITION[:, ::-1]))
    assert np.abs(other - one).max() > 1e-3
    none = {"pooled": {"w": np.zeros_like(params["pooled"]["w"])}}
    plain = {name: part for name, part in params.items() if name != "pooled"}
    np.testing.assert_allclose(
        call(params | none, X, TIMES, CONDITION), run(plain, X, TIMES, CONDITION), atol=1e-4
    )
    assert flops.unet(config, 4, 3) == multiplied(params, config, X, TIMES, CONDITION)


def test_each_place_is_told_by_a_map_of_its_own():
    """A place's own map changes the output at that place; a map of zeros changes nothing."""
    config = dataclasses.replace(SIZE, pooled=3, side=4)
    params = random(UNet, config)
    none = dataclasses.replace(SIZE, pooled=3)
    call = partial(run, config=config)
    alone = params | {"places": {"w": np.zeros_like(params["places"]["w"])}}
    before = np.asarray(call(alone, X, TIMES, CONDITION))
    plain = {name: part for name, part in params.items() if name != "places"}
    np.testing.assert_allclose(before, run(plain, X, TIMES, CONDITION, config=none), atol=1e-4)
    at_one = np.zeros_like(params["places"]["w"])
    at_one[:, 1, 2] = np.asarray(params["places"]["w"])[:, 1, 2]
    one = params | {"places": {"w": at_one}}
    moved = np.abs(call(one, X, TIMES, CONDITION) - before).max((0, 3))
    assert moved[1, 2] > 0.1
    assert flops.unet(config, 4, 3) == multiplied(params, config, X, TIMES, CONDITION)


def test_a_patch_is_more_channels_at_a_place():
    big = dataclasses.replace(FLAT, channels_in=12, channels_out=8)
    params = random(UNet, big)
    folded = dataclasses.replace(FLAT, patch=2)
    x = rng.standard_normal((1, 8, 8, 3)).astype(np.float32)

    def fold(x):
        return np.reshape(x, (1, 4, 2, 4, 2, -1)).transpose(0, 1, 3, 2, 4, 5).reshape(1, 4, 4, -1)

    got = run(params, x, TIMES[:1], CONDITION[:1], config=folded)
    want = run(params, fold(x), TIMES[:1], CONDITION[:1], config=big)
    np.testing.assert_allclose(fold(got), want, atol=1e-4)


def test_sharded_is_single():
    want = run(PARAMS, X, TIMES, CONDITION)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        placed = jax.device_put(
            {"unet": jax.device_get(PARAMS)},
            sharding.shardings(mesh, sharding.specs({"unet": PARAMS})),
        )["unet"]
        np.testing.assert_allclose(run(placed, X, TIMES, CONDITION), want, atol=1e-4)


def test_remat_changes_nothing():
    params = random(UNet, FLAT)
    inputs = jax.device_put((X[:2], TIMES[:2], CONDITION[:2]))

    def loss(config):
        return jax.jit(jax.grad(lambda params: (forward(params, *inputs, config) ** 2).sum()))(
            params
        )

    assert_close(loss(dataclasses.replace(FLAT, remat="full")), loss(FLAT), 2e-4, floor=1e-3)


def test_sides_that_do_not_divide_are_one_line():
    x = jax.device_put(np.zeros((1, 5, 4, 3), np.float32))
    times, condition = jax.device_put((TIMES[:1], CONDITION[:1]))
    with pytest.raises(UserError, match="multiples of 2 .* not 5 x 4"):
        jax.eval_shape(lambda: forward(PARAMS, x, times, condition))
    with pytest.raises(UserError, match="sides are multiples of 2, not 5 x 4"):
        jax.eval_shape(lambda: module.bind(Vae, VAE, random(Vae, VAE)).encode(x))


def test_flops_are_what_is_multiplied():
    assert flops.unet(SIZE, 4, 3) == multiplied(PARAMS, SIZE, X, TIMES, CONDITION)
    folded = dataclasses.replace(SIZE, patch=2, channels_in=3, channels_out=3)
    inputs = (np.zeros(shape, np.float32) for shape in ((1, 8, 8, 3), (1,), (1, 5, 12)))
    assert flops.unet(folded, 8, 5) == multiplied(random(UNet, folded), folded, *inputs)
    params = random(Vae, VAE)
    assert flops.vae_encoder(VAE, 8) == traced(
        lambda x: module.bind(Vae, VAE, params).encode(x), ((1, 8, 8, 3), jnp.float32)
    )


# The autoencoder


def test_latents_are_scaled_and_drawn_around_their_mean():
    params = random(Vae, VAE)
    images = rng.standard_normal((2, 4, 4, 3)).astype(np.float32)

    def everything(params, images):
        model = module.bind(Vae, VAE, params)
        mean, log_variance = model.encode(images)
        draws = jax.vmap(partial(model.sample, mean, log_variance))(
            jax.random.split(jax.random.key(0), 400)
        )
        return mean, log_variance, model.sample(mean, log_variance), draws, model.decode(mean)

    found = jax.device_get(jax.jit(everything)(params, images))
    mean, log_variance, still, draws, decoded = found
    assert mean.shape == (2, 2, 2, 2) and decoded.shape == images.shape
    np.testing.assert_allclose(still, VAE.scale * mean, rtol=1e-6)
    deviation = VAE.scale * np.exp(log_variance / 2)
    np.testing.assert_allclose(np.std(draws, 0) / deviation, 1, atol=0.2)
    np.testing.assert_allclose((np.mean(draws, 0) - still) / deviation, 0, atol=0.25)
