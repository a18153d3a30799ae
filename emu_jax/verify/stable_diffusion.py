"""Compare the decoder with diffusers: U-Net, VAE, schedule, loss, gradients and samplers."""

import json
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from emu_jax import tree
from emu_jax.config import UserError
from emu_jax.generate import samplers
from emu_jax.models.diffusion import Diffusion, add_noise, alphas_cumprod, target
from emu_jax.models.module import abstract, bind
from emu_jax.models.unet import UNet, UNetConfig
from emu_jax.models.vae import Vae, VaeConfig
from emu_jax.verify.golden import Quantity, compare, weights
from emu_jax.weights import convert
from emu_jax.weights import stable_diffusion as family

INPUTS = (
    "unet_config",
    "vae_config",
    "seed",
    "parameter_names",
    "parameter_shapes",
    "latents",
    "condition",
    "timesteps",
    "image",
    "noise",
    "unconditional",
    "x_init",
    "grad_names",
)
NEEDED = (
    *INPUTS,
    "unet_out",
    "vae_mean",
    "vae_logvar",
    "vae_decoded",
    "add_noise",
    "alphas_cumprod",
    "train_loss",
    "grad_norms",
)
# The golden files' names of samplers -> ours.
SAMPLED = {"ddim": "ddim", "pndm": "pndm", "euler": "euler", "dpmpp": "dpm++"}
GUIDANCE = 7.5
SCHEDULE = Diffusion(
    steps=1000, beta_start=0.00085, beta_end=0.012, zero_snr=False, target="epsilon", min_snr=0.0
)


def quantities(file: dict[str, np.ndarray]) -> Iterator[Quantity]:
    """Quantities of a Stable Diffusion file, each with its error, or None if not covered.

    Raises UserError for missing arrays and unsupported configs.
    """
    if missing := [name for name in NEEDED if name not in file]:
        raise UserError(f"golden file: missing {', '.join(missing)}")
    try:
        configs = [json.loads(str(file[f"{tower}_config"])) for tower in ("unet", "vae")]
    except json.JSONDecodeError as error:
        raise UserError(f"golden file: its configs are no JSON ({error})") from error
    unet = family.unet_config(configs[0], remat="none")
    vae = family.vae_config(configs[1], remat="none")
    _check(file, unet, vae)
    table = family.table(unet, vae)
    params = jax.tree.map(jnp.asarray, convert.from_theirs(table, family.canonical(weights(file))))
    made = {
        "unet": abstract(UNet, unet),
        "vae": abstract(Vae, vae),
    }
    for (path, here), (_, there) in zip(tree.leaves(made), tree.leaves(params), strict=True):
        if here.shape != there.shape:
            raise UserError(
                f"golden file: {path} has the shape {there.shape}, "
                f"and its config makes {here.shape}"
            )

    ours = _vae(vae, params["vae"], file) | _noised(file)
    loss, gradient, ours["unet_out"] = _trained(unet, params["unet"], file)
    ours |= {"train_loss": loss, "alphas_cumprod": alphas_cumprod(SCHEDULE)}
    sampled = {}
    for theirs, name in SAMPLED.items():
        if f"sample_{theirs}" in file:
            sampled[f"timesteps_{theirs}"], sampled[f"sample_{theirs}"] = _sampled(
                unet, params["unet"], name, file
            )
    for name in file:
        if name in ours or name in sampled:
            yield compare(
                name,
                file[name],
                (ours | sampled)[name],
                1e-3 if name.startswith("sample_") else 1e-4,
            )

    norms = {
        name.removeprefix("unet."): np.linalg.norm(g.astype(np.float64))
        for name, g in convert.to_theirs(
            family.table(unet, None), convert.reader({"unet": gradient})
        )
    }
    # A group norm cancels some biases. Their gradients are pure rounding errors, so norms below
    # this are compared absolutely.
    least = 1e-3 * np.max(file["grad_norms"], initial=0.0)
    for name, norm in zip(map(str, file["grad_names"]), file["grad_norms"], strict=True):
        error = float(abs(norms[name] - norm) / max(norm, least)) if name in norms else None
        yield Quantity(f"grad_norm {name}", error, 1e-4)
    yield from (
        Quantity(name, None, 1e-4)
        for name in file
        if name not in {*ours, *sampled, *INPUTS, "grad_norms"}
    )


def _check(file: dict[str, np.ndarray], unet: UNetConfig, vae: VaeConfig) -> None:
    """Raise UserError if the file's inputs do not fit its configs."""
    for name, axis, wanted, of in (
        ("latents", 1, unet.channels_in, "unet_config's in_channels"),
        ("condition", 2, unet.condition, "unet_config's cross_attention_dim"),
        ("image", 1, vae.channels, "vae_config's in_channels"),
    ):
        if file[name].shape[axis] != wanted:
            raise UserError(
                f"golden file: {name} has {file[name].shape[axis]} channels, and {of} is {wanted}"
            )


def _last(x: np.ndarray) -> jax.Array:
    return jnp.asarray(rearrange(x, "b c h w -> b h w c"))


def _first(x: jax.Array) -> np.ndarray:
    return rearrange(np.asarray(x), "b h w c -> b c h w")


def _vae(config: VaeConfig, params: dict, file: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    def run(params, image):
        model = bind(Vae, config, params)
        mean, log_variance = model.encode(image)
        return dict(vae_mean=mean, vae_logvar=log_variance, vae_decoded=model.decode(mean))

    return {name: _first(x) for name, x in jax.jit(run)(params, _last(file["image"])).items()}


def _noised(file: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        "add_noise": _first(
            add_noise(
                SCHEDULE,
                _last(file["latents"]),
                _last(file["noise"]),
                jnp.asarray(file["timesteps"], jnp.float32),
            )
        )
    }


def _trained(
    config: UNetConfig, params: dict, file: dict[str, np.ndarray]
) -> tuple[np.ndarray, dict, np.ndarray]:
    """The training loss, its gradient, and the U-Net's prediction for the latents as they are."""
    x0 = _last(file["latents"])
    eps = _last(file["noise"])
    condition = jnp.asarray(file["condition"])
    timesteps = jnp.asarray(file["timesteps"], jnp.float32)

    def loss(params):
        predicted = bind(UNet, config, params)(
            add_noise(SCHEDULE, x0, eps, timesteps), timesteps, condition
        )
        return jnp.square(predicted - target(SCHEDULE, x0, eps, timesteps)).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    plain = jax.jit(lambda params: bind(UNet, config, params)(x0, timesteps, condition))(params)
    return np.asarray(value), gradient, _first(plain)


def _sampled(
    config: UNetConfig, params: dict, sampler: str, file: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps of the network's evaluations, and the sample, for the file's step count."""
    theirs = next(theirs for theirs, ours in SAMPLED.items() if ours == sampler)
    schedule = samplers.schedule_for(
        SCHEDULE, sampler, len(file[f"timesteps_{theirs}"]) - (sampler == "pndm")
    )

    def run(params, x, condition, negative):
        denoise = samplers.guided_denoiser(
            SCHEDULE, bind(UNet, config, params), condition, negative, guidance=GUIDANCE
        )
        return samplers.SAMPLERS[sampler].run(denoise, x, schedule)

    timesteps = (
        schedule.timesteps[samplers.pndm_evaluations(len(schedule.timesteps))]
        if sampler == "pndm"
        else schedule.timesteps
    )
    condition, negative = (
        jnp.asarray(file[name][: len(file["x_init"])]) for name in ("condition", "unconditional")
    )
    return timesteps, _first(jax.jit(run)(params, _last(file["x_init"]), condition, negative))
