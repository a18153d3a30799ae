"""Tokenizer: text to ids and back, by LLaMA's SentencePiece file or a tokenizer.json.

The base vocabulary has V ids, with <unk> 0, <s> 1 and </s> 2 as in LLaMA; Emu's added tokens follow
it. Text never encodes to added tokens, <s> or </s>: a caption that contains the characters "[IMG]"
is plain text. Read next: sequence.py.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from emu_jax.config import UserError
from emu_jax.files import commit, made_by, part_of

SPECIAL = ("<unk>", "<s>", "</s>")
BOS = SPECIAL.index("<s>")
EOS = SPECIAL.index("</s>")

# These estimate the number of tokens of a document. LLaMA's tokenizer makes one token of 3 to 4
# bytes of English, and an image is [IMG], 32 slots and [/IMG].
BYTES_PER_TOKEN = 4
MIN_BYTES_PER_TOKEN = 3
TOKENS_PER_IMAGE = 34

# Ids of the added tokens, counted from the end of the base vocabulary.
PAD = 0
IMG = 1
END_IMG = 2
IMAGE = 3
USER = 4
ASSISTANT = 5


class Tokenizer:
    """Encodes and decodes plain text, and has the ids of special tokens. Thread-safe.

    vocab: the size V of the base vocabulary.
    """

    bos = BOS
    eos = EOS

    def __init__(
        self, vocab: int, encode: Callable[[str], list[int]], decode: Callable[[list[int]], str]
    ):
        self.vocab = vocab
        self.pad = vocab + PAD
        self.img = vocab + IMG
        self.end_img = vocab + END_IMG
        self.image = vocab + IMAGE
        self.user = vocab + USER
        self.assistant = vocab + ASSISTANT
        self._encode = encode
        self._decode = decode

    def image_block(self, n_visual: int) -> list[int]:
        """The ids of one image: [IMG], n_visual slots and [/IMG]."""
        return [self.img, *[self.image] * n_visual, self.end_img]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, all below `vocab`, without <s> and </s>."""
        return self._encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special ids are dropped."""
        return self._decode(
            [int(i) for i in ids if i < self.vocab and i not in (self.bos, self.eos)]
        )


def load(path: str | Path, vocab: int) -> Tokenizer:
    """Load a tokenizer.json, or a SentencePiece model from a file with any other suffix.

    Raises UserError for a missing or damaged file, if <s> and </s> are not 1 and 2, and if the size
    is not `vocab`: training with the wrong tokenizer would fail silently.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"no tokenizer at '{path}'; data.tokenizer is the path of a tokenizer.model "
            f"(SentencePiece) or a tokenizer.json{made_by(str(path))}"
        )
    load_file = _load_json if path.suffix == ".json" else _load_sentencepiece
    size, ends, encode, decode = load_file(path)
    if size != vocab:
        raise UserError(
            f"the tokenizer '{path}' has {size} pieces, but model.llama.vocab is {vocab}; "
            "they must be equal"
        )
    if ends != (Tokenizer.bos, Tokenizer.eos):
        raise UserError(
            f"the tokenizer '{path}' has <s> and </s> at {ends[0]} and {ends[1]}; "
            "Emu, like LLaMA, needs them at 1 and 2"
        )
    return Tokenizer(vocab, encode, decode)


def train(texts: Iterable[str], vocab: int, path: str | Path) -> None:
    """Train a byte-pair tokenizer.json of exactly `vocab` pieces, and write it to `path`.

    The same texts give the same file, byte for byte. Text is split only at spaces, which are marked
    as in SentencePiece, so each frequent word of a small data set becomes one piece. Raises
    UserError if there is too little text for that many pieces.
    """
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    model = Model(models.BPE(unk_token=SPECIAL[0]))
    model.normalizer = normalizers.NFC()
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Metaspace()
    # Printable ASCII is always included, so that anything typed in it can be encoded.
    printable = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=printable,
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    if model.get_vocab_size() != vocab:
        raise UserError(
            f"these texts give a tokenizer of {model.get_vocab_size()} pieces, not {vocab}; "
            "use more text or that vocabulary size"
        )
    part = part_of(Path(path))
    model.save(str(part))
    commit(part, Path(path))


# (size, ids of <s> and </s>, encode, decode).
Loaded = tuple[int, tuple[int | None, ...], Callable[[str], list[int]], Callable[[list[int]], str]]


def _load_json(path: Path) -> Loaded:
    from tokenizers import Tokenizer as Model

    try:
        model = Model.from_file(str(path))
    # The library raises plain Exception.
    except Exception as error:
        raise UserError(f"'{path}' is not a tokenizer.json: {error}") from error
    # "<s>" in a text must be encoded as three characters, not as the special token.
    model.encode_special_tokens = True
    return (
        model.get_vocab_size(),
        tuple(model.token_to_id(name) for name in SPECIAL[1:]),
        lambda text: model.encode(text, add_special_tokens=False).ids,
        model.decode,
    )


def _load_sentencepiece(path: Path) -> Loaded:
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"'{path}' is not a SentencePiece model: {error}") from error
    return model.get_piece_size(), (model.bos_id(), model.eos_id()), model.encode, model.decode
