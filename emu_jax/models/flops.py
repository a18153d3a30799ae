"""Model FLOPs by tower: 2 per multiply-add of every matrix product.

Only real tokens and images count; recomputation, padding, norms and softmax do not, as in the
definition of MFU (PaLM, arXiv 2204.02311, appendix B).
"""

from collections.abc import Iterable

from emu_jax.models.decoder import DecoderConfig
from emu_jax.models.emu import EmuConfig
from emu_jax.models.unet import UNetConfig, level_specs
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
    """Forward FLOPs of each tower for `images` images and `tokens` tokens.

    pairs: number of (query, key) pairs that the causal mask allows, which is n (n + 1) / 2 for a
    document of n tokens. labels: number of text tokens that have a loss. regressed: number of
    visual tokens that are targets.
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
    """FLOPs of a step by tower. `counts` are the arguments of `forward`.

    A tower that trains costs three times its forward pass. A frozen tower costs its forward pass
    once, or twice if gradients pass through it to an earlier tower or to its LoRA. LoRA's own FLOPs
    are not counted.
    """
    order = ("vision", "resampler", "inputs", "llama", "heads")
    passes = {
        tower: any(trained.get(before) for before in order[:index])
        for index, tower in enumerate(order)
    }
    return {
        tower: (3 if trained.get(tower) else 2 if passes[tower] else 1) * value
        for tower, value in forward(config, **counts).items()
    }


def trained(paths: Iterable[str]) -> dict[str, bool]:
    """The `trained` argument of `train`, from the paths of trainable parameters.

    If only LoRA and the added rows of the LLM train, the result has the entry "inputs" instead of
    "llama". `train` then counts the LLM as frozen, but with gradients that pass through it.
    """
    found: dict[str, bool] = {}
    for path in paths:
        tower = path.split("/")[0]
        few = tower == "llama" and path.endswith(("/a", "/b", "/added"))
        found["inputs" if few else tower] = True
    return found | {"heads": found.get("regress_head", False)}


def unet(config: UNetConfig, side: int, tokens: int) -> int:
    """Forward FLOPs of one `side` x `side` input with a condition of `tokens` tokens."""
    positions = [(side // config.patch // 2**level) ** 2 for level in range(len(config.widths))]

    def transformer(level):
        C = config.widths[level]
        P = positions[level]
        N = tokens
        # Self-attention, cross-attention (positions, then condition), feed-forward.
        block = (
            P * (8 * C * C + 4 * P * C)
            + P * (4 * C * C + 4 * N * C)
            + 4 * N * config.condition * C
            + 24 * P * C * C
        )
        return 4 * P * C * C + config.depths[level] * block

    def resnet(width_in, level):
        return (
            _resnet(width_in, config.widths[level], positions[level])
            + 2 * config.time * config.widths[level]
        )

    ends = (
        18
        * positions[0]
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

    def level(spec):
        residual = sum(resnet(width_in, spec.level) for width_in in spec.widths_in)
        return residual + spec.attentions * transformer(spec.level)

    def conv(level, resolution):
        return 18 * config.widths[level] ** 2 * positions[resolution]

    down, mid, up = level_specs(config)
    total = ends + time + sum(level(spec) for spec in (*down, mid, *up))
    total += sum(conv(spec.level, spec.level + 1) for spec in down if spec.resample)
    total += sum(conv(spec.level, spec.level - 1) for spec in up if spec.resample)
    return total


def vae_encoder(config: VaeConfig, side: int) -> int:
    """Forward FLOPs of encoding one image of `side` x `side`."""
    positions = [(side // 2**level) ** 2 for level in range(len(config.widths))]
    C = config.widths[-1]
    P = positions[-1]
    last = len(positions) - 1
    c = 2 * config.latent
    total = 18 * positions[0] * config.channels * config.widths[0] + 18 * P * C * c + 2 * P * c * c
    total += 2 * _resnet(C, C, P) + P * (8 * C * C + 4 * P * C)
    before = config.widths[0]
    for level, width in enumerate(config.widths):
        total += _resnet(before, width, positions[level]) + (config.resnets - 1) * _resnet(
            width, width, positions[level]
        )
        total += 18 * width * width * positions[level + 1] if level < last else 0
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
    """FLOPs by tower of a step of the decoder stage, which denoises every image once.

    Emu's towers count only if they compute the condition. The encoder of the autoencoder counts
    only if `encodes`, which is False if the latents are precomputed.
    """
    reads_text = config.condition == "teacher_forced"
    text = {name: value if reads_text else 0.0 for name, value in counts.items()}
    text["labels"] = 0.0
    read = 0.0 if config.condition == "generated" else images
    forwards = forward(config.emu, images=read, **text)
    work = {tower: value for tower, value in forwards.items() if value}
    if config.vae and encodes:
        work["vae"] = images * vae_encoder(config.vae, config.image)
    passes = 3 if trained.get("unet") else 1
    once = unet(config.unet, config.latents[0], config.emu.resampler.tokens)
    return work | {"unet": passes * images * once}


def _resnet(width_in: int, width_out: int, positions: int) -> int:
    convolutions = 18 * positions * width_out * (width_in + width_out)
    shortcut = 2 * positions * width_in * width_out if width_in != width_out else 0
    return convolutions + shortcut
