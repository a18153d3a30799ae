"""The models by name.

Every number of emu-14b is from the paper (arXiv 2307.05222) or its release. The comment above a
field of VISION, RESAMPLER, LLAMA, LORA and COMMON is its reference documentation; SIZES lists what
the other models change. Read next: decoder.py.
"""

from ml_collections import ConfigDict


def model(size: str) -> ConfigDict:
    """Sizes and numerical options of the towers. Raises ValueError for an unknown size."""
    if size not in SIZES:
        raise ValueError(f"no model size {size!r}; there are {', '.join(SIZES)}")
    vision, resampler, llama, common = SIZES[size]
    return ConfigDict(
        dict(
            # Vision encoder: EVA-01-CLIP ViT-g/14.
            vision=VISION | vision,
            # Causal transformer: a T5-base decoder, trained from scratch.
            resampler=RESAMPLER | resampler,
            # Language model: LLaMA-1 13B.
            llama=LLAMA | llama,
            # Low-rank adapters and the storage of frozen matrices.
            lora=LORA,
            **COMMON | common,
        )
    )


COMMON = dict(
    # Dtype of arithmetic: "bfloat16" or "float32". Softmax, norms and losses are always in float32.
    compute="bfloat16",
    # Attention kernel: "dense", "splash" (TPU), "pallas" (GPU), "cudnn" (GPU, no packed rows), or
    # "auto", which chooses by platform.
    attention="auto",
    # Whether visual tokens are standardised per token and dimension, by constants measured once
    # before training. The release does not do this.
    standardise=False,
)
VISION = dict(
    # Side of the input image, in pixels.
    image=224,
    # Side of a patch, in pixels.
    patch=14,
    # E, width of the hidden states.
    width=1408,
    # Number of transformer blocks.
    depth=40,
    # Attention heads.
    heads=16,
    # Hidden width of the feed-forward layers.
    ffn=6144,
    # Mean of the red, green and blue of images between 0 and 1 (CLIP's constants).
    mean=(0.48145466, 0.4578275, 0.40821073),
    # Standard deviation of the red, green and blue (CLIP's constants).
    std=(0.26862954, 0.26130258, 0.27577711),
    # Rematerialisation, that is, what a block saves for the backward pass: "full" only its inputs,
    # "dots" also the results of matrix products, "none" everything. Our default, "full", needs the
    # least memory.
    remat="full",
)
RESAMPLER = dict(
    # N, visual tokens per image: the number of learned queries.
    tokens=32,
    # Width of the hidden states.
    width=768,
    # Number of blocks, each with self-attention, cross-attention and a feed-forward layer.
    depth=12,
    # Attention heads.
    heads=12,
    # Width of a head.
    head_width=64,
    # Hidden width of the feed-forward layers.
    ffn=3072,
    # Buckets of the relative position bias (T5's).
    buckets=32,
    # Distances of at least this many tokens share the last bucket (T5's).
    max_distance=128,
    # Dropout rate (T5's).
    dropout=0.1,
    # What a block saves for the backward pass, as in model.vision.remat.
    remat="full",
)
LLAMA = dict(
    # Size of LLaMA's own vocabulary.
    vocab=32000,
    # Number of tokens that Emu adds: [PAD], [IMG], [/IMG] and <image>. The chat model has 6, with
    # [USER] and [ASSISTANT].
    added=4,
    # D, width of the hidden states.
    width=5120,
    # Number of transformer blocks.
    depth=40,
    # Attention heads.
    heads=40,
    # Hidden width of the feed-forward layers.
    ffn=13824,
    # Heads of keys and values (grouped-query attention, LLaMA 2 and 3); 0: as many as heads.
    kv_heads=0,
    # Epsilon of the RMSNorms; LLaMA 2 and 3 use 1e-5.
    eps=1e-6,
    # Whether the output head shares the input embedding table, as in the small LLaMA 3 models.
    tied=False,
    # Base of the rotary frequencies.
    rope_base=10000.0,
    # Scaling of the rotary frequencies beyond the trained context: ("linear", factor) or ("llama3",
    # factor, low, high, context); (): none.
    rope_scaling=(),
    # Dtype to which the rotary frequencies are rounded. The release's outputs show that it uses
    # bfloat16; LLaMA itself needs "float32".
    rope_dtype="bfloat16",
    # What a block saves for the backward pass, as in model.vision.remat.
    remat="full",
)
LORA = dict(
    # Rank of the adapters; 0: no LoRA. The release's chat model has 16.
    rank=0,
    # Scale: the product of A and B is multiplied by alpha / rank.
    alpha=16.0,
    # Dropout rate on LoRA's input.
    dropout=0.05,
    # Which matrices of the towers' blocks get adapters: (regex over parameter paths, bool) rows,
    # first match wins. The paper's: the LLM's self-attention.
    targets=(("llama/blocks/attn/(q|k|v|o)/w", True), (".*", False)),
    # How the frozen matrices of the LLM's blocks are stored: "int8" or "nf4" (QLoRA, arXiv
    # 2305.14314); "": in frozen_dtype.
    storage="",
)

# Name -> what differs from emu-14b, in (VISION, RESAMPLER, LLAMA, COMMON).
SIZES = {
    "emu-14b": ({}, {}, {}, {}),
    # The paper's ablation, with LLaMA-7B.
    "emu-7b": ({}, {}, dict(width=4096, depth=32, heads=32, ffn=11008), {}),
    # A ViT-L and a LLaMA of 1B parameters, in the proportions of the 14B.
    "emu-1b": (
        dict(width=1024, depth=24, heads=16, ffn=4096),
        dict(width=512, depth=8, heads=8, ffn=2048),
        dict(width=2048, depth=16, heads=16, ffn=5504),
        {},
    ),
    # For benchmarks on a CPU.
    "emu-60m": (
        dict(image=112, width=256, depth=6, heads=4, ffn=1024),
        dict(tokens=8, width=256, depth=4, heads=4, ffn=1024),
        dict(width=512, depth=8, heads=8, ffn=1376),
        dict(compute="float32"),
    ),
    # `make demo`: trains in minutes on two cores.
    "demo": (
        dict(image=64, patch=16, width=128, depth=4, heads=4, ffn=512, remat="none"),
        dict(
            tokens=4, width=128, depth=2, heads=8, head_width=16, ffn=512, dropout=0.0, remat="none"
        ),
        dict(vocab=2048, width=128, depth=4, heads=4, ffn=384, remat="none"),
        dict(compute="float32", standardise=True),
    ),
    # For tests.
    "debug": (
        dict(image=28, width=32, depth=2, heads=4, ffn=64),
        dict(tokens=4, width=32, depth=2, heads=4, head_width=8, ffn=64),
        dict(vocab=512, width=32, depth=2, heads=4, ffn=64),
        dict(compute="float32"),
    ),
}
