"""Stable Diffusion 1 and 2 in the format of diffusers.

The folder has unet/ and vae/, each with a config.json and tensors; names in the table have the
prefixes `unet.` and `vae.`. A config that models/unet.py or models/vae.py does not support is an
error.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from emu_jax import tree
from emu_jax.config import UserError
from emu_jax.models import module
from emu_jax.models.diffusion import Diffusion
from emu_jax.models.unet import CONDITIONED, UNet, UNetConfig, level_specs
from emu_jax.models.vae import Vae, VaeConfig
from emu_jax.weights.convert import Row, Table, Tensors
from emu_jax.weights.family import Family, Shapes
from emu_jax.weights.files import Tensor

# Fields of diffusers' configs, each with the values that we support. The first value is the one
# that diffusers assumes if the field is missing.
UNET_FIXED = dict(
    act_fn=("silu", "swish"),
    addition_embed_type=(None,),
    attention_type=("default",),
    center_input_sample=(False,),
    class_embed_type=(None,),
    class_embeddings_concat=(False,),
    conv_in_kernel=(3,),
    conv_out_kernel=(3,),
    cross_attention_norm=(None,),
    downsample_padding=(1,),
    dropout=(0.0,),
    dual_cross_attention=(False,),
    encoder_hid_dim=(None,),
    encoder_hid_dim_type=(None,),
    mid_block_only_cross_attention=(None, False),
    mid_block_scale_factor=(1,),
    mid_block_type=("UNetMidBlock2DCrossAttn",),
    num_attention_heads=(None,),
    num_class_embeds=(None,),
    only_cross_attention=(False,),
    resnet_out_scale_factor=(1.0,),
    resnet_skip_time_act=(False,),
    resnet_time_scale_shift=("default",),
    reverse_transformer_layers_per_block=(None,),
    time_cond_proj_dim=(None,),
    time_embedding_act_fn=(None,),
    time_embedding_type=("positional",),
    timestep_post_act=(None,),
)
VAE_FIXED = dict(
    act_fn=("silu", "swish"),
    latents_mean=(None,),
    latents_std=(None,),
    mid_block_add_attention=(True,),
    shift_factor=(None, 0.0),
    use_post_quant_conv=(True,),
    use_quant_conv=(True,),
)
SCHEDULE_FIXED = dict(beta_schedule=("scaled_linear",), trained_betas=(None,))
# diffusers' names of the prediction target -> ours.
TARGETS = {"epsilon": "epsilon", "v_prediction": "v"}


class StableDiffusionConfig(NamedTuple):
    """Configs of the two networks."""

    unet: UNetConfig
    vae: VaeConfig


def make_config(model: Mapping[str, Any]) -> StableDiffusionConfig:
    """Configs of the networks in config.model. Raises UserError for other image decoders."""
    if "decoder" not in model:
        raise UserError("the model has no image decoder; configs/decoder.py has one")
    decoder = model["decoder"]
    if not decoder["vae"]:
        raise UserError(
            "the image decoder works on pixels, without an autoencoder (model.decoder.vae); "
            "Stable Diffusion needs one"
        )
    if (patch := decoder["unet"]["patch"]) != 1:
        raise UserError(
            f"the U-Net works on patches of {patch} (model.decoder.unet.patch); "
            "Stable Diffusion has patches of 1"
        )
    return StableDiffusionConfig(UNetConfig(**decoder["unet"]), VaeConfig(**decoder["vae"]))


# Building the abstract networks takes seconds.
@lru_cache(maxsize=16)
def shapes(model_config: StableDiffusionConfig) -> Shapes:
    """Shapes of all leaves of the two networks."""
    params = {
        "unet": module.abstract(UNet, model_config.unet),
        "vae": module.abstract(Vae, model_config.vae),
    }
    return {path: leaf.shape for path, leaf in tree.leaves(params)}


def infer_config(shapes: Shapes, config: dict[str, Any]) -> dict[str, Any]:
    """Infer config.model.decoder from the config files of a folder.

    The fields of its `diffusion` are None if the folder has no scheduler.
    """
    parts = {
        "unet": asdict(unet_config(config["unet"])),
        "vae": asdict(vae_config(config["vae"])),
        "diffusion": schedule(config["scheduler"]),
    }
    return {
        f"decoder.{part}.{name}": value
        for part, fields in parts.items()
        for name, value in fields.items()
        if name != "remat"
    }


def default_config(shapes: Shapes, config: dict[str, Any]) -> dict[str, Any]:
    """Set the image size to that of the U-Net's config."""
    side = config["unet"].get("sample_size")
    if not isinstance(side, int):
        return {}
    return {"decoder.image": side * vae_config(config["vae"]).factor}


