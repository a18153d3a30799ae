"""Turn a document into one sequence: `<s>`, its parts, `</s>`.

An image becomes `[IMG]`, N slots and `[/IMG]`. This is Emu's grammar (arXiv 2307.05222, section 2)
with the token ids and labels of its release. The paper's data sets differ only in the order of a
document's parts, which sources decide, except that the order of a Pair is drawn here. Conversations
follow chat_format.py, and only their answers are trained on. Read next: packing.py.
"""

from collections.abc import Collection, Iterable, Iterator
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int, UInt8

from emu_jax.config import UserError
from emu_jax.data import chat_format
from emu_jax.data.documents import Document, Image, Pair, Picture, Text
from emu_jax.data.tokenizer import Tokenizer

LABELS = ("text", "</s>", "[IMG]", "[/IMG]")


@dataclass(frozen=True)
class Sequence:
    """One tokenised document of t tokens and i images.

    Without images, `images` has shape [0, 0, 0, 3].
    """

    id: str
    # Token ids, int32.
    tokens: Int[np.ndarray, " t"]
    # Weight of each token as a label, float32.
    text_weights: Float[np.ndarray, " t"]
    images: UInt8[np.ndarray, "i h w 3"]
    # Index in `tokens` of the first of each image's N slots, int32.
    image_slots: Int[np.ndarray, " i"]
    # Weight of each image as a regression target, float32.
    image_weights: Float[np.ndarray, " i"]
    # Number of tokens that truncation dropped.
    cut: int
    # Number of conversation turns that truncation dropped.
    cut_turns: int = 0


@dataclass(frozen=True)
class SourceRule:
    """Overrides of data settings for one source: the fourth field of a row of data.mixture."""

    # Maximum number of tokens in a sequence; 0: data.tokens.
    tokens: int = 0
    # Number of images to keep; later images are dropped, but not the text. 0: data.images.
    images: int = 0
    # "first": a long document loses its end; "random": it starts at a random part.
    start: str = "first"
    # Number of Pairs to draw from a document in place of all its parts, kept in order; 0: off.
    pairs: int = 0
    # Probability that the image of a Pair comes before its text; -1: data.image_first.
    image_first: float = -1.0


NO_RULE = SourceRule()


@dataclass(frozen=True)
class _Encoded:
    """Ids and label weights of one piece, and its image if it is one."""

    ids: list[int]
    weights: list[float]
    image: Image | None = None
    image_weight: float = 0.0


@dataclass
class _Writer:
    """A sequence under construction."""

    tokens: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    image_weights: list[float] = field(default_factory=list)

    def append(self, piece: _Encoded) -> None:
        if piece.image is not None:
            self.images.append(piece.image)
            self.slots.append(len(self.tokens) + 1)
            self.image_weights.append(piece.image_weight)
        self.tokens += piece.ids
        self.weights += piece.weights

    def finish(
        self, id: str, tokens: int, images: int, dropped: int = 0, cut_turns: int = 0
    ) -> Sequence:
        """The first `tokens` tokens and `images` images as a Sequence.

        dropped: number of tokens that were left out before they got here.
        """
        kept = self.images[:images]
        return Sequence(
            id=id,
            tokens=np.array(self.tokens[:tokens], np.int32),
            text_weights=np.array(self.weights[:tokens], np.float32),
            images=np.stack(kept) if kept else np.zeros((0, 0, 0, 3), np.uint8),
            image_slots=np.array(self.slots[:images], np.int32),
            image_weights=np.array(self.image_weights[:images], np.float32),
            cut=dropped + len(self.tokens) - tokens,
            cut_turns=cut_turns,
        )


