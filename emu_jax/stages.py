"""The stages of training: what each one trains, and its loss.

`emu` predicts the next element (section 2.2 of the paper): cross-entropy for text, L2 for visual
tokens, whose targets are detached. `contrastive` warms up a new image encoder. `decoder` trains the
U-Net that draws images from visual tokens (section 3.3). Metrics are (sum, weight). Read next:
step.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict

from emu_jax.config import UserError
from emu_jax.data.tokenizer import END_IMG
from emu_jax.losses import fused
from emu_jax.models import diffusion, flops
from emu_jax.models.contrast import READOUT, ContrastiveModel
from emu_jax.models.decoder import Decoder, DecoderConfig
from emu_jax.models.emu import Emu, EmuConfig
from emu_jax.types import Batch, Metrics


def itself(config: EmuConfig) -> EmuConfig:
    """The `emu_config` of a stage whose module is an Emu: the config itself."""
    return config


def encoder_side(config: EmuConfig) -> int:
    """The side, in pixels, of the images that the encoder reads."""
    return config.vision.image


def accept(config: Any) -> None:
    """The `check` of a stage that can train every config."""


@dataclass(frozen=True)
class Stage:
    """Everything that differs between stages."""

    module: type[nnx.Module]
    # (batch) -> the sums over the complete batch by which the loss is normalised.
    loss_weights: Callable[[Batch], dict[str, Float[Array, ""]]]
    # (module, micro-batch, key, sums, objective) -> (the micro-batch's share of the loss, its
    # metrics).
    loss: Callable[..., tuple[Float[Array, ""], Metrics]]
    # (config.model as a dict) -> the module's config.
    make_config: Callable[[dict], Any] = EmuConfig.of
    # (the module's config) -> the config of the Emu in it.
    emu_config: Callable[[Any], EmuConfig] = itself
    # (the module's config) -> the side, in pixels, of the images in a batch.
    image_side: Callable[[Any], int] = encoder_side
    # (the module's config, what trains, counts) -> FLOPs of a step by tower.
    step_flops: Callable[..., dict[str, flops.Count]] = flops.train
    # Raises UserError for a config of the module that the stage cannot train.
    check: Callable[[Any], None] = accept
    # Whether the model has an LLM that answers questions and captions images.
    answers: bool = False
    # Whether the model has a decoder that draws images, with the average of its weights.
    draws: bool = False


def get_stage(c: ConfigDict) -> Stage:
    """The stage of a config. Raises UserError for an unknown one."""
    if c.stage not in STAGES:
        raise UserError(f"stage={c.stage!r} is not one of {', '.join(STAGES)}")
    stage = STAGES[c.stage]
    if c.data.latents:
        stage = replace(stage, step_flops=decoder_flops_from_latents)
    return stage


def decoder_flops_from_latents(
    config: DecoderConfig, trained: dict[str, bool], **counts: flops.Count
) -> dict[str, flops.Count]:
    """`flops.train_decoder` for data with precomputed latents, so that no image is encoded."""
    return flops.train_decoder(config, trained, encodes=False, **counts)


def flops_towers(params: dict[str, Any]) -> set[str]:
    """Entries of `flops.forward` that a model with these parameters has."""
    heads = {"heads"} if "llama" in params else set()
    return set(params) | heads


def emu_sums(batch: Batch) -> dict[str, Float[Array, ""]]:
    """Total weight of the labels, and of the regressed images."""
    return {"text": label_weights(batch).sum(), "image": image_weights(batch).sum()}


def emu(
    model: Emu, batch: Batch, key, totals: dict, objective: Mapping[str, Any]
) -> tuple[Float[Array, ""], Metrics]:
    """text_weight * mean cross-entropy + image_weight * mean squared error.

    totals: `emu_sums` of the batch that this micro-batch is part of; the means are over that batch.
    """
    batch = shifted(batch, key, objective["shift"])
    hidden, visual = model(batch, key)
    return next_element(model, hidden, visual, batch, totals, objective)


def next_element(
    model: Emu,
    hidden: Float[Array, "B T D"],
    visual: Float[Array, "B I N D"],
    batch: Batch,
    totals: dict,
    objective: Mapping[str, Any],
) -> tuple[Float[Array, ""], Metrics]:
    """The loss and metrics of `emu`, given the LLM's hidden states and the visual tokens.

    An image counts once, whether it has N or N + 1 targets.
    """
    N = visual.shape[2]
    counts = image_weights(batch)
    predictors = batch.image_slots[:, :, None] - 1 + jnp.arange(N)
    targets = visual
    # The embedding of [/IMG] may be regressed too, after the last visual token.
    if objective["regress_end"]:
        end = model.llama.embeddings(
            jnp.full((1, 1), model.config.llama.vocab + END_IMG), visual.dtype
        )
        targets = jnp.concatenate(
            [visual, jnp.broadcast_to(end, (*visual.shape[:2], 1, visual.shape[3]))], 2
        )
        predictors = batch.image_slots[:, :, None] - 1 + jnp.arange(N + 1)
    per_image = targets.shape[2]
    text = jnp.maximum(totals["text"], 1)
    image = jnp.maximum(totals["image"], 1)
    loss, nll, error = fused(
        hidden,
        model.llama.head(),
        {"w": model.regress_head.w.get_value()},
        labels=jnp.roll(batch.tokens, -1, 1),
        label_weights=label_weights(batch),
        predictors=rearrange(predictors, "B I N -> B (I N)"),
        targets=rearrange(targets, "B I N D -> B (I N) D"),
        target_weights=jnp.repeat(counts, per_image, axis=1),
        text_scale=objective["text_weight"] / text,
        image_scale=objective["image_weight"] / (image * per_image),
        chunk=objective["chunk"],
    )

    error = rearrange(error, "B (I N) -> B I N", N=per_image).mean(-1)
    nll = nll * label_weights(batch)
    words = label_weights(batch)
    source_of_image = jnp.take_along_axis(
        batch.sources, jnp.minimum(batch.image_slots, batch.tokens.shape[1] - 1), 1
    )

    def by_source(values, sources):
        return jax.ops.segment_sum(values.ravel(), sources.ravel(), objective["sources"])

    return loss, {
        "text_loss": (nll.sum(), words.sum()),
        "image_loss": ((error * counts).sum(), counts.sum()),
        "text_loss_by_source": (by_source(nll, batch.sources), by_source(words, batch.sources)),
        "image_loss_by_source": (
            by_source(error * counts, source_of_image),
            by_source(counts, source_of_image),
        ),
        "visual_variance": variance(visual, counts),
    }


def image_sums(batch: Batch) -> dict[str, Float[Array, ""]]:
    """Total weight of the images."""
    return {"image": image_weights(batch).sum()}


def contrastive(
    model: ContrastiveModel, batch: Batch, key, totals: dict, objective: Mapping[str, Any]
) -> tuple[Float[Array, ""], Metrics]:
    """Symmetric InfoNCE between images and their documents' texts, plus three regularisers.

    The negatives of an image are the texts of its micro-batch that differ from its own. The
    regularisers are readout_weight x the squared error of a linear read-out of the pixels, and
    VICReg's two terms (arXiv 2105.04906), without which visual tokens become small and span few
    directions: spread x a hinge on the standard deviation of each dimension, and decorrelate x the
    squared correlations between dimensions.
    """
    batch = shifted(batch, key, objective["shift"])
    images = rearrange(batch.images, "B I h w c -> (B I) h w c")
    counts = image_weights(batch).ravel()

    def mean_over(equation, *values):
        return jnp.einsum(equation, *values, counts) / jnp.maximum(counts.sum(), 1)

    # Standardised visual tokens, and VICReg's two terms.
    visual = model.encode(images, key).astype(jnp.float32)
    mean = mean_over("mnd,m->nd", visual)
    squared_deviation = mean_over("mnd,m->nd", (visual - mean) ** 2)
    z = (visual - mean) * jax.lax.rsqrt(squared_deviation + 1e-6)
    variance_hinge = jax.nn.relu(1 - jnp.sqrt(squared_deviation + 1e-6)).mean()
    correlation = mean_over("mnd,mne,m->nde", z, z)
    diagonal = jnp.square(jnp.einsum("ndd->nd", correlation)).sum(1)
    off_diagonal = jnp.square(correlation).sum((1, 2)) - diagonal
    covariance_penalty = off_diagonal.mean() / z.shape[-1]

    def normalize(x):
        return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-6)

    # InfoNCE; equal texts are not negatives of each other, and missing images match nothing.
    u = normalize(model.contrast.image(visual))
    w = normalize(rearrange(model.contrast.text(batch), "B I D -> (B I) D"))
    similarity = jnp.einsum("md,nd->mn", u, w, preferred_element_type=jnp.float32)
    logits = similarity / objective["temperature"]
    same = jax.lax.stop_gradient(w @ w.T > 1 - 1e-5) & ~jnp.eye(len(counts), dtype=bool)
    logits = jnp.where(same | (counts[None] == 0) | (counts[:, None] == 0), -1e9, logits)
    nll = (jax.nn.logsumexp(logits, 0) + jax.nn.logsumexp(logits, 1)) / 2 - jnp.diagonal(logits)
    top1 = jnp.argmax(logits, 1) == jnp.arange(len(counts))

    readout_error = jnp.mean(
        (model.contrast.pixels(visual) - small_images(images)) ** 2, axis=(1, 2, 3)
    )
    each = (
        nll
        + objective["readout_weight"] * readout_error
        + objective["spread"] * variance_hinge
        + objective["decorrelate"] * covariance_penalty
    )

    def per_image(values):
        return ((values * counts).sum(), counts.sum())

    return (each * counts).sum() / jnp.maximum(totals["image"], 1), {
        "contrastive_loss": per_image(nll),
        "readout_loss": per_image(readout_error),
        "correlation": per_image(covariance_penalty),
        "top1": per_image(top1),
        "visual_variance": variance(visual, counts),
    }


def small_images(images: UInt8[Array, "m h w 3"]) -> Float[Array, "m y x 3"]:
    """Downscale images to READOUT x READOUT pixels in -1..1, each the mean of a patch."""
    m, h, _, _ = images.shape
    patches = images.astype(jnp.float32).reshape(m, READOUT, h // READOUT, READOUT, -1, 3)
    return patches.mean((2, 4)) / 127.5 - 1


def decoder(
    model: Decoder, batch: Batch, key, totals: dict, objective: Mapping[str, Any]
) -> tuple[Float[Array, ""], Metrics]:
    """Weighted mean squared error of the U-Net's prediction, at a random timestep per image.

    models/diffusion.py defines weights and targets. For a share `condition_drop` of the images, the
    condition is replaced by zeros. No gradient flows into the condition or the image. Without a
    key, as in evaluation, noise and timesteps are always the same.
    """
    keys = jax.random.split(jax.random.key(0) if key is None else key, 5)
    d = model.decoder.diffusion
    counts = image_weights(batch).ravel()
    condition = model.conditions(batch)
    if key is not None and model.decoder.condition == "generated" and objective["encoded_share"]:
        encoded = jax.random.bernoulli(keys[4], objective["encoded_share"], counts.shape)
        condition = jnp.where(encoded[:, None, None], model.encode_batch(batch), condition)
    condition = jax.lax.stop_gradient(condition)
    if key is not None:
        dropped = jax.random.bernoulli(keys[0], objective["condition_drop"], counts.shape)
        condition = jnp.where(dropped[:, None, None], 0, condition)
    x0 = jax.lax.stop_gradient(model.batch_latents(batch, keys[1]))
    eps = jax.random.normal(keys[2], x0.shape)
    timesteps = diffusion.sample_timesteps(d, keys[3], len(x0))
    noisy = diffusion.add_noise(d, x0, eps, timesteps)
    predicted = model.predict(noisy, timesteps, condition)
    error = jnp.square(predicted - diffusion.target(d, x0, eps, timesteps)).mean((1, 2, 3))
    weighted = error * diffusion.loss_weights(d, timesteps) * counts
    return weighted.sum() / jnp.maximum(totals["image"], 1), {
        "diffusion_loss": ((error * counts).sum(), counts.sum()),
        "condition_variance": variance(condition, counts),
    }


def check_readout(config: EmuConfig) -> None:
    """Raise UserError if the side of the images is not a multiple of READOUT."""
    if config.vision.image % READOUT:
        raise UserError(
            f"model.vision.image={config.vision.image} must be a multiple of {READOUT}: "
            f"the contrastive stage predicts {READOUT} x {READOUT} pixels from the visual tokens"
        )


STAGES = {
    "emu": Stage(module=Emu, loss_weights=emu_sums, loss=emu, answers=True),
    "contrastive": Stage(
        module=ContrastiveModel, loss_weights=image_sums, loss=contrastive, check=check_readout
    ),
    "decoder": Stage(
        module=Decoder,
        loss_weights=image_sums,
        loss=decoder,
        make_config=DecoderConfig.of,
        emu_config=attrgetter("emu"),
        image_side=attrgetter("loader_image"),
        step_flops=flops.train_decoder,
        draws=True,
    ),
}


def label_weights(batch: Batch) -> Float[Array, "B T"]:
    """Weight of the label that each position predicts, the next token; 0 at the row's end."""
    return jnp.pad(batch.text_weights[:, 1:], ((0, 0), (0, 1)))


