"""emu_jax: the open training codebase of unified multimodal generation (Emu, arXiv 2307.05222) in
JAX and Flax.
"""
