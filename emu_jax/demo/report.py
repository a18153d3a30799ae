"""The demo's report: an HTML page of targets, examples, decoded images and curves.

The examples are the first of each split in file order, not a selection. Read next: ../html.py.
"""

import json
import math
from collections.abc import Iterable
from functools import partial

from emu_jax import html
from emu_jax.demo import history
from emu_jax.demo.captions import Captioned
from emu_jax.demo.decoding import Blend, Decoded, Pixels
from emu_jax.demo.evaluation import Result, Retrieved, Target
from emu_jax.demo.history import Line, Number
from emu_jax.html import Curve, chart, escape, percent, td

# Number of examples on the page, by group.
CAPTIONS = {"scenes_held_out": 24, "names_train": 24, "names_held_out": 12}
DECODED = {"names_train": 40, "names_held_out": 10, "scenes_held_out": 20}
# Number of names whose nearest drawings are shown, from training and held out.
RETRIEVED = 10
RETRIEVED_HELD_OUT = 4
# Number of stories, and of prompts with examples in context.
STORIES = 4
IN_CONTEXT = 8

GROUPS = {
    "names_train": "training drawings",
    "names_held_out": "held-out drawings",
    "scenes_held_out": "held-out scenes",
}
LICENCE = (
    "Drawings: “OpenMoji – the open-source emoji and icon project” "
    '(<a href="https://openmoji.org">openmoji.org</a>), licence '
    '<a href="https://creativecommons.org/licenses/by-sa/4.0/">CC BY-SA 4.0</a>; the scenes are '
    "composed of them, under the same licence."
)


def page(result: Result, checkpoint: str) -> str:
    """The HTML page; `checkpoint`: the path to show."""
    sections = [
        _introduction(result, checkpoint),
        _targets(result.targets),
        _scenes(result),
        _decoded(result),
        _retrieved(result),
        _stories(result),
        _in_context(result),
        _names(result),
        _curves(result),
        _variance(result.numbers),
        _speed(result.numbers),
        _config(result),
        f"<footer>{LICENCE}</footer>",
    ]
    return html.page("A small Emu: what it learnt", "\n".join(filter(None, sections)))


def _introduction(result: Result, checkpoint: str) -> str:
    steps = f", after {result.lines[-1]['step']:,} steps" if result.lines else ""
    return f"""<p>Emu (<a href="https://arxiv.org/abs/2307.05222">arXiv 2307.05222</a>) predicts the
next element of interleaved text and images: a word or a visual token. This model runs the code of
the 14B model at a size that two CPU cores train in minutes. It learnt from drawings with their
names, and from scenes composed of 28 of these drawings.</p>
<p class="soft">Checkpoint <code>{escape(checkpoint)}</code>{steps}. All examples are the first of
their split, not a selection.</p>"""


def _targets(targets: list[Target]) -> str:
    marks = {
        True: '<span class="mark right">reached</span>',
        False: '<span class="mark wrong">not reached</span>',
        None: '<span class="mark">not measured</span>',
    }
    rows = []
    for target in targets:
        value = "–"
        if target.value is not None:
            value = percent(target.value, 2 if target.value < 0.02 else 1)
        bound = f'<small class="soft number">{escape(target.bound)}</small>'
        rows.append(
            [
                td(f"{escape(target.what)} {bound}"),
                td(value, "number big"),
                td(marks[target.reached], "end"),
            ]
        )
    reached = sum(target.reached is True for target in targets)
    return f"<h2>Targets: {reached} of {len(targets)} reached</h2>\n{html.table(rows)}"


def _scenes(result: Result) -> str:
    numbers = result.numbers
    header = ("held-out scenes", "number", "exact", "facts", "F1")
    header += ("baseline: exact", "facts", "F1")
    rows = []
    for label in ("all", "counts", "spatial"):
        group = "scenes_held_out" if label == "all" else f"scenes_held_out_{label}"
        if not numbers[f"{group}_count"]:
            continue
        row = [td(label), td(f"{numbers[f'{group}_count']}", "number")]
        for prefix in (group, f"{group}_nearest"):
            for score in ("exact", "facts", "f1"):
                row.append(td(percent(numbers[f"{prefix}_{score}"]), "number"))
        rows.append(row)
    swapped = numbers.get("scenes_held_out_spatial_swapped")
    swaps = ""
    if swapped is not None:
        swaps = f"Of the spatial captions, {percent(swapped)} swap the right two drawings."
    return f"""<h2>Captions of scenes it has never seen</h2>
<p>Every number, drawing, relation and background below occurred in training, but never in this
combination. <b>{percent(numbers["scenes_held_out_exact"])}</b> of
{numbers["scenes_held_out_count"]} captions are exactly right. {swaps}</p>
<p>The baseline is the caption of the nearest training scene in pixels. It can never be exactly
right, because the right combination is held out, so compare the share of facts (number or relation,
drawings, background) that are right, each in its role, and the F1 of the words.</p>
{html.table(rows, header)}
{_captions(result, "scenes_held_out", 235)}"""


