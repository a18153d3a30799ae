"""The demo's report: one HTML page that needs nothing else, with its pictures inside and no script.

Charts are SVG from `chart`; colours are CSS variables, so they follow a reader's light or dark
setting. What is shown of a split is the first of it, in the order of the file: nothing is chosen.
"""

import base64
import io
import json
import math
from collections.abc import Sequence
from functools import partial
from html import escape
from itertools import pairwise

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from emu_jax.evaluate import history
from emu_jax.evaluate.demo import Drawn, Result, Target, Told
from emu_jax.evaluate.drawings import Blend
from emu_jax.evaluate.history import Curve, Number

SHOWN = {"scenes_held_out": 24, "names_held_out": 12, "names_train": 24}
PICTURES = {"names_train": 40, "names_held_out": 10, "scenes_held_out": 20}
PARTS = ("the image", "of its visual tokens", "of its caption")
# names of the retrieval table: trained, held out
QUERIES = {False: 10, True: 4}
STORIES = 4
IN_CONTEXT = 8
# of a curve: neighbouring steps are averaged
POINTS = 240

LICENCE = (
    'Drawings: “OpenMoji – the open-source emoji and icon project” (<a href="https://openmoji.org">openmoji.org</a>), licence '
    '<a href="https://creativecommons.org/licenses/by-sa/4.0/">CC BY-SA 4.0</a>; the scenes are composed of them, '
    "under the same licence."
)

STYLE = """
:root { color-scheme: light dark; --page: #f6f6f3; --card: #fff; --ink: #1d1f23; --soft: #686d76; --line: #e1e1dc;
  --good: #15803d; --bad: #c2410c; --good-back: #e7f5ec; --bad-back: #fdeee4; --c0: #2563eb; --c1: #ea580c; --c2: #0d9488; --c3: #9333ea; }
@media (prefers-color-scheme: dark) { :root { --page: #14161a; --card: #1e2126; --ink: #e9e9e6; --soft: #9ba1ab; --line: #33373e;
  --good: #4ade80; --bad: #fb923c; --good-back: #173223; --bad-back: #3a2415; --c0: #7aa7ff; --c1: #ffa566; --c2: #4fd1c1; --c3: #c79bff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 28px 18px 48px; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 8px; letter-spacing: -.015em; }
h2 { font-size: 1.25rem; margin: 44px 0 6px; letter-spacing: -.01em; }
p { margin: 0 0 14px; max-width: 74ch; }
a { color: var(--c0); }
code { overflow-wrap: anywhere; }
.soft, figcaption, th { color: var(--soft); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 14px; min-width: 0; }
.grid { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--least, 320px)), 1fr)); margin-top: 12px; }
.grid + p, .card + p { margin-top: 26px; }
.scroll { overflow-x: auto; padding: 4px 14px; }
table { border-collapse: collapse; width: 100%; font-size: .94rem; }
th, td { text-align: left; padding: 8px 14px 8px 0; border-top: 1px solid var(--line); }
tr:first-child > * { border-top: 0; }
th { font-weight: 500; }
td.big { font-weight: 650; font-size: 1.1rem; }
.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.mark { border-radius: 99px; padding: 2px 10px; font-size: .84rem; font-weight: 600; white-space: nowrap; }
.mark.right { color: var(--good); background: var(--good-back); }
.mark.wrong { color: var(--bad); background: var(--bad-back); }
.told { display: flex; gap: 12px; align-items: center; font-size: .9rem; line-height: 1.35; overflow-wrap: anywhere; }
.told.right { border-color: color-mix(in srgb, var(--good) 45%, var(--line)); }
.told.wrong { border-color: color-mix(in srgb, var(--bad) 45%, var(--line)); }
.told div > div { margin-top: 3px; }
.told small { color: var(--soft); }
.said { font-weight: 600; }
.right .said { color: var(--good); }
.wrong .said { color: var(--bad); }
.story { display: grid; gap: 10px; align-content: start; }
.story .told { border: 0; padding: 0; }
img { width: 64px; height: 64px; border-radius: 6px; background: #fff; flex: none; }
.told img { width: 80px; height: 80px; }
.row { display: flex; gap: 4px; }
.row img { flex: 1; width: 0; height: auto; }
.row + div { font-size: .82rem; line-height: 1.3; margin-top: 6px; overflow-wrap: anywhere; }
.found { white-space: nowrap; font-size: 0; }
.found img { outline: 1px solid var(--line); margin-right: 9px; }
.found img.hit { outline: 4px solid var(--good); outline-offset: -1px; }
@media (max-width: 560px) { .found img { width: 34px; height: 34px; margin-right: 5px; } .found img.hit { outline-width: 3px; }
  th, td { padding-right: 9px; } }
figure { margin: 0; }
figcaption { font-size: .88rem; display: flex; flex-wrap: wrap; gap: 2px 14px; margin-bottom: 4px; }
figcaption b { color: var(--ink); font-weight: 600; width: 100%; }
.key::before { content: ""; display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin-right: 5px;
  vertical-align: middle; background: var(--k); }
svg { width: 100%; height: auto; display: block; }
svg text { font: 11px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: var(--soft); }
.rule { stroke: var(--line); }
polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
polyline.pale { opacity: .3; stroke-width: 1; }
circle { fill: var(--card); stroke-width: 2; }
.s0 { stroke: var(--c0); } .s1 { stroke: var(--c1); } .s2 { stroke: var(--c2); } .s3 { stroke: var(--c3); }
summary { cursor: pointer; }
pre { overflow-x: auto; font-size: .8rem; line-height: 1.4; margin: 10px 0 0; }
footer { margin-top: 48px; font-size: .88rem; color: var(--soft); }
"""


