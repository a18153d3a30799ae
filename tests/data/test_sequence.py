"""Documents as token sequences: grammar, labels, truncation, and rules."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from emu_jax.data.documents import Document, Pair, Text
from emu_jax.data.sequence import NO_RULE, SequenceBuilder, SourceRule
from emu_jax.data.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent.parent / "golden" / "emu1_pretrained.npz"

# Ids of <s>, </s>, [IMG], [/IMG] and <image> in the tokenizer of letters.
S = 1
E = 2
IMG = 257
END = 258
SLOT = 259


@pytest.fixture
def make(letters):
    def call(*parts, seed=0, **settings):
        settings = (
            dict(
                n_visual=2, max_tokens=100, max_images=10, image_first=0.5, labels=("text", "</s>")
            )
            | settings
        )
        rule = settings.pop("rule", NO_RULE)
        build = SequenceBuilder(letters, **settings)
        return build(Document("d", parts), rng=np.random.default_rng(seed), rule=rule)

    return call


def test_grammar_by_hand(make, picture):
    sequence = make("hi", picture(3), Text("no", 0.5), picture(4))
    h, i, n, o = (ord(letter) for letter in "hino")
    assert sequence.tokens.tolist() == [
        S,
        h,
        i,
        IMG,
        SLOT,
        SLOT,
        END,
        n,
        o,
        IMG,
        SLOT,
        SLOT,
        END,
        E,
    ]
    assert sequence.text_weights.tolist() == [0, 1, 1, 0, 0, 0, 0, 0.5, 0.5, 0, 0, 0, 0, 1]
    assert sequence.image_slots.tolist() == [4, 10]
    assert sequence.image_weights.tolist() == [1, 1]
    assert sequence.images[:, 0, 0, 0].tolist() == [3, 4] and sequence.images.shape == (2, 4, 4, 3)
    assert (sequence.id, sequence.cut) == ("d", 0)


def test_ids_and_labels_of_the_release(picture):
    """The golden file has LLaMA's ids of each run of text, and no </s>."""
    golden = np.load(GOLDEN)
    for text, ids, keep, targets in zip(
        *(golden[name] for name in ("texts", "input_ids", "attention_mask", "text_targets"))
    ):
        runs = iter(
            re.findall(r"(?:\d+ )+", " ".join(str(i) if i < 32000 else "," for i in ids[1:]) + " ")
        )
        parts = [
            picture(0) if "[IMG]" in part else part
            for part in re.split(r"(\[IMG\].*?\[/IMG\])", str(text))
            if part
        ]
        tokenizer = Tokenizer(32000, lambda _, runs=runs: [int(i) for i in next(runs).split()], str)
        build = SequenceBuilder(
            tokenizer,
            n_visual=4,
            max_tokens=100,
            max_images=5,
            image_first=0.5,
            labels=("text", "</s>"),
        )
        sequence = build(Document("d", tuple(parts)), rng=np.random.default_rng(0))
        assert sequence.tokens[:-1].tolist() == ids[keep == 1].tolist()
        assert sequence.text_weights[1:-1].tolist() == (targets != -100)[keep == 1][1:].tolist()


def test_img_is_a_label_on_demand(make, picture):
    assert make(picture(3), "a", labels=("text", "</s>", "[IMG]")).text_weights.tolist() == [
        0,
        1,
        0,
        0,
        0,
        1,
        1,
    ]


def test_no_image(make):
    sequence = make("a")
    assert sequence.tokens.tolist() == [S, ord("a"), E]
    assert (
        sequence.images.shape == (0, 0, 0, 3)
        and len(sequence.image_slots) == len(sequence.image_weights) == 0
    )


def test_names_of_special_tokens_in_a_text_stay_text(make):
    text = "[IMG]<image></s>"
    assert make(text).tokens.tolist() == [S, *map(ord, text), E]


