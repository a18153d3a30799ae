"""The page about instruction tuning: accuracies, conversations and the loss.

The conversations are the first of the split, not a selection. Read next: report.py.
"""

from functools import partial
from pathlib import Path

from emu_jax import html
from emu_jax.demo import history
from emu_jax.demo.chat import Answered, Result, rows
from emu_jax.demo.report import LICENCE
from emu_jax.html import Curve, chart, escape, percent, td

# Number of conversations on the page.
SHOWN = 12


def page(result: Result, checkpoint: str) -> str:
    """The HTML page; `checkpoint`: the path to show."""
    accuracies = []
    for row in rows(result.numbers):
        accuracies.append(
            [
                td(escape(row.label)),
                td(f"{row.count}", "number"),
                td(percent(row.before), "number"),
                td(percent(row.after), "number big"),
                td(percent(row.most_common), "number"),
            ]
        )
    header = ("held-out questions", "number", "before", "after", "most common answer")
    conversations: dict[str, list[Answered]] = {}
    for answer in result.answers:
        conversations.setdefault(answer.id, []).append(answer)
    shown = list(conversations.values())[:SHOWN]
    lines = partial(history.curve, result.lines)
    loss = chart(
        "Loss of the answers, nats per token (log scale)",
        [Curve("training", lines("text_loss")), Curve("held out", lines("eval/text_loss"), True)],
        log=True,
    )
    body = f"""<p>Instruction tuning of the demo's model. LoRA of rank
{result.config["model"]["lora"]["rank"]} and the embeddings of [USER] and [ASSISTANT] learnt from
conversations about scenes; everything else is unchanged from
<code>{escape(Path(result.config["init"]).name)}</code>. The questions are about scenes of held-out
combinations, and are answered greedily; an answer counts if it is exactly right. The last column is
a baseline: the most common answer in training to questions of that kind.</p>
<p class="soft">Checkpoint <code>{escape(checkpoint)}</code>.</p>
{html.table(accuracies, header)}
<h2>Conversations</h2>
<p>The first {len(shown)} of the split. Later turns were asked after the true answers to earlier
ones.</p>
<div class="grid">{"".join(map(_conversation, shown))}</div>
<h2>Training curve</h2>
<div class="grid">{loss}</div>
<footer>{LICENCE}</footer>"""
    return html.page("A small Emu learns to answer", body)


def _conversation(turns: list[Answered]) -> str:
    return f'<div class="card story">{"".join(map(_turn, turns))}</div>'


def _turn(answered: Answered) -> str:
    right = answered.after == answered.true
    true = "" if right else f" <small>(true: {escape(answered.true)})</small>"
    images = "".join(html.image(image, answered.true) for image in answered.images)
    before = escape(answered.before or "(nothing)")
    return (
        f'<div class="example {"right" if right else "wrong"}">{images}'
        f'<div>{escape(answered.question)}<div class="answer">{escape(answered.after)}{true}</div>'
        f"<small>before: {before}</small></div></div>"
    )