def page(result: Result, checkpoint: str) -> str:
    """The whole page; `checkpoint` is the directory's name to show."""
    n = result.numbers
    reached = sum(target.reached is True for target in result.targets)
    after = f", after {result.lines[-1]['step']:,} steps" if result.lines else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>A small Emu</title>
<style>{STYLE}</style></head><body>
<h1>A small Emu: what it learnt</h1>
<p>Emu (<a href="https://arxiv.org/abs/2307.05222">arXiv 2307.05222</a>) predicts the next element of interleaved text and images: a word, or
a visual token. This one is the same code as the 14B model at a size that two CPU cores train in minutes, on drawings with their names and on
scenes composed of 28 of them. Checkpoint <code>{escape(checkpoint)}</code>{after}. The examples are the first of each split: nothing is
chosen.</p>
<h2>Targets: {reached} of {len(result.targets)} reached</h2>
{_targets(result.targets)}
<h2>Scenes of combinations it has never seen</h2>
{_scenes(n)}
<div class="grid" style="--least: 235px">{_told(result, "scenes_held_out")}</div>
{_stories(result)}
{_in_context(result)}
<h2>From a name to its drawing</h2>
<p>From a name alone the model regresses the drawing's {result.config["model"]["resampler"]["tokens"]} visual tokens, each fed back. Here are
the drawings, of all {n["retrieval_among"]:,}, whose true tokens are nearest; the right one is framed. It is among the first five for
<b>{percent(n["retrieval_top5"])}</b> of the training names and first for <b>{percent(n["retrieval_top1"])}</b> (by chance
{percent(5 / n["retrieval_among"], 2)} and {percent(1 / n["retrieval_among"], 2)}); free-run R² {n["free_run_r2"]:.2f}. What a
held-out name looks like can only be guessed from its words: first five {percent(n["retrieval_held_out_top5"])}, R²
{n["free_run_r2_held_out"]:.2f}.</p>
<div class="card scroll"><table>{_retrieval(result.drawn)}</table></div>
{_pictures(result)}
<h2>Names of drawings</h2>
<p>Training drawings: memory. All {n["names_train_count"]:,} were asked; <b>{percent(n["names_train_exact"])}</b> are exactly right, F1 of the
words {n["names_train_f1"]:.2f}.</p>
<div class="grid" style="--least: 210px">{_told(result, "names_train")}</div>
<p>Held-out drawings, for information, since a name that was never read cannot be known: {percent(n["names_held_out_exact"])} of
{n["names_held_out_count"]} exactly right, F1 {n["names_held_out_f1"]:.2f}. The name of the nearest training drawing in pixels:
{percent(n["names_held_out_nearest_exact"])}, F1 {n["names_held_out_nearest_f1"]:.2f}.</p>
<div class="grid" style="--least: 210px">{_told(result, "names_held_out")}</div>
<h2>Curves</h2>
<p>Pale: training; strong: its running mean; circles: held-out data.</p>
<div class="grid">{_curves(result)}</div>
<h2>Collapse?</h2>
<p>Where an encoder learns, its visual tokens are input and target at once, and the loss can be won by making them all the same. That shows in
their variance across images, not in the loss. {_variance_words(n)}</p>
<h2>Speed</h2>
<div class="card scroll"><table>{_speed(n)}</table></div>
<h2>Config</h2>
<details class="card"><summary>All fields of the run</summary><pre>{escape(json.dumps(result.config, indent=1))}</pre></details>
<footer>{LICENCE}</footer>
</body></html>
"""


def chart(title: str, series: Sequence[tuple[str, Curve, bool]], *, log: bool = False) -> str:
    """An SVG line chart of (label, points, held out) curves, at most four. Held-out ones get
    circles, the others a running mean.

    With `log`, values of 0 or less are left out. "" where no curve has a point.
    """
    series = [
        (label, _thin([(x, y) for x, y in points if y > 0 or not log]), mark)
        for label, points, mark in series
    ]
    series = [curve for curve in series if curve[1]]
    if not series:
        return ""
    width = 400
    height = 230
    left = 46
    right = 8
    top = 10
    bottom = 24
    scale = math.log10 if log else float
    xs, ys = ([point[axis] for _, points, _ in series for point in points] for axis in (0, 1))
    ticks = (_log_ticks if log else _ticks)(min(ys), max(ys))
    low = min(scale(min(ys)), scale(ticks[0]))
    high = max(scale(max(ys)), scale(ticks[-1]))
    end = max(*xs, 1)

    def x_of(x):
        return round(left + x / end * (width - left - right), 1)

    def y_of(y):
        return round(height - bottom - (scale(y) - low) / (high - low) * (height - top - bottom), 1)

    parts = [
        f'<line class="rule" x1="{left}" x2="{width - right}" y1="{y_of(y)}" y2="{y_of(y)}"/>'
        f'<text x="{left - 6}" y="{y_of(y) + 4}" text-anchor="end">{y:g}</text>'
        for y in ticks
    ]

    def anchor(x):
        return "end" if x > 0.95 * end else "middle"

    parts += [
        f'<text x="{x_of(x)}" y="{height - 6}" text-anchor="{anchor(x)}">{x:,g}</text>'
        for x in _ticks(0, end)
    ]

    def line(kind, points):
        return f'<polyline class="{kind}" points="{" ".join(f"{x_of(x)},{y_of(y)}" for x, y in points)}"/>'

    for number, (_, points, held_out) in enumerate(series):
        if held_out:
            parts += [
                line(f"s{number}", points),
                *(
                    f'<circle class="s{number}" cx="{x_of(x)}" cy="{y_of(y)}" r="3"><title>{x:g}: {y:.3g}</title></circle>'
                    for x, y in points
                ),
            ]
        else:
            parts += [line(f"pale s{number}", points), line(f"s{number}", _running_mean(points))]

    def last(points, held_out):
        return (points if held_out else _running_mean(points))[-1][1]

    keys = "".join(
        f'<span class="key" style="--k: var(--c{number})">{escape(label)}, last {last(points, held_out):.3g}</span>'
        for number, (label, points, held_out) in enumerate(series)
    )
    return (
        f'<figure class="card"><figcaption><b>{escape(title)}</b>{keys}</figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


def _ticks(low: Number, high: Number) -> list[Number]:
    """About four round numbers from below `low` to `high`, from 0 where that is near."""
    low = 0.0 if 0 < low < 0.5 * high else low
    step = 10 ** math.floor(math.log10(max(high - low, 1e-9) / 3))
    step = next(step * m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 5)
    return (
        [round(step * k, 12) for k in range(math.floor(low / step), math.floor(high / step) + 1)]
        if high > low
        else [low, low + 1]
    )


def _log_ticks(low: Number, high: Number) -> list[Number]:
    """1, 2 and 5 times powers of ten around both values, or where those would be many, powers of
    ten alone, or some of them.
    """
    for steps in ((1, 2, 5), (1,)):
        every = [
            m * 10.0**k
            for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 2)
            for m in steps
        ]
        ticks = [a for a, b in pairwise([*every, math.inf]) if b > low]
        ticks = ticks[: next(k for k, tick in enumerate(ticks) if tick >= high and k) + 1]
        if len(ticks) <= 7:
            break
    return ticks[:: math.ceil(len(ticks) / 7)]


def _thin(points: Curve) -> Curve:
    """At most POINTS points: means of neighbours."""
    each = max(1, math.ceil(len(points) / POINTS))
    return [
        tuple(np.mean(points[start : start + each], 0)) for start in range(0, len(points), each)
    ]


def _running_mean(points: Curve) -> Curve:
    reach = len(points) // 24
    values = [y for _, y in points]
    return [
        (x, float(np.mean(values[max(0, k - reach) : k + reach + 1])))
        for k, (x, _) in enumerate(points)
    ]


def picture(image: UInt8[np.ndarray, "h w 3"], label: str, style: str = "") -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", optimize=True)
    return f'<img{style} src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}" alt="{escape(label)}" title="{escape(label)}">'


def percent(value: Number, digits: int = 1) -> str:
    # a space that does not break the line
    return f"{100 * value:.{digits}f}\u00a0%"


def _targets(targets: list[Target]) -> str:
    def mark(target):
        if target.reached is None:
            return '<span class="mark">not measured</span>'
        return f'<span class="mark {"right" if target.reached else "wrong"}">{"reached" if target.reached else "not reached"}</span>'

    def value(target):
        return (
            "–" if target.value is None else percent(target.value, 2 if target.value < 0.02 else 1)
        )

    rows = (
        f'<tr><td>{escape(target.what)} <small class="soft number">{escape(target.bound)}</small></td>'
        f'<td class="number big">{value(target)}</td><td>{mark(target)}</td></tr>'
        for target in targets
    )
    return f'<div class="card scroll"><table>{"".join(rows)}</table></div>'


def _scenes(n: dict[str, Number]) -> str:
    head = (
        "<tr><th>held-out scenes</th><th>number</th><th>exact</th><th>facts right</th><th>F1 of words</th>"
        "<th>nearest: exact</th><th>facts right</th><th>F1 of words</th></tr>"
    )
    rows = ""
    for label, group in (
        ("all", "scenes_held_out"),
        ("counts", "scenes_held_out_counts"),
        ("spatial", "scenes_held_out_spatial"),
    ):
        scores = [
            f"{group}_{who}{score}"
            for who in ("", "nearest_")
            for score in ("exact", "facts", "f1")
        ]
        if n[f"{group}_count"]:
            rows += (
                f'<tr><td>{label}</td><td class="number">{n[f"{group}_count"]}</td>'
                + "".join(f'<td class="number">{percent(n[score])}</td>' for score in scores)
                + "</tr>"
            )
    swapped = n.get("scenes_held_out_spatial_swapped")
    return f"""<p>Each number, drawing, relation and background below was seen in training, but never together. Exactly right:
