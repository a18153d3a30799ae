"""Text to ids and back: LLaMA's SentencePiece file, or a tokenizer.json of the `tokenizers`
library.

The base vocabulary has V ids, with <unk> 0, <s> 1 and </s> 2 as LLaMA has them; Emu's added ids
follow it: [PAD] V, [IMG] V + 1, [/IMG] V + 2, <image> V + 3, [USER] V + 4, [ASSISTANT] V + 5. No
text ever encodes to one of them, nor to <s> or </s>: a caption that says "[IMG]" is a caption. Read
next: sequence.py.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from emu_jax.config import UserError

SPECIAL = ("<unk>", "<s>", "</s>")


class Tokenizer:
    """Encodes and decodes plain text, and knows the special ids. Safe to use from several
    threads.
    """

    bos = 1
    eos = 2

    def __init__(
        self, vocab: int, encode: Callable[[str], list[int]], decode: Callable[[list[int]], str]
    ):
        self.vocab = vocab
        self.pad, self.img, self.end_img, self.image, self.user, self.assistant = range(
            vocab, vocab + 6
        )
        self._encode = encode
        self._decode = decode

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, all below `vocab`, without <s> and </s>."""
        return self._encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special ids are dropped."""
        return self._decode(
            [int(i) for i in ids if i < self.vocab and i not in (self.bos, self.eos)]
        )


def load(path: str | Path, vocab: int) -> Tokenizer:
    """The tokenizer in `path`: tokenizer.json, or else a SentencePiece model.

    Raises UserError where there is none, where its size is not `vocab` (a wrong or half-loaded
    tokenizer encodes without complaint and trains nonsense), and where <s> and </s> are not 1 and
    2.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"no tokenizer at '{path}'; data.tokenizer names a tokenizer.model (SentencePiece) or a tokenizer.json"
        )
    size, ends, encode, decode = (_load_json if path.suffix == ".json" else _load_sentencepiece)(
        path
    )
    if size != vocab:
        raise UserError(
            f"the tokenizer '{path}' has {size} pieces, and model.llama.vocab is {vocab}; they must be equal"
        )
    if ends != (Tokenizer.bos, Tokenizer.eos):
        raise UserError(
            f"the tokenizer '{path}' has <s> and </s> at {ends[0]} and {ends[1]}; Emu, like LLaMA, has them at 1 and 2"
        )
    return Tokenizer(vocab, encode, decode)


def train(texts: Iterable[str], vocab: int, path: str | Path) -> None:
    """Writes to `path` a byte-pair tokenizer.json of exactly `vocab` pieces learnt from `texts`;
    the same bytes for the same texts.

    It divides text at spaces only and marks them as SentencePiece does, so that a word which is
    frequent in a small set becomes one piece. Raises UserError if `texts` are too few for so many
    pieces.
    """
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    model = Model(models.BPE(unk_token=SPECIAL[0]))
    model.normalizer = normalizers.NFC()
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Metaspace()
    # so that whatever is typed in ASCII has its pieces
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
            "take more text or a vocabulary of that size"
        )
    new = Path(f"{path}.new")
    model.save(str(new))
    # whole or not at all
    new.replace(path)


def _load_json(path: Path):
    from tokenizers import Tokenizer as Model

    try:
        model = Model.from_file(str(path))
    # the library raises plain Exception
    except Exception as error:
        raise UserError(f"'{path}' is not a tokenizer.json: {error}") from error
    # "<s>" in a text is three characters, not an id
    model.encode_special_tokens = True
    return (
        model.get_vocab_size(),
        tuple(model.token_to_id(name) for name in SPECIAL[1:]),
        lambda text: model.encode(text, add_special_tokens=False).ids,
        model.decode,
    )


def _load_sentencepiece(path: Path):
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"'{path}' is not a SentencePiece model: {error}") from error
    return model.get_piece_size(), (model.bos_id(), model.eos_id()), model.encode, model.decode
