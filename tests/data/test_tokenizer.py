"""Both tokenizers: decoding inverts encoding, special ids, training, and wrong files."""

import io
import itertools

import pytest
import sentencepiece

from emu_jax.config import UserError
from emu_jax.data import tokenizer

WORDS = ("cat", "dog", "tree", "house", "above", "left", "blue", "green", "São", "Côte", "d’Ivoire")
TEXTS = [f"a {a} and a {b} on {c}" for a, b, c in itertools.permutations(WORDS, 3)]
TRICKS = (
    "<s> a cat </s>",
    "[IMG]",
    "a [IMG]<image><image>[/IMG] b",
    "[PAD] [USER] [ASSISTANT]",
    "<unk>",
)


@pytest.fixture(scope="module", params=["sentencepiece", "json"])
def model(request, tmp_path_factory):
    """(path, vocab) of a tokenizer trained on TEXTS."""
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "json":
        tokenizer.train(TEXTS, 149, folder / "tokenizer.json")
        return folder / "tokenizer.json", 149
    return save_sentencepiece(folder / "tokenizer.model"), 400


def save_sentencepiece(path, **different):
    data = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=data,
        vocab_size=400,
        hard_vocab_limit=True,
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=[f"reserved{number}" for number in range(80)],
        minloglevel=2,
        **dict(unk_id=0, bos_id=1, eos_id=2, pad_id=-1) | different,
    )
    path.write_bytes(data.getvalue())
    return path


def test_decode_inverts_encode(model):
    mine = tokenizer.load(*model)
    for text in TEXTS[:50]:
        assert mine.decode(mine.encode(text)) == text
    assert mine.encode("") == []


def test_added_ids_follow_the_vocabulary(model):
    mine = tokenizer.load(*model)
    vocab = model[1]
    assert mine.vocab == vocab and (mine.bos, mine.eos) == (1, 2)
    assert [mine.pad, mine.img, mine.end_img, mine.image, mine.user, mine.assistant] == list(
        range(vocab, vocab + 6)
    )


@pytest.mark.parametrize("text", TRICKS)
def test_no_text_becomes_a_special_id(model, text):
    mine = tokenizer.load(*model)
    ids = mine.encode(text)
    assert ids and all(2 < i < mine.vocab or i == 0 for i in ids)
    assert mine.decode(ids).strip() == text


def test_decode_drops_special_ids(model):
    mine = tokenizer.load(*model)
    ids = mine.encode("a cat")
    wrapped = [mine.bos, *ids, mine.img, mine.image, mine.end_img, mine.eos, mine.pad]
    assert mine.decode(wrapped) == "a cat"


def test_another_size_is_refused(model):
    path, vocab = model
    with pytest.raises(UserError, match=f"has {vocab} pieces, but model.llama.vocab is 32000"):
        tokenizer.load(path, 32000)


def test_training_is_deterministic(tmp_path):
    for name in "ab":
        tokenizer.train(TEXTS, 149, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_frequent_words_are_one_piece(tmp_path):
    tokenizer.train(TEXTS, 149, tmp_path / "tokenizer.json")
    mine = tokenizer.load(tmp_path / "tokenizer.json", 149)
    assert len(mine.encode("a house above a tree")) == 5


def test_too_few_texts_for_the_vocabulary(tmp_path):
    with pytest.raises(UserError, match="not 2048"):
        tokenizer.train(["a cat"], 2048, tmp_path / "tokenizer.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_missing_and_damaged_files(tmp_path, name):
    with pytest.raises(UserError, match="no tokenizer at"):
        tokenizer.load(tmp_path / name, 100)
    with pytest.raises(UserError, match="`make demo` makes"):
        tokenizer.load(f"data/demo/none/{name}", 100)
    (tmp_path / name).write_bytes(b"nonsense")
    with pytest.raises(UserError, match="is not a"):
        tokenizer.load(tmp_path / name, 100)


def test_ends_of_sequence_elsewhere_are_refused(tmp_path):
    path = save_sentencepiece(tmp_path / "tokenizer.model", bos_id=2, eos_id=1)
    with pytest.raises(UserError, match="has <s> and </s> at 2 and 1"):
        tokenizer.load(path, 400)
