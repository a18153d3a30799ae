"""The models by name. Every number of emu-14b is the paper's and its release's; a field is
explained where it is used.
"""

from ml_collections import ConfigDict


def model(size: str) -> ConfigDict:
    if size not in SIZES:
        raise ValueError(f"no model size {size!r}; there are {', '.join(SIZES)}")
    vision, resampler, llama, rest = SIZES[size]
    c = ConfigDict(
        dict(
            vision=VISION | vision, resampler=RESAMPLER | resampler, llama=LLAMA | llama, lora=LORA
        )
    )
    c.update(
        dict(
            # or "float32"; parameters, softmax, norms and losses are float32 always
            compute="bfloat16",
            # "dense", "splash" (TPU), "pallas" (GPU), "cudnn" (GPU, unmasked only) or by the
            # platform
            attention="auto",
            # visual tokens standardised per (token, dimension) by measured constants; the release:
            # no
            standardise=False,
        )
        | rest
    )
    return c


# EVA-01-CLIP ViT-g/14
VISION = dict(
    image=224,
    patch=14,
    width=1408,
    depth=40,
    heads=16,
    ffn=6144,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    remat="full",
)
# T5-base decoder, from scratch
RESAMPLER = dict(
    tokens=32,
    width=768,
    depth=12,
    heads=12,
    head_width=64,
    ffn=3072,
    buckets=32,
    max_distance=128,
    dropout=0.1,
    remat="full",
)
# LLaMA-1 13B
LLAMA = dict(
    vocab=32000,
    added=4,
    width=5120,
    depth=40,
    heads=40,
    ffn=13824,
    # heads of keys and values (LLaMA 2 and 3: fewer than heads); 0: as many as heads
    kv_heads=0,
    # of the RMSNorms; LLaMA 2 and 3: 1e-5
    eps=1e-6,
    # is the output head the input table? The small LLaMA 3: yes
    tied=False,
    rope_base=10000.0,
    # ("linear", factor) or ("llama3", factor, low, high, context) for a context longer than trained
    rope_scaling=(),
    # the release rounds the rotary frequencies so (its golden numbers show it); "float32" for LLaMA
    # itself
    rope_dtype="bfloat16",
    remat="full",
)
LORA = dict(
    # 0: none; the release: 16
    rank=0,
    # the product of A and B counts alpha / rank times
    alpha=16.0,
    # of what A multiplies
    dropout=0.05,
    # beside which matrices of the towers' blocks
    targets=(("llama/blocks/attn/(q|k|v|o)/w", True), (".*", False)),
    # the matrices of the LLM's blocks, where they are frozen, as "int8" or "nf4" (QLoRA); "":
    # frozen_dtype
    storage="",
)

SIZES = {
    "emu-14b": ({}, {}, {}, {}),
    # the paper's ablation: LLaMA-7B
    "emu-7b": ({}, {}, dict(width=4096, depth=32, heads=32, ffn=11008), {}),
    # a ViT-L and a LLaMA of 1B: the 14B's ratios
    "emu-1b": (
        dict(width=1024, depth=24, heads=16, ffn=4096),
        dict(width=512, depth=8, heads=8, ffn=2048),
        dict(width=2048, depth=16, heads=16, ffn=5504),
        {},
    ),
    # for benchmarks on a CPU
    "emu-60m": (
        dict(image=112, width=256, depth=6, heads=4, ffn=1024),
        dict(tokens=8, width=256, depth=4, heads=4, ffn=1024),
        dict(width=512, depth=8, heads=8, ffn=1376),
        dict(compute="float32"),
    ),
    "demo": (
        dict(image=64, patch=16, width=128, depth=4, heads=4, ffn=512, remat="none"),
        dict(
            tokens=4, width=128, depth=2, heads=8, head_width=16, ffn=512, dropout=0.0, remat="none"
        ),
        dict(vocab=2048, width=128, depth=4, heads=4, ffn=384, remat="none"),
        dict(compute="float32", standardise=True),
    ),
    "debug": (
        dict(image=28, width=32, depth=2, heads=4, ffn=64),
        dict(tokens=4, width=32, depth=2, heads=4, head_width=8, ffn=64),
        dict(vocab=512, width=32, depth=2, heads=4, ffn=64),
        dict(compute="float32"),
    ),
}
