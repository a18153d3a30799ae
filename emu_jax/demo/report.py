"""The demo's report: one HTML page that needs nothing else, with its pictures inside and no script.

Charts are SVG from `chart`; colours are CSS variables, so they follow a reader's light or dark
setting. What is shown of a split is the first of it, in the order of the file: nothing is chosen.
"""

import json
import math
from functools import partial

import numpy as np
from jaxtyping import UInt8

from emu_jax import html
from emu_jax.demo import history
from emu_jax.demo.drawings import Blend
from emu_jax.demo.evaluation import Drawn, Result, Target, Told
from emu_jax.demo.history import Number
from emu_jax.html import Curve, chart, escape, percent

SHOWN = {"scenes_held_out": 24, "names_held_out": 12, "names_train": 24}
PICTURES = {"names_train": 40, "names_held_out": 10, "scenes_held_out": 20}
PARTS = ("the image", "of its visual tokens", "of its caption")
# names of the retrieval table: trained, held out
QUERIES = {False: 10, True: 4}
STORIES = 4
IN_CONTEXT = 8

LICENCE = (
    'Drawings: “OpenMoji – the open-source emoji and icon project” (<a href="https://openmoji.org">openmoji.org</a>), licence '
    '<a href="https://creativecommons.org/licenses/by-sa/4.0/">CC BY-SA 4.0</a>; the scenes are composed of them, '
    "under the same licence."
)


def page(result: Result, checkpoint: str) -> str:
    """The whole page; `checkpoint` is the directory's name to show."""
    n = result.numbers
    reached = sum(target.reached is True for target in result.targets)
    after = f", after {result.lines[-1]['step']:,} steps" if result.lines else ""
    return html.page(
        "A small Emu: what it learnt",
        f"""<p>Emu (<a href="https://arxiv.org/abs/2307.05222">arXiv 2307.05222</a>) predicts the next element of interleaved text and images: a word, or
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
<footer>{LICENCE}</footer>""",
    )


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
        f'<div class="card told {"right" if right else "wrong"}">{html.image(told.image, told.true)}'
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
        return f'<div class="told">{html.image(told.image, told.true)}<div><small>given</small><div>{escape(told.true)}</div></div></div>'

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
    images = "".join(html.image(image, label) for image, label in pictures)
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
            html.image(image, name, kind="hit" if name == query.name else "")
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
                [
                    Curve("training", emu("text_loss")),
                    Curve("held out", emu("eval/text_loss"), True),
                ],
                log=True,
            ),
            chart(
                "Emu: image loss, squared error (log)",
                [
                    Curve("training", emu("image_loss")),
                    Curve("held out", emu("eval/image_loss"), True),
                ],
                log=True,
            ),
            chart(
                "Emu: held-out text loss by source (log)",
                [Curve(name, emu(f"eval/text_loss/{name}"), True) for name in held[:4]],
                log=True,
            ),
            chart(
                "Emu: variance of the visual tokens",
                [Curve("in a batch", emu("visual_variance"))],
            ),
            chart(
                "Decoder: squared error of the prediction",
                [
                    Curve("training", decoder("diffusion_loss")),
                    Curve("held out", decoder("eval/diffusion_loss"), True),
                ],
            ),
            chart(
                "Warm-up: contrastive loss, nats", [Curve("training", warmup("contrastive_loss"))]
            ),
            chart(
                "Warm-up: linear reading of the pixels, squared error (log)",
                [Curve("training", warmup("readout_loss"))],
                log=True,
            ),
            chart(
                "Warm-up: variance of the visual tokens (log)",
                [Curve("in a batch", warmup("visual_variance"))],
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
