"""The demo's trained model, which answers many prompts of one kind at a time.

Read next: ../generate/session.py, which does the work; captions.py, evaluation.py.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8

from emu_jax import checkpoint, tree
from emu_jax.config import UserError, from_dict
from emu_jax.data import tokenizer as tokenizers
from emu_jax.demo.scores import plain
from emu_jax.generate import diffusion_decoder
from emu_jax.generate.diffusion_decoder import DiffusionDecoder
from emu_jax.generate.generation_config import GenerationConfig
from emu_jax.generate.processor import Parts
from emu_jax.generate.session import Session
from emu_jax.models import emu

# Number of images or prompts in a batch.
BATCH = 128
# Maximum length of a generated caption; the longest name has 15 tokens.
NEW_TOKENS = 24
# Length of a prompt with its answer; none in the demo is longer.
CONTEXT = 1024

Images = UInt8[np.ndarray, "M h w 3"]
Visual = Float[np.ndarray, "M N D"]


class Model:
    """A trained Emu that processes many prompts of one kind in batches."""

    def __init__(
        self, model_config: emu.EmuConfig, params: tree.Tree, tokenizer: tokenizers.Tokenizer
    ):
        self.model_config = model_config
        self.params = jax.tree.map(jax.numpy.asarray, params)
        self.tokenizer = tokenizer
        self.session = Session(model_config, self.params, tokenizer, context=CONTEXT, batch=BATCH)

    @classmethod
    def load(cls, directory: str, config: dict[str, Any], data: str) -> "Model":
        """Load the run in `directory` and the tokenizer in `data`; config: that of the run."""
        model_config = emu.EmuConfig.of(from_dict(config["model"]).to_dict())
        tokenizer = tokenizers.load(f"{data}/tokenizer.json", model_config.llama.vocab)
        params = checkpoint.restore_params(directory, ema=config["optim"]["ema"] > 0)
        return cls(model_config, params, tokenizer)

    def load_decoder(self, directory: str) -> DiffusionDecoder:
        """Load the decoder, trained by the run in `directory`, of this model's visual tokens."""
        return diffusion_decoder.load(
            directory,
            self.model_config,
            empty_prompt=lambda: self.session.generate_images([[]])[0],
        )

    def encode(self, images: Images) -> Visual:
        """The visual tokens of images, as the LLM reads them."""
        return self.session.encode_images(images, "encoding")

    def caption(self, images: Images) -> list[str]:
        return self.complete([(image,) for image in images], "captions")

    def regress(self, names: list[str]) -> Visual:
        """The visual tokens regressed from `<s> name [IMG]`; each token is fed back as input."""
        return self.session.generate_images([[name] for name in names], progress="regressing")

    def complete(self, prompts: Sequence[Parts], progress: str = "stories") -> list[str]:
        """Generate the text that follows each prompt, greedily."""
        config = GenerationConfig(max_new_tokens=NEW_TOKENS)
        texts = self.session.generate_texts(prompts, config, progress=progress)
        return [plain(text) for text in texts]


def read_config(directory: str) -> dict[str, Any]:
    """The config of a run or checkpoint. Raises UserError if its stage is not `emu`."""
    config = checkpoint.read_config(directory)
    if config["stage"] != "emu":
        raise UserError(
            f"the checkpoint in '{directory}' is of the stage {config['stage']!r}; "
            "the demo's evaluation needs one of the stage 'emu'"
        )
    return config
