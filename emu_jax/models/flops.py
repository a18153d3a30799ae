"""Model FLOPs, counted by hand and by tower: 2 a multiply-add of every matrix product, on real tokens and images only.

Recomputation, padding, norms and softmax count nothing, as in the definition of MFU (PaLM, arXiv 2204.02311, appendix B).
"""
from emu_jax.models.emu import EmuSize

Count = int | float

# Dense bfloat16 FLOP/s of a device by the start of jax's `device_kind`; the makers' data sheets.
PEAK = {"NVIDIA A100": 312e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12, "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12,
        "TPU v5p": 459e12, "TPU v5": 459e12, "TPU v6": 918e12, "TPU7x": 2307e12}


def peak(device_kind: str) -> float | None:
    """FLOP/s of one device, or None where it is not known (a CPU)."""
    return next((value for kind, value in PEAK.items() if device_kind.startswith(kind)), None)


def forward(size: EmuSize, *, images: Count, tokens: Count, pairs: Count, labels: Count, regressed: Count) -> dict[str, Count]:
    """Forward FLOPs by tower of `images` images and `tokens` tokens, of which `labels` are predicted and `regressed` are visual
    targets; `pairs` is the number of (query, key) pairs that the causal mask allows, the sum of n (n + 1) / 2 over documents."""
    v, r, m = size.vision, size.resampler, size.llama
    P, E, N, C, hd = 1 + v.patches, v.width, r.tokens, r.width, r.heads * r.head_width
    vision = 2 * v.patches * v.patch ** 2 * 3 * E + v.depth * P * (8 * E * E + 4 * E * v.ffn + 4 * P * E)
    resampler = r.depth * (N * (8 * C * hd + 4 * C * hd + 4 * C * r.ffn) + P * 4 * E * hd + N * (N + 1) * 2 * hd + 4 * N * P * hd)
    resampler += 2 * N * C * m.width
    block = 8 * m.width ** 2 + 6 * m.width * m.ffn
    return {"vision": images * vision, "resampler": images * resampler,
            "llama": m.depth * (tokens * block + 4 * pairs * m.width),
            "heads": labels * 2 * m.width * (m.vocab + m.added) + regressed * 2 * m.width ** 2}


def train(size: EmuSize, trained: dict[str, bool], **counts: Count) -> dict[str, Count]:
    """FLOPs of a step by tower, from the counts of `forward`: three times the forward where the tower trains, twice where
    gradients only pass through it to an earlier one, once otherwise."""
    order = ("vision", "resampler", "llama", "heads")
    passes = {tower: any(trained.get(before) for before in order[:place]) for place, tower in enumerate(order)}
    return {tower: (3 if trained.get(tower) else 2 if passes[tower] else 1) * value for tower, value in forward(size, **counts).items()}
