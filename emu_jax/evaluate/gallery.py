"""The HTML page of a benchmark: its scores, and examples with images and predictions.

The page is one file without scripts. Read next: ../html.py.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from emu_jax import html
from emu_jax.evaluate.annotations import Example
from emu_jax.evaluate.plan import BenchmarkPlan, BenchmarkSettings
from emu_jax.evaluate.predict import Prediction
from emu_jax.evaluate.tasks import TASKS
from emu_jax.evaluate.text_to_image import read_image
from emu_jax.generate import media
from emu_jax.html import escape

# The page shows this many of the worst examples, and as many of the first.
SHOWN = 24
# Longer side of an image on the page, in pixels.
SIDE = 160


class Item(NamedTuple):
    """An example on the page."""

    image: UInt8[np.ndarray, "h w 3"]
    question: str
    prediction: str
    references: Sequence[str]
    score: float | None


def benchmark_page(
    settings: BenchmarkSettings,
    plan: BenchmarkPlan,
    predictions: dict[str, Prediction],
    each: dict[str, float],
    results: dict[str, Any],
    out: Path,
) -> str:
    """The HTML page of a run in the folder `out`.

    each: scores of single examples, by id. results: the contents of scores.json.
    """
    task = TASKS[settings.task]

    def item(example: Example) -> Item:
        prediction = predictions[example.id]
        if task.kind == "image":
            path = out / prediction.value
        else:
            path = plan.paths[example.media]
        text = prediction.value if isinstance(prediction.value, str) else prediction.text
        score = each.get(example.id)
        return Item(_thumbnail(path), example.question, text, example.references, score)

    scored = [example for example in plan.examples if example.id in each]
    worst = sorted(scored, key=lambda example: each[example.id])[:SHOWN]
    first = plan.examples[:SHOWN]
    title = f"{settings.task}, {settings.split}: {task.description.partition(';')[0]}"
    return page(title, results, list(map(item, worst)), list(map(item, first)))


def page(title: str, results: dict[str, Any], worst: Sequence[Item], first: Sequence[Item]) -> str:
    """An HTML page with a table of results, the worst examples and the first ones."""
    rows = []
    for name, value in results.items():
        cell = f'<td class="number">{escape(_format(value))}</td>'
        rows.append(f"<tr><td>{escape(name)}</td>{cell}</tr>")
    body = [f'<div class="card scroll"><table>{"".join(rows)}</table></div>']
    if worst:
        body.append(f"<h2>Worst</h2><p>The {len(worst)} examples with the lowest scores.</p>")
        body.append(_grid(worst))
    body.append(f"<h2>First</h2><p>The first {len(first)} examples of the annotations.</p>")
    body.append(_grid(first))
    return html.page(title, "\n".join(body))


def _grid(items: Sequence[Item]) -> str:
    return f'<div class="grid" style="--least: 300px">{"".join(map(_card, items))}</div>'


def _card(item: Item) -> str:
    references = " · ".join(dict.fromkeys(map(escape, item.references))) or "(withheld)"
    lines = [f"<div>{escape(item.question)}</div>"] if item.question else []
    lines.append(f'<div class="answer">{escape(item.prediction) or "(nothing)"}</div>')
    lines.append(f"<div><small>true:</small> {references}</div>")
    if item.score is not None:
        lines.append(f'<div><small class="number">score {item.score:.3g}</small></div>')
    image = html.image(item.image, item.question or item.prediction)
    return f'<div class="card example">{image}<div>{"".join(lines)}</div></div>'


def _thumbnail(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    """An image, or the first frame of a video."""
    pixels = media.load_video(path, SIDE)[0] if media.is_video(path) else read_image(path)
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE))
    return np.asarray(image)


def _format(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)
