"""HTML pages that stand alone: one stylesheet, SVG charts, embedded images, no script.

Colours are CSS variables, so a page follows the reader's light or dark setting. Texts that a page
quotes must go through `escape`. Used by data/builders/card.py, evaluate/gallery.py and the demo's
report.
"""

import base64
import io
import math
from collections.abc import Iterable, Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

Number = int | float
Points = Sequence[tuple[Number, Number]]

# A curve with more points than this is drawn with means of neighbouring points.
MAX_POINTS = 240
# Size of a chart and its margins, in the units of its SVG.
WIDTH = 400
HEIGHT = 230
LEFT = 46
RIGHT = 8
TOP = 10
BOTTOM = 24

STYLE = """
:root { color-scheme: light dark; --page: #f6f6f3; --card: #fff; --ink: #1d1f23; --soft: #686d76;
  --line: #e1e1dc; --good: #15803d; --bad: #c2410c; --good-back: #e7f5ec; --bad-back: #fdeee4;
  --c0: #2563eb; --c1: #ea580c; --c2: #0d9488; --c3: #9333ea; }
@media (prefers-color-scheme: dark) { :root { --page: #14161a; --card: #1e2126; --ink: #e9e9e6;
  --soft: #9ba1ab; --line: #33373e; --good: #4ade80; --bad: #fb923c; --good-back: #173223;
  --bad-back: #3a2415; --c0: #7aa7ff; --c1: #ffa566; --c2: #4fd1c1; --c3: #c79bff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 28px 18px 48px; background: var(--page);
  color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 8px; letter-spacing: -.015em; }
h2 { font-size: 1.25rem; margin: 44px 0 6px; letter-spacing: -.01em; }
h3 { font-size: 1rem; margin: 26px 0 4px; }
p { margin: 0 0 14px; max-width: 74ch; }
a { color: var(--c0); }
.soft, figcaption, th { color: var(--soft); }
footer { margin-top: 48px; font-size: .88rem; color: var(--soft); }
summary { cursor: pointer; }
pre { overflow-x: auto; font-size: .8rem; line-height: 1.4; margin: 10px 0 0; }

.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 14px; min-width: 0; }
.card.out { border-style: dashed; }
.grid { display: grid; gap: 12px; margin-top: 12px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--least, 320px)), 1fr)); }
.grid + p, .card + p { margin-top: 26px; }
.stack > .card { margin: 10px 0; }
.document p { margin: 4px 0; max-width: none; white-space: pre-wrap; }
.role { font-size: .78rem; color: var(--soft); border: 1px solid var(--line);
  border-radius: 99px; padding: 0 8px; margin-right: 6px; }

.scroll { overflow-x: auto; padding: 4px 14px; }
table { border-collapse: collapse; width: 100%; font-size: .94rem; }
th, td { text-align: left; padding: 8px 14px 8px 0; border-top: 1px solid var(--line); }
tr:first-child > * { border-top: 0; }
th { font-weight: 500; }
td.big { font-weight: 650; font-size: 1.1rem; }
.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.mark { border-radius: 99px; padding: 2px 10px; font-size: .84rem; font-weight: 600;
  white-space: nowrap; }
.mark.right { color: var(--good); background: var(--good-back); }
.mark.wrong { color: var(--bad); background: var(--bad-back); }

img { border-radius: 6px; background: #fff; flex: none; }
img.thumbnail { max-width: 112px; max-height: 112px; vertical-align: top;
  margin: 3px 6px 3px 0; }
.example { display: flex; gap: 12px; align-items: center; font-size: .9rem; line-height: 1.35; }
.example img { width: 80px; height: 80px; }
.example.right { border-color: color-mix(in srgb, var(--good) 45%, var(--line)); }
.example.wrong { border-color: color-mix(in srgb, var(--bad) 45%, var(--line)); }
.example div > div { margin-top: 3px; }
.example small { color: var(--soft); }
.answer { font-weight: 600; }
.right .answer { color: var(--good); }
.wrong .answer { color: var(--bad); }
.story { display: grid; gap: 10px; align-content: start; }
.story .example { border: 0; padding: 0; }
.row { display: flex; gap: 6px; }
.row > div { flex: 1; min-width: 0; text-align: center; }
.row img { width: 100%; height: auto; display: block; image-rendering: pixelated; }
.row small { font-size: .7rem; color: var(--soft); white-space: nowrap; }
.row + div { font-size: .86rem; line-height: 1.3; margin-top: 4px; }
.found { white-space: nowrap; font-size: 0; }
.found img { width: 64px; height: 64px; outline: 1px solid var(--line); margin-right: 9px; }
.found img.hit { outline: 4px solid var(--good); outline-offset: -1px; }
@media (max-width: 560px) {
  .found img { width: 34px; height: 34px; margin-right: 5px; }
  .found img.hit { outline-width: 3px; }
  th, td { padding-right: 9px; } }

figure { margin: 0; }
figcaption { font-size: .88rem; display: flex; flex-wrap: wrap; gap: 2px 14px;
  margin-bottom: 4px; }
figcaption b { color: var(--ink); font-weight: 600; width: 100%; }
.key::before { content: ""; display: inline-block; width: 14px; height: 3px;
  border-radius: 2px; margin-right: 5px; vertical-align: middle; background: var(--k); }
svg { width: 100%; height: auto; display: block; }
svg text { font: 11px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  fill: var(--soft); }
.rule { stroke: var(--line); }
polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
polyline.pale { opacity: .3; stroke-width: 1; }
circle { fill: var(--card); stroke-width: 2; }
.s0 { stroke: var(--c0); } .s1 { stroke: var(--c1); }
.s2 { stroke: var(--c2); } .s3 { stroke: var(--c3); }
.bars { display: flex; align-items: flex-end; gap: 3px; height: 90px; }
.bars div { flex: 1; background: var(--c0); border-radius: 3px 3px 0 0; min-height: 1px; }
.ends { display: flex; gap: 3px; font-size: .72rem; color: var(--soft); }
.ends span { flex: 1; text-align: center; white-space: nowrap; overflow: hidden; }
"""