def schedule(config: Mapping[str, Any]) -> dict[str, Any]:
    """Infer config.model.decoder.diffusion from a scheduler's config."""
    if not config:
        return dict.fromkeys(("steps", "beta_start", "beta_end", "zero_snr", "target"))
    steps = config.get("num_train_timesteps", 1000)
    if config.get("_class_name") == "FlowMatchEulerDiscreteScheduler":
        _fixed("scheduler", config, dict(shift=(1.0,), use_dynamic_shifting=(False,)))
        betas = dict.fromkeys(("beta_start", "beta_end", "zero_snr"))
        return {"steps": steps, **betas, "target": "flow"}
    _fixed("scheduler", {"beta_schedule": "linear", **config}, SCHEDULE_FIXED)
    if (target := config.get("prediction_type", "epsilon")) not in TARGETS:
        raise UserError(
            f"the scheduler's config has prediction_type={target!r}, which is not supported; "
            f"choose from {', '.join(TARGETS)}"
        )
    found = {
        "steps": steps,
        "beta_start": config.get("beta_start", 0.0001),
        "beta_end": config.get("beta_end", 0.02),
        "zero_snr": config.get("rescale_betas_zero_snr", False),
        "target": TARGETS[target],
    }
    try:
        Diffusion(**found, min_snr=0.0)
    except ValueError as error:
        raise UserError(f"the scheduler's config: {error}") from error
    return found


