"""The page is complete and self-contained, and marks wrong answers."""

import base64
import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from emu_jax.demo import decoding, evaluation, report
from emu_jax.demo.captions import Captioned, caption_numbers
from tests.support.pages import Page


def picture(k):
    return np.full((8, 8, 3), k, np.uint8)


@pytest.fixture(scope="module")
def result():
    def told(true, said, nearest=None, id="counts/x"):
        return Captioned(id, picture(len(true)), true, said, nearest)

    captions = {
        "names_train": [told("cat", "cat"), told("<b>pig</b>", "dog & <script>")] * 30,
        "names_held_out": [told("fox", "wolf", "fox")],
        "scenes_held_out": [
            told("one cat on blue", "one cat on blue", "one pig on blue"),
            told(
                "a cat above a pig on blue",
                "a pig above a cat on blue",
                "one cat on pink",
                "spatial/y",
            ),
        ],
    }
    drawn = [
        evaluation.Retrieved("cat", False, 1, [("pig", picture(1)), ("cat", picture(2))]),
        evaluation.Retrieved("fox", True, 40, [("pig", picture(1))]),
    ]
    lines = [
        {"step": k, "text_loss": 9 / k, "image_loss": 1 / k, "visual_variance": 1 + k % 2}
        for k in range(1, 900)
    ]
    lines.append({"step": 899, "eval/text_loss": 2.0, "eval/text_loss/names": 2.0})
    numbers = (
        caption_numbers(captions)
        | evaluation.retrieve(
            [told(name, "") for name in "abc"],
            2,
            np.arange(3.0).reshape(3, 1, 1),
            np.ones((3, 1, 1)),
        )[1]
    )
    numbers |= {
        "visual_rank": 3.2,
        "stories_held_out_count": 1,
        "stories_held_out_exact": 0.0,
        "in_context_count": 1,
        "in_context_exact": 0.0,
        "speed/steps": 899,
        "speed/wall_s": 90.0,
        "speed/flops_per_second": 5.2e10,
        "speed/input_wait_share": 0.001,
    }

    def drawn_as(caption, k):
        return decoding.Decoded(caption, picture(k), picture(k + 1), picture(k + 100))

    pictures = {
        "names_train": [drawn_as("<b>pig</b>", 2 * k) for k in range(50)],
        "names_held_out": [drawn_as("fox", 3)],
        "scenes_held_out": [drawn_as("one cat on blue", 3)],
    }
    for group, some in pictures.items():
        numbers |= decoding.retrieval_numbers(group, some)
    blends = [decoding.Blend(("cat", "<pig>"), (picture(1), picture(2)), picture(3), picture(4))]
    c = {"stage": "emu", "model": {"resampler": {"tokens": 4}}}
    return evaluation.Result(
        c,
        numbers,
        evaluation.targets(numbers),
        captions,
        drawn,
        [[told("a cat comes", "a dog comes")]],
        [[told("cat", "cat"), told("pig", "pig"), told("fox", "fox"), told("owl", "eagle")]],
        pictures,
        blends,
        lines,
        [],
        [{"step": 1, "diffusion_loss": 0.5}],
    )


@pytest.fixture(scope="module")
def page(result):
    return Page(report.page(result, "runs/<demo>"))


def test_the_page_stands_alone(page):
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "b>"}
    for tag, attributes in page.elements:
        assert not {"onclick", "onload", "srcset"} & attributes.keys()
        assert attributes.get("src", "data:").startswith("data:image/png;base64,") or tag != "img"
    style = next(text for text in page.words if ":root" in text)
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style


def test_images_of_the_page_are_those_of_the_result(page, result):
    sources = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
    decoded = [
        np.array(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))
        for source in sources
    ]
    assert (decoded[0] == result.captions["scenes_held_out"][0].image).all()
    assert (
        len(decoded)
        == 2
        + report.CAPTIONS["names_train"]
        + 1
        + 1
        + 4
        + 3
        + 3 * (report.DECODED["names_train"] + 1 + 1)
        + 4
    )
    # The terms count scenes, names, held out, story, in context, retrieved, drawn and blended.


def test_right_and_wrong_are_marked(page):
    cards = [
        attributes["class"]
        for tag, attributes in page.elements
        if "example" in attributes.get("class", "").split()
    ]
    half = report.CAPTIONS["names_train"] // 2
    assert sum("right" in card.split() for card in cards) == 1 + half
    assert sum("wrong" in card.split() for card in cards) == 1 + half + 1 + 1 + 1
    hits = [
        attributes["alt"]
        for tag, attributes in page.elements
        if tag == "img" and attributes.get("class") == "hit"
    ]
    assert hits == ["cat"]


def test_texts_are_escaped_and_shown(page):
    words = " ".join(" ".join(page.words).split())
    assert "dog & <script>" in words and "<b>pig</b>" in words and "runs/<demo>" in words
    for phrase in (
        "after 899 steps",
        "OpenMoji",
        "CC BY-SA 4.0",
        "baseline: one pig on blue",
        '"stage": "emu"',
        "52 G",
        "1.5 min",
        "100.0 % swap the right two drawings",
        "8 × 8 pixels",
        "cat + <pig>",
    ):
        assert phrase in words, phrase


def test_targets_are_marked_as_reached_or_not(page, result):
    marks = [
        attributes["class"].split()[1:]
        for tag, attributes in page.elements
        if tag == "span" and attributes.get("class", "").startswith("mark")
    ]
    said = {True: ["right"], False: ["wrong"], None: []}
    assert marks[:9] == [said[target.reached] for target in result.targets]
    assert {target.reached for target in result.targets} == {True, False, None}
    assert (
        f"Targets: {sum(target.reached is True for target in result.targets)} of 9 reached"
        in page.words
    )


def test_without_metrics_there_are_no_charts(result):
    bare = report.page(
        dataclasses.replace(result, lines=[], decoder_lines=[], stories=[], decoded={}), "x"
    )
    assert "<svg" not in bare and "Stories" not in bare and "Images it draws" not in bare


def test_si():
    assert [report.si(value) for value in (0.5, 12, 1234, 5.2e10, 1.3e15)] == [
        "0.5",
        "12",
        "1.23 k",
        "52 G",
        "1.3 P",
    ]
