"""Evaluation of the demo's instruction tuning: questions about held-out scenes.

"Before" is the Emu that tuning started from, in the same chat format, with the embeddings of the
new tokens that tuning started from. "After" is the tuned model. The baseline gives the most
frequent answer in training to each kind of question. A later turn is asked after the true answers
to the earlier ones. Read next: chat_report.py.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from emu_jax import checkpoint, tree
from emu_jax.config import UserError, from_dict
from emu_jax.data import chat_format, sources
from emu_jax.data import tokenizer as tokenizers
from emu_jax.data.documents import Document, Text
from emu_jax.data.sources import Source
from emu_jax.demo import history
from emu_jax.demo.history import Number
from emu_jax.demo.scores import plain
from emu_jax.generate import processor
from emu_jax.generate.generation_config import GenerationConfig
from emu_jax.generate.processor import Prompt
from emu_jax.generate.session import Session
from emu_jax.initial import init_from_checkpoint
from emu_jax.models import emu

# Number of questions in a batch.
BATCH = 128
# Maximum length of an answer.
NEW_TOKENS = 24
# Kind of question -> its label in the table.
KINDS = {
    "what": "what is this?",
    "number": "how many … are there?",
    "animal": "which of the two is an animal?",
    "relation": "what is … of the …?",
    "colour": "which colour is behind?",
    "there": "is there a …?",
}
Pixels = UInt8[np.ndarray, "h w 3"]


class Answered(NamedTuple):
    """A question with its true answer and the model's answers before and after tuning.

    id: that of the conversation. turn: the question's position in it, from 0. images: those in the
    question.
    """

    id: str
    turn: int
    kind: str
    question: str
    true: str
    before: str
    after: str
    images: tuple[Pixels, ...]


class Accuracy(NamedTuple):
    """A row of the table: the shares of `count` questions that are answered exactly right."""

    label: str
    count: int
    before: float
    after: float
    most_common: float


class Result(NamedTuple):
    """Everything the report shows; lines: the run's metrics.jsonl."""

    config: dict[str, Any]
    numbers: dict[str, Number]
    answers: list[Answered]
    lines: list[history.Line]


def evaluate(directory: str, data: str) -> Result:
    """Ask the run in `directory` (a workdir or a checkpoint) the questions in `data`.

    Raises UserError unless the run was tuned on conversations and started from another checkpoint.
    """
    config = checkpoint.read_config(directory)
    model_config = emu.EmuConfig.of(from_dict(config["model"]).to_dict())
    if not model_config.llama.chats or not config["init"]:
        raise UserError(
            f"the checkpoint in '{directory}' was not tuned to chat from another checkpoint "
            f"(model.llama.added={model_config.llama.added}, init={config['init']!r}); "
            "configs/demo.py:instruct trains one"
        )
    image = model_config.vision.image
    held_out = sources.open_source(f"{data}/questions:held_out", image)
    train = sources.open_source(f"{data}/questions:train", image)
    tokenizer = tokenizers.load(f"{data}/tokenizer.json", model_config.llama.vocab)
    after = jax.tree.map(jnp.asarray, checkpoint.restore_params(directory))
    # With B = 0, LoRA does nothing.
    untuned = {
        path: jnp.zeros_like(leaf) if path.endswith("/b") else leaf
        for path, leaf in tree.leaves(after)
    }
    before, _ = init_from_checkpoint(config["init"], tree.unflatten(untuned))

    def session(params: tree.Tree) -> Session:
        return Session(
            model_config,
            params,
            tokenizer,
            context=2 * config["data"]["tokens"],
            batch=BATCH,
            system=config["data"]["system"],
        )

    answers = ask(session(before), session(after), held_out)
    numbers = accuracies(answers, most_common_answers(train))
    return Result(config, numbers, answers, history.read(directory))