def test_truncation_is_the_longest_prefix_that_splits_no_image(make, picture):
    parts = ("ab", picture(1), picture(2), "c", picture(3), "de", Text("f", 0.0))
    whole = make(*parts)
    # Prefixes of these lengths split an image.
    ends_inside = {slot - 1 + k for slot in whole.image_slots for k in range(1, 4)}
    for max_tokens in range(1, len(whole.tokens) + 3):
        for max_images in range(5):
            cut = make(*parts, max_tokens=max_tokens, max_images=max_images)
            length = max(
                n
                for n in range(1, min(max_tokens, len(whole.tokens)) + 1)
                if n not in ends_inside
                and sum(slot < n for slot in whole.image_slots) <= max_images
            )
            assert cut.tokens.tolist() == whole.tokens[: len(cut.tokens)].tolist()
            assert cut.text_weights.tolist() == whole.text_weights[: len(cut.tokens)].tolist()
            assert len(cut.tokens) == length
            assert cut.cut == len(whole.tokens) - length
            assert (
                len(cut.images)
                == len(cut.image_slots)
                == len(cut.image_weights)
                == (cut.tokens == IMG).sum()
            )
            assert (cut.tokens == SLOT).sum() == 2 * len(cut.images) and (
                cut.tokens == END
            ).sum() == len(cut.images)
            assert (cut.tokens[cut.image_slots - 1] == IMG).all()
            assert (cut.tokens[-1] == E) == (cut.cut == 0)


@pytest.mark.parametrize("image_first, first", [(1.0, IMG), (0.0, ord("a"))])
def test_order_of_a_pair(make, picture, image_first, first):
    for seed in range(20):
        sequence = make(Pair(picture(1), Text("a", 0.5)), image_first=image_first, seed=seed)
        assert sequence.tokens[1] == first
        assert sequence.text_weights.tolist() == (
            [0, 0, 0, 0, 0, 0.5, 1] if first == IMG else [0, 0.5, 0, 0, 0, 0, 1]
        )


def test_pairs_are_ordered_one_by_one_with_the_given_probability(make, picture):
    sequence = make(
        *[Pair(picture(1), "a")] * 1000, image_first=0.25, max_tokens=10_000, max_images=1000
    )
    starts = sequence.tokens[1:-1].reshape(1000, 5)[:, 0]
    # The mean is 250, the standard deviation 14.
    assert 190 < (starts == IMG).sum() < 310


LONG = [f"{letter}" * 3 for letter in "abcdefghij"]


def test_a_rule_begins_a_long_document_anywhere(make):
    firsts = Counter()
    for seed in range(200):
        sequence = make(*LONG, seed=seed, rule=SourceRule(tokens=11, start="random"))
        text = "".join(map(chr, sequence.tokens[1:])).strip("\x02")
        assert "".join(LONG).find(text) % 3 == 0 and 8 <= len(sequence.tokens) <= 11
        assert sequence.cut == 32 - len(sequence.tokens)
        firsts[text[0]] += 1
    # Three parts and </s> fit, so a document may begin at "h" at the latest.
    assert set(firsts) == set("abcdefgh") and min(firsts.values()) >= 5
    # A document that fits begins at its beginning.
    assert make(*LONG[:3], seed=0, rule=SourceRule(tokens=11, start="random")).tokens[1] == ord("a")


def test_a_rule_keeps_the_first_images_and_all_text(make, picture):
    sequence = make(
        "a", picture(1), "b", picture(2), "c", picture(3), "d", rule=SourceRule(images=2)
    )
    assert sequence.images[:, 0, 0, 0].tolist() == [1, 2] and sequence.cut == 4
    assert [chr(token) for token in sequence.tokens if 32 < token < 127] == list("abcd")


def test_a_rule_draws_pairs_in_their_order(make, picture):
    parts = [part for k in range(6) for part in (f"text {k}", Pair(picture(k), chr(97 + k)))]
    drawn = set()
    for seed in range(100):
        sequence = make(*parts, seed=seed, rule=SourceRule(pairs=3, image_first=1.0))
        shown = tuple(sequence.images[:, 0, 0, 0].tolist())
        assert list(shown) == sorted(set(shown)) and len(shown) == 3
        assert [chr(token) for token in sequence.tokens if 32 < token < 127] == [
            chr(97 + k) for k in shown
        ]
        drawn.add(shown)
    # Three of six pairs can be chosen in 20 ways.
    assert len(drawn) > 15
    assert (
        make("no", "pairs", rule=SourceRule(pairs=3)).tokens.tolist()
        == make("no", "pairs").tokens.tolist()
    )


def test_a_plain_rule_draws_nothing_more(make, picture):
    parts = [Pair(picture(k), "a" * k) for k in range(5)]
    assert (make(*parts, seed=3).tokens == make(*parts, seed=3, rule=SourceRule()).tokens).all()


def test_oblong_images_are_cut_at_random(make):
    wide = np.arange(12, dtype=np.uint8)[None, :, None] + np.zeros((4, 1, 3), np.uint8)
    places = {int(make(wide, seed=seed).images[0, 0, 0, 0]) for seed in range(100)}
    assert places == set(range(9)) and make(wide.transpose(1, 0, 2), seed=0).images.shape == (
        1,
        4,
        4,
        3,
    )
