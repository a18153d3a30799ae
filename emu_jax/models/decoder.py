"""The visual decoder (Emu, section 3.3): a diffusion U-Net conditioned on visual tokens.

The condition is one of: `generated` (visual tokens that the LLM generated beforehand; part of the
batch), `teacher_forced` (the LLM's prediction of each visual token from the true ones before it) or
`encoded` (the image's own visual tokens, which makes an autoencoder without an LLM, as in Emu2).
Read next: unet.py, vae.py, diffusion.py; ../stages.py for the loss.
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
    # None: the U-Net works on pixels.
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
        """Side in pixels of the images to load: the larger of the decoder's and the encoder's."""
        return max(self.image, self.emu.vision.image)

    @property
    def latents(self) -> tuple[int, int, int]:
        """Shape [h, w, c] of the arrays that are denoised."""
        side = self.image // (self.vae.factor if self.vae else 1)
        return side, side, self.unet.channels_in

    @property
    def moments(self) -> tuple[int, int, int]:
        """Shape of one image's `moments`."""
        y, x, c = self.latents
        return y, x, 2 * c


class UNetWithVae(nnx.Module):
    """The U-Net and its autoencoder, if any: the part of a decoder that sampling needs."""

    def __init__(self, config: DecoderConfig, rngs: layers.Rngs):
        self.decoder = config
        if config.vae:
            self.vae = Vae(config.vae, rngs)
        self.unet = UNet(config.unet, rngs)

    def clean_latents(
        self, images: UInt8[Array, "M h w 3"], key: Array | None = None
    ) -> Float[Array, "M y x c"]:
        """Diffusion's x0 in float32: pixels in -1..1, or latents.

        Latents are sampled with `key`; without it they are the mean.
        """
        if not self.decoder.vae:
            return resize_to_unit(images, self.decoder.image)
        return self.sample_latents(moments(self.decoder, self.vae, images), key)

    def sample_latents(
        self, moments: Float[Array, "M y x m"], key: Array | None = None
    ) -> Float[Array, "M y x c"]:
        """`clean_latents` of images whose `moments` are known."""
        mean, log_variance = jnp.split(moments.astype(self.decoder.emu.compute), 2, -1)
        return self.vae.sample(mean, log_variance, key).astype(jnp.float32)

    def predict(
        self, x: Float[Array, "M y x c"], times: Float[Array, "M"], condition: Float[Array, "M N D"]
    ) -> Float[Array, "M y x c"]:
        """The U-Net's prediction, in float32."""
        return self.unet(
            x.astype(self.decoder.emu.compute), times, condition, kernel=self.decoder.emu.attention
        ).astype(jnp.float32)

    def decode_images(self, x: Float[Array, "M y x c"]) -> UInt8[Array, "M h w 3"]:
        """Images of sampled latents or pixels: the inverse of `clean_latents`."""
        if self.decoder.vae:
            x = self.vae.decode(
                (x / self.decoder.vae.scale).astype(self.decoder.emu.compute),
                kernel=self.decoder.emu.attention,
            ).astype(jnp.float32)
        return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)


class Decoder(Emu, UNetWithVae):
    """Everything the decoder stage needs: an Emu for the condition, the U-Net and the VAE.

    Emu's LLM is left out unless conditions are teacher-forced.
    """

    def __init__(self, config: DecoderConfig, rngs: layers.Rngs):
        Emu.__init__(self, config.emu, rngs)
        if config.condition != "teacher_forced":
            del self.llama, self.regress_head
        UNetWithVae.__init__(self, config, rngs)

    def batch_latents(self, batch: Batch, key: Array) -> Float[Array, "M y x c"]:
        """`clean_latents` of every image of the batch, M = B * I.

        Precomputed moments of the batch are used if present; they differ only by rounding.
        """
        if isinstance(batch, DecoderBatch) and batch.latents is not None:
            return self.sample_latents(rearrange(batch.latents, "B I y x m -> (B I) y x m"), key)
        return self.clean_latents(rearrange(batch.images, "B I h w c -> (B I) h w c"), key)

    def encode_batch(self, batch: Batch) -> Float[Array, "M N D"]:
        """The visual tokens of every image of the batch."""
        images = rearrange(batch.images, "B I h w c -> (B I) h w c")
        return self.encode(resize(images, self.decoder.emu.vision.image))

    def conditions(self, batch: Batch) -> Float[Array, "M N D"]:
        """The condition of every image of the batch, M = B * I."""
        config = self.decoder
        (B, I) = batch.images.shape[:2]
        if config.condition == "generated":
            # With this condition every batch is a DecoderBatch.
            conditions = batch.conditions  # ty: ignore[missing-attribute]
            return rearrange(conditions, "B I N D -> (B I) N D").astype(config.emu.compute)
        z = self.encode_batch(batch)
        if config.condition == "encoded":
            return z
        visual = rearrange(z, "(B I) N D -> B I N D", B=B)
        x = self.interleave(batch.tokens, visual, batch.image_slots)
        hidden, _ = self.llama(x, batch.positions, batch.segments, kernel=config.emu.attention)
        # Each visual token is predicted from the position before its own.
        positions = batch.image_slots[:, :, None] - 1 + jnp.arange(visual.shape[2])
        positions = rearrange(positions, "B I N -> B (I N)")
        before = jnp.take_along_axis(hidden, positions[..., None], 1, mode="clip")
        predicted = self.regress_head(before)
        return rearrange(predicted, "B (I N) D -> (B I) N D", I=I)


def moments(
    config: DecoderConfig, vae: Vae, images: UInt8[Array, "M h w 3"]
) -> Float[Array, "M y x m"]:
    """The VAE encoder's output: unscaled means of the latents, then log variances; m = 2 c."""
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
