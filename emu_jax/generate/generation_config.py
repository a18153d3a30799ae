"""What a user may say about how text is generated. Read next: sampling.py."""

from dataclasses import dataclass

from emu_jax.config import UserError


@dataclass(frozen=True)
class GenerationConfig:
    """How text is generated. Greedy unless there is a temperature or there are beams."""

    max_new_tokens: int = 128
    # before it, no </s>
    min_new_tokens: int = 0
    # 0: the likeliest token
    temperature: float = 0.0
    # sample among the k likeliest; 0: all
    top_k: int = 0
    # among the likeliest that together have probability p
    top_p: float = 1.0
    # among those with at least this share of the likeliest's probability
    min_p: float = 0.0
    # scores of ids that were in the prompt or the answer: divided by it if positive, else
    # multiplied
    repetition_penalty: float = 1.0
    beams: int = 1
    # of beams: a hypothesis scores its log-probability / length ** length_penalty
    length_penalty: float = 1.0
    # texts before which an answer ends
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self):
        """Raises UserError for what is out of range, or does not go together."""
        for name, low, high in (
            ("max_new_tokens", 1, None),
            ("min_new_tokens", 0, self.max_new_tokens),
            ("temperature", 0, None),
            ("top_k", 0, None),
            ("top_p", 0, 1),
            ("min_p", 0, 1),
            ("repetition_penalty", 1e-3, None),
            ("beams", 1, 64),
        ):
            value = getattr(self, name)
            if not value >= low or (high is not None and value > high):
                raise UserError(
                    f"{name}={value} must be at least {low}"
                    + ("" if high is None else f" and at most {high}")
                )
        if "" in self.stop:
            raise UserError("a stop string must not be empty")
        if self.beams > 1 and self.temperature:
            raise UserError(
                f"beams={self.beams} seek the likeliest answer, temperature={self.temperature} draws one at random: choose one of them"
            )
        if not self.temperature and (self.top_k or self.top_p < 1 or self.min_p):
            raise UserError(
                "top_k, top_p and min_p choose among samples: they need a temperature, for example temperature=1"
            )