def ask(before: Session, after: Session, source: Source) -> list[Answered]:
    """Ask both sessions every question of a source."""
    questions: list[Answered] = []
    prompts: list[Prompt] = []
    for document in (source[i] for i in range(len(source))):
        read = Prompt()
        for number, (turn, kind) in enumerate(_turns(document)):
            parts = _question(turn)
            texts = [part for part in parts if isinstance(part, str)]
            images = [part for part in parts if not isinstance(part, str)]
            asked = after.processor.chat_turn(parts, system=None, first=number == 0)
            read = processor.concatenate(read, asked)
            prompts.append(read)
            true = _answer(turn)
            question = Answered(
                document.id, number, kind, " ".join(texts), true, "", "", tuple(images)
            )
            questions.append(question)
            answer = Prompt([*after.tokenizer.encode(true), after.tokenizer.eos])
            read = processor.concatenate(read, answer)
    options = GenerationConfig(max_new_tokens=NEW_TOKENS)
    answers_before = before.generate_texts(prompts, options, progress="before")
    answers_after = after.generate_texts(prompts, options, progress="after")
    return [
        question._replace(before=plain(answer_before), after=plain(answer_after))
        for question, answer_before, answer_after in zip(
            questions, answers_before, answers_after, strict=True
        )
    ]


def _turns(document: Document) -> list[tuple[chat_format.Turn, str]]:
    """The turns of a conversation, each with the kind of its question."""
    _, turns = chat_format.split_turns(document)
    return list(zip(turns, document.provenance["kinds"], strict=True))


def _question(turn: chat_format.Turn) -> list[str | Pixels]:
    parts: list[str | Pixels] = []
    for part in turn.question:
        if isinstance(part, Text):
            parts.append(part.text)
        else:
            # The source has decoded its images.
            assert isinstance(part.data, np.ndarray)
            parts.append(part.data)
    return parts


def _answer(turn: chat_format.Turn) -> str:
    return plain(" ".join(part.text for part in turn.answer if isinstance(part, Text)))


def most_common_answers(source: Source) -> dict[str, str]:
    """The most frequent answer to each kind of question."""
    counts: dict[str, Counter] = {}
    for document in (source[i] for i in range(len(source))):
        for turn, kind in _turns(document):
            counts.setdefault(kind, Counter())[_answer(turn)] += 1
    return {kind: answers.most_common(1)[0][0] for kind, answers in counts.items()}


def accuracies(answers: Sequence[Answered], most_common: dict[str, str]) -> dict[str, Number]:
    """Shares of exactly right answers: for all questions, later turns, and each kind."""
    groups = {"all": answers, "later_turns": [one for one in answers if one.turn]}
    for kind in KINDS:
        groups[kind] = [one for one in answers if one.kind == kind]
    numbers: dict[str, Number] = {}
    for name, some in groups.items():
        if not some:
            continue
        numbers |= {
            f"{name}_count": len(some),
            f"{name}_before": float(np.mean([one.before == one.true for one in some])),
            f"{name}_after": float(np.mean([one.after == one.true for one in some])),
            f"{name}_most_common": float(
                np.mean([most_common.get(one.kind, "") == one.true for one in some])
            ),
        }
    return numbers


def rows(numbers: dict[str, Number]) -> list[Accuracy]:
    """The accuracies as rows of a table."""
    labels = {"all": "all"} | KINDS | {"later_turns": "second and third turns"}
    fields = ("before", "after", "most_common")
    found = []
    for name, label in labels.items():
        if f"{name}_count" in numbers:
            count = int(numbers[f"{name}_count"])
            shares = (numbers[f"{name}_{field}"] for field in fields)
            found.append(Accuracy(label, count, *shares))
    return found


def table(result: Result) -> str:
    """The accuracies as a text table."""
    header = f"{'held-out questions':32}{'number':>8}{'before':>10}{'after':>10}"
    lines = [f"{header}{'most common answer':>21}"]
    for row in rows(result.numbers):
        shares = f"{row.before:>10.1%}{row.after:>10.1%}{row.most_common:>21.1%}"
        lines.append(f"{row.label:32}{row.count:>8}{shares}")
    return "\n".join(lines)
