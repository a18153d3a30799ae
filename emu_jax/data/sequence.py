"""A document becomes one sequence: `<s>` parts `</s>`, where an image is `[IMG]`, N slots and
`[/IMG]`.

The grammar of Emu (arXiv 2307.05222, section 2; the release's ids and labels). Everything that
differs between the data sets of the paper is said by the order of a document's parts; the random
order of a Pair is drawn here. A conversation is written by chat_format.py, and only its answers count.
Read next: packing.py.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt8

from emu_jax.config import UserError
from emu_jax.data import chat_format
from emu_jax.data.documents import Document, Pair, Picture, Text
from emu_jax.data.tokenizer import Tokenizer

LABELS = ("text", "</s>", "[IMG]", "[/IMG]")


@dataclass(frozen=True)
class Sequence:
    """One tokenised document; t tokens and i images of it. With no image, `images` has shape [0, 0,
    0, 3].
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
    # tokens that truncation dropped
    cut: int
    # and turns of a conversation
    cut_turns: int = 0


@dataclass(frozen=True)
class SourceRule:
    """How the documents of one source become sequences, where that is not how all do: the fourth
    field of a row of data.mixture.

    `pairs` draws so many of a document's pairs (all, if it has fewer), in their order, and leaves
    everything else out. `start="random"` begins what is longer than `tokens` at a part drawn at
    random, in place of its first.
    """

    # of a sequence, at most; 0: data.tokens
    tokens: int = 0
    # the first so many are kept, the others left out and the text goes on; 0: all that data.images
    # allows
    images: int = 0
    # or "random"
    start: str = "first"
    # 0: the whole document
    pairs: int = 0
    # of an image and its text, how often the image comes first; -1: data.image_first
    image_first: float = -1.0


NO_RULE = SourceRule()


def make_sequence(
    document: Document,
    tokenizer: Tokenizer,
    *,
    n_visual: int,
    max_tokens: int,
    max_images: int,
    image_first: float,
    labels: Collection[str],
    rng: np.random.Generator,
    rule: SourceRule = NO_RULE,
    chats: bool = True,
    system: str = "release",
) -> Sequence:
    """The sequence of `document`, of at most `max_tokens` tokens and `max_images` images, made by
    `rule`.

    `labels` says which of LABELS count as labels; `<s>` and the slots never do. Every part that is
    text is encoded on its own, so the tokenizer's dummy prefix stands between neighbours. What is
    too long loses its end, `</s>` included, and never a part of an image. `image_first` is the
    probability that a Pair's image comes first. `rng` is asked once a Pair, once more for an image
    that is not square (its place of the cut: images.decode, "random"), and by a rule that draws.

    A conversation is cut after a whole turn instead; one whose first turn is too long has no
    tokens. Its questions and their images count nothing. system: "release" begins it with the
    release's message, if it has none of its own. Raises CorruptRecord for roles out of order, and
    UserError for a conversation where the model has no tokens for it (`chats`).
    """
    max_tokens = min(max_tokens, rule.tokens or max_tokens)
    if chat_format.is_conversation(document):
        if not chats:
            raise UserError(
                f"{document.id} is a conversation, and this model has no [USER] and [ASSISTANT]: model.llama.added=6"
            )
        return _conversation(
            document,
            tokenizer,
            n_visual,
            max_tokens,
            min(max_images, rule.images or max_images),
            labels,
            rng,
            system,
        )
    block = [tokenizer.img, *[tokenizer.image] * n_visual, tokenizer.end_img]
    counts = {label: float(label in labels) for label in LABELS}
    block_weights = [counts["[IMG]"], *[0.0] * n_visual, counts["[/IMG]"]]
    pieces: list[tuple[list[int], list[float], np.ndarray | None]] = []
    for part in _ordered(
        _chosen(document.parts, rule.pairs, rng),
        image_first if rule.image_first < 0 else rule.image_first,
        rng,
    ):
        if isinstance(part, np.ndarray):
            pieces.append((block, block_weights, _square(part, rng)))
        else:
            text, weight = (part.text, part.weight) if isinstance(part, Text) else (part, 1.0)
            ids = tokenizer.encode(text)
            pieces.append((ids, [weight * counts["text"]] * len(ids), None))
    before, pieces = _begun(pieces, max_tokens, rule.start, rng)

    tokens = [tokenizer.bos]
    weights = [0.0]
    images = []
    slots = []
    for ids, counted, image in pieces:
        if image is not None:
            if rule.images and len(images) == rule.images:
                before += len(ids)
                continue
            images.append(image)
            slots.append(len(tokens) + 1)
        tokens += ids
        weights += counted
    tokens.append(tokenizer.eos)
    weights.append(counts["</s>"])

    keep = min(len(tokens), max_tokens)
    # images whose [/IMG], at slot + N, is still there
    kept = min(max_images, sum(slot + n_visual < keep for slot in slots))
    if kept < len(slots):
        # before the [IMG] of the first that is not
        keep = min(keep, slots[kept] - 1)
    return Sequence(
        id=document.id,
        tokens=np.array(tokens[:keep], np.int32),
        text_weights=np.array(weights[:keep], np.float32),
        images=np.stack(images[:kept]) if kept else np.zeros((0, 0, 0, 3), np.uint8),
        image_slots=np.array(slots[:kept], np.int32),
        image_weights=np.ones(kept, np.float32),
        cut=before + len(tokens) - keep,
    )


