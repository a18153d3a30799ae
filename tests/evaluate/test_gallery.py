"""A benchmark's page: whole, alone, and what others wrote is text on it."""

import numpy as np

from emu_jax.evaluate import gallery
from emu_jax.evaluate.gallery import Shown
from tests.support.pages import Page


def test_the_page_is_whole_and_what_others_wrote_is_text():
    image = np.full((20, 30, 3), 9, np.uint8)
    worst = [
        Shown(
            image,
            "<script>alert(1)</script> & why?",
            "<b>a dog</b>",
            ("a cat", "a cat", "two <i>cats"),
            0.25,
        )
    ]
    first = [*worst, Shown(image, "", "", (), None)]
    page = Page(
        gallery.page(
            "vqav2, <val>",
            {"accuracy": 12.345678, "count": 2, "split": "val", "text_only": False},
            worst,
            first,
        )
    )
    tags = {tag for tag, _ in page.elements}
    words = "|".join(page.words)
    assert (
        not tags & {"script", "link", "b", "i"}
        and sum(tag == "img" for tag, _ in page.elements) == 3
    )
    assert all(
        attributes["src"].startswith("data:image/png;base64,")
        for tag, attributes in page.elements
        if tag == "img"
    )
    for text in (
        "<script>alert(1)</script> & why?",
        "<b>a dog</b>",
        "12.35",
        "score 0.25",
        "(nothing)",
        "vqav2, <val>",
        "a cat · two <i>cats",
    ):
        assert text in words, text
    assert "The worst" in words and "(withheld)" in words


def test_without_scores_there_are_no_worst():
    assert "The worst" not in gallery.page(
        "mmvet", {"count": 1}, [], [Shown(np.zeros((4, 4, 3), np.uint8), "q", "a", (), None)]
    )