<b>{percent(n["scenes_held_out_exact"])}</b> of {n["scenes_held_out_count"]}. The caption of the nearest training scene in pixels cannot be exactly
right, for its combination is another one; so also compare the share of facts (number or relation, drawings, background) that are right, each in
its role. {"" if swapped is None else f"Of the spatial captions {percent(swapped)} name the right two drawings in each other's place."}</p>
<div class="card scroll"><table>{head}{rows}</table></div>"""


def _card(told: Told) -> str:
    right = told.said == told.true
    said = escape(told.said) or "(nothing)"
    other = "" if right else f"<div><small>true:</small> {escape(told.true)}</div>"
    near = (
        f"<div><small>nearest in pixels: {escape(told.nearest)}</small></div>"
        if told.nearest is not None
        else ""
    )
    return (
        f'<div class="card told {"right" if right else "wrong"}">{picture(told.image, told.true)}'
        f'<div><div class="said">{"✓" if right else "✗"} {said}</div>{other}{near}</div></div>'
    )


def _told(result: Result, group: str) -> str:
    return "".join(_card(told) for told in result.captions[group][: SHOWN[group]])


def _stories(result: Result) -> str:
    if not result.stories:
        return ""
    n = result.numbers
    stories = "".join(
        f'<div class="card story">{"".join(map(_card, story))}</div>'
        for story in result.stories[:STORIES]
    )
    return f"""<h2>Stories, sentence by sentence</h2>
