"""CLIP score of image files and captions with an imported CLIP of random weights.

Its tokenizer must give the same ids as OpenAI's, which this file writes out.
"""

import json

import numpy as np
import pytest
from PIL import Image
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from emu_jax.evaluate.__main__ import main
from emu_jax.evaluate.metrics import clip_score
from emu_jax.weights import __main__ as weights
from tests.support import clips

# Contractions, accents in two forms, digits, special tokens as text, emoji, letters whose lower
# case is longer, white space, punctuation, ligatures, full-width letters, and a text longer than
# the context.
ODD_TEXTS = (
    "",
    " ",
    "the dog\n at",
    "don't I'm WE'LL",
    "caf\u00e9 cafe\u0301 na\u00efve",
    "12 3.5 x2 \u00bd \u0663",
    "<|endoftext|>dog a <|startoftext|> b </w> <unk>",
    "\U0001f600 dog\u4e2d\u6587",
    "\u0130stanbul \u01c5 \u1e9e \u03c2 \u03a3",
    "a\u00a0b\u2003c\x00d\r\ne\tf",
    "!!??-- __init__ a_b",
    "\u00ad soft \ufb01 \uff21",
    "the dog " * 30,
)
CAPTIONS = {"a": ["the dog sat"], "b": ["the dog at the mat", "39 dogs!"], "c": ["a cat"]}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A CLIP, as imported, and three pictures of different shapes."""
    root = tmp_path_factory.mktemp("root")
    clips.folder(root / "theirs")
    assert weights.main(["import", "--family=clip", str(root / "theirs"), f"--to={root}/clip"]) == 0
    (root / "pictures").mkdir()
    for number, (name, shape) in enumerate(
        (("a.png", (40, 30, 3)), ("b.jpg", (18, 50, 3)), ("c.webp", (16, 16, 3)))
    ):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, shape, np.uint8)).save(
            root / "pictures" / name
        )
    (root / "captions.json").write_text(json.dumps(CAPTIONS | {"a": CAPTIONS["a"][0]}))
    (root / "pictures.json").write_text(
        json.dumps({name[0]: f"pictures/{name}" for name in ("c.webp", "a.png", "b.jpg")})
    )
    return root


def score(root, capsys, *, predictions="pictures", references="captions.json", clip="clip"):
    code = main(
        [
            "score",
            "--metric=clip_score",
            f"--predictions={root}/{predictions}",
            f"--references={root}/{references}",
            *([f"--clip={root}/{clip}"] if clip else []),
        ]
    )
    out, error = capsys.readouterr()
    assert code == (2 if error else 0) and error.count("\n") == bool(error)
    return error or json.loads(out)


def test_a_folder_and_a_file_of_paths_score_like_their_features(root, capsys):
    model = clip_score.load(str(root / "clip"))
    images = clip_score.image_features(
        model, [root / "pictures" / name for name in ("a.png", "b.jpg", "b.jpg", "c.webp")]
    )
    texts = clip_score.text_features(
        model, [caption for some in CAPTIONS.values() for caption in some]
    )
    each = [clip_score.score(images[k : k + 1], texts[k : k + 1]) for k in range(4)]
    want = np.mean([each[0], np.mean(each[1:3]), each[3]])
    assert max(each) > 1 and len(set(each)) > 2
    for predictions in ("pictures", "pictures.json"):
        found = score(root, capsys, predictions=predictions)
        assert found["count"] == 3 and found["clip_score"] == pytest.approx(want, abs=1e-4)


def test_features_do_not_depend_on_what_else_is_scored(root):
    model = clip_score.load(str(root / "clip"))
    texts = [f"the dog {k}" for k in range(clip_score.BATCH + 1)]
    whole = clip_score.text_features(model, texts)
    np.testing.assert_allclose(whole[-1:], clip_score.text_features(model, texts[-1:]), atol=1e-5)
    assert clip_score.text_features(model, []).shape == (0, 12)


def openai_tokenizer(folder):
    """OpenAI's byte-pair tokenizer, from vocab.json and merges.txt."""
    start = "<|startoftext|>"
    end = "<|endoftext|>"
    files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer = Tokenizer(models.BPE.from_file(*files, end_of_word_suffix="</w>", unk_token=end))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = (
        r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|"
        r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.add_special_tokens([start, end])
    ids = tokenizer.get_vocab()
    tokenizer.post_processor = processors.RobertaProcessing(
        (end, ids[end]), (start, ids[start]), trim_offsets=False, add_prefix_space=False
    )
    return tokenizer


@pytest.mark.parametrize("in_one_file", [False, True])
def test_ids_are_those_of_openais_tokenizer(root, tmp_path, in_one_file):
    model = clip_score.load(str(root / "clip"))
    openai = openai_tokenizer(root / "clip")
    if in_one_file:
        # Other programs may leave truncation and padding in the file. They must not change the ids.
        openai.enable_truncation(5)
        openai.enable_padding(length=9)
        openai.save(str(tmp_path / "tokenizer.json"))
        openai.no_truncation()
        openai.no_padding()
        model = model._replace(tokenizer=clip_score.load_tokenizer(tmp_path, model.config))
    for text in ODD_TEXTS:
        ids = openai.encode(text).ids
        ids = ids[:19] + ids[-1:] if len(ids) > 20 else ids
        expected = ids + ids[-1:] * (20 - len(ids))
        assert clip_score.token_ids(model, text).tolist() == expected, text


def test_a_text_is_cut_to_the_context_and_keeps_its_end(root):
    model = clip_score.load(str(root / "clip"))
    ids = clip_score.token_ids(model, "the dog " * 30)
    assert len(ids) == 20 and ids[0] == 517 and ids[-1] == 518 and 518 not in ids[:-1]
    assert clip_score.token_ids(model, "the DOG\n at").tolist()[:6] == [
        517,
        513,
        515,
        516,
        518,
        518,
    ]


def test_bad_input_is_a_one_line_error(root, capsys, tmp_path):
    assert "of images needs --clip=DIR, a CLIP. Download a folder" in score(root, capsys, clip=None)
    assert "no directory" in score(root, capsys, clip="nowhere")
    for name, value, message in (
        ("more", CAPTIONS | {"d": ["x"]}, "nothing for 1 ids (d)"),
        ("less", {"a": "x"}, "nothing for 2 ids (b, c)"),
        ("odd", {"a": 3}, "not references"),
    ):
        (root / f"{name}.json").write_text(json.dumps(value))
        assert message in score(root, capsys, references=f"{name}.json")
    (root / "gone.json").write_text(
        json.dumps({"a": "pictures/a.png", "b": "nothing.png", "c": "captions.json"})
    )
    assert "cannot read" in score(root, capsys, predictions="gone.json")
    (root / "text.json").write_text(
        json.dumps({"a": "captions.json", "b": "captions.json", "c": "captions.json"})
    )
    assert "not a usable image" in score(root, capsys, predictions="text.json")
    for name, pictures, message in (
        ("empty", (), "no images (.png"),
        ("twice", ("a.png", "a.jpg"), "the names of two images differ only"),
    ):
        (root / name).mkdir()
        for picture in pictures:
            Image.new("RGB", (20, 20)).save(root / name / picture)
        assert message in score(root, capsys, predictions=name)


def test_a_clip_without_its_own_tokenizer_is_a_one_line_error(root, capsys):
    vocab = (root / "clip/vocab.json").read_text()
    for text, message in (
        (None, "lacks CLIP's tokenizer"),
        ("{", "tokenizer cannot be read"),
        (
            json.dumps(json.loads(vocab) | {"more": 519}),
            "has 520 tokens and puts [517, 518] around a text; the model has 519",
        ),
    ):
        (root / "clip/vocab.json").unlink(missing_ok=True)
        if text:
            (root / "clip/vocab.json").write_text(text)
        assert message in score(root, capsys)
    (root / "clip/vocab.json").write_text(vocab)
    path = root / "clip/preprocessor_config.json"
    for said, message in (
        ({"size": 8}, "do not fit a CLIP of 16 pixels"),
        ({"size": "x"}, "not a CLIP's preprocessor"),
        ([], "not a CLIP's preprocessor"),
    ):
        path.write_text(json.dumps(said))
        assert message in score(root, capsys)
    path.write_text(
        json.dumps(
            {
                "size": {"height": 16, "width": 20},
                "crop_size": 16,
                "image_mean": [0, 0, 0],
                "image_std": [1, 1, 1],
            }
        )
    )
    assert score(root, capsys)["count"] == 3
    path.unlink()