def _conversation(
    document, tokenizer, n_visual, max_tokens, max_images, labels, rng, system
) -> Sequence:
    own, turns = chat_format.split_turns(document)
    counts = {label: float(label in labels) for label in LABELS}
    said = own or (
        chat_format.SYSTEM_MESSAGES[
            chat_format.question_kind(
                [part for part in turns[0].question if isinstance(part, Picture)]
            )
        ]
        if system == "release"
        else ()
    )
    written = _Written(tokenizer, n_visual, counts)
    ends = [written.end]
    for number, (question, answer) in enumerate(turns):
        asked = [
            _square(part.data, rng) if isinstance(part, Picture) else part.text for part in question
        ]
        for piece in chat_format.join_texts(
            [
                *(chat_format.opening_pieces(tokenizer, said) if number == 0 else ()),
                *chat_format.question_pieces(tokenizer, asked),
            ]
        ):
            written.add(piece, 0.0)
        for part in answer:
            written.add(
                *(
                    (_square(part.data, rng), 1.0)
                    if isinstance(part, Picture)
                    else (part.text, part.weight)
                )
            )
        written.add(tokenizer.eos, counts["</s>"])
        ends.append(written.end)
    kept = max(
        number
        for number, (tokens, images) in enumerate(ends)
        if tokens <= max_tokens and images <= max_images
    )
    return written.until(document.id, ends[kept], cut_turns=len(turns) - kept)


class _Written:
    """A sequence that grows by pieces."""

    def __init__(self, tokenizer: Tokenizer, n_visual: int, counts: dict[str, float]):
        self.t = tokenizer
        self.n = n_visual
        self.counts = counts
        self.tokens = []
        self.weights = []
        self.images = []
        self.slots = []
        self.regressed = []

    @property
    def end(self) -> tuple[int, int]:
        """(tokens, images) so far."""
        return len(self.tokens), len(self.images)

    def add(self, piece: chat_format.Piece, weight: float) -> None:
        """weight: of a special id as a label; of a text, and of an image as a target, beside what
        `labels` says.
        """
        if isinstance(piece, int):
            ids = [piece]
            weights = [weight]
        elif isinstance(piece, str):
            ids = self.t.encode(piece)
            weights = [weight * self.counts["text"]] * len(ids)
        else:
            self.images.append(piece)
            self.slots.append(len(self.tokens) + 1)
            self.regressed.append(weight)
            ids = [self.t.img, *[self.t.image] * self.n, self.t.end_img]
            weights = [
                weight * self.counts["[IMG]"],
                *[0.0] * self.n,
                weight * self.counts["[/IMG]"],
            ]
        self.tokens += ids
        self.weights += weights

    def until(self, id: str, end: tuple[int, int], cut_turns: int) -> Sequence:
        tokens, images = end
        return Sequence(
            id=id,
            tokens=np.array(self.tokens[:tokens], np.int32),
            text_weights=np.array(self.weights[:tokens], np.float32),
            images=np.stack(self.images[:images]) if images else np.zeros((0, 0, 0, 3), np.uint8),
            image_slots=np.array(self.slots[:images], np.int32),
            image_weights=np.array(self.regressed[:images], np.float32),
            cut=len(self.tokens) - tokens,
            cut_turns=cut_turns,
        )


def _chosen(parts, pairs, rng):
    found = [part for part in parts if isinstance(part, Pair)]
    if not pairs or not found:
        return parts
    return [found[place] for place in sorted(rng.permutation(len(found))[:pairs])]


def _ordered(parts, image_first, rng):
    for part in parts:
        if not isinstance(part, Pair):
            yield part
        elif rng.random() < image_first:
            yield from (part.image, part.text)
        else:
            yield from (part.text, part.image)


def _begun(pieces, max_tokens, start, rng):
    """(tokens left out, the pieces from where the subsequence begins)."""
    starts = np.cumsum([0, *(len(ids) for ids, _, _ in pieces)])
    # <s> and </s>
    spare = int(starts[-1]) + 2 - max_tokens
    if start == "first" or spare <= 0:
        return 0, pieces
    # the first piece that begins there or after
    first = int(np.searchsorted(starts[:-1], rng.integers(spare + 1)))
    first = min(first, len(pieces) - 1)
    return int(starts[first]), pieces[first:]


def _square(image, rng):
    """The square of an image's shorter side, its place drawn along the longer one."""
    height, width = image.shape[:2]
    side = min(height, width)
    if height == width:
        return image
    place = int(rng.integers(max(height, width) - side + 1))
    return image[place : place + side] if height > width else image[:, place : place + side]