def _captions(result: Result, group: str, width: int) -> str:
    examples = result.captions[group][: CAPTIONS[group]]
    return _grid(map(_example, examples), width)


def _grid(cards: Iterable[str], width: int) -> str:
    """Cards next to each other, each at least `width` pixels wide."""
    return f'<div class="grid" style="--least: {width}px">{"".join(cards)}</div>'


def _example(caption: Captioned) -> str:
    right = caption.predicted == caption.true
    predicted = escape(caption.predicted) or "(nothing)"
    lines = [f'<div class="answer">{"✓" if right else "✗"} {predicted}</div>']
    if not right:
        lines.append(f"<div><small>true:</small> {escape(caption.true)}</div>")
    if caption.nearest is not None:
        lines.append(f"<div><small>baseline: {escape(caption.nearest)}</small></div>")
    kind = "right" if right else "wrong"
    image = html.image(caption.image, caption.true)
    return f'<div class="card example {kind}">{image}<div>{"".join(lines)}</div></div>'


def _stories(result: Result) -> str:
    if not result.stories:
        return ""
    numbers = result.numbers
    cards = [
        f'<div class="card story">{"".join(map(_example, story))}</div>'
        for story in result.stories[:STORIES]
    ]
    return f"""<h2>Stories, sentence by sentence</h2>
<p>Stories of held-out pairs of drawings. The model writes each sentence after all images and true
sentences before it: {percent(numbers["stories_held_out_exact"])} of
{numbers["stories_held_out_count"]} are exactly right, up to the length of the true sentence
(nothing teaches the model where a sentence inside a story ends).</p>
{_grid(cards, 235)}"""


def _in_context(result: Result) -> str:
    if not result.in_context:
        return ""
    cards = []
    for four in result.in_context[:IN_CONTEXT]:
        given = "".join(
            f'<div class="example">{html.image(one.image, one.true)}'
            f"<div><small>given</small><div>{escape(one.true)}</div></div></div>"
            for one in four[:3]
        )
        cards.append(f'<div class="card story">{given}{_example(four[3])}</div>')
    return f"""<h2>Examples in context</h2>
<p>The model reads three training drawings with their names, and then names a fourth. Training
showed it one drawing at a time, so the others may disturb as well as help:
{percent(result.numbers["in_context_exact"])} of {result.numbers["in_context_count"]} are exactly
right.</p>
{_grid(cards, 210)}"""


def _decoded(result: Result) -> str:
    """What the decoder draws; "" without a decoder."""
    if not result.decoded:
        return ""
    header = ("decoded", "number", "from visual tokens: first", "first five")
    header += ("from the caption: first", "first five")
    rows = []
    grids = {}
    for group, label in GROUPS.items():
        row = [td(label), td(f"{result.numbers[f'pictures_{group}_count']}", "number")]
        for source in ("encoded", "regressed"):
            for top in (1, 5):
                share = result.numbers[f"pictures_{group}_{source}_top{top}"]
                row.append(td(percent(share), "number"))
        rows.append(row)
        examples = result.decoded[group][: DECODED[group]]
        grids[group] = _grid(map(_decoded_card, examples), 200)
    side = len(result.decoded["names_train"][0].image)
    return f"""<h2>Images it draws</h2>
<p>The visual decoder, a U-Net on {side} × {side} pixels, turns visual tokens into images. Each card
shows three: the <b>original</b>, one decoded <b>from the visual tokens</b> that the encoder makes
of it, and one decoded <b>from the caption</b> alone, by way of the visual tokens that the model
regresses. The table counts how often the original is the nearest in pixels to the decoded image, or
among the nearest five, of all images in its row.</p>
{html.table(rows, header)}
<h3>Training drawings</h3>
{grids["names_train"]}
<h3>Scenes it has never seen</h3>
<p>A caption does not fix where in the image its drawings are, so the third image may rightly differ
from the first.</p>
{grids["scenes_held_out"]}
<h3>Held-out drawings</h3>
<p>A model that has never seen them cannot know what they look like from their names.</p>
{grids["names_held_out"]}
<h3>Blends</h3>
<p>Two drawings, the image decoded from what the model regresses after reading both, and the image
decoded from the mean of their visual tokens.</p>
{_grid(map(_blend_card, result.blends), 260)}"""


