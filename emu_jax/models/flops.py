"""Model FLOPs, counted by hand and by tower: 2 a multiply-add of every matrix product, on real
tokens and images only.

Recomputation, padding, norms and softmax count nothing, as in the definition of MFU (PaLM, arXiv
2204.02311, appendix B).
"""

from collections.abc import Iterable

from emu_jax.models.decoder import DecoderConfig
from emu_jax.models.emu import EmuConfig
from emu_jax.models.unet import UNetConfig
from emu_jax.models.vae import VaeConfig

Count = int | float


def forward(
    config: EmuConfig,
    *,
    images: Count,
    tokens: Count,
    pairs: Count,
    labels: Count,
    regressed: Count,
) -> dict[str, Count]:
    """Forward FLOPs by tower of `images` images and `tokens` tokens, of which `labels` are
    predicted and `regressed` are visual targets; `pairs` is the number of (query, key) pairs that
    the causal mask allows, the sum of n (n + 1) / 2 over documents.
    """
    v = config.vision
    r = config.resampler
    m = config.llama
    P = 1 + v.patches
    E = v.width
    N = r.tokens
    C = r.width
    hd = r.heads * r.head_width
    vision = 2 * v.patches * v.patch**2 * 3 * E + v.depth * P * (
        8 * E * E + 4 * E * v.ffn + 4 * P * E
    )
    resampler = r.depth * (
        N * (8 * C * hd + 4 * C * hd + 4 * C * r.ffn)
        + P * 4 * E * hd
        + N * (N + 1) * 2 * hd
        + 4 * N * P * hd
    )
    resampler += 2 * N * C * m.width
    block = 4 * m.width**2 + 4 * m.width**2 * m.kv // m.heads + 6 * m.width * m.ffn
    return {
        "vision": images * vision,
        "resampler": images * resampler,
        "llama": m.depth * (tokens * block + 4 * pairs * m.width),
        "heads": labels * 2 * m.width * (m.vocab + m.added) + regressed * 2 * m.width**2,
    }


def train(config: EmuConfig, trained: dict[str, bool], **counts: Count) -> dict[str, Count]:
    """FLOPs of a step by tower, from the counts of `forward`: three times the forward where the
    tower trains, twice where gradients only pass through it to an earlier one (or to LoRA in it,
    whose own few count nothing), once otherwise.
    """
    order = ("vision", "resampler", "inputs", "llama", "heads")
    passes = {
        tower: any(trained.get(before) for before in order[:place])
        for place, tower in enumerate(order)
    }
    return {
        tower: (3 if trained.get(tower) else 2 if passes[tower] else 1) * value
        for tower, value in forward(config, **counts).items()
    }


def trained(paths: Iterable[str]) -> dict[str, bool]:
    """What `train` asks of the parameters that train: by tower, is it one, or more than LoRA and
    single rows in it? "inputs": is it these?
    """
    found: dict[str, bool] = {}
    for path in paths:
        tower = path.split("/")[0]
        found["inputs" if tower == "llama" and path.endswith(("/a", "/b", "/added")) else tower] = (
            True
        )
    return found | {"heads": found.get("regress_head", False)}


def unet(config: UNetConfig, side: int, tokens: int) -> int:
    """Forward FLOPs of one input of `side` x `side` with a condition of `tokens`."""
    places = [(side // config.patch // 2**level) ** 2 for level in range(len(config.widths))]
    last = len(places) - 1

    def transformer(level):
        C = config.widths[level]
        P = places[level]
        N = tokens
        # self, cross, ffn
        block = (
            P * (8 * C * C + 4 * P * C)
            + P * (4 * C * C + 4 * N * C)
            + 4 * N * config.condition * C
            + 24 * P * C * C
        )
        return 4 * P * C * C + config.depths[level] * block

    def resnet(width_in, level):
        return (
            _resnet(width_in, config.widths[level], places[level])
            + 2 * config.time * config.widths[level]
        )

    ends = (
        18
        * places[0]
        * config.patch**2
        * (config.channels_in + config.channels_out)
        * config.widths[0]
    )
    time = (
        2
        * config.time
        * (
            config.widths[0]
            + config.time
            + config.pooled * config.condition
            + config.side**2 * config.widths[0]
        )
    )
    total = ends + time + 2 * resnet(config.widths[last], last) + transformer(last)
    skips = [config.widths[0]]
    for level, (C, count) in enumerate(zip(config.widths, config.resnets, strict=True)):
        total += (
            resnet(skips[-1], level)
            + (count - 1) * resnet(C, level)
            + count * config.attends_down[level] * transformer(level)
        )
        total += 18 * C * C * places[level + 1] if level < last else 0
        skips += [C] * (count + (level < last))
    width = config.widths[last]
    for level in range(last, -1, -1):
        C = config.widths[level]
        count = config.resnets[level] + 1
        total += sum(resnet(before + skips.pop(), level) for before in [width] + [C] * (count - 1))
        total += count * config.attends_up[level] * transformer(level)
        total += 18 * C * C * places[level - 1] if level else 0
        width = C
    return total


def vae_encoder(config: VaeConfig, side: int) -> int:
    """Forward FLOPs of encoding one image of `side` x `side`."""
    places = [(side // 2**level) ** 2 for level in range(len(config.widths))]
    C = config.widths[-1]
    P = places[-1]
    last = len(places) - 1
    c = 2 * config.latent
    total = 18 * places[0] * config.channels * config.widths[0] + 18 * P * C * c + 2 * P * c * c
    total += 2 * _resnet(C, C, P) + P * (8 * C * C + 4 * P * C)
    before = config.widths[0]
    for level, width in enumerate(config.widths):
        total += _resnet(before, width, places[level]) + (config.resnets - 1) * _resnet(
            width, width, places[level]
        )
        total += 18 * width * width * places[level + 1] if level < last else 0
        before = width
    return total


def train_decoder(
    config: DecoderConfig,
    trained: dict[str, bool],
    *,
    images: Count,
    encodes: bool = True,
    **counts: Count,
) -> dict[str, Count]:
    """As `train`, of a step that draws every image once; the Emu's towers run as far as the
    condition comes from them, and the autoencoder's encoder only where it `encodes` what is
    drawn.
    """
    text = {
        name: value if config.condition == "teacher_forced" else 0.0
        for name, value in counts.items()
    } | {"labels": 0.0}
    read = 0.0 if config.condition == "generated" else images
    work = {
        tower: value for tower, value in forward(config.emu, images=read, **text).items() if value
    }
    if config.vae and encodes:
        work["vae"] = images * vae_encoder(config.vae, config.image)
    return work | {
        "unet": (3 if trained.get("unet") else 1)
        * images
        * unet(config.unet, config.latents[0], config.emu.resampler.tokens)
    }


def _resnet(width_in: int, width_out: int, places: int) -> int:
    return 18 * places * width_out * (width_in + width_out) + (
        2 * places * width_in * width_out if width_in != width_out else 0
    )