def image_weights(batch: Batch) -> Float[Array, "B I"]:
    """Weight of each image, 0 where a row has no i-th image."""
    return batch.image_weights * batch.has_image


def variance(visual: Float[Array, "... N D"], counts: Float[Array, "..."]) -> tuple[Array, Array]:
    """Variance of visual tokens across images, as (sum, weight).

    The sum is over images: each adds its squared distance from the mean of all images, averaged
    over tokens and dimensions. It is 0 if the tokens of all images are the same.
    """
    z = visual.astype(jnp.float32).reshape(-1, *visual.shape[-2:])
    counts = counts.ravel()
    mean = jnp.einsum("mnd,m->nd", z, counts) / jnp.maximum(counts.sum(), 1)
    return jnp.einsum("mnd,m->", (z - mean) ** 2, counts) / mean.size, counts.sum()


def shifted(batch: Batch, key, pixels: int) -> Batch:
    """Shift each image by up to `pixels` along both axes, repeating its edges.

    Without a key, the batch is returned unchanged.
    """
    if key is None or pixels == 0:
        return batch
    B, I, h, w, _ = batch.images.shape
    moves = jax.random.randint(jax.random.fold_in(key, 1), (B, I, 2), -pixels, pixels + 1)
    y, x = (
        jnp.clip(jnp.arange(size) - moves[..., axis, None], 0, size - 1)
        for axis, size in ((0, h), (1, w))
    )

    def take(image, y, x):
        return image[y][:, x]

    return replace(batch, images=jax.vmap(jax.vmap(take))(batch.images, y, x))
