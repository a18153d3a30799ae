"""Instruction tuning (section 2.4 of the paper): LoRA on the LLM's self-attention learns to answer;
all else is frozen.

python -m emu_jax.train --config=configs/instruct.py[:emu-7b] --config.workdir=DIR --config.init=EMU
--config.data.tokenizer=tokenizer.model
    --config.model.lora.storage=nf4                 the frozen LLM in 4 bits (QLoRA), or int8
    --config.model.lora.rank=0 --config.rules.train="(('(vision|ln_visual|resampler)/.*', False),
    ('.*', True))"     the whole LLM instead
"""

from configs.base import get_config as base


def get_config(size: str = "emu-14b"):
    c = base(size)
    c.frozen_dtype = "bfloat16"
    # [PAD] [IMG] [/IMG] <image>, and [USER] [ASSISTANT]
    c.model.llama.added = 6
    # it is frozen
    c.model.resampler.dropout = 0.0
    # q, k, v and o; alpha and dropout: configs/sizes.py
    c.model.lora.rank = 16
    # The new tokens' rows learn too (whether the paper's did is unpublished); without their row
    # here they stay the mean of the others.
    c.rules.train = ((".*/(a|b)", True), ("llama/(embed|lm_head)/added", (4, 6)), (".*", False))
    # Steps, warm-up, peak and batch are from memory of the paper; weight decay is unpublished.
    c.rules.peak_lr = ((".*", 1e-5),)
    c.rules.decay = ((".*", 0.0),)
    c.optim.steps = 10_000
    c.optim.warmup = 0.05
    # rows of 2048 tokens: some 128 conversations
    c.data.batch = 32
    c.data.num_streams = 32
    # Weights are the sets' sizes, in thousands (how they were mixed is unpublished). `python -m
    # emu_jax.data build --kind=NAME` writes them.
    c.data.mixture = (
        ("sharegpt", 90.0, "data/sharegpt:train"),
        ("alpaca", 52.0, "data/alpaca:train"),
        ("llava", 158.0, "data/llava:train"),
        ("videochat", 11.0, "data/videochat:train"),
        ("videochatgpt", 100.0, "data/videochatgpt:train"),
    )
    c.checkpoint.every = 500
    return c
