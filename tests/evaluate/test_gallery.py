"""The page of a benchmark: complete, self-contained, with foreign texts escaped."""

import numpy as np

from emu_jax.evaluate import gallery
from emu_jax.evaluate.gallery import Item
from tests.support.pages import Page


def test_the_page_is_complete_and_escapes_foreign_texts():
    image = np.full((20, 30, 3), 9, np.uint8)
    worst = [
        Item(
            image,
            "<script>alert(1)</script> & why?",
            "<b>a dog</b>",
            ("a cat", "a cat", "two <i>cats"),
            0.25,
        )
    ]
    first = [*worst, Item(image, "", "", (), None)]
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
    assert "Worst" in words and "(withheld)" in words


def test_without_scores_the_page_has_no_worst_examples():
    assert "Worst" not in gallery.page(
        "mmvet", {"count": 1}, [], [Item(np.zeros((4, 4, 3), np.uint8), "q", "a", (), None)]
    )