def _decoded_card(decoded: Decoded) -> str:
    return _image_card(
        decoded.caption,
        [
            (decoded.image, "original"),
            (decoded.encoded, "from tokens"),
            (decoded.regressed, "from caption"),
        ],
    )


def _blend_card(blend: Blend) -> str:
    images = list(zip(blend.images, ("first", "second"), strict=True))
    images += [(blend.regressed, "regressed"), (blend.mean, "mean")]
    return _image_card(" + ".join(blend.captions), images)


def _image_card(caption: str, images: list[tuple[Pixels, str]]) -> str:
    """Images next to each other, each above its label, and a caption below them."""
    figures = "".join(
        f"<div>{html.image(image, label)}<small>{escape(label)}</small></div>"
        for image, label in images
    )
    return f'<div class="card"><div class="row">{figures}</div><div>{escape(caption)}</div></div>'


def _retrieved(result: Result) -> str:
    numbers = result.numbers
    trained = [query for query in result.retrieved if not query.held_out]
    held_out = [query for query in result.retrieved if query.held_out]
    shown = trained[:RETRIEVED] + held_out[:RETRIEVED_HELD_OUT]
    among = numbers["retrieval_among"]
    tokens = result.config["model"]["resampler"]["tokens"]
    return f"""<h2>From a name to its drawing</h2>
<p>From a name alone the model regresses the {tokens} visual tokens of a drawing, feeding each back.
The table shows the drawings, out of all {among:,}, whose visual tokens are nearest; the right one
is framed. It is among the first five for <b>{percent(numbers["retrieval_top5"])}</b> of the
training names and first for <b>{percent(numbers["retrieval_top1"])}</b> (chance:
{percent(5 / among, 2)} and {percent(1 / among, 2)}); R² of the regressed tokens is
{numbers["free_run_r2"]:.2f}. A held-out drawing can only be guessed from the words of its name:
{percent(numbers["retrieval_held_out_top5"])} are among the first five, R²
{numbers["free_run_r2_held_out"]:.2f}.</p>
{html.table(map(_retrieved_row, shown), ("name", "rank", "nearest five"))}"""


def _retrieved_row(query: Retrieved) -> list[str]:
    name = escape(query.name)
    if query.held_out:
        name += "<br><small class=soft>held out</small>"
    kind = "right" if query.rank < len(query.found) else "wrong"
    images = "".join(
        html.image(image, found, kind="hit" if found == query.name else "")
        for found, image in query.found
    )
    rank = f'<span class="mark {kind}">{query.rank + 1:,}</span>'
    return [td(name), td(rank, "number"), td(images, "found")]


def _names(result: Result) -> str:
    numbers = result.numbers
    return f"""<h2>Names of drawings</h2>
<p>Training drawings test memory. Of all {numbers["names_train_count"]:,},
<b>{percent(numbers["names_train_exact"])}</b> are named exactly; F1 of the words is
{numbers["names_train_f1"]:.2f}.</p>
{_captions(result, "names_train", 210)}
<p>Held-out drawings are only for information: the model cannot know a name that it never read.
{percent(numbers["names_held_out_exact"])} of {numbers["names_held_out_count"]} are named exactly,
F1 {numbers["names_held_out_f1"]:.2f}. Baseline, the name of the nearest training drawing in pixels:
{percent(numbers["names_held_out_nearest_exact"])}, F1
{numbers["names_held_out_nearest_f1"]:.2f}.</p>
{_captions(result, "names_held_out", 210)}"""


