"""The visual decoder (section 2.3 of Emu's paper): a U-Net that draws what N visual tokens say,
beside the Emu that says them.

A condition is made of a document's image and text: `generated` (what the LLM regresses, made
beforehand: it comes with the batch), `teacher_forced` (what it predicts for each token from the
true ones before) or `encoded` (the image's own visual tokens: an autoencoder without an LLM, as in
Emu2). Read next: unet.py, vae.py, diffusion.py; ../stages.py for the loss.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, UInt8

from emu_jax.config import UserError
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
    # None: the U-Net works on pixels
    vae: VaeConfig | None
    diffusion: Diffusion
    # pixels a side of what is drawn
    image: int
    # its source
    condition: str

    @classmethod
    def of(cls, model: dict) -> "DecoderConfig":
        """From `config.model` with its group `decoder`. Raises UserError for parts that do not fit
        one another.
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
        factor = config.vae.factor if config.vae else 1
        channels = config.vae.latent if config.vae else 3
        if config.condition not in CONDITIONS:
            raise UserError(
                f"model.decoder.condition={config.condition!r} is not one of {', '.join(CONDITIONS)}"
            )
        if config.unet.condition != config.emu.llama.width:
            raise UserError(
                f"model.decoder.unet.condition={config.unet.condition}: "
                f"the model's visual tokens have the width {config.emu.llama.width}"
            )
        if config.unet.pooled not in (0, config.emu.resampler.tokens):
            raise UserError(
                f"model.decoder.unet.pooled={config.unet.pooled} must be "
                f"0 or the number of visual tokens, {config.emu.resampler.tokens}"
            )
        if config.unet.side not in (0, config.image // (factor * config.unet.patch)):
            raise UserError(
                f"model.decoder.unet.side={config.unet.side} must be 0 or {config.image // (factor * config.unet.patch)}, the places a side"
            )
        if config.image % (factor * config.unet.divisor):
            raise UserError(
                f"model.decoder.image={config.image} must be divisible by {factor * config.unet.divisor} "
                f"({f'{factor} pixels a latent, ' if config.vae else ''}{config.unet.divisor} in the U-Net)"
            )
        if (config.unet.channels_in, config.unet.channels_out) != (channels, channels):
            raise UserError(
                f"model.decoder.unet has {config.unet.channels_in} channels in and {config.unet.channels_out} out; "
                f"{'the latents' if config.vae else 'pixels'} have {channels}"
            )
        return config

    @property
    def lora(self) -> LoraConfig:
        return self.emu.lora

    @property
    def loader_image(self) -> int:
        """Pixels a side of the images that the loader gives: the larger of what is drawn and what
        the encoder sees.
        """
        return max(self.image, self.emu.vision.image)

    @property
    def latents(self) -> tuple[int, int, int]:
        """Shape of what is denoised."""
        side = self.image // (self.vae.factor if self.vae else 1)
        return side, side, self.unet.channels_in

    @property
    def moments(self) -> tuple[int, int, int]:
        """Shape of `moments` of an image."""
        y, x, c = self.latents
        return y, x, 2 * c


class UNetWithVae(nnx.Module):
    """The U-Net and its autoencoder: all that drawing needs of a decoder."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.decoder = config
        if config.vae:
            self.vae = Vae(config.vae, rngs)
        self.unet = UNet(config.unet, rngs)

    def clean_latents(
        self, images: UInt8[Array, "M h w 3"], key: Array | None = None
    ) -> Float[Array, "M y x c"]:
        """What is to be drawn: pixels in -1..1, or their latents (drawn with `key`, else their
        mean), in float32.
        """
        if not self.decoder.vae:
            return resize_to_unit(images, self.decoder.image)
        return self.sample_latents(moments(self.decoder, self.vae, images), key)

    def sample_latents(
        self, moments: Float[Array, "M y x m"], key: Array | None = None
    ) -> Float[Array, "M y x c"]:
        """As `clean_latents`, of images of which `moments` said this."""
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
        """Images of what was sampled: the inverse of `clean_latents`."""
        if self.decoder.vae:
            x = self.vae.decode(
                (x / self.decoder.vae.scale).astype(self.decoder.emu.compute),
                kernel=self.decoder.emu.attention,
            ).astype(jnp.float32)
        return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)


class Decoder(Emu, UNetWithVae):
    """The towers of training: the Emu that makes the condition (without its LLM where that has no
    say), and what draws.
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        Emu.__init__(self, config.emu, rngs)
        if config.condition != "teacher_forced":
            del self.llama, self.regress_head
        UNetWithVae.__init__(self, config, rngs)

    def batch_latents(self, batch: Batch, key: Array) -> Float[Array, "M y x c"]:
        """`clean_latents` of every image of the batch, M = B * I, from the moments that came with it if
        some did: the same but for their rounding.
        """
        if isinstance(batch, DecoderBatch) and batch.latents is not None:
            return self.sample_latents(rearrange(batch.latents, "B I y x m -> (B I) y x m"), key)
        return self.clean_latents(rearrange(batch.images, "B I h w c -> (B I) h w c"), key)

    def encode_batch(self, batch: Batch) -> Float[Array, "M N D"]:
        """The visual tokens of every image of the batch."""
        return self.encode(
            resize(
                rearrange(batch.images, "B I h w c -> (B I) h w c"), self.decoder.emu.vision.image
            )
        )

    def conditions(self, batch: Batch) -> Float[Array, "M N D"]:
        """The condition of every image of the batch, M = B * I."""
        config = self.decoder
        (B, I) = batch.images.shape[:2]
        if config.condition == "generated":
            return rearrange(batch.conditions, "B I N D -> (B I) N D").astype(config.emu.compute)
        z = self.encode_batch(batch)
        if config.condition == "encoded":
            return z
        visual = rearrange(z, "(B I) N D -> B I N D", B=B)
        x = self.interleave(batch.tokens, visual, batch.image_slots)
        hidden, _ = self.llama(x, batch.positions, batch.segments, kernel=config.emu.attention)
        places = rearrange(
            batch.image_slots[:, :, None] - 1 + jnp.arange(visual.shape[2]), "B I N -> B (I N)"
        )
        predicted = self.regress_head(
            jnp.take_along_axis(hidden, places[..., None], 1, mode="clip")
        )
        return rearrange(predicted, "B (I N) D -> (B I) N D", I=I)


def moments(
    config: DecoderConfig, vae: Vae, images: UInt8[Array, "M h w 3"]
) -> Float[Array, "M y x m"]:
    """What the autoencoder's encoder makes of images: the means of their latents, unscaled, and
    beside them the log variances, m = 2 c.
    """
    return jnp.concatenate(
        vae.encode(
            resize_to_unit(images, config.image).astype(config.emu.compute),
            kernel=config.emu.attention,
        ),
        -1,
    )


def resize_to_unit(images: UInt8[Array, "M h w 3"], side: int) -> Float[Array, "M s s 3"]:
    """`resize`, in -1..1."""
    return resize(images, side).astype(jnp.float32) / 127.5 - 1


def resize(images: UInt8[Array, "M h w 3"], side: int) -> UInt8[Array, "M s s 3"]:
    """Bicubic, with the finer detail filtered out first; unchanged where it fits."""
    if images.shape[1:3] == (side, side):
        return images
    x = jax.image.resize(
        images.astype(jnp.float32), (len(images), side, side, 3), "cubic", antialias=True
    )
    return jnp.clip(jnp.round(x), 0, 255).astype(jnp.uint8)
