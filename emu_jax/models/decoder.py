"""The visual decoder (Emu, section 3.3): a diffusion U-Net conditioned on visual tokens.

There are three kinds of condition. `generated`: visual tokens that the LLM generated beforehand and
that the batch contains. `teacher_forced`: the LLM's prediction of each visual token from the true
visual tokens before it. `encoded`: the visual tokens of the image itself, which makes the model an
autoencoder without an LLM, as in Emu2. Read next: unet.py, vae.py, diffusion.py; ../stages.py for
the loss.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, UInt8

from emu_jax.config import UserError
from emu_jax.models import layers
from emu_jax.models.diffusion import Diffusion
from emu_jax.models.emu import Emu, EmuConfig
from emu_jax.models.lora import LoraConfig
from emu_jax.models.unet import UNet, UNetConfig
from emu_jax.models.vae import Vae, VaeConfig
from emu_jax.types import Batch, DecoderBatch

CONDITIONS = ("generated", "teacher_forced", "encoded")


@dataclass(frozen=True)
class DecoderConfig:
    emu: EmuConfig
    unet: UNetConfig
    # None if the U-Net works on pixels.
    vae: VaeConfig | None
    diffusion: Diffusion
    # Height and width of decoded images, in pixels.
    image: int
    # One of CONDITIONS.
    condition: str

    @classmethod
    def of(cls, model: dict) -> "DecoderConfig":
        """Make the config from `config.model`, which must have the group `decoder`.

        Raises UserError if its parts do not fit together.
        """
        d = model["decoder"]
        try:
            diffusion = Diffusion(**d["diffusion"])
        except ValueError as error:
            raise UserError(f"model.decoder: {error}") from error
        config = cls(
            EmuConfig.of(model),
            UNetConfig(**d["unet"]),
            VaeConfig(**d["vae"]) if d["vae"] else None,
            diffusion,
            d["image"],
            d["condition"],
        )
        config._check()
        return config

    def _check(self) -> None:
        """Raise UserError if the parts do not fit together."""
        factor = self.vae.factor if self.vae else 1
        channels = self.vae.latent if self.vae else 3
        side = self.image // (factor * self.unet.patch)
        multiple = factor * self.unet.divisor
        if self.condition not in CONDITIONS:
            raise UserError(
                f"model.decoder.condition={self.condition!r} is not one of {', '.join(CONDITIONS)}"
            )
        if self.unet.condition != self.emu.llama.width:
            raise UserError(
                f"model.decoder.unet.condition={self.unet.condition}: "
                f"the model's visual tokens have the width {self.emu.llama.width}"
            )
        if self.unet.pooled not in (0, self.emu.resampler.tokens):
            raise UserError(
                f"model.decoder.unet.pooled={self.unet.pooled} must be "
                f"0 or the number of visual tokens, {self.emu.resampler.tokens}"
            )
        if self.unet.side not in (0, side):
            raise UserError(
                f"model.decoder.unet.side={self.unet.side} must be 0 or {side}, "
                "the side of the U-Net's finest level"
            )
        if self.image % multiple:
            in_vae = f"{factor} pixels a latent, " if self.vae else ""
            raise UserError(
                f"model.decoder.image={self.image} must be divisible by {multiple} "
                f"({in_vae}{self.unet.divisor} in the U-Net)"
            )
        if (self.unet.channels_in, self.unet.channels_out) != (channels, channels):
            raise UserError(
                f"model.decoder.unet has {self.unet.channels_in} channels in "
                f"and {self.unet.channels_out} out; "
                f"{'the latents' if self.vae else 'pixels'} have {channels}"
            )

    @property
    def lora(self) -> LoraConfig:
        return self.emu.lora

    @property
    def loader_image(self) -> int:
        """Side in pixels of the images to load: the larger of decoder's and encoder's sides."""
        return max(self.image, self.emu.vision.image)

    @property
    def latents(self) -> tuple[int, int, int]:
        """Shape [h, w, c] of the arrays that are denoised."""
        side = self.image // (self.vae.factor if self.vae else 1)
        return side, side, self.unet.channels_in

    @property
    def moments(self) -> tuple[int, int, int]:
        """Shape [h, w, 2 c] of the `moments` of one image."""
        y, x, c = self.latents
        return y, x, 2 * c


class UNetWithVae(nnx.Module):
    """The U-Net and, if it works on latents, the autoencoder: all that sampling needs."""

    def __init__(self, config: DecoderConfig, rngs: layers.Rngs):
        self.decoder = config
        if config.vae:
            self.vae = Vae(config.vae, rngs)
        self.unet = UNet(config.unet, rngs)

    def clean_latents(
        self, images: UInt8[Array, "M h w 3"], key: Array | None = None
    ) -> Float[Array, "M y x c"]:
        """Compute the arrays x0 to which diffusion adds noise, in float32.

        These are latents or, without an autoencoder, pixels in -1..1. Latents are sampled with
        `key`; without a key they are the mean.
        """
        if not self.decoder.vae:
            return resize_to_unit(images, self.decoder.image)
        return self.sample_latents(moments(self.decoder, self.vae, images), key)

    def sample_latents(
        self, moments: Float[Array, "M y x m"], key: Array | None = None
    ) -> Float[Array, "M y x c"]:
        """Compute the `clean_latents` of images from the `moments` of these images."""
        mean, log_variance = jnp.split(moments.astype(self.decoder.emu.compute), 2, -1)
        return self.vae.sample(mean, log_variance, key).astype(jnp.float32)

    def predict(
        self, x: Float[Array, "M y x c"], times: Float[Array, "M"], condition: Float[Array, "M N D"]
    ) -> Float[Array, "M y x c"]:
        """Run the U-Net on the noisy x at the timesteps `times`; the result is in float32."""
        return self.unet(
            x.astype(self.decoder.emu.compute), times, condition, kernel=self.decoder.emu.attention
        ).astype(jnp.float32)

    def decode_images(self, x: Float[Array, "M y x c"]) -> UInt8[Array, "M h w 3"]:
        """Turn sampled latents or pixels into images: the inverse of `clean_latents`."""
        if self.decoder.vae:
            x = self.vae.decode(
                (x / self.decoder.vae.scale).astype(self.decoder.emu.compute),
                kernel=self.decoder.emu.attention,
            ).astype(jnp.float32)
        return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)


class Decoder(Emu, UNetWithVae):
    """Everything the decoder stage needs: an Emu for the condition, the U-Net and the VAE.

    The LLM is left out unless conditions are teacher-forced, since only these need it here.
    """

    def __init__(self, config: DecoderConfig, rngs: layers.Rngs):
        Emu.__init__(self, config.emu, rngs)
        if config.condition != "teacher_forced":
            del self.llama, self.regress_head
        UNetWithVae.__init__(self, config, rngs)

    def batch_latents(self, batch: Batch, key: Array) -> Float[Array, "M y x c"]:
        """Compute the `clean_latents` of every image of the batch; M = B * I.

        If the batch contains precomputed moments, the images are not encoded again. The latents
        then differ only by rounding.
        """
        if isinstance(batch, DecoderBatch) and batch.latents is not None:
            return self.sample_latents(rearrange(batch.latents, "B I y x m -> (B I) y x m"), key)
        return self.clean_latents(rearrange(batch.images, "B I h w c -> (B I) h w c"), key)

    def encode_batch(self, batch: Batch) -> Float[Array, "M N D"]:
        """Encode every image of the batch into visual tokens; M = B * I."""
        images = rearrange(batch.images, "B I h w c -> (B I) h w c")
        return self.encode(resize(images, self.decoder.emu.vision.image))

    def conditions(self, batch: Batch) -> Float[Array, "M N D"]:
        """Compute the condition of every image of the batch; M = B * I."""
        config = self.decoder
        (B, I) = batch.images.shape[:2]
        if config.condition == "generated":
            # With this condition every batch is a DecoderBatch, which has conditions.
            conditions = batch.conditions  # ty: ignore[missing-attribute]
            return rearrange(conditions, "B I N D -> (B I) N D").astype(config.emu.compute)
        z = self.encode_batch(batch)
        if config.condition == "encoded":
            return z
        visual = rearrange(z, "(B I) N D -> B I N D", B=B)
        x = self.interleave(batch.tokens, visual, batch.image_slots)
        hidden, _ = self.llama(x, batch.positions, batch.segments, kernel=config.emu.attention)
        # The LLM predicts the next position, so the prediction of a visual token is one position
        # before the token.
        positions = batch.image_slots[:, :, None] - 1 + jnp.arange(visual.shape[2])
        positions = rearrange(positions, "B I N -> B (I N)")
        before = jnp.take_along_axis(hidden, positions[..., None], 1, mode="clip")
        predicted = self.regress_head(before)
        return rearrange(predicted, "B (I N) D -> (B I) N D", I=I)


def moments(
    config: DecoderConfig, vae: Vae, images: UInt8[Array, "M h w 3"]
) -> Float[Array, "M y x m"]:
    """Encode images with the VAE into the unscaled means and log variances of their latents.

    Both are concatenated along the channels, so m is twice the number c of latent channels.
    """
    pixels = resize_to_unit(images, config.image).astype(config.emu.compute)
    mean, log_variance = vae.encode(pixels, kernel=config.emu.attention)
    return jnp.concatenate([mean, log_variance], -1)


def resize_to_unit(images: UInt8[Array, "M h w 3"], side: int) -> Float[Array, "M s s 3"]:
    """Resize images to `side` x `side` and scale them to -1..1."""
    return resize(images, side).astype(jnp.float32) / 127.5 - 1


def resize(images: UInt8[Array, "M h w 3"], side: int) -> UInt8[Array, "M s s 3"]:
    """Resize images to `side` x `side`, bicubic with antialiasing, unless they are that large."""
    if images.shape[1:3] == (side, side):
        return images
    x = jax.image.resize(
        images.astype(jnp.float32), (len(images), side, side, 3), "cubic", antialias=True
    )
    return jnp.clip(jnp.round(x), 0, 255).astype(jnp.uint8)