END = "</body></html>\n"


class Curve(NamedTuple):
    """A line of a chart, drawn with circles if `held_out`, else with its running mean."""

    label: str
    points: Points
    held_out: bool = False


def page(title: str, body: str) -> str:
    """A complete page with the heading `title`; `body` is HTML."""
    return f"{head(title)}{body}\n{END}"


def head(title: str) -> str:
    """Everything above a page's body, for pages written in pieces; the last piece is END."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{STYLE}</style></head><body>
<h1>{escape(title)}</h1>
"""


def image(
    pixels: UInt8[np.ndarray, "h w 3"], label: str, *, kind: str = "", encoding: str = "PNG"
) -> str:
    """An <img> with the pixels embedded; `kind` is its CSS class, `encoding` PNG or JPEG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, encoding, optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    label = escape(label)
    css = f' class="{kind}"' if kind else ""
    source = f"data:image/{encoding.lower()};base64,{data}"
    return f'<img{css} src="{source}" alt="{label}" title="{label}">'


def table(rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> str:
    """A table in a card. rows: cells made by `td`. header: plain texts."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = [f"<tr>{head}</tr>"] if header else []
    lines += [f"<tr>{''.join(row)}</tr>" for row in rows]
    return f'<div class="card scroll"><table>{"".join(lines)}</table></div>'


def td(content: str, kind: str = "") -> str:
    """A cell of a table; `content` is HTML, `kind` its CSS class."""
    return f'<td class="{kind}">{content}</td>' if kind else f"<td>{content}</td>"


def percent(value: Number, digits: int = 1) -> str:
    """Format a share of 1 as "12.3 %", with a non-breaking space."""
    return f"{100 * value:.{digits}f}\u00a0%"


def chart(title: str, curves: Sequence[Curve], *, log: bool = False) -> str:
    """An SVG line chart of at most four curves; "" if no curve has a point.

    With `log` the vertical axis is logarithmic, and values of 0 or less are left out.
    """
    drawn = []
    for curve in curves:
        points = [(x, y) for x, y in curve.points if y > 0 or not log]
        if points:
            drawn.append(curve._replace(points=thinned(points)))
    if not drawn:
        return ""
    axes = _Axes.around([point for curve in drawn for point in curve.points], log)
    keys = ""
    lines = ""
    for number, curve in enumerate(drawn):
        mean = curve.points if curve.held_out else _running_mean(curve.points)
        last = f"{escape(curve.label)}, last {mean[-1][1]:.3g}"
        keys += f'<span class="key" style="--k: var(--c{number})">{last}</span>'
        if curve.held_out:
            lines += axes.line(f"s{number}", mean) + axes.circles(f"s{number}", mean)
        else:
            lines += axes.line(f"pale s{number}", curve.points) + axes.line(f"s{number}", mean)
    title = escape(title)
    return (
        f'<figure class="card"><figcaption><b>{title}</b>{keys}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">'
        f"{axes.rules()}{lines}</svg></figure>"
    )


