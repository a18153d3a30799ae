"""Pages about documents: the one that `inspect` shows, and the data card of a build. One HTML file
each, pictures inside, no script.

Read next: build.py.
"""

import base64
import io
import json
from collections.abc import Iterable, Iterator
from html import escape
from typing import Any

import numpy as np
from PIL import Image as Pillow

from emu_jax.data import images
from emu_jax.data.documents import Document, Image, Pair, Picture, Skipped, Text

# pixels of a picture's longer side on a page
THUMB = 112

STYLE = """
:root { color-scheme: light dark; --page: #f6f6f3; --card: #fff; --ink: #1d1f23; --soft: #686d76; --line: #e1e1dc; --bar: #2563eb; }
@media (prefers-color-scheme: dark) { :root { --page: #14161a; --card: #1e2126; --ink: #e9e9e6; --soft: #9ba1ab; --line: #33373e; --bar: #7aa7ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 28px 18px 48px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 8px; }
h2 { font-size: 1.2rem; margin: 36px 0 8px; }
.soft { color: var(--soft); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 12px 14px; margin: 10px 0; }
.card p { margin: 4px 0; white-space: pre-wrap; }
.card.out { border-style: dashed; }
.grid { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); }
.grid .card { margin: 0; }
img { max-width: 112px; max-height: 112px; border-radius: 6px; vertical-align: top; margin: 3px 6px 3px 0; background: #fff; }
.role { font-size: .78rem; color: var(--soft); border: 1px solid var(--line); border-radius: 99px; padding: 0 8px; margin-right: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; }
th, td { text-align: left; padding: 6px 14px 6px 0; border-top: 1px solid var(--line); vertical-align: top; }
tr:first-child > * { border-top: 0; }
th { font-weight: 500; color: var(--soft); }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.bars { display: flex; align-items: flex-end; gap: 3px; height: 90px; }
.bars div { flex: 1; background: var(--bar); border-radius: 3px 3px 0 0; min-height: 1px; }
.ends { display: flex; gap: 3px; font-size: .72rem; color: var(--soft); }
.ends span { flex: 1; text-align: center; white-space: nowrap; overflow: hidden; }
"""


def inspection_page(title: str, documents: Iterable[Document | Skipped]) -> Iterator[str]:
    """The page of `inspect`, in pieces: every document as it reads, every record that was left out
    and why.
    """
    yield _head(f"Documents of {title}")
    count = skipped = 0
    for document in documents:
        if isinstance(document, Skipped):
            skipped += 1
            yield f'<div class="card out"><b>{escape(document.id)}</b> <span class="soft">left out: {escape(document.reason)}</span></div>\n'
        else:
            count += 1
            yield document_card(document) + "\n"
    yield f'<p class="soft">{count:,} documents, {skipped:,} left out.</p></body></html>\n'


def document_card(document: Document, characters: int = 2000) -> str:
    """A document as a card; a text is cut after `characters`."""
    pieces = []
    for part in document.parts:
        for half in (part.image, part.text) if isinstance(part, Pair) else (part,):
            half = (
                Text(half)
                if isinstance(half, str)
                else Picture(half)
                if isinstance(half, np.ndarray)
                else half
            )
            mark = f'<span class="role">{escape(half.role)}</span>' if half.role else ""
            if isinstance(half, Text):
                text = half.text if len(half.text) <= characters else f"{half.text[:characters]} …"
                pieces.append(f"<p>{mark}{escape(text)}</p>")
            else:
                pieces.append(thumbnail(half.data))
    dropped = (
        f'<p class="soft">dropped: {escape("; ".join(document.dropped))}</p>'
        if document.dropped
        else ""
    )
    return f'<div class="card"><span class="soft">{escape(document.id)}</span><div>{"".join(pieces)}</div>{dropped}</div>'


def thumbnail(data: bytes | Image) -> str:
    """An <img> with the picture inside, THUMB pixels at most."""
    image = Pillow.fromarray(images.decode_full(data) if isinstance(data, bytes) else data)
    size = image.size
    image.thumbnail((THUMB, THUMB))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    label = f"{size[0]} x {size[1]}"
    return f'<img alt="{label}" title="{label}" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'


def page(card: dict[str, Any], samples: list[str]) -> str:
    """The data card: what `build.summary` counted, and some documents as `document_card` made them."""
    counts = card["counts"]
    histograms = card["histograms"]
    rows = "".join(
        f'<tr><td>{escape(what.replace("_", " "))}</td><td class="number">{number:,}</td></tr>'
        for what, number in counts.items()
    )
    settings = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(json.dumps(value, ensure_ascii=False))}</td></tr>"
        for name, value in card["settings"].items()
    )
    sections = [
        (title, _reasons(card[name], total))
        for title, name, total in (
            ("Records left out", "skipped", counts["documents"] + counts["skipped"]),
            ("Parts left out of documents", "dropped", counts["images"] + counts["dropped"]),
        )
        if card[name]
    ]
    sections += [
        (title, _bars(histograms[name]))
        for name, title in (
            ("tokens", "Tokens in a document (estimated: 4 bytes of text, 34 a picture)"),
            ("images", "Pictures in a document"),
            ("side", "Shorter side of a picture, pixels"),
        )
        if histograms[name]
    ]
    return f"""{_head(f"Data card: {card['name']}")}
<p class="soft">Kind {escape(card["kind"])}, from {escape(", ".join(card["from"]))};
{counts["bytes"] / 2**20:,.1f} MiB in {counts["shards"]:,} shards.</p>
<div class="card"><table>{rows}</table></div>
{"".join(f"<h2>{title}</h2>{body}" for title, body in sections)}
<h2>Samples</h2>
<p class="soft">The first of every shard, as far as they go: nothing is chosen.</p>
<div class="grid">{"".join(samples)}</div>
<h2>Settings</h2>
<div class="card"><table>{settings}</table></div>
</body></html>
"""


def _head(title: str) -> str:
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>\n"
    )


def _reasons(reasons: dict[str, int], total: int) -> str:
    rows = "".join(
        f'<tr><td>{escape(reason)}</td><td class="number">{count:,}</td><td class="number soft">{100 * count / total:.2f} %</td></tr>'
        for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    )
    return f'<div class="card"><table>{rows}</table></div>'


def _bars(histogram: dict[str, int]) -> str:
    """Bars of {"lower edge of a power of two": count}, empty ones between them included."""
    edges = [int(edge) for edge in histogram]
    least = min((edge for edge in edges if edge), default=1)
    every = [0] * (0 in edges) + [
        1 << k for k in range(least.bit_length() - 1, max(edges).bit_length())
    ]
    values = [histogram.get(str(edge), 0) for edge in every]
    top = max(values)
    bars = "".join(
        f'<div style="height: {100 * value / top:.1f}%" title="from {edge}: {value:,}"></div>'
        for edge, value in zip(every, values)
    )
    return f'<div class="card"><div class="bars">{bars}</div><div class="ends">{"".join(f"<span>{edge:,}</span>" for edge in every)}</div></div>'