@dataclass(frozen=True)
class SequenceBuilder:
    """Turns documents into sequences of at most `max_tokens` tokens and `max_images` images.

    Each text is encoded separately, so it starts with the tokenizer's dummy prefix (a space). A
    document that is too long loses its end, including `</s>`, but is never cut within an image. A
    conversation is cut after a complete turn; if even the first turn is too long, the sequence has
    no tokens.
    """

    tokenizer: Tokenizer
    # N, visual tokens per image.
    n_visual: int
    max_tokens: int
    max_images: int
    # Probability that the image of a Pair comes before its text.
    image_first: float
    # Which of LABELS count as labels; `<s>` and image slots never do.
    labels: Collection[str]
    # Whether the model has tokens for conversations.
    chats: bool = True
    # "release": a conversation without a system message gets the release's; "none": it gets none.
    system: str = "release"

    def __call__(
        self, document: Document, *, rng: np.random.Generator, rule: SourceRule = NO_RULE
    ) -> Sequence:
        """The sequence of `document`.

        `rng` decides which pairs the rule draws, the order of each pair, where images that are not
        square are cropped (images.decode, "random"), and the rule's random start. Raises
        CorruptRecord for roles out of order, and UserError for a conversation if the model has no
        tokens for it.
        """
        if not chat_format.is_conversation(document):
            return self._interleaved(document, rng, rule)
        if not self.chats:
            raise UserError(
                f"{document.id} is a conversation, and this model has no [USER] and [ASSISTANT] "
                "tokens; set model.llama.added=6"
            )
        return self._conversation(document, rng, rule)

    def _interleaved(
        self, document: Document, rng: np.random.Generator, rule: SourceRule
    ) -> Sequence:
        max_tokens = self._max_tokens(rule)
        image_first = self.image_first if rule.image_first < 0 else rule.image_first
        parts = _in_order(_choose_pairs(document.parts, rule.pairs, rng), image_first, rng)
        pieces = [self._encode_part(part, rng) for part in parts]
        first = 0
        if rule.start == "random":
            first = _random_start([len(piece.ids) for piece in pieces], max_tokens, rng)
        dropped = sum(len(piece.ids) for piece in pieces[:first])

        writer = _Writer()
        writer.append(self._encode(self.tokenizer.bos))
        for piece in pieces[first:]:
            if piece.image is not None and rule.images and len(writer.images) == rule.images:
                dropped += len(piece.ids)
            else:
                writer.append(piece)
        writer.append(self._encode(self.tokenizer.eos, self._label("</s>")))

        tokens, images = self._fitting(writer, max_tokens)
        return writer.finish(document.id, tokens, images, dropped)

    def _fitting(self, writer: _Writer, max_tokens: int) -> tuple[int, int]:
        """Number of tokens and images of the longest prefix that fits and cuts no image."""
        tokens = min(len(writer.tokens), max_tokens)
        # An image is complete if its [/IMG], at slot + N, is kept.
        complete = sum(slot + self.n_visual < tokens for slot in writer.slots)
        images = min(self.max_images, complete)
        if images < len(writer.slots):
            first_dropped = writer.slots[images]
            # The sequence ends before the [IMG] of the first dropped image.
            tokens = min(tokens, first_dropped - 1)
        return tokens, images

    def _conversation(
        self, document: Document, rng: np.random.Generator, rule: SourceRule
    ) -> Sequence:
        system, turns = chat_format.split_turns(document)
        if not system and self.system == "release":
            images = [part for part in turns[0].question if isinstance(part, Picture)]
            system = chat_format.SYSTEM_MESSAGES[chat_format.question_kind(images)]
        writer = _Writer()
        # Number of (tokens, images) after each turn.
        ends = [(0, 0)]
        for number, turn in enumerate(turns):
            opening = chat_format.opening_pieces(self.tokenizer, system) if number == 0 else []
            question = [_content(part, rng) for part in turn.question]
            asked = chat_format.question_pieces(self.tokenizer, question)
            for piece in chat_format.join_texts([*opening, *asked]):
                writer.append(self._encode(piece))
            for part in turn.answer:
                writer.append(self._encode_part(part, rng))
            writer.append(self._encode(self.tokenizer.eos, self._label("</s>")))
            ends.append((len(writer.tokens), len(writer.images)))

        max_tokens = self._max_tokens(rule)
        max_images = min(self.max_images, rule.images or self.max_images)
        kept = max(
            turns_kept
            for turns_kept, (tokens, images) in enumerate(ends)
            if tokens <= max_tokens and images <= max_images
        )
        tokens, images = ends[kept]
        return writer.finish(document.id, tokens, images, cut_turns=len(turns) - kept)

    def _encode_part(self, part: chat_format.Part, rng: np.random.Generator) -> _Encoded:
        weight = part.weight if isinstance(part, Text) else 1.0
        return self._encode(_content(part, rng), weight)

    def _encode(self, piece: chat_format.Piece, weight: float = 0.0) -> _Encoded:
        """Encode a text, an image or a special id.

        weight: the label weight of the tokens of a text, or of a special id. For an image, it is
        the weight of the image as a regression target, and of [IMG] and [/IMG] as labels, if
        `labels` includes them.
        """
        if isinstance(piece, int):
            return _Encoded([piece], [weight])
        if isinstance(piece, str):
            ids = self.tokenizer.encode(piece)
            return _Encoded(ids, [weight * self._label("text")] * len(ids))
        weights = [
            weight * self._label("[IMG]"),
            *[0.0] * self.n_visual,
            weight * self._label("[/IMG]"),
        ]
        return _Encoded(self.tokenizer.image_block(self.n_visual), weights, piece, weight)

    def _label(self, name: str) -> float:
        return float(name in self.labels)

    def _max_tokens(self, rule: SourceRule) -> int:
        return min(self.max_tokens, rule.tokens or self.max_tokens)


