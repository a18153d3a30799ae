"""Settings of text generation. Read next: logits_process.py."""

from dataclasses import dataclass

from emu_jax.config import SEEDS, UserError


@dataclass(frozen=True)
class GenerationConfig:
    """How text is generated: greedily, unless there is a temperature or more than one beam.

    Raises UserError for values out of range or that exclude each other.
    """

    max_new_tokens: int = 128
    # </s> is not chosen before this many tokens.
    min_new_tokens: int = 0
    # 0 means greedy decoding.
    temperature: float = 0.0
    # Sample among the k likeliest tokens; 0 means among all.
    top_k: int = 0
    # Sample among the likeliest tokens that together have probability p (nucleus sampling).
    top_p: float = 1.0
    # Sample among the tokens at least min_p times as likely as the likeliest.
    min_p: float = 0.0
    # Divides positive scores of ids that occur in the prompt or answer, and multiplies negative
    # ones.
    repetition_penalty: float = 1.0
    beams: int = 1
    # Beam search ranks answers by log-probability / length ** length_penalty.
    length_penalty: float = 1.0
    # Strings that end the answer and are not part of it.
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self):
        for name, low, high in (
            ("max_new_tokens", 1, None),
            ("min_new_tokens", 0, self.max_new_tokens),
            ("temperature", 0, None),
            ("top_k", 0, None),
            ("top_p", 0, 1),
            ("min_p", 0, 1),
            ("repetition_penalty", 1e-3, None),
            ("beams", 1, 64),
            ("seed", *SEEDS),
        ):
            value = getattr(self, name)
            # NaN fails every comparison.
            if not value >= low or (high is not None and value > high):
                limits = f"at least {low}" + ("" if high is None else f" and at most {high}")
                raise UserError(f"{name}={value} must be {limits}")
        if "" in self.stop:
            raise UserError("a stop string must not be empty")
        if self.beams > 1 and self.temperature:
            raise UserError(
                f"beams={self.beams} and temperature={self.temperature} exclude each other: "
                "beam search does not sample; set one of them"
            )
        if not self.temperature and (self.top_k or self.top_p < 1 or self.min_p):
            raise UserError(
                "top_k, top_p and min_p restrict sampling, so they need a temperature, "
                "for example temperature=1"
            )