def config_json(model: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Make the JSON files of a StableDiffusionPipeline, by path.

    It has no text encoder, because our decoder is conditioned on an Emu.
    """
    unet, vae = make_config(model)
    image = model["decoder"]["image"]
    scheduler = _scheduler(Diffusion(**model["decoder"]["diffusion"]))
    absent = ("feature_extractor", "image_encoder", "safety_checker", "text_encoder", "tokenizer")
    return {
        "model_index.json": {
            "_class_name": "StableDiffusionPipeline",
            "requires_safety_checker": False,
            **{part: [None, None] for part in absent},
            "scheduler": ["diffusers", scheduler["_class_name"]],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
        "scheduler/scheduler_config.json": scheduler,
        "unet/config.json": _unet_json(unet, image // vae.factor),
        "vae/config.json": _vae_json(vae, image),
    }


def _unet_json(unet: UNetConfig, side: int) -> dict[str, Any]:
    """Make the config.json of UNet2DConditionModel; side: that of its latents."""

    def one_of(values):
        return values[0] if len(set(values)) == 1 else list(values)

    def blocks(attends, way):
        return [f"{'CrossAttn' * attending}{way}Block2D" for attending in attends]

    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": one_of(unet.heads),
        "block_out_channels": list(unet.widths),
        "center_input_sample": False,
        "cross_attention_dim": unet.condition,
        "down_block_types": blocks(unet.attends_down, "Down"),
        "downsample_padding": 1,
        "flip_sin_to_cos": unet.cosine_first,
        "freq_shift": unet.frequency_shift,
        "in_channels": unet.channels_in,
        "layers_per_block": one_of(unet.resnets),
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": unet.eps,
        "norm_num_groups": unet.groups,
        "out_channels": unet.channels_out,
        "sample_size": side,
        "time_embedding_dim": None if unet.time == 4 * unet.widths[0] else unet.time,
        "transformer_layers_per_block": one_of(unet.depths),
        "up_block_types": blocks(unet.attends_up[::-1], "Up"),
        "use_linear_projection": unet.linear,
    }


def _vae_json(vae: VaeConfig, image: int) -> dict[str, Any]:
    """Make the config.json of AutoencoderKL; image: side of an image in pixels."""
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(vae.widths),
        "down_block_types": ["DownEncoderBlock2D"] * len(vae.widths),
        "in_channels": vae.channels,
        "latent_channels": vae.latent,
        "layers_per_block": vae.resnets,
        "norm_num_groups": vae.groups,
        "out_channels": vae.channels,
        "sample_size": image,
        "scaling_factor": vae.scale,
        "up_block_types": ["UpDecoderBlock2D"] * len(vae.widths),
    }


def _scheduler(d: Diffusion) -> dict[str, Any]:
    """Make the config of a scheduler that can sample from the diffusion `d`.

    It is PNDM, as in Stable Diffusion 1.5; DDIM if the schedule ends in pure noise, which PNDM does
    not support; or Euler for a flow.
    """
    if d.target == "flow":
        return {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": d.steps,
            "shift": 1.0,
        }
    theirs = {ours: name for name, ours in TARGETS.items()}
    if d.zero_snr:
        name = "DDIMScheduler"
        rest = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    else:
        name = "PNDMScheduler"
        rest = {"skip_prk_steps": True, "steps_offset": 1}
    return {
        "_class_name": name,
        "num_train_timesteps": d.steps,
        "beta_start": d.beta_start,
        "beta_end": d.beta_end,
        "beta_schedule": "scaled_linear",
        "prediction_type": theirs[d.target],
        "set_alpha_to_one": False,
        "clip_sample": False,
        "trained_betas": None,
        **rest,
    }


def unet_config(config: Mapping[str, Any], *, remat: str = "full") -> UNetConfig:
    """Convert a U-Net's config.json to our config.

    Raises UserError for unsupported values and missing fields.
    """
    need = partial(_need, "U-Net", config)
    _fixed("U-Net", config, UNET_FIXED)
    widths = tuple(need("block_out_channels"))

    def each(field, default=None):
        return _each(f"the U-Net's config has {field}", need(field, default), len(widths))

    condition = set(each("cross_attention_dim"))
    if len(condition) > 1:
        raise UserError(
            f"the U-Net's config has cross_attention_dim={config['cross_attention_dim']}; "
            "one width for all levels is supported"
        )
    down_kinds = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
    down = _kinds("U-Net", config, "down_block_types", len(widths), down_kinds)
    up_kinds = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
    up = _kinds("U-Net", config, "up_block_types", len(widths), up_kinds)[::-1]
    # Despite its name, attention_head_dim is the number of heads.
    heads = each("attention_head_dim", 8)
    last = len(widths) - 1
    for level, width in enumerate(widths):
        attends = down[level] or up[level] or level == last
        if attends and width % heads[level]:
            raise UserError(
                f"the U-Net's config has {heads[level]} heads at level {level}, "
                f"which do not divide its width {width}"
            )
    return UNetConfig(
        channels_in=need("in_channels", 4),
        channels_out=need("out_channels", 4),
        patch=1,
        widths=widths,
        resnets=each("layers_per_block", 2),
        attends_down=down,
        attends_up=up,
        depths=each("transformer_layers_per_block", 1),
        heads=heads,
        condition=condition.pop(),
        pooled=0,
        side=0,
        time=config.get("time_embedding_dim") or 4 * widths[0],
        cosine_first=need("flip_sin_to_cos", True),
        frequency_shift=float(need("freq_shift", 0)),
        groups=_groups("U-Net", config, widths),
        eps=float(need("norm_eps", 1e-5)),
        linear=need("use_linear_projection", False),
        remat=remat,
    )


def vae_config(config: Mapping[str, Any], *, remat: str = "full") -> VaeConfig:
    """Convert an autoencoder's config.json to our config. Raises UserError like `unet_config`."""
    need = partial(_need, "autoencoder", config)
    _fixed("autoencoder", config, VAE_FIXED)
    widths = tuple(need("block_out_channels"))
    for field, kind in (
        ("down_block_types", "DownEncoderBlock2D"),
        ("up_block_types", "UpDecoderBlock2D"),
    ):
        _kinds("autoencoder", config, field, len(widths), {kind: True})
    if need("out_channels", 3) != need("in_channels", 3):
        raise UserError(
            f"the autoencoder's config has in_channels={need('in_channels', 3)} and "
            f"out_channels={need('out_channels', 3)}; they must be the same"
        )
    return VaeConfig(
        channels=need("in_channels", 3),
        latent=need("latent_channels", 4),
        widths=widths,
        resnets=need("layers_per_block", 1),
        groups=_groups("autoencoder", config, widths),
        scale=float(need("scaling_factor", 0.18215)),
        remat=remat,
    )


def table(unet: UNetConfig | None, vae: VaeConfig | None) -> Table:
    """Rows of a U-Net, an autoencoder, or both."""
    rows: list[Row] = []
    axes: dict[str, int] = {}
    if unet:
        rows += _unet(unet)
        axes = {f"h{heads}": heads for heads in set(unet.heads)}
    if vae:
        rows += _vae(vae)
    return Table(tuple(rows), axes, unused=(), depth={})


def rename(name: str) -> str:
    """Replace the attention's names in older autoencoders by the current ones."""
    for old, new in (
        ("query", "to_q"),
        ("key", "to_k"),
        ("value", "to_v"),
        ("proj_attn", "to_out.0"),
    ):
        name = re.sub(rf"(^|\.)(mid_block\.attentions\.0\.){old}\.", rf"\1\2{new}.", name)
    return name


def canonical(foreign: Tensors) -> dict[str, Any]:
    """Rename tensors, and turn the autoencoder's 1 x 1 convolutions into matrices."""
    attention = re.compile(r"vae\..*mid_block\.attentions\.0\.to_.*weight")

    def as_matrix(name: str, x: Any) -> Any:
        if len(x.shape) == 2 or not attention.fullmatch(name):
            return x
        return Tensor(tuple(x.shape[:2]), x.dtype, lambda: np.asarray(x)[:, :, 0, 0])

    renamed = {rename(name): x for name, x in foreign.items()}
    return {name: as_matrix(name, x) for name, x in renamed.items()}


def _unet(size: UNetConfig) -> list[Row]:
    flat = "o i -> i o" if size.linear else "o i 1 1 -> i o"

    def resnets(theirs, ours, widths_in, width):
        for n, width_in in enumerate(widths_in):
            yield from _resnet(
                f"{theirs}.resnets.{n}", f"{ours}/resnets/{n}", shortcut=width_in != width
            )
            yield from _linear(f"{theirs}.resnets.{n}.time_emb_proj", f"{ours}/resnets/{n}/time")

    def attentions(theirs, ours, count, level):
        heads = f"h{size.heads[level]}"
        for n in range(count):
            t = f"{theirs}.attentions.{n}"
            o = f"{ours}/attentions/{n}"
            yield from (
                *_norm(f"{t}.norm", f"{o}/norm"),
                *_linear(f"{t}.proj_in", f"{o}/into", flat),
            )
            for depth in range(size.depths[level]):
                yield from _block(
                    f"{t}.transformer_blocks.{depth}",
                    f"{o}/blocks/{depth}",
                    heads,
                    size.widths[level],
                )
            yield from _linear(f"{t}.proj_out", f"{o}/out", flat)

    rows = [
        *_linear("unet.time_embedding.linear_1", "unet/time/up"),
        *_linear("unet.time_embedding.linear_2", "unet/time/down"),
        *_conv("unet.conv_in", "unet/conv_in"),
    ]
    down, mid, up = level_specs(size)
    for spec in down:
        level = spec.level
        theirs = f"unet.down_blocks.{level}"
        ours = f"unet/down/{level}"
        rows += resnets(theirs, ours, spec.widths_in, size.widths[level])
        rows += attentions(theirs, ours, spec.attentions, level)
        if spec.resample:
            rows += _conv(f"{theirs}.downsamplers.0.conv", f"{ours}/resample")
    rows += resnets("unet.mid_block", "unet/mid", mid.widths_in, size.widths[mid.level])
    rows += attentions("unet.mid_block", "unet/mid", mid.attentions, mid.level)
    for number, spec in enumerate(up):
        level = spec.level
        theirs = f"unet.up_blocks.{number}"
        ours = f"unet/up/{level}"
        rows += resnets(theirs, ours, spec.widths_in, size.widths[level])
        rows += attentions(theirs, ours, spec.attentions, level)
        if spec.resample:
            rows += _conv(f"{theirs}.upsamplers.0.conv", f"{ours}/resample")
    return rows + [
        *_norm("unet.conv_norm_out", "unet/norm_out"),
        *_conv("unet.conv_out", "unet/conv_out"),
    ]


def _vae(size: VaeConfig) -> list[Row]:
    last = len(size.widths) - 1
    widths = size.widths
    rows = [
        *_linear("vae.quant_conv", "vae/quant", "o i 1 1 -> i o"),
        *_linear("vae.post_quant_conv", "vae/post_quant", "o i 1 1 -> i o"),
    ]
    for half in ("encoder", "decoder"):
        encodes = half == "encoder"
        t = f"vae.{half}"
        o = f"vae/{half}"
        rows += _conv(f"{t}.conv_in", f"{o}/conv_in")
        for level, C in enumerate(widths):
            theirs = f"{t}.down_blocks.{level}" if encodes else f"{t}.up_blocks.{last - level}"
            before = widths[max(level - 1, 0)] if encodes else widths[min(level + 1, last)]
            for n in range(size.resnets + (not encodes)):
                rows += _resnet(
                    f"{theirs}.resnets.{n}",
                    f"{o}/levels/{level}/resnets/{n}",
                    shortcut=n == 0 and before != C,
                )
            resamples = level < last if encodes else level > 0
            if resamples:
                sampler = "downsamplers" if encodes else "upsamplers"
                rows += _conv(f"{theirs}.{sampler}.0.conv", f"{o}/levels/{level}/resample")
        for n in range(2):
            rows += _resnet(f"{t}.mid_block.resnets.{n}", f"{o}/mid/resnets/{n}", shortcut=False)
        rows += _norm(f"{t}.mid_block.attentions.0.group_norm", f"{o}/mid/attn/norm")
        for theirs, ours in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o")):
            rows += _linear(f"{t}.mid_block.attentions.0.{theirs}", f"{o}/mid/attn/{ours}")
        rows += [
            *_norm(f"{t}.conv_norm_out", f"{o}/norm_out"),
            *_conv(f"{t}.conv_out", f"{o}/conv_out"),
        ]
    return rows


def _block(t: str, o: str, heads: str, C: int) -> list[Row]:
    rows = []
    for n, (theirs, ours) in enumerate((("attn1", "self"), ("attn2", "cross")), 1):
        rows += _norm(f"{t}.norm{n}", f"{o}/norm{n}")
        rows += [
            Row(
                f"{t}.{theirs}.to_{name}.weight",
                f"{o}/{ours}/{name}/w",
                f"({heads} d) i -> i {heads} d",
            )
            for name in "qkv"
        ]
        rows += [
            Row(
                f"{t}.{theirs}.to_out.0.weight", f"{o}/{ours}/o/w", f"o ({heads} d) -> {heads} d o"
            ),
            Row(f"{t}.{theirs}.to_out.0.bias", f"{o}/{ours}/o/bias"),
        ]
    rows += _norm(f"{t}.norm3", f"{o}/norm3")
    for ours, cut in (("up", (0, 4 * C)), ("gate", (4 * C, 8 * C))):
        rows += [
            Row(f"{t}.ff.net.0.proj.weight", f"{o}/ffn/{ours}/w", "f i -> i f", cut),
            Row(f"{t}.ff.net.0.proj.bias", f"{o}/ffn/{ours}/bias", cut=cut),
        ]
    return rows + _linear(f"{t}.ff.net.2", f"{o}/ffn/down")


def _resnet(t: str, o: str, *, shortcut: bool) -> list[Row]:
    rows = []
    for n in (1, 2):
        rows += _norm(f"{t}.norm{n}", f"{o}/norm{n}")
        rows += _conv(f"{t}.conv{n}", f"{o}/conv{n}")
    if shortcut:
        rows += _linear(f"{t}.conv_shortcut", f"{o}/shortcut", "o i 1 1 -> i o")
    return rows


def _norm(t: str, o: str) -> list[Row]:
    return [Row(f"{t}.weight", f"{o}/scale"), Row(f"{t}.bias", f"{o}/bias")]


def _linear(t: str, o: str, pattern: str = "o i -> i o") -> list[Row]:
    return [Row(f"{t}.weight", f"{o}/w", pattern), Row(f"{t}.bias", f"{o}/bias")]


def _conv(t: str, o: str) -> list[Row]:
    return [Row(f"{t}.weight", f"{o}/w", "o i y x -> y x i o"), Row(f"{t}.bias", f"{o}/bias")]


def _fixed(what: str, config: Mapping[str, Any], fixed: dict[str, tuple]) -> None:
    for field, values in fixed.items():
        if config.get(field, values[0]) not in values:
            raise UserError(
                f"the {what}'s config has {field}={config[field]!r}, which is not supported; "
                f"{field}={values[0]!r} is"
            )


def _need(what: str, config: Mapping[str, Any], field: str, default: Any = None) -> Any:
    if (value := config.get(field, default)) is None:
        raise UserError(f"the {what}'s config lacks {field}")
    return value


def _each(what: str, value: Any, levels: int) -> tuple[int, ...]:
    """One value per level, from a list or from one value for all levels."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * levels
    if len(values) != levels or not all(isinstance(item, int) and item > 0 for item in values):
        raise UserError(
            f"{what}={value!r}; it must be a positive integer, or {levels} of them, one per level"
        )
    return values


def _kinds(
    what: str, config: Mapping[str, Any], field: str, levels: int, known: dict[str, bool]
) -> tuple[bool, ...]:
    """The value in `known` of each level's block type. Raises UserError for other types."""
    kinds = _need(what, config, field)
    for kind in kinds:
        if kind not in known:
            raise UserError(
                f"the {what}'s config has {field} with {kind!r}, which is not supported; "
                f"choose from {', '.join(known)}"
            )
    if len(kinds) != levels:
        raise UserError(
            f"the {what}'s config has {len(kinds)} {field} and {levels} block_out_channels"
        )
    return tuple(known[kind] for kind in kinds)


def _groups(what: str, config: Mapping[str, Any], widths: tuple[int, ...]) -> int:
    groups = _need(what, config, "norm_num_groups", 32)
    if bad := [width for width in widths if width % groups]:
        raise UserError(
            f"the {what}'s config has {groups} norm groups, which do not divide its width {bad[0]}"
        )
    return groups


def _table(model_config: StableDiffusionConfig) -> Table:
    return table(*model_config)


FAMILY = Family(
    name="stable-diffusion",
    about="Stable Diffusion 1 and 2, a diffusers folder, from which the image decoder starts",
    signature=r"unet\.down_blocks\.\d+\.resnets\.\d+\.conv1\.weight",
    table=_table,
    infer_config=infer_config,
    default_config=default_config,
    config_json=config_json,
    canonical=canonical,
    make_config=make_config,
    shapes=shapes,
    components=("unet", "vae"),
    stem="diffusion_pytorch_model",
    may_override=("decoder.unet.condition", CONDITIONED),
    config_file="decoder",
)
