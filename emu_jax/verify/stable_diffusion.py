"""Compare the decoder with diffusers: U-Net, VAE, schedule, loss, gradients and samplers.

Read next: ../weights/stable_diffusion.py, ../generate/samplers.py.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial

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

# Arrays that are inputs, and so are not compared.
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
# Arrays that a file must have.
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
# Names of samplers in the files -> ours.
SAMPLERS = {"ddim": "ddim", "pndm": "pndm", "euler": "euler", "dpmpp": "dpm++"}
TOLERANCE = 1e-4
SAMPLE_TOLERANCE = 1e-3
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
        raise UserError(f"golden file: its configs are not JSON ({error})") from error
    unet = family.unet_config(configs[0], remat="none")
    vae = family.vae_config(configs[1], remat="none")
    _check_inputs(file, unet, vae)
    params = _import_weights(file, unet, vae)

    ours = _vae_outputs(vae, params["vae"], file) | _noised(file)
    # Traced once for all samplers.
    network = jax.jit(lambda params, *inputs: bind(UNet, unet, params)(*inputs))
    loss, gradient, ours["unet_out"] = _trained(network, params["unet"], file)
    ours |= {"train_loss": loss, "alphas_cumprod": alphas_cumprod(SCHEDULE)}
    for theirs, sampler in SAMPLERS.items():
        if f"sample_{theirs}" in file:
            timesteps, sample = _sampled(network, params["unet"], theirs, sampler, file)
            ours |= {f"timesteps_{theirs}": timesteps, f"sample_{theirs}": sample}
    for name in file:
        if name in ours:
            tolerance = SAMPLE_TOLERANCE if name.startswith("sample_") else TOLERANCE
            yield compare(name, file[name], ours[name], tolerance)
    yield from _gradient_norms(file, unet, gradient)
    for name in file:
        if name not in {*ours, *INPUTS, "grad_norms"}:
            yield Quantity(name, None, TOLERANCE)


def _import_weights(file: dict[str, np.ndarray], unet: UNetConfig, vae: VaeConfig) -> tree.Tree:
    """Our parameters. Raises UserError if their shapes do not fit the configs."""
    table = family.table(unet, vae)
    params = convert.from_theirs(table, family.canonical(weights(file)))
    expected = {"unet": abstract(UNet, unet), "vae": abstract(Vae, vae)}
    leaves = zip(tree.leaves(expected), tree.leaves(params), strict=True)
    for (path, wanted), (_, found) in leaves:
        if wanted.shape != found.shape:
            raise UserError(
                f"golden file: {path} has the shape {found.shape}, "
                f"and its config makes {wanted.shape}"
            )
    return jax.tree.map(jnp.asarray, params)


def _gradient_norms(
    file: dict[str, np.ndarray], unet: UNetConfig, gradient: tree.Tree
) -> Iterator[Quantity]:
    """Compare the norms of the U-Net's gradients."""
    exported = convert.to_theirs(family.table(unet, None), convert.reader({"unet": gradient}))
    norms = {}
    for name, array in exported:
        norms[name.removeprefix("unet.")] = np.linalg.norm(array.astype(np.float64))
    # A group norm cancels some biases, whose gradients are pure rounding errors. So the errors of
    # norms below this are relative to it, and not to the norm.
    least = 1e-3 * np.max(file["grad_norms"], initial=0.0)
    for name, norm in zip(map(str, file["grad_names"]), file["grad_norms"], strict=True):
        error = None
        if name in norms:
            error = float(abs(norms[name] - norm) / max(norm, least))
        yield Quantity(f"grad_norm {name}", error, TOLERANCE)


def _check_inputs(file: dict[str, np.ndarray], unet: UNetConfig, vae: VaeConfig) -> None:
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


def _channels_last(x: np.ndarray) -> jax.Array:
    return jnp.asarray(rearrange(x, "b c h w -> b h w c"))


def _channels_first(x: jax.Array) -> np.ndarray:
    return rearrange(np.asarray(x), "b h w c -> b c h w")


def _vae_outputs(
    config: VaeConfig, params: tree.Tree, file: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The moments of the file's image, and the image decoded from their mean."""

    @jax.jit
    def run(params, image):
        model = bind(Vae, config, params)
        mean, log_variance = model.encode(image)
        return dict(vae_mean=mean, vae_logvar=log_variance, vae_decoded=model.decode(mean))

    outputs = run(params, _channels_last(file["image"]))
    return {name: _channels_first(x) for name, x in outputs.items()}


def _noised(file: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    x0 = _channels_last(file["latents"])
    eps = _channels_last(file["noise"])
    timesteps = jnp.asarray(file["timesteps"], jnp.float32)
    return {"add_noise": _channels_first(add_noise(SCHEDULE, x0, eps, timesteps))}


def _trained(
    network: Callable[..., jax.Array], params: tree.Tree, file: dict[str, np.ndarray]
) -> tuple[np.ndarray, tree.Tree, np.ndarray]:
    """The training loss, its gradient, and the U-Net's output for the latents without noise."""
    x0 = _channels_last(file["latents"])
    eps = _channels_last(file["noise"])
    condition = jnp.asarray(file["condition"])
    timesteps = jnp.asarray(file["timesteps"], jnp.float32)

    def predict(params, x):
        return network(params, x, timesteps, condition)

    def loss(params):
        predicted = predict(params, add_noise(SCHEDULE, x0, eps, timesteps))
        return jnp.square(predicted - target(SCHEDULE, x0, eps, timesteps)).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    output = jax.jit(predict)(params, x0)
    return np.asarray(value), jax.device_get(gradient), _channels_first(output)


def _sampled(
    network: Callable[..., jax.Array],
    params: tree.Tree,
    theirs: str,
    sampler: str,
    file: dict[str, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """The timesteps at which the network is evaluated, and the sample.

    theirs: the sampler's name in the file, whose timesteps decide the number of steps.
    """
    steps = len(file[f"timesteps_{theirs}"])
    # PNDM evaluates the network once more than it has steps.
    if sampler == "pndm":
        steps -= 1
    schedule = samplers.schedule_for(SCHEDULE, sampler, steps)
    timesteps = schedule.timesteps
    if sampler == "pndm":
        timesteps = timesteps[samplers.pndm_evaluations(len(timesteps))]

    @jax.jit
    def run(params, x, condition, negative):
        unet = partial(network, params)
        denoise = samplers.guided_denoiser(SCHEDULE, unet, condition, negative, guidance=GUIDANCE)
        return samplers.SAMPLERS[sampler].run(denoise, x, schedule)

    x = _channels_last(file["x_init"])
    condition = jnp.asarray(file["condition"][: len(x)])
    negative = jnp.asarray(file["unconditional"][: len(x)])
    return timesteps, _channels_first(run(params, x, condition, negative))
