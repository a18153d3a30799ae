"""A benchmark's page: scores, the worst and the first examples with their pictures, predictions and
references. Alone, without a script.

Read next: ../html.py.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from emu_jax import html
from emu_jax.html import escape

# examples of each kind
SHOWN = 24


class Shown(NamedTuple):
    """An example to look at."""

    image: UInt8[np.ndarray, "h w 3"]
    question: str
    said: str
    answers: Sequence[str]
    score: float | None


def page(title: str, scores: dict[str, Any], worst: Sequence[Shown], first: Sequence[Shown]) -> str:
    """The whole page; `scores` is what scores.json says."""
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="number">{escape(_said(value))}</td></tr>'
        for name, value in scores.items()
    )

    def cards(some):
        return f'<div class="grid" style="--least: 300px">{"".join(map(_card, some))}</div>'

    return html.page(
        title,
        f"""<div class="card scroll"><table>{rows}</table></div>
{f"<h2>The worst</h2><p>Of all, the {len(worst)} with the lowest score.</p>{cards(worst)}" if worst else ""}
<h2>The first</h2>
<p>The first {len(first)} in the order of the annotations: nothing is chosen.</p>
{cards(first)}""",
    )


def _card(shown: Shown) -> str:
    question = f"<div>{escape(shown.question)}</div>" if shown.question else ""
    score = (
        ""
        if shown.score is None
        else f'<div><small class="number">score {shown.score:.3g}</small></div>'
    )
    answers = " · ".join(dict.fromkeys(map(escape, shown.answers))) or "(withheld)"
    return (
        f'<div class="card example">{html.image(shown.image, shown.question or shown.said)}<div>{question}'
        f'<div class="answer">{escape(shown.said) or "(nothing)"}</div><div><small>true:</small> {answers}</div>{score}</div></div>'
    )


def _said(value: Any) -> str:
    return (
        f"{value:.4g}"
        if isinstance(value, float)
        else value
        if isinstance(value, str)
        else json.dumps(value, ensure_ascii=False)
    )
