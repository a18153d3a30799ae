"""The decoder stage: what trains, sources of conditions, and reproducible sampling."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emu_jax import config, sharding, tree
from emu_jax.config import UserError
from emu_jax.generate import samplers
from emu_jax.models import emu, flops, module
from emu_jax.models.decoder import Decoder, DecoderConfig, moments, resize
from emu_jax.step import cast_frozen, init_state, train_step
from emu_jax.types import DecoderBatch
from tests.support import make
from tests.support.trees import assert_bitwise_equal

C = make.decoder_cfg("optim.ema=0.9")
P = make.program(C)
PARAMS = jax.jit(partial(cast_frozen, P))(make.random_params(P))
BATCH = make.batch(C)
# Row 2 has no image.
BATCH.image_slots[2] = C.data.tokens
BATCH = jax.device_put(BATCH)


def model(params, model_config=P.model_config):
    return module.bind(Decoder, model_config, params)


@pytest.fixture(scope="module")
def trained():
    """The states before and after two steps, and the metrics of each step."""
    states = [jax.jit(partial(init_state, P))(PARAMS)]
    told = []
    step = jax.jit(partial(train_step, P))
    for _ in range(2):
        state, metrics = step(states[-1], BATCH)
        states.append(state)
        told.append(metrics)
    return jax.device_get((states, told))


# What trains


def test_frozen_towers_stay_as_they_are(trained):
    (before, *_, after), _ = trained
    assert_bitwise_equal(after.frozen, before.frozen)
    assert {path.split("/")[0] for path, _ in make.flat(after.frozen)} == {
        "vision",
        "ln_visual",
        "resampler",
        "llama",
        "regress_head",
    }
    moved = [
        (np.asarray(new) != np.asarray(old)).any()
        for old, new in zip(*(jax.tree.leaves(state.trainable) for state in (before, after)))
    ]
    assert np.mean(moved) > 0.95


def test_frozen_towers_have_neither_gradient_nor_optimizer_state(trained):
    state = trained[0][-1]
    held = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(
            (state.opt_state, state.ema, state.trainable)
        )
    ]
    assert held and not [
        path
        for path in held
        if any(tower in path for tower in ("vision", "resampler", "llama", "regress_head"))
    ]
    assert {path.split("/")[0] for path, _ in make.flat(state.trainable)} == {"unet"}


def test_frozen_matrices_are_bfloat16_and_all_else_is_float32(trained):
    for path, leaf in make.flat(trained[0][-1].frozen):
        assert leaf.dtype == (
            jnp.bfloat16 if path.endswith(("/w", "/base", "/added")) else jnp.float32
        ), path
    assert {leaf.dtype for _, leaf in make.flat(trained[0][-1].trainable)} == {jnp.dtype("float32")}


def test_the_average_follows_by_its_decay(trained):
    first, second, third = trained[0]
    for old, new, weights in (
        (first.ema, second.ema, second.trainable),
        (second.ema, third.ema, third.trainable),
    ):
        want = jax.tree.map(lambda a, w: 0.9 * a + 0.1 * w, old, weights)
        chex.assert_trees_all_close(new, want, rtol=1e-4, atol=1e-6)


def test_the_loss_is_a_mean_over_images_and_micro_batches_change_nothing_of_it(trained):
    """Without images the loss is 0; the sums over micro-batches are the sums over the batch."""
    empty = BATCH.replace(image_weights=np.zeros_like(BATCH.image_weights))
    loss, metrics = jax.jit(
        lambda batch: P.stage.loss(
            model(PARAMS), batch, None, P.stage.loss_weights(batch), P.objective
        )
    )(empty)
    assert loss == 0 and metrics["diffusion_loss"][1] == 0
    held = float(np.sum(BATCH.has_image))
    assert 0 < held < BATCH.image_slots.size and trained[1][0]["diffusion_loss"][1] == held


# Conditions


def conditions(c, *batches):
    p = make.program(c)
    params = {tower: PARAMS[tower] for tower in make.abstract(p)}
    made = jax.jit(lambda batch: model(params, p.model_config).conditions(batch))
    return [np.asarray(made(batch)) for batch in batches]


@pytest.fixture(scope="module")
def predicted():
    return conditions(C, BATCH)[0]


def test_encoded_conditions_are_the_visual_tokens_and_need_no_llm():
    c = make.decoder_cfg("model.decoder.condition=encoded")
    assert set(make.abstract(make.program(c))) == {
        "vision",
        "ln_visual",
        "resampler",
        "unet",
    }
    plain = module.bind(
        emu.Encoder,
        P.model_config.emu,
        {tower: PARAMS[tower] for tower in ("vision", "ln_visual", "resampler")},
    )
    tokens = np.asarray(BATCH.tokens)
    other = BATCH.replace(tokens=np.where(tokens < 512, (tokens + 1) % 512, tokens))
    before, after = conditions(c, BATCH, other)
    encoded = jax.jit(plain.encode)(np.asarray(BATCH.images)[:, 0])
    np.testing.assert_allclose(before, encoded, atol=1e-4)
    np.testing.assert_array_equal(after, before)


def test_teacher_forced_conditions_are_the_llms_predictions(predicted):
    full = module.bind(
        emu.Emu,
        P.model_config.emu,
        {tower: part for tower, part in PARAMS.items() if tower != "unet"},
    )
    hidden = np.asarray(jax.jit(lambda batch: full.regress_head(full(batch)[0]))(BATCH))
    held = 0
    for row, slot in enumerate(np.asarray(BATCH.image_slots)[:, 0]):
        if slot < C.data.tokens:
            np.testing.assert_allclose(
                predicted[row], hidden[row, slot - 1 : slot - 1 + predicted.shape[1]], atol=1e-4
            )
            held += 1
    assert held > 2


def test_a_dropped_condition_is_zero_and_the_share_is_the_configs(trained):

    def seen(key):
        found = []
        spy = model(PARAMS)
        spy.conditions = lambda batch: jnp.ones((8, 4, 32))
        spy.predict = lambda x, times, condition: found.append(condition) or x
        totals = P.stage.loss_weights(BATCH)
        for share in (0.0, 1.0):
            P.stage.loss(spy, BATCH, key, totals, P.objective.copy({"condition_drop": share}))
        return found

    kept, dropped = jax.jit(seen)(jax.random.key(0))
    assert np.min(kept) == 1 and np.max(dropped) == 0


# Pictures


def test_pixels_are_the_inverse_of_targets():
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    bound = model(PARAMS)
    back = jax.jit(lambda images: bound.decode_images(bound.clean_latents(images)))(images)
    np.testing.assert_array_equal(back, images)


def test_resized_keeps_what_fits_and_flat_colours():
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)), jnp.uint8)
    assert resize(images, 8) is images
    np.testing.assert_array_equal(resize(jnp.full((1, 28, 28, 3), 77, jnp.uint8), 8), 77)
    np.testing.assert_array_equal(resize(images[:, :, ::-1], 4), resize(images, 4)[:, :, ::-1])


def test_sampling_is_a_function_of_the_seed_on_any_mesh(predicted):
    schedule = samplers.schedule_for(P.model_config.diffusion, "ddim", 2)

    def draw(params, condition, seeds):
        bound = model(params)
        denoise = samplers.guided_denoiser(
            P.model_config.diffusion,
            bound.predict,
            condition,
            jnp.zeros_like(condition),
            guidance=2.0,
        )
        return samplers.ddim(
            denoise, samplers.initial_noise(seeds, P.model_config.latents), schedule
        )

    seeds = np.arange(8)
    draw = jax.jit(draw)
    params = jax.device_get(PARAMS)
    alone, other = (np.asarray(draw(params, predicted, s)) for s in (seeds, seeds + 1))
    assert np.abs(alone - other).max() > 0.1
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.shardings(mesh, sharding.specs(params)))
        np.testing.assert_allclose(draw(placed, predicted, seeds), alone, atol=1e-3)


def test_latents_that_come_with_the_batch_are_those_of_its_images():
    """Stored latents give the same samples as encoding does, up to rounding, also in bfloat16.

    With stored latents the batch's images are not used: here they are zeros.
    """
    p = make.program(
        make.decoder_cfg("model.decoder.condition=encoded", "model.compute=bfloat16", vae=True)
    )
    params = make.random_params(p)

    def both(images, keys):
        bound = model(params, p.model_config)
        stored = moments(p.model_config, bound.vae, images[:, 0]).astype(jnp.float16)
        batch = DecoderBatch(
            **vars(BATCH.replace(images=jnp.zeros_like(images))), latents=stored[:, None]
        )
        return (
            stored,
            [bound.clean_latents(images[:, 0], key) for key in keys],
            [bound.batch_latents(batch, key) for key in keys],
        )

    stored, step, once = jax.jit(both)(BATCH.images, jax.random.split(jax.random.key(0)))
    stored, step, once = jax.device_get((stored, step, once))
    assert (
        stored.shape[1:] == p.model_config.moments == (4, 4, 8)
        and step[0].shape[1:] == p.model_config.latents
        and np.abs(step[0] - step[1]).max() > 0.1
    )
    for a, b in zip(step, once):
        np.testing.assert_allclose(b, a, rtol=5e-3, atol=5e-3 * np.abs(a).max())


# Sizes


def test_the_papers_decoder():
    """The paper's U-Net is SD 1.5's with a condition of width 5120 in place of 768.

    SD 1.5's U-Net has 859,520,964 parameters and 16 transformers, whose keys and values grow.
    """
    c = config.load(["--config=configs/decoder.py"])
    model_config = DecoderConfig.of(c.model.to_dict())
    abstract = module.abstract(Decoder, model_config)
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract["unet"]))
    widths = 5 * 320 + 5 * 640 + 6 * 1280
    assert count == 859_520_964 + 2 * (5120 - 768) * widths
    specs = dict(tree.leaves(sharding.specs(abstract)))
    for path, leaf in tree.leaves(abstract):
        for n, axes in zip(leaf.shape, specs[path]):
            assert axes is None or n % (32 if "unet" in path or "vae" in path else 1) == 0, (
                path,
                leaf.shape,
            )
    # That is about 0.4 T multiply-adds, the usual figure for SD 1.5.
    assert flops.unet(model_config.unet, 64, 77) == pytest.approx(8.0e11, rel=0.05)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.decoder.image=9", "image=9 must be divisible by 2 .2 in the U-Net"),
        ("model.decoder.condition=drawn", "is not one of generated, teacher_forced, encoded"),
        (
            "model.decoder.unet.condition=16",
            "unet.condition=16: the model's visual tokens have the width 32",
        ),
        ("model.decoder.unet.pooled=3", "pooled=3 must be 0 or the number of visual tokens, 4"),
        ("model.decoder.unet.side=3", "side=3 must be 0 or"),
        ("model.decoder.unet.channels_in=4", "4 channels in and 3 out; pixels have 3"),
        ("model.decoder.diffusion.target=noise", "target='noise' is not one of"),
        ("model.decoder.diffusion.zero_snr=true", "use target='v'"),
    ],
)
def test_parts_that_do_not_fit_are_one_line(override, message):
    with pytest.raises(UserError, match=message):
        DecoderConfig.of(make.decoder_cfg(override).model.to_dict())