class _Axes(NamedTuple):
    """Maps values to positions in a chart whose horizontal axis runs from 0 to `end`."""

    end: Number
    # The ends of the vertical axis; logarithms if `log`.
    low: float
    high: float
    ticks: list[Number]
    log: bool

    @classmethod
    def around(cls, points: Points, log: bool) -> "_Axes":
        ys = [y for _, y in points]
        least = min(ys)
        most = max(ys)
        ticks = log_ticks(least, most) if log else linear_ticks(least, most)
        scale = math.log10 if log else float
        low = min(scale(least), scale(ticks[0]))
        high = max(scale(most), scale(ticks[-1]))
        return cls(max(1, *(x for x, _ in points)), low, high, ticks, log)

    def x(self, value: Number) -> float:
        return round(LEFT + value / self.end * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: Number) -> float:
        scaled = math.log10(value) if self.log else value
        share = (scaled - self.low) / (self.high - self.low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    def rules(self) -> str:
        """Horizontal grid lines with their values, and the numbers below the chart."""
        parts = []
        for tick in self.ticks:
            y = self.y(tick)
            parts.append(
                f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
                f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>'
            )
        for tick in linear_ticks(0, self.end):
            anchor = "end" if tick > 0.95 * self.end else "middle"
            parts.append(
                f'<text x="{self.x(tick)}" y="{HEIGHT - 6}" text-anchor="{anchor}">{tick:,g}</text>'
            )
        return "".join(parts)

    def line(self, kind: str, points: Points) -> str:
        places = " ".join(f"{self.x(x)},{self.y(y)}" for x, y in points)
        return f'<polyline class="{kind}" points="{places}"/>'

    def circles(self, kind: str, points: Points) -> str:
        return "".join(
            f'<circle class="{kind}" cx="{self.x(x)}" cy="{self.y(y)}" r="3">'
            f"<title>{x:g}: {y:.3g}</title></circle>"
            for x, y in points
        )


def linear_ticks(low: Number, high: Number) -> list[Number]:
    """About four round numbers, from just below `low` to `high`.

    They start at 0 if `low` is positive and less than half of `high`.
    """
    if low == high:
        return [low, low + 1]
    if 0 < low < 0.5 * high:
        low = 0.0
    power = 10 ** math.floor(math.log10(max(high - low, 1e-9) / 3))
    step = next(power * m for m in (1, 2, 5, 10) if (high - low) / (power * m) <= 5)
    numbers = range(math.floor(low / step), math.floor(high / step) + 1)
    return [round(step * number, 12) for number in numbers]


def log_ticks(low: Number, high: Number) -> list[Number]:
    """1, 2 and 5 times powers of ten, from around `low` to around `high`.

    If these are more than seven, only powers of ten are used; if even these are more than seven,
    only every second, third, ... power.
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 2)
    ticks: list[Number] = []
    for steps in ((1, 2, 5), (1,)):
        every = [m * 10.0**power for power in powers for m in steps]
        ticks = [a for a, b in pairwise([*every, math.inf]) if b > low]
        last = next(k for k, tick in enumerate(ticks) if tick >= high and k)
        ticks = ticks[: last + 1]
        if len(ticks) <= 7:
            break
    return ticks[:: math.ceil(len(ticks) / 7)]


def thinned(points: Points) -> list[tuple[Number, Number]]:
    """The points, or means of neighbouring ones if there are more than MAX_POINTS."""
    each = max(1, math.ceil(len(points) / MAX_POINTS))
    starts = range(0, len(points), each)
    return [tuple(np.mean(points[start : start + each], 0)) for start in starts]


def _running_mean(points: Points) -> list[tuple[Number, Number]]:
    reach = len(points) // 24
    values = [y for _, y in points]
    means = []
    for k, (x, _) in enumerate(points):
        around = values[max(0, k - reach) : k + reach + 1]
        means.append((x, float(np.mean(around))))
    return means
