"""A document becomes one sequence: `<s>` parts `</s>`.

An image in it is `[IMG]`, N slots and `[/IMG]`. This is Emu's grammar (arXiv 2307.05222, section
2), with the ids and labels of its release. The order of a document's parts expresses what differs
between the paper's data sets; the order of a Pair is drawn here. Conversations follow
chat_format.py, and only their answers are trained on. Read next: packing.py.
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
    # int32
    tokens: Int[np.ndarray, " t"]
    # float32; weight of tokens[t] as a label
    text_weights: Float[np.ndarray, " t"]
    images: UInt8[np.ndarray, "i h w 3"]
    # int32; index in tokens of the first of an image's N slots
    image_slots: Int[np.ndarray, " i"]
    # float32; 1 where the image is regressed
    image_weights: Float[np.ndarray, " i"]
    # number of tokens that truncation dropped
    cut: int
    # number of turns of a conversation that truncation dropped
    cut_turns: int = 0


@dataclass(frozen=True)
class SourceRule:
    """Overrides of data settings for one source: the fourth field of a row of data.mixture."""

    # most tokens of a sequence; 0: data.tokens
    tokens: int = 0
    # images to keep, later ones are left out but their text stays; 0: as many as data.images
    images: int = 0
    # "first": truncate the end of a long document; "random": start it at a random part
    start: str = "first"
    # number of the document's pairs to draw, kept in order without anything else; 0: the document
    pairs: int = 0
    # probability that the image of a pair comes before its text; -1: data.image_first
    image_first: float = -1.0


NO_RULE = SourceRule()


@dataclass(frozen=True)
class _Encoded:
    """Ids and label weights of one piece, and the image whose slots are among the ids, if any."""

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
        """The first `tokens` tokens and `images` images. dropped: tokens left out before."""
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

    Every text part is encoded on its own, so each starts with the tokenizer's dummy prefix. A
    document that is too long loses its end, `</s>` included, but never a part of an image. A
    conversation is cut after a complete turn; if even its first turn is too long, the sequence has
    no tokens.
    """

    tokenizer: Tokenizer
    # N
    n_visual: int
    max_tokens: int
    max_images: int
    # probability that the image of a pair comes before its text
    image_first: float
    # those of LABELS that count as labels; `<s>` and the image slots never do
    labels: Collection[str]
    # whether the model has tokens for conversations
    chats: bool = True
    # "release": start conversations without a system message with the release's; "none": do not
    system: str = "release"

    def __call__(
        self, document: Document, *, rng: np.random.Generator, rule: SourceRule = NO_RULE
    ) -> Sequence:
        """The sequence of `document`.

        Draws from `rng`: the choice of pairs if the rule asks for one, the order of each pair, the
        crop of each image that is not square (images.decode, "random"), and the rule's random
        start. Raises CorruptRecord for roles out of order, and UserError for a conversation if the
        model has no tokens for it.
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
        """Tokens and images of the longest beginning that fits and has complete images only."""
        tokens = min(len(writer.tokens), max_tokens)
        # An image is complete if its [/IMG], at slot + N, is kept.
        complete = sum(slot + self.n_visual < tokens for slot in writer.slots)
        images = min(self.max_images, complete)
        if images < len(writer.slots):
            first_dropped = writer.slots[images]
            # The sequence ends before its [IMG].
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
        # (tokens, images) after each turn
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
        """A text, an image or a special id.

        weight: of a special id as a label; of a text as labels, and of an image as a target and its
        marks as labels, where `labels` has these.
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
    """Only `count` pairs, drawn at random, in order; all parts for 0 or without pairs."""
    pairs = [part for part in parts if isinstance(part, Pair)]
    if not count or not pairs:
        return parts
    return [pairs[number] for number in sorted(rng.permutation(len(pairs))[:count])]


def _in_order(
    parts: Iterable[chat_format.Part | Pair], image_first: float, rng: np.random.Generator
) -> Iterator[chat_format.Part]:
    """The parts, with each pair as its image and its text in an order drawn at random."""
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
    """Number of the piece to start at, so that what follows still fills the sequence."""
    starts = np.cumsum([0, *lengths])
    # <s> and </s> are 2 more.
    excess = int(starts[-1]) + 2 - max_tokens
    if excess <= 0:
        return 0
    first = int(np.searchsorted(starts[:-1], rng.integers(excess + 1)))
    return min(first, len(lengths) - 1)


def _content(part: chat_format.Part, rng: np.random.Generator) -> str | np.ndarray:
    """The text of a part, or the pixels of its image cropped to a square."""
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