def _choose_pairs(
    parts: Ordered[chat_format.Part | Pair], count: int, rng: np.random.Generator
) -> Ordered[chat_format.Part | Pair]:
    """Draw `count` pairs at random and keep their order.

    A `count` of 0 takes all parts, and so does a document without pairs.
    """
    pairs = [part for part in parts if isinstance(part, Pair)]
    if not count or not pairs:
        return parts
    return [pairs[number] for number in sorted(rng.permutation(len(pairs))[:count])]


def _in_order(
    parts: Iterable[chat_format.Part | Pair], image_first: float, rng: np.random.Generator
) -> Iterator[chat_format.Part]:
    """The parts, with each pair split into its image and text in random order."""
    for part in parts:
        if not isinstance(part, Pair):
            yield part
        elif rng.random() < image_first:
            yield part.image
            yield part.text
        else:
            yield part.text
            yield part.image


def _random_start(lengths: list[int], max_tokens: int, rng: np.random.Generator) -> int:
    """Index of a random piece to start at, with enough tokens after it to fill the sequence."""
    starts = np.cumsum([0, *lengths])
    # <s> and </s> are 2 tokens more.
    excess = int(starts[-1]) + 2 - max_tokens
    if excess <= 0:
        return 0
    first = int(np.searchsorted(starts[:-1], rng.integers(excess + 1)))
    return min(first, len(lengths) - 1)


def _content(part: chat_format.Part, rng: np.random.Generator) -> str | np.ndarray:
    """The text of a part, or its image cropped to a square."""
    if isinstance(part, Text):
        return part.text
    if isinstance(part, str):
        return part
    image = part.data if isinstance(part, Picture) else part
    assert not isinstance(image, bytes), "records.py decodes images before they get here"
    return _crop_square(image, rng)


def _crop_square(image: Image, rng: np.random.Generator) -> UInt8[np.ndarray, "side side 3"]:
    """A square of the image's shorter side, at a random position along the longer one."""
    height, width = image.shape[:2]
    if height == width:
        return image
    side = min(height, width)
    start = int(rng.integers(max(height, width) - side + 1))
    if height > width:
        return image[start : start + side]
    return image[:, start : start + side]
