"""HTML pages that show documents: the page of `inspect`, and the data card of a build.

Read next: build.py, and ../../html.py for the style.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from PIL import Image as Pillow

from emu_jax import html
from emu_jax.data import images
from emu_jax.data.documents import Document, Image, Skipped, Text, flat_parts
from emu_jax.html import escape

# Longer side of an image on a page, in pixels.
THUMBNAIL = 112
REASON_TABLES = (
    # (title, key of the card, counts whose sum is 100 %)
    ("Records left out", "skipped", ("documents", "skipped")),
    ("Parts left out of documents", "dropped", ("images", "dropped")),
)
HISTOGRAMS = {
    "tokens": "Tokens in a document (estimated: 4 bytes of text, 34 per image)",
    "images": "Images in a document",
    "side": "Shorter side of an image, pixels",
}


def inspection_page(title: str, documents: Iterable[Document | Skipped]) -> Iterator[str]:
    """Yield the page of `inspect`: documents, and skipped records with their reasons."""
    yield html.head(f"Documents of {title}") + '<div class="stack">\n'
    count = 0
    skipped = 0
    for document in documents:
        if isinstance(document, Skipped):
            skipped += 1
            yield (
                f'<div class="card out"><b>{escape(document.id)}</b> '
                f'<span class="soft">left out: {escape(document.reason)}</span></div>\n'
            )
        else:
            count += 1
            yield document_card(document) + "\n"
    yield f'</div><p class="soft">{count:,} documents, {skipped:,} left out.</p>{html.END}'


def document_card(document: Document, characters: int = 2000) -> str:
    """A document as an HTML card; texts longer than `characters` are cut."""
    body = ""
    for part in flat_parts(document):
        if isinstance(part, Text):
            role = f'<span class="role">{escape(part.role)}</span>' if part.role else ""
            text = part.text
            if len(text) > characters:
                text = f"{text[:characters]} …"
            body += f"<p>{role}{escape(text)}</p>"
        else:
            body += thumbnail(part.data)
    if document.dropped:
        body += f'<p class="soft">left out: {escape("; ".join(document.dropped))}</p>'
    id = f'<span class="soft">{escape(document.id)}</span>'
    return f'<div class="card document">{id}<div>{body}</div></div>'


def thumbnail(data: bytes | Image) -> str:
    """An <img> tag with the image embedded, at most THUMBNAIL pixels on its longer side."""
    image = Pillow.fromarray(images.decode_full(data) if isinstance(data, bytes) else data)
    label = f"{image.width} x {image.height}"
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return html.image(np.asarray(image), label, kind="thumbnail", encoding="JPEG")


def card_page(card: dict[str, Any], samples: list[str]) -> str:
    """The data card: the numbers of `build.summarise`, and samples made by `document_card`."""
    counts = card["counts"]
    sections = ""
    for title, name, parts in REASON_TABLES:
        if card[name]:
            total = sum(counts[part] for part in parts)
            sections += f"<h2>{title}</h2>{_reasons(card[name], total)}"
    for name, title in HISTOGRAMS.items():
        if card["histograms"][name]:
            sections += f"<h2>{title}</h2>{_bars(card['histograms'][name])}"
    rows = [(name.replace("_", " "), _number(f"{count:,}")) for name, count in counts.items()]
    settings = [
        (name, f"<td>{escape(json.dumps(value, ensure_ascii=False))}</td>")
        for name, value in card["settings"].items()
    ]
    body = f"""<p class="soft">Kind {escape(card["kind"])}, from {escape(", ".join(card["from"]))};
{counts["bytes"] / 2**20:,.1f} MiB in {counts["shards"]:,} shards.</p>
{_table(rows)}
{sections}
<h2>Samples</h2>
<p class="soft">The first documents of the first shards, not selected.</p>
<div class="grid">{"".join(samples)}</div>
<h2>Settings</h2>
{_table(settings)}
"""
    return html.page(f"Data card: {card['name']}", body)


def _table(rows: Iterable[tuple[str, str]]) -> str:
    """A table of (text of the first cell, HTML of the other cells)."""
    lines = "".join(f"<tr><td>{escape(first)}</td>{others}</tr>" for first, others in rows)
    return f'<div class="card scroll"><table>{lines}</table></div>'


def _number(text: str) -> str:
    return f'<td class="number">{text}</td>'


def _reasons(reasons: dict[str, int], total: int) -> str:
    ranked = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return _table(
        (reason, _number(f"{count:,}") + _number(html.percent(count / total, 2)))
        for reason, count in ranked
    )


def _bars(histogram: dict[str, int]) -> str:
    """A bar chart of {lower edge, a power of two: count}; missing powers are empty bars."""
    edges = [int(edge) for edge in histogram]
    least = min((edge for edge in edges if edge), default=1)
    powers = range(least.bit_length() - 1, max(edges).bit_length())
    every = [0] * (0 in edges) + [1 << power for power in powers]
    highest = max(histogram.values())
    bars = ""
    for edge in every:
        count = histogram.get(str(edge), 0)
        style = f"height: {100 * count / highest:.1f}%"
        bars += f'<div style="{style}" title="from {edge}: {count:,}"></div>'
    ends = "".join(f"<span>{edge:,}</span>" for edge in every)
    return f'<div class="card"><div class="bars">{bars}</div><div class="ends">{ends}</div></div>'
