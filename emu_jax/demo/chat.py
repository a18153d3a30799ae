"""What instruction tuning taught the demo's model: questions on held-out scenes, answered before
and after, and a page that shows them.

Before is the Emu that tuning started from, in the same chat format, with the new tokens' rows as
tuning found them. Beside both stands the answer that training gives most often to questions of a
kind. A later turn is asked after the right answers to the turns before it.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from emu_jax import checkpoint, html, tree
from emu_jax.config import UserError, from_dict
from emu_jax.data import chat_format, sources
from emu_jax.data import tokenizer as tokenizers
from emu_jax.data.documents import Document, Picture
from emu_jax.data.sources import Source
from emu_jax.demo import history
from emu_jax.demo.evaluation import plain
from emu_jax.demo.history import Number
from emu_jax.demo.report import LICENCE
from emu_jax.generate import processor
from emu_jax.generate.generation_config import GenerationConfig
from emu_jax.generate.processor import Prompt
from emu_jax.generate.session import Session
from emu_jax.html import Curve, chart, escape, percent
from emu_jax.initial import initial
from emu_jax.models import emu

BATCH = 128
NEW_TOKENS = 24
# conversations on the page
SHOWN = 12
KINDS = {
    "what": "what is this?",
    "number": "how many … are there?",
    "animal": "which of the two is an animal?",
    "relation": "what is … of the …?",
    "colour": "which colour is behind?",
    "there": "is there a …?",
}


class Told(NamedTuple):
    """A question of a conversation, by its place there, and what is answered; `images` are those
    that it shows.
    """

    id: str
    turn: int
    kind: str
    question: str
    true: str
    before: str
    after: str
    images: tuple[UInt8[np.ndarray, "h w 3"], ...]


class Result(NamedTuple):
    config: dict[str, Any]
    numbers: dict[str, Number]
    told: list[Told]
    lines: list[history.Line]


def evaluate(directory: str, data: str) -> Result:
    """Of the run in `directory` (a workdir or one of its checkpoints) on the questions in `data`.
    Raises UserError for a run that was not tuned on conversations, or started from nothing.
    """
    config = checkpoint.read_config(directory)
    model_config = emu.EmuConfig.of(from_dict(config["model"]).to_dict())
    if not model_config.llama.chats or not config["init"]:
        raise UserError(
            f"the checkpoint in '{directory}' was not tuned to chat from another (model.llama.added={model_config.llama.added}, "
            f"init={config['init']!r}); configs/demo.py:instruct is"
        )
    asked, learnt = (
        sources.open_source(f"{data}/questions:{split}", model_config.vision.image)
        for split in ("held_out", "train")
    )
    tokenizer = tokenizers.load(f"{data}/tokenizer.json", model_config.llama.vocab)
    after = jax.tree.map(jnp.asarray, checkpoint.restore_params(directory))
    # LoRA starts as nothing
    untuned = {
        path: jnp.zeros_like(leaf) if path.endswith("/b") else leaf
        for path, leaf in tree.leaves(after)
    }
    before, _ = initial(config["init"], tree.unflatten(untuned))
    sessions = [
        Session(
            model_config,
            params,
            tokenizer,
            context=2 * config["data"]["tokens"],
            batch=BATCH,
            system=config["data"]["system"],
        )
        for params in (before, after)
    ]
    told = _asked(sessions, asked)
    return Result(config, _numbers(told, _common(learnt)), told, history.read(directory))


def _asked(sessions: Sequence[Session], source: Source) -> list[Told]:
    """Every question of a source, answered by the sessions of before and after."""
    open_ = []
    prompts = []
    for document in (source[i] for i in range(len(source))):
        read = Prompt()
        for number, (turn, kind) in enumerate(_turns(document)):
            parts = [
                part.data if isinstance(part, Picture) else part.text for part in turn.question
            ]
            read = processor.concatenate(
                read, sessions[0].processor.chat_turn(parts, system=None, first=number == 0)
            )
            prompts.append(read)
            question = " ".join(part for part in parts if isinstance(part, str))
            open_.append(
                Told(
                    document.id,
                    number,
                    kind,
                    question,
                    _answer(turn),
                    "",
                    "",
                    tuple(part for part in parts if not isinstance(part, str)),
                )
            )
            t = sessions[0].tokenizer
            read = processor.concatenate(read, Prompt([*t.encode(_answer(turn)), t.eos]))
    said = [
        session.generate_texts(prompts, GenerationConfig(max_new_tokens=NEW_TOKENS), progress=when)
        for session, when in zip(sessions, ("before", "after"))
    ]
    return [
        told._replace(before=plain(one), after=plain(other))
        for told, one, other in zip(open_, *said, strict=True)
    ]


def _turns(document: Document) -> list[tuple[chat_format.Turn, str]]:
    return list(
        zip(chat_format.split_turns(document)[1], document.provenance["kinds"], strict=True)
    )


def _answer(turn: chat_format.Turn) -> str:
    return plain(" ".join(part.text for part in turn.answer))


def _common(source: Source) -> dict[str, str]:
    """The most frequent answer of each kind."""
    counts: dict[str, Counter] = {}
    for document in (source[i] for i in range(len(source))):
        for turn, kind in _turns(document):
            counts.setdefault(kind, Counter())[_answer(turn)] += 1
    return {kind: some.most_common(1)[0][0] for kind, some in counts.items()}


def _numbers(told: list[Told], common: dict[str, str]) -> dict[str, Number]:
    """Shares of exact answers: of all, by kind, and of the turns after the first."""
    groups = {"all": told, "later_turns": [one for one in told if one.turn]} | {
        kind: [one for one in told if one.kind == kind] for kind in KINDS
    }
    numbers: dict[str, Number] = {}
    for name, some in groups.items():
        if some:

            def share(said):
                return float(np.mean([said(one) == one.true for one in some]))

            numbers |= {
                f"{name}_count": len(some),
                f"{name}_before": share(lambda one: one.before),
                f"{name}_after": share(lambda one: one.after),
                f"{name}_most_common": share(lambda one: common.get(one.kind, "")),
            }
    return numbers


def _rows(numbers: dict[str, Number]) -> list[tuple[str, int, float, float, float]]:
    """(what is asked, number, shares before, after, and of the most common answer)."""
    names = {"all": "all"} | KINDS | {"later_turns": "second and third turns"}
    return [
        (
            label,
            *(numbers[f"{name}_{what}"] for what in ("count", "before", "after", "most_common")),
        )
        for name, label in names.items()
        if f"{name}_count" in numbers
    ]


def table(result: Result) -> str:
    """The accuracies, for a terminal."""
    head = f"{'held-out questions':32}{'number':>8}{'before':>10}{'after':>10}{'most common answer':>21}"
    return "\n".join(
        [
            head,
            *(
                f"{label:32}{count:>8}{before:>10.1%}{after:>10.1%}{common:>21.1%}"
                for label, count, before, after, common in _rows(result.numbers)
            ),
        ]
    )


def page(result: Result, checkpoint: str) -> str:
    """One HTML page, with its pictures inside and no script; the conversations shown are the first,
    nothing is chosen.
    """
    rows = "".join(
        f'<tr><td>{escape(label)}</td><td class="number">{count}</td><td class="number">{percent(before)}</td>'
        f'<td class="number big">{percent(after)}</td><td class="number">{percent(common)}</td></tr>'
        for label, count, before, after, common in _rows(result.numbers)
    )
    head = "<tr><th>held-out questions</th><th>number</th><th>before</th><th>after</th><th>most common answer</th></tr>"
    ids = list(dict.fromkeys(told.id for told in result.told))[:SHOWN]

    def lines(name):
        return history.curve(result.lines, name)

    loss = chart(
        "Loss of the answers, nats a token (log)",
        [Curve("training", lines("text_loss")), Curve("held out", lines("eval/text_loss"), True)],
        log=True,
    )
    lora = result.config["model"]["lora"]
    return html.page(
        "A small Emu learns to answer",
        f"""<p>Instruction tuning of the demo's model: LoRA of rank {lora["rank"]} and the rows of [USER] and [ASSISTANT] learn from conversations about scenes;
all else is as <code>{escape(Path(result.config["init"]).name)}</code> left it. Asked here are questions on scenes of held-out combinations, greedily;
an answer counts if it is exactly right. Checkpoint <code>{escape(checkpoint)}</code>.</p>
<div class="card scroll"><table>{head}{rows}</table></div>
<h2>Conversations</h2>
<p>The first {len(ids)} of the split. A later turn was asked after the right answers to those before it.</p>
<div class="grid">{"".join(_shown([told for told in result.told if told.id == id]) for id in ids)}</div>
<h2>Curve</h2>
<div class="grid">{loss}</div>
<footer>{LICENCE}</footer>""",
    )


def _shown(turns: list[Told]) -> str:
    def one(told: Told) -> str:
        mark = "right" if told.after == told.true else "wrong"
        true = "" if mark == "right" else f" <small>({escape(told.true)})</small>"
        return (
            f'<div class="told {mark}">{"".join(html.image(image, told.true) for image in told.images)}<div>{escape(told.question)}'
            f'<div class="said">{escape(told.after)}{true}</div><small>before: {escape(told.before or "nothing")}</small></div></div>'
        )

    return f'<div class="card story">{"".join(map(one, turns))}</div>'