<p>Held-out pairs of drawings. Each sentence is told from all images and true sentences before it: {percent(n["stories_held_out_exact"])} of
{n["stories_held_out_count"]} are exactly right as far as the true sentence goes (nothing teaches where a sentence inside a story ends).</p>
<div class="grid" style="--least: 235px">{stories}</div>"""


def _in_context(result: Result) -> str:
    if not result.in_context:
        return ""

    def given(told):
        return f'<div class="told">{picture(told.image, told.true)}<div><small>given</small><div>{escape(told.true)}</div></div></div>'

    fours = "".join(
        f'<div class="card story">{"".join(map(given, four[:3]))}{_card(four[3])}</div>'
        for four in result.in_context[:IN_CONTEXT]
    )
    return f"""<h2>Examples in context</h2>
<p>Three training drawings with their names, and then a fourth: the model reads all that and goes on. It was trained on one drawing and its name
at a time, so what helps with one can disturb among four: {percent(result.numbers["in_context_exact"])} of
{result.numbers["in_context_count"]} are exactly right.</p>
<div class="grid" style="--least: 210px">{fours}</div>"""


def _pictures(result: Result) -> str:
    """What the decoder draws; "" where there is none."""
    if not result.pictures:
        return ""
    n = result.numbers
    head = "<tr><th>pictures</th><th>number</th><th>of visual tokens: first</th><th>in five</th><th>of the caption: first</th><th>in five</th></tr>"
    rows = ""
    shown = {}
    for group, label in (
        ("names_train", "training drawings"),
        ("names_held_out", "held-out drawings"),
        ("scenes_held_out", "held-out scenes"),
    ):
        scores = (
            f"pictures_{group}_{source}_top{top}"
            for source in ("encoded", "regressed")
            for top in (1, 5)
        )
        rows += (
            f'<tr><td>{label}</td><td class="number">{n[f"pictures_{group}_count"]}</td>'
            + "".join(f'<td class="number">{percent(n[score])}</td>' for score in scores)
            + "</tr>"
        )
        cards = (
            _row(
                picture.caption,
                list(zip((picture.image, picture.encoded, picture.regressed), PARTS, strict=True)),
            )
            for picture in result.pictures[group][: PICTURES[group]]
        )
        shown[group] = f'<div class="grid" style="--least: 150px">{"".join(cards)}</div>'
    return f"""<h2>Drawn</h2>
