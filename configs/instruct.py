"""Instruction tuning, as in the paper.

LoRA on the LLM's self-attention trains; everything else is frozen.

python -m emu_jax.train --config=configs/instruct.py[:emu-7b] --config.workdir=DIR \\
    --config.init=EMU --config.data.tokenizer=tokenizer.model

To hold the frozen LLM in 4 bits (QLoRA) or 8, add --config.model.lora.storage=nf4 or =int8.
To train the complete LLM instead of LoRA, add --config.model.lora.rank=0 and
    --config.rules.train="(('(vision|ln_visual|resampler)/.*', False), ('.*', True))"
"""

from configs.base import get_config as base


def get_config(size: str = "emu-14b"):
    c = base(size)
    c.frozen_dtype = "bfloat16"
    # [PAD], [IMG], [/IMG], <image>, [USER] and [ASSISTANT].
    c.model.llama.added = 6
    # The resampler is frozen, so its dropout would only add noise.
    c.model.resampler.dropout = 0.0
    # LoRA on q, k, v and o; alpha, dropout and targets are the defaults of configs/sizes.py.
    c.model.lora.rank = 16
    # The rows of [USER] and [ASSISTANT] (4 and 5 of the added ones) train, too; without this rule
    # they would stay at the mean of the other rows. Whether they trained in the paper is
    # unpublished.
    c.rules.train = ((".*/(a|b)", True), ("llama/(embed|lm_head)/added", (4, 6)), (".*", False))
    # Learning rate, steps, warm-up and batch are from memory of the paper and should be checked
    # against it; weight decay is unpublished.
    c.rules.peak_lr = ((".*", 1e-5),)
    c.rules.decay = ((".*", 0.0),)
    c.optim.steps = 10_000
    c.optim.warmup = 0.05
    # 32 rows of 2048 tokens hold about 128 conversations.
    c.data.batch = 32
    c.data.num_streams = 32
    # Weights are the sizes of the data sets in thousands (how the paper mixes them is unpublished).
    # Build each with `python -m emu_jax.data build --kind=NAME`.
    c.data.mixture = (
        ("sharegpt", 90.0, "data/sharegpt:train"),
        ("alpaca", 52.0, "data/alpaca:train"),
        ("llava", 158.0, "data/llava:train"),
        ("videochat", 11.0, "data/videochat:train"),
        ("videochatgpt", 100.0, "data/videochatgpt:train"),
    )
    c.checkpoint.every = 500
    return c