def _curves(result: Result) -> str:
    emu = partial(history.curve, result.lines)
    warmup = partial(history.curve, result.warmup_lines)
    decoder = partial(history.curve, result.decoder_lines)
    charts = [
        chart(
            "Emu: text loss, nats per token (log scale)",
            [Curve("training", emu("text_loss")), Curve("held out", emu("eval/text_loss"), True)],
            log=True,
        ),
        chart(
            "Emu: image loss, squared error (log scale)",
            [Curve("training", emu("image_loss")), Curve("held out", emu("eval/image_loss"), True)],
            log=True,
        ),
        chart(
            "Emu: held-out text loss by source (log scale)",
            [
                Curve(source, emu(f"eval/text_loss/{source}"), True)
                for source in _held_out_sources(result.lines)[:4]
            ],
            log=True,
        ),
        chart("Emu: variance of the visual tokens", [Curve("in a batch", emu("visual_variance"))]),
        chart(
            "Decoder: squared error of the prediction",
            [
                Curve("training", decoder("diffusion_loss")),
                Curve("held out", decoder("eval/diffusion_loss"), True),
            ],
        ),
        chart("Warm-up: contrastive loss, nats", [Curve("training", warmup("contrastive_loss"))]),
        chart(
            "Warm-up: linear readout of pixels, squared error (log scale)",
            [Curve("training", warmup("readout_loss"))],
            log=True,
        ),
        chart(
            "Warm-up: variance of the visual tokens (log scale)",
            [Curve("in a batch", warmup("visual_variance"))],
            log=True,
        ),
    ]
    if not any(charts):
        return ""
    return f"""<h2>Training curves</h2>
<p>By step. Pale lines: training; strong lines: its running mean; circles: held-out data.</p>
{_grid(charts, 320)}"""


def _held_out_sources(lines: list[Line]) -> list[str]:
    prefix = "eval/text_loss/"
    names = {name for line in lines for name in line if name.startswith(prefix)}
    return sorted(name.removeprefix(prefix) for name in names)


def _variance(numbers: dict[str, Number]) -> str:
    """The section about whether the visual tokens have collapsed."""
    words = []
    if "visual_variance_ratio" in numbers:
        words.append(
            f"During the Emu stage it was {numbers['visual_variance_first']:.3g} at the first step "
            f"and never below {numbers['visual_variance_least']:.3g}."
        )
    if "raw_variance_ratio" in numbers:
        words.append(
            "Over all single drawings, before standardising, it was "
            f"{numbers['raw_variance_warmup']:.3g} after the warm-up and is "
            f"{numbers['raw_variance']:.3g} now."
        )
    return f"""<h2>Have the visual tokens collapsed?</h2>
<p>While an encoder trains, its visual tokens are both input and target, so making them all the same
would minimise the loss. Such a collapse shows in their variance across images, not in the loss.
{" ".join(words)} The tokens use about {numbers["visual_rank"]:.0f} directions (effective
rank).</p>"""


def _speed(numbers: dict[str, Number]) -> str:
    def count(value: Number) -> str:
        return f"{value:,.0f}"

    towers = dict.fromkeys(
        name.rpartition("/")[2] for name in numbers if "flops_per_second/" in name
    )
    kinds = [
        ("steps", "steps", count),
        ("time, without compiling and evaluating", "wall_s", lambda s: f"{s / 60:.1f} min"),
        ("step, median", "step_time_s", lambda s: f"{1000 * s:.0f} ms"),
        ("tokens per second", "tokens_per_second", count),
        ("images per second", "images_per_second", count),
        ("model FLOP/s", "flops_per_second", si),
        *((f"… {tower}", f"flops_per_second/{tower}", si) for tower in towers),
        ("share of the peak (MFU)", "mfu", percent),
        ("waiting for data", "input_wait_share", partial(percent, digits=2)),
        ("padding", "padding_share", percent),
    ]
    stages = {"warmup_speed": "warm-up", "speed": "Emu"}
    if "decoder_speed/steps" in numbers:
        stages["decoder_speed"] = "decoder"
    rows = []
    for label, name, show in kinds:
        values = [numbers.get(f"{stage}/{name}") for stage in stages]
        if any(value is not None for value in values):
            shown = ["–" if value is None else show(value) for value in values]
            rows.append([td(label), *(td(value, "number") for value in shown)])
    return f"<h2>Speed</h2>\n{html.table(rows, ('', *stages.values()))}"


def si(value: Number) -> str:
    """A number with an SI prefix: 3.2 G, 1.1 T."""
    power = min(max(int(math.log10(value) // 3), 0), 5) if value >= 1 else 0
    return f"{value / 1000**power:.3g} {' kMGTP'[power]}".strip()


def _config(result: Result) -> str:
    fields = escape(json.dumps(result.config, indent=1))
    return f"""<h2>Config</h2>
<details class="card"><summary>All fields of the run</summary><pre>{fields}</pre></details>"""
