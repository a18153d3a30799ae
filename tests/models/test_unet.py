"""Laws of the U-Net and the autoencoder; tests/verify compares them with diffusers."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_flops import traced

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
VAE = VaeConfig(channels=3, latent=2, widths=(8, 16), resnets=1, groups=4, scale=0.5, remat="none")
rng = np.random.default_rng(0)
X, CONDITION = (
    jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((8, 4, 4, 3), (8, 3, 12))
)
TIMES = jnp.arange(8) * 100.0


def random(tower, config):
    """Every leaf random: fresh layers that are zero would hide mistakes."""
    shapes = module.abstract(tower, config)

    def noise(path, x):
        return jnp.asarray(rng.standard_normal(x.shape) * 0.3 + path.endswith("scale"), jnp.float32)

    return tree.unflatten({path: noise(path, x) for path, x in make.flat(shapes)})


PARAMS = random(UNet, SIZE)


def forward(params, x, times, condition, config=SIZE):
    return module.bind(UNet, config, params)(x, times, condition)


@pytest.fixture(scope="module")
def run():
    return jax.jit(forward)


def test_a_fresh_unet_predicts_nothing_yet():
    flat = dataclasses.replace(
        SIZE,
        widths=(8,),
        resnets=(1,),
        attends_down=(False,),
        attends_up=(False,),
        depths=(1,),
        heads=(2,),
    )
    params = module.init(UNet, flat, jax.random.key(0))
    assert (
        jnp.abs(params["conv_out"]["w"]).max() == 0
        and jnp.abs(params["mid"]["resnets"]["0"]["conv2"]["w"]).max() == 0
    )
    assert jnp.abs(params["conv_in"]["w"]).max() > 0


def test_rows_do_not_see_one_another_and_everything_is_seen(run):
    y = run(PARAMS, X, TIMES, CONDITION)
    assert y.shape == (8, 4, 4, 2)
    turned = jnp.roll(jnp.arange(8), 3)
    np.testing.assert_allclose(
        run(PARAMS, X[turned], TIMES[turned], CONDITION[turned]), y[turned], atol=1e-4
    )
    for changed in (
        (X + 1, TIMES, CONDITION),
        (X, TIMES + 50, CONDITION),
        (X, TIMES, CONDITION + 1),
    ):
        assert (jnp.abs(run(PARAMS, *changed) - y).max((1, 2, 3)) > 1e-3).all()


def test_the_order_of_the_conditions_tokens_says_nothing(run):
    np.testing.assert_allclose(
        run(PARAMS, X, TIMES, CONDITION[:, ::-1]), run(PARAMS, X, TIMES, CONDITION), atol=1e-4
    )


def test_pooled_the_order_says_something_and_its_map_is_counted(run):
    config = dataclasses.replace(SIZE, pooled=3)
    params = random(UNet, config)
    call = jax.jit(partial(forward, config=config))
    assert (
        jnp.abs(
            call(params, X, TIMES, CONDITION[:, ::-1]) - call(params, X, TIMES, CONDITION)
        ).max()
        > 1e-3
    )
    none = {"pooled": {"w": jnp.zeros_like(params["pooled"]["w"])}}
    plain = {name: part for name, part in params.items() if name != "pooled"}
    np.testing.assert_allclose(
        call(params | none, X, TIMES, CONDITION), run(plain, X, TIMES, CONDITION), atol=1e-4
    )
    f32 = jnp.float32
    assert flops.unet(config, 4, 3) == traced(
        lambda x, t, c: forward(params, x, t, c, config),
        ((1, 4, 4, 3), f32),
        ((1,), f32),
        ((1, 3, 12), f32),
    )


def test_each_place_is_told_by_a_map_of_its_own(run):
    """Where that map is zero nothing changes; where it is not, at one place, that place feels
    it.
    """
    config = dataclasses.replace(SIZE, pooled=3, side=4)
    params = random(UNet, config)
    none = dataclasses.replace(SIZE, pooled=3)
    call = jax.jit(partial(forward, config=config))
    alone = params | {"places": {"w": jnp.zeros_like(params["places"]["w"])}}
    before = call(alone, X, TIMES, CONDITION)
    plain = {name: part for name, part in params.items() if name != "places"}
    np.testing.assert_allclose(
        before, jax.jit(partial(forward, config=none))(plain, X, TIMES, CONDITION), atol=1e-4
    )
    one = params | {
        "places": {"w": alone["places"]["w"].at[:, 1, 2].set(params["places"]["w"][:, 1, 2])}
    }
    moved = jnp.abs(call(one, X, TIMES, CONDITION) - before).max((0, 3))
    assert moved[1, 2] > 0.1
    f32 = jnp.float32
    assert flops.unet(config, 4, 3) == traced(
        lambda x, t, c: forward(params, x, t, c, config),
        ((1, 4, 4, 3), f32),
        ((1,), f32),
        ((1, 3, 12), f32),
    )


def test_a_patch_is_more_channels_at_a_place():
    big = dataclasses.replace(SIZE, channels_in=12, channels_out=8)
    params = random(UNet, big)
    folded = dataclasses.replace(SIZE, patch=2)
    x = jnp.asarray(rng.standard_normal((1, 8, 8, 3)), jnp.float32)

    def fold(x):
        return x.reshape(1, 4, 2, 4, 2, -1).transpose(0, 1, 3, 2, 4, 5).reshape(1, 4, 4, -1)

    got = jax.jit(lambda params: forward(params, x, TIMES[:1], CONDITION[:1], folded))(params)
    want = jax.jit(lambda params: forward(params, fold(x), TIMES[:1], CONDITION[:1], big))(params)
    np.testing.assert_allclose(fold(got), want, atol=1e-4)


def test_sharded_is_single(run):
    want = run(PARAMS, X, TIMES, CONDITION)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        placed = jax.device_put(
            {"unet": PARAMS}, sharding.shardings(mesh, sharding.specs({"unet": PARAMS}))
        )["unet"]
        np.testing.assert_allclose(jax.jit(forward)(placed, X, TIMES, CONDITION), want, atol=1e-4)


def test_remat_changes_nothing():
    small = dataclasses.replace(
        SIZE,
        widths=(8,),
        resnets=(1,),
        attends_down=(True,),
        attends_up=(False,),
        depths=(1,),
        heads=(2,),
    )
    params = random(UNet, small)

    def loss(config):
        return jax.jit(
            jax.grad(
                lambda params: (forward(params, X[:2], TIMES[:2], CONDITION[:2], config) ** 2).sum()
            )
        )(params)

    assert_close(loss(dataclasses.replace(small, remat="full")), loss(small), 2e-4, floor=1e-3)


def test_sides_that_do_not_divide_are_one_line():
    with pytest.raises(UserError, match="multiples of 2 .* not 5 x 4"):
        jax.eval_shape(lambda: forward(PARAMS, jnp.zeros((1, 5, 4, 3)), TIMES[:1], CONDITION[:1]))
    with pytest.raises(UserError, match="sides are multiples of 2, not 5 x 4"):
        jax.eval_shape(
            lambda: module.bind(Vae, VAE, module.init(Vae, VAE, jax.random.key(0))).encode(
                jnp.zeros((1, 5, 4, 3))
            )
        )


def test_flops_are_what_is_multiplied():
    f32 = jnp.float32
    assert flops.unet(SIZE, 4, 3) == traced(
        lambda x, t, c: forward(PARAMS, x, t, c),
        ((1, 4, 4, 3), f32),
        ((1,), f32),
        ((1, 3, 12), f32),
    )
    folded = dataclasses.replace(SIZE, patch=2, channels_in=3, channels_out=3)
    params = random(UNet, folded)
    assert flops.unet(folded, 8, 5) == traced(
        lambda x, t, c: forward(params, x, t, c, folded),
        ((1, 8, 8, 3), f32),
        ((1,), f32),
        ((1, 5, 12), f32),
    )
    params = random(Vae, VAE)
    assert flops.vae_encoder(VAE, 8) == traced(
        lambda x: module.bind(Vae, VAE, params).encode(x), ((1, 8, 8, 3), f32)
    )


# The autoencoder


def test_latents_are_scaled_and_drawn_around_their_mean():
    params = random(Vae, VAE)
    images = jnp.asarray(rng.standard_normal((2, 4, 4, 3)), jnp.float32)

    def everything(params, images):
        model = module.bind(Vae, VAE, params)
        mean, log_variance = model.encode(images)
        draws = jax.vmap(partial(model.sample, mean, log_variance))(
            jax.random.split(jax.random.key(0), 400)
        )
        return mean, log_variance, model.sample(mean, log_variance), draws, model.decode(mean)

    mean, log_variance, still, draws, decoded = jax.jit(everything)(params, images)
    assert mean.shape == (2, 2, 2, 2) and decoded.shape == images.shape
    np.testing.assert_allclose(still, VAE.scale * mean, rtol=1e-6)
    deviation = VAE.scale * np.exp(log_variance / 2)
    np.testing.assert_allclose(np.std(draws, 0) / deviation, 1, atol=0.2)
    np.testing.assert_allclose((np.mean(draws, 0) - still) / deviation, 0, atol=0.25)
