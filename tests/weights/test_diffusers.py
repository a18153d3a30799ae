"""We and diffusers load each other's files and compute the same predictions and samples.

Skipped where PyTorch and diffusers are not installed: nothing of ours needs them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from emu_jax import checkpoint
from emu_jax.generate import samplers
from emu_jax.models.diffusion import Diffusion
from emu_jax.models.module import bind
from emu_jax.models.unet import UNet
from emu_jax.models.vae import Vae
from emu_jax.weights import files, stable_diffusion
from tests.support.foreign import (
    PNDM,
    UNET1,
    UNET2,
    VAE,
    diffusion,
    export,
    import_,
    model_of,
)

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
V = PNDM | {"prediction_type": "v_prediction"}
RNG = np.random.default_rng(0)
LATENTS = RNG.standard_normal((2, 8, 8, 2), np.float32)
TIMES = np.array([30, 700], np.float32)
IMAGES = RNG.standard_normal((2, 16, 16, 3), np.float32)


def condition(unet):
    return np.random.default_rng(1).standard_normal((2, 5, unet["cross_attention_dim"]), np.float32)


def first(x):
    """A tensor with channels first."""
    return torch.tensor(np.ascontiguousarray(rearrange(np.asarray(x), "b h w c -> b c h w")))


def last(x):
    """An array with channels last."""
    return rearrange(x.detach().numpy(), "b c h w -> b h w c")


def ours(directory, unet):
    """(U-Net's prediction, mean of the latents, decoded images) of our checkpoint."""
    model_config = stable_diffusion.make_config(model_of(directory))
    params = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32), checkpoint.restore_params(str(directory))
    )
    vae = bind(Vae, model_config.vae, params["vae"])
    return (
        bind(UNet, model_config.unet, params["unet"])(
            jnp.asarray(LATENTS), jnp.asarray(TIMES), jnp.asarray(condition(unet))
        ),
        vae.encode(jnp.asarray(IMAGES))[0],
        vae.decode(jnp.asarray(LATENTS)),
    )


def theirs(unet_model, vae_model, unet):
    """What diffusers computes from the same inputs."""
    with torch.no_grad():
        predicted = unet_model(
            first(LATENTS), torch.tensor(TIMES), torch.tensor(condition(unet))
        ).sample
        return (
            last(predicted),
            last(vae_model.encode(first(IMAGES)).latent_dist.mean),
            last(vae_model.decode(first(LATENTS)).sample),
        )


def assert_close(got, want, share=1e-4):
    """Arrays differ by at most `share` of the largest element."""
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=share * np.abs(y).max())


@pytest.mark.parametrize(
    ("unet", "schedule", "sampler"),
    [(UNET1, PNDM, "pndm"), (UNET2, V, "pndm"), (UNET2, V, "ddim")],
    ids=["sd1", "sd2", "sd2-ddim"],
)
def test_diffusers_loads_our_export_with_the_same_results(tmp_path, unet, schedule, sampler):
    diffusion(tmp_path / "source", unet, schedule=schedule)
    import_(tmp_path / "ours", "--family=stable-diffusion", tmp_path / "source")
    export("stable-diffusion", tmp_path / "ours", tmp_path / "theirs")
    models = []
    for kind, component in (
        (diffusers.UNet2DConditionModel, "unet"),
        (diffusers.AutoencoderKL, "vae"),
    ):
        model, report = kind.from_pretrained(
            tmp_path / "theirs", subfolder=component, output_loading_info=True
        )
        assert not any(report.values()), report
        models.append(model.eval())
    assert_close(ours(tmp_path / "ours", unet), theirs(*models, unet))

    absent = dict.fromkeys(
        ("feature_extractor", "image_encoder", "safety_checker", "text_encoder", "tokenizer")
    )
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "theirs", **absent)
    pipeline.set_progress_bar_config(disable=True)
    if sampler == "ddim":
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(
            pipeline.scheduler.config, clip_sample=False
        )
    positive = condition(unet)
    negative = np.zeros_like(positive)
    sample = pipeline(
        prompt_embeds=torch.tensor(positive),
        negative_prompt_embeds=torch.tensor(negative),
        latents=first(LATENTS),
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="latent",
    ).images
    model = model_of(tmp_path / "ours")
    diffusion_config = Diffusion(**model["decoder"]["diffusion"])
    params = checkpoint.restore_params(str(tmp_path / "ours"))["unet"]
    network = bind(
        UNet, stable_diffusion.make_config(model).unet, jax.tree.map(jnp.asarray, params)
    )
    denoise = samplers.guided_denoiser(
        diffusion_config, network, jnp.asarray(positive), jnp.asarray(negative), guidance=3.0
    )
    steps = samplers.schedule_for(diffusion_config, sampler, 4)
    got = samplers.SAMPLERS[sampler].run(denoise, jnp.asarray(LATENTS), steps)
    assert_close([got], [last(sample)], 1e-3)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(safe_serialization=False),
        dict(variant="fp16"),
        dict(variant="fp16", max_shard_size="20KB"),
    ],
    ids=["plain", "bin", "fp16", "fp16-shards"],
)
def test_we_load_what_diffusers_saves_with_the_same_results(tmp_path, options):
    torch.manual_seed(0)
    models = diffusers.UNet2DConditionModel(**UNET2).eval(), diffusers.AutoencoderKL(**VAE).eval()
    # Rounded to float16, so that all variants hold the same numbers.
    models = [model.half().float() for model in models]
    for model, component in zip(models, ("unet", "vae")):
        if "variant" in options:
            model.half()
        model.save_pretrained(tmp_path / component, **options)
        model.float()
    if "max_shard_size" in options:
        assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    import_(tmp_path / "ours", "--family=stable-diffusion", tmp_path)
    assert_close(ours(tmp_path / "ours", UNET2), theirs(*models, UNET2))


def test_diffusers_reads_the_folders_that_tests_write(tmp_path):
    arrays = diffusion(tmp_path, UNET2)
    model = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), arrays[f"unet.{name}"])
    assert len(files.read([str(tmp_path / "unet")]).tensors) == len(model.state_dict())