<p>The visual decoder, a U-Net on {len(result.pictures["names_train"][0].image)} × {len(result.pictures["names_train"][0].image)} pixels, draws visual
tokens. In each card: the image, what is drawn of the visual tokens that the encoder makes of it, and what is drawn of those that the model
regresses from the caption alone. In how many cases is the image the one nearest to its picture in pixels, of all in its row of the table, or
among the nearest five?</p>
<div class="card scroll"><table>{head}{rows}</table></div>
<p>Training drawings.</p>
{shown["names_train"]}
<p>Scenes of combinations it has never seen. A caption does not say where exactly its drawings are, so the picture need not be the image.</p>
{shown["scenes_held_out"]}
<p>Held-out drawings: their look cannot be known from their names.</p>
{shown["names_held_out"]}
<p>Blends: two drawings, what the model regresses after having read both, and the mean of their visual tokens.</p>
<div class="grid" style="--least: 220px">{"".join(map(_blend, result.blends))}</div>"""


def _row(caption: str, pictures: list[tuple[UInt8[np.ndarray, "h w 3"], str]]) -> str:
    images = "".join(picture(image, label) for image, label in pictures)
    return f'<div class="card"><div class="row">{images}</div><div>{escape(caption)}</div></div>'


def _blend(blend: Blend) -> str:
    sides = zip(blend.images, blend.captions, strict=True)
    return _row(
        " + ".join(blend.captions),
        [
            *sides,
            (blend.regressed, "regressed after both"),
            (blend.mean, "of the mean of their visual tokens"),
        ],
    )


def _retrieval(drawn: list[Drawn]) -> str:
    rows = "<tr><th>name</th><th>place</th><th>nearest five</th></tr>"
    for query in (
        query
        for held_out, count in QUERIES.items()
        for query in [q for q in drawn if q.held_out == held_out][:count]
    ):
        pictures = "".join(
            picture(image, name, ' class="hit"' if name == query.name else "")
            for name, image in query.found
        )
        mark = "<br><small class=soft>held out</small>" if query.held_out else ""
        rows += (
            f'<tr><td>{escape(query.name)}{mark}</td><td class="number">'
            f'<span class="mark {"right" if query.rank < len(query.found) else "wrong"}">{query.rank + 1:,}</span></td>'
            f'<td class="found">{pictures}</td></tr>'
        )
    return rows


def _curves(result: Result) -> str:
    emu, warmup, decoder = (
        partial(history.curve, lines)
        for lines in (result.lines, result.warmup_lines, result.decoder_lines)
    )
    held = sorted(
        {
            name.removeprefix("eval/text_loss/")
            for line in result.lines
            for name in line
            if name.startswith("eval/text_loss/")
        }
    )
    return "".join(
        (
            chart(
                "Emu: text loss, nats a token (log)",
                [("training", emu("text_loss"), False), ("held out", emu("eval/text_loss"), True)],
                log=True,
            ),
            chart(
                "Emu: image loss, squared error (log)",
                [
                    ("training", emu("image_loss"), False),
                    ("held out", emu("eval/image_loss"), True),
                ],
                log=True,
            ),
            chart(
                "Emu: held-out text loss by source (log)",
                [(name, emu(f"eval/text_loss/{name}"), True) for name in held[:4]],
                log=True,
            ),
            chart(
                "Emu: variance of the visual tokens",
                [("in a batch", emu("visual_variance"), False)],
            ),
            chart(
                "Decoder: squared error of the prediction",
                [
                    ("training", decoder("diffusion_loss"), False),
                    ("held out", decoder("eval/diffusion_loss"), True),
                ],
            ),
            chart(
                "Warm-up: contrastive loss, nats", [("training", warmup("contrastive_loss"), False)]
            ),
            chart(
                "Warm-up: linear reading of the pixels, squared error (log)",
                [("training", warmup("readout_loss"), False)],
                log=True,
            ),
            chart(
                "Warm-up: variance of the visual tokens (log)",
                [("in a batch", warmup("visual_variance"), False)],
                log=True,
            ),
        )
    )


def _variance_words(n: dict[str, Number]) -> str:
    words = []
    if "visual_variance_ratio" in n:
        words.append(
            f"Over the Emu stage: {n['visual_variance_first']:.3g} at the first step, "
            f"{n['visual_variance_least']:.3g} at the least."
        )
    if "raw_variance_ratio" in n:
        words.append(
            f"Over all single drawings, before any standardising: {n['raw_variance_warmup']:.3g} after the warm-up, "
            f"{n['raw_variance']:.3g} now."
        )
    return " ".join(
        (*words, f"The tokens use about {n['visual_rank']:.0f} directions (effective rank).")
    )


def _speed(n: dict[str, Number]) -> str:
    def rate(value):
        return f"{value:,.0f}"

    rows = [
        ("steps", "steps", rate),
        ("wall time, without compiling and evaluating", "wall_s", lambda s: f"{s / 60:.1f} min"),
        ("step, median", "step_time_s", lambda s: f"{1000 * s:.0f} ms"),
        ("tokens a second", "tokens_per_second", rate),
        ("images a second", "images_per_second", rate),
        ("model FLOP/s", "flops_per_second", _si),
    ]
    stages = {"warmup_speed": "warm-up", "speed": "Emu"} | (
        {"decoder_speed": "decoder"} if "decoder_speed/steps" in n else {}
    )
    towers = dict.fromkeys(name.rpartition("/")[2] for name in n if "flops_per_second/" in name)
    rows += [(f"… {tower}", f"flops_per_second/{tower}", _si) for tower in towers]
    rows += [
        ("share of the peak (MFU)", "mfu", percent),
        ("waiting for data", "input_wait_share", lambda share: percent(share, 2)),
        ("padding", "padding_share", percent),
    ]

    def cell(stage, name, show):
        return f'<td class="number">{show(n[f"{stage}/{name}"]) if f"{stage}/{name}" in n else "–"}</td>'

    return (
        "<tr><th></th>"
        + "".join(f"<th>{label}</th>" for label in stages.values())
        + "</tr>"
        + "".join(
            f"<tr><td>{label}</td>{''.join(cell(stage, name, show) for stage in stages)}</tr>"
            for label, name, show in rows
            if any(f"{stage}/{name}" in n for stage in stages)
        )
    )


def _si(value: Number) -> str:
    """3.2 G, 1.1 T, ..."""
    power = min(max(int(math.log10(value) // 3), 0), 5) if value >= 1 else 0
    return f"{value / 1000**power:.3g} {' kMGTP'[power]}".strip()
