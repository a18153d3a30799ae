"""One benchmark, from its published files to its scores: `python -m emu_jax.evaluate --task=T
--data=DIR --checkpoint=DIR`.

Predictions are appended to a file as they come, so the same command goes on where it was stopped;
hosts take turns. Then all is scored, and written: submission.json, scores.json, report.html. Read
next: tasks.py, retrieval.py, gallery.py.
"""

import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from emu_jax import checkpoint
from emu_jax.config import UserError
from emu_jax.evaluate import annotations, gallery, prompts, retrieval, score
from emu_jax.evaluate.annotations import Example
from emu_jax.evaluate.metrics import clip_score, fid, lemmas
from emu_jax.evaluate.metrics.wordnet import WHERE, WordNet
from emu_jax.evaluate.score import Scores
from emu_jax.evaluate.tasks import TASKS, Folder, examples_of
from emu_jax.generate import diffusion_decoder, media
from emu_jax.generate.generation_config import GenerationConfig
from emu_jax.generate.processor import Prompt
from emu_jax.generate.session import Session
from emu_jax.weights import inception

# pixels of a picture on the page
SIDE = 160
# pictures that are held, for many questions are about one
KEPT = 64
SETTINGS = "settings.json"
# what only that checkpoint has
INCEPTION = "Mixed_7c/branch_pool/w"
# seed of the examples that are drawn at random
POOL = 1


@dataclass(frozen=True)
class Settings:
    """What decides a prediction: a run goes on only with the same."""

    task: str
    checkpoint: str
    step: int
    data: str
    split: str
    # examples before the question
    shots: int = 0
    # without their pictures, and the same for all questions (the paper's "zero-shot" has two)
    text_only: bool = False
    # 0: the task's own
    beams: int = 0
    ema: bool = False
    decoder: str = ""


class Plan(NamedTuple):
    # those whose picture is there
    examples: list[Example]
    # of every example's picture, by its name; of the pool's too
    paths: dict[str, Path]
    # pictures that are not there
    missing: list[str]
    # what few-shot examples are chosen from
    pool: list[Example]


class Predicted(NamedTuple):
    id: str
    # as the model said it
    said: str
    # what counts of it; VisDial: the place of each candidate
    prediction: Any
    shots: int


def plan(settings: Settings, *, limit: int | None = None, allow_missing: bool = False) -> Plan:
    """The examples of a benchmark, the first `limit` of them. Raises UserError for files or
    pictures that are missing.
    """
    task = TASKS[settings.task]
    folder = Folder(settings.data)
    wanted = examples_of(settings.task, folder, settings.split)[:limit]
    paths = {example.picture: path for example in wanted if (path := folder.picture(example))}
    missing = list(
        dict.fromkeys(example.picture for example in wanted if example.picture not in paths)
    )
    if task.kind == "image":
        # nothing is shown
        missing = []
    if missing and not allow_missing:
        raise UserError(
            f"{settings.data}: {len(missing)} of the pictures are not there: {', '.join(missing[:4])}{', ...' if missing[4:] else ''}; "
            "--allow-missing leaves their questions out"
        )
    gone = set(missing)
    examples = [example for example in wanted if example.picture not in gone]
    if not examples:
        raise UserError(
            f"{settings.data}: none of the pictures is there; they lie anywhere in it, under the names of the annotations, as "
            f"{missing[0]}"
        )
    pool: list[Example] = []
    if settings.shots:
        if not task.examples:
            raise UserError(
                f"--shots={settings.shots}: {settings.task} has no split that examples come from"
            )
        pool = [
            example
            for example in examples_of(task.fewshot or settings.task, folder, task.examples)
            if example.answers
        ]
        if not settings.text_only:
            paths |= {
                example.picture: path for example in pool if (path := folder.picture(example))
            }
            pool = [example for example in pool if example.picture in paths]
        there = len(pool) if settings.text_only else len({example.picture for example in pool})
        if there < settings.shots:
            what = "examples" if settings.text_only else "pictures of examples in the folder"
            raise UserError(
                f"--shots={settings.shots}: the split {task.examples!r} has {there} {what}"
            )
    return Plan(examples, paths, missing, pool)


class Asker:
    """Asks a model the questions of a plan."""

    def __init__(self, session: Session, settings: Settings, plan: Plan, index: Path | None = None):
        """index: where the features of the examples are kept."""
        self.session = session
        self.settings = settings
        self.plan = plan
        self.task = TASKS[settings.task]
        self.chat = session.model_config.llama.chats
        self.options = replace(self.task.options, beams=settings.beams or self.task.options.beams)
        self.frames = lru_cache(KEPT)(lambda picture: session.processor.frames(plan.paths[picture]))
        self.by_picture: dict[str, list[Example]] = {}
        for example in plan.pool:
            self.by_picture.setdefault(example.picture, []).append(example)
        self.fixed = [
            plan.pool[k]
            for k in np.random.default_rng(POOL).permutation(len(plan.pool))[: settings.shots]
        ]
        self.index = None
        if settings.shots and not settings.text_only:
            of = json.dumps([settings.checkpoint, settings.step])
            self.index = retrieval.saved(index, of, list(self.by_picture), session, self.frames)

    def predict(self, examples: Sequence[Example]) -> list[Predicted]:
        """Of so many at once."""
        if self.task.kind == "dialog":
            return [self._ranked(example) for example in examples]
        shots = self._shots(examples)
        asked = [
            self._fitting(example, some) for example, some in zip(examples, shots, strict=True)
        ]
        said = self.session.generate_texts([prompt for prompt, _ in asked], self.options)
        kept = [self.task.clean(text) for text in said]
        if self.settings.task == "vizwiz":
            sure = [self._prompt("known", example, []) for example in examples]
            known = self.session.generate_texts(
                sure,
                GenerationConfig(max_new_tokens=self.options.max_new_tokens),
                choices=prompts.KNOWN,
            )
            kept = [
                text if knows == prompts.KNOWN[0] else "unanswerable"
                for text, knows in zip(kept, known, strict=True)
            ]
        return [
            Predicted(example.id, text, keep, used)
            for example, text, keep, (_, used) in zip(examples, said, kept, asked, strict=True)
        ]

    def _shots(self, examples: Sequence[Example]) -> list[list[Example]]:
        """The examples before each question, the nearest last."""
        if self.index is None:
            return [self.fixed] * len(examples)
        features = retrieval.features(
            self.session, (self.frames(example.picture) for example in examples)
        )
        chosen = []
        for example, feature in zip(examples, features, strict=True):
            near = self.index.nearest(feature, self.settings.shots, but=example.picture)
            # of several questions about a near picture, one, always the same
            number = zlib.crc32(example.id.encode())
            chosen.append(
                [some[number % len(some)] for some in (self.by_picture[name] for name in near)]
            )
        return chosen

    def _fitting(self, example: Example, shots: list[Example]) -> tuple[Prompt, int]:
        """The prompt with as many of the examples, the nearest, as the context holds."""
        room = self.session.context - self.options.max_new_tokens
        while True:
            prompt = self._prompt(self.task.kind, example, shots)
            if len(prompt) <= room or not shots:
                return prompt, len(shots)
            shots = shots[1:]

    def _prompt(self, kind: str, example: Example, shots: list[Example]) -> Prompt:
        shown = not self.settings.text_only
        told = [
            prompts.Shot(shot.question, answer_of(shot, self.task.kind), shown) for shot in shots
        ]
        text = prompts.ask(kind, example.question, told, chat=self.chat, video=self.task.video)
        pictures = [*(shot.picture for shot in shots if shown), example.picture]
        return self.session.processor.template(text, [self.frames(picture) for picture in pictures])

    def _ranked(self, example: Example) -> Predicted:
        prompt = self.session.processor.template(
            prompts.dialog(example.history, example.question, chat=self.chat),
            [self.frames(example.picture)],
        )
        order = np.argsort(self.session.losses(prompt, example.options), kind="stable")
        ranks = np.empty(len(order), int)
        ranks[order] = np.arange(1, len(order) + 1)
        return Predicted(example.id, example.options[order[0]], ranks.tolist(), 0)


def answer_of(example: Example, kind: str) -> str:
    """What a few-shot example answers: its first caption, or the answer that most annotators
    gave.
    """
    return (
        example.answers[0].strip().removesuffix(".").lower()
        if kind == "caption"
        else Counter(example.answers).most_common(1)[0][0]
    )


def scores_of(
    settings: Settings,
    examples: Sequence[Example],
    predictions: dict[str, Any],
    *,
    wordnet: str | None = None,
    tagger: str | None = None,
    pictures: Callable[[], Scores] | None = None,
) -> Scores:
    """The numbers of a benchmark, and each example's; none of each where the split's answers are
    withheld. `pictures`: those of drawn ones.
    """
    task = TASKS[settings.task]
    counted = {"count": len(predictions)}
    if task.metric == "fid":
        return pictures()
    true = {example.id: list(example.answers) for example in examples}
    if task.metric == "judge" or not all(true.values()):
        return Scores(counted, {})
    kinds = {example.id: example.kind for example in examples}
    if task.metric == "wups":
        if tagger:
            predictions, true = score.lemmatised(WordNet(wordnet), tagger, predictions, true)
        return score.of_wups(WordNet(wordnet), predictions, true, kinds)
    if task.metric == "visdial":
        path = Folder(settings.data).find(task.marks.format(split=settings.split))
        dense = score.dense_of(str(path))[0] if path else {}
        return score.of_ranks(
            predictions,
            {key: dense[key] for key in predictions if key in dense},
            {example.id: example.truth for example in examples if example.truth is not None},
        )
    of = {"captions": score.of_captions, "vqa": score.of_vqa, "exact_match": score.of_exact_match}[
        task.metric
    ]
    whole = of(predictions, true)
    for kind in sorted(filter(None, set(kinds.values()))):
        some = [key for key in true if kinds[key] == kind]
        part = of({key: predictions[key] for key in some}, {key: true[key] for key in some}).numbers
        whole.numbers.update({f"{name}/{kind}": value for name, value in part.items()})
    return whole


def run(
    settings: Settings,
    load: Callable[[], Session],
    out: Path,
    *,
    limit: int | None = None,
    allow_missing: bool = False,
    wordnet: str | None = None,
    inception_dir: str | None = None,
    clip_dir: str | None = None,
    tagger: str | None = None,
    host: int = 0,
    hosts: int = 1,
) -> dict[str, Any]:
    """Predicts what is not predicted yet, and once all is, scores it: what scores.json says. Raises
    UserError for what the user can put right.
    """
    task = TASKS[settings.task]
    if task.metric == "wups" and not wordnet:
        raise UserError(f"--task={settings.task} needs {WHERE}")
    if task.metric == "wups":
        WordNet(wordnet)
        if tagger:
            lemmas.Tagger(tagger)
    if task.kind == "image" and not (settings.decoder and inception_dir):
        raise UserError(
            f"--task={settings.task} needs a trained decoder (--decoder=DIR) and {inception.WHERE}"
        )
    if task.kind == "image" and INCEPTION not in checkpoint.param_shapes(inception_dir):
        raise UserError(
            f"the checkpoint in '{inception_dir}' is not FID's Inception; {inception.WHERE}"
        )
    if task.kind == "image" and clip_dir:
        clip_score.check(clip_dir)
    planned = plan(settings, limit=limit, allow_missing=allow_missing)
    check_folder(settings, out)
    done = predicted(out)
    mine = planned.examples[host::hosts]
    if todo := [example for example in mine if example.id not in done]:
        done |= {
            found.id: found
            for found in _predict(settings, planned, load, out, todo, len(mine), host)
        }
    waiting = sum(example.id not in done for example in planned.examples)
    if waiting:
        return {"waiting": waiting, "count": len(planned.examples)}
    found = {example.id: done[example.id] for example in planned.examples}
    predictions = {key: one.prediction for key, one in found.items()}

    def pictures():
        return _drawn(planned, out, inception_dir, clip_dir)

    scores = scores_of(
        settings, planned.examples, predictions, wordnet=wordnet, tagger=tagger, pictures=pictures
    )
    fewer = sum(one.shots < settings.shots for one in found.values())
    told = (
        asdict(settings)
        | scores.numbers
        | {"missing_pictures": len(planned.missing)}
        | ({"fewer_shots": fewer} if settings.shots else {})
    )
    told |= {"lemmatised": bool(tagger)} if task.metric == "wups" else {}
    if fewer:
        print(f"{fewer} of {len(found)} prompts had room for fewer than {settings.shots} examples")
    write(out / "submission.json", json.dumps(task.results(predictions), ensure_ascii=False) + "\n")
    write(out / "scores.json", json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    if planned.missing:
        write(out / "missing.txt", "".join(f"{name}\n" for name in planned.missing))
    write(out / "report.html", _page(settings, planned, found, scores, told, out))
    return told


def numbers(session: Session, settings: Settings, *, limit: int) -> dict[str, float]:
    """The numbers of a benchmark's first `limit` examples, with nothing written: for evaluation
    during training.
    """
    planned = plan(settings, limit=limit)
    asker = Asker(session, settings, planned)
    found = [
        one
        for start in range(0, len(planned.examples), session.batch)
        for one in asker.predict(planned.examples[start : start + session.batch])
    ]
    scores = scores_of(
        settings, planned.examples, {one.id: one.prediction for one in found}
    ).numbers
    return {name: value for name, value in scores.items() if isinstance(value, float)}


def check_folder(settings: Settings, out: Path) -> None:
    """Raises UserError where the folder `out` holds predictions of other settings."""
    if (out / SETTINGS).exists():
        before = annotations.load(out / SETTINGS)
        now = asdict(settings)
        before = before if isinstance(before, dict) else {}
        if differ := [name for name in now if before.get(name) != now[name]]:
            raise UserError(
                f"{out} holds predictions of other settings: {differ[0]} was {before.get(differ[0])!r} and is {now[differ[0]]!r}; "
                "choose another --out"
            )


def predicted(out: Path) -> dict[str, Predicted]:
    """All that was predicted in `out`, by every host; a line that was being written when its run
    was killed does not count.
    """
    found: dict[str, Predicted] = {}
    for path in sorted(out.glob("predictions-*.jsonl")):
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break
            try:
                one = Predicted(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise UserError(
                    f"{path}: line {number} is no prediction; remove it, and it is made again"
                ) from error
            found[one.id] = one
    return found


def write(path: Path, text: str) -> None:
    """Whole or not at all. Raises UserError where it cannot be written."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def where(settings: Settings) -> Path:
    """The folder of a run's predictions, unless another is given."""
    shots = (
        f"-{settings.shots}{'-text' if settings.text_only else ''}-shot" if settings.shots else ""
    )
    return (
        checkpoint.split_step(Path(settings.checkpoint).resolve())[0]
        / "evaluate"
        / f"{settings.task}-{settings.split}{shots}-step{settings.step}"
    )


def _predict(
    settings: Settings,
    planned: Plan,
    load: Callable[[], Session],
    out: Path,
    todo: list[Example],
    total: int,
    host: int,
) -> Iterator[Predicted]:
    """Predicts and appends, a batch at a time."""
    session = load()
    write(out / SETTINGS, json.dumps(asdict(settings), indent=1) + "\n")
    ask = (
        _drawer(session, settings, out)
        if TASKS[settings.task].kind == "image"
        else Asker(session, settings, planned, out / "examples.npz").predict
    )
    path = out / f"predictions-{host}.jsonl"
    with (
        path.open("ab+") as file,
        tqdm(desc=settings.task, initial=total - len(todo), total=total, disable=None) as bar,
    ):
        _cut(file)
        for start in range(0, len(todo), session.batch):
            found = ask(todo[start : start + session.batch])
            file.write(
                "".join(
                    json.dumps(one._asdict(), ensure_ascii=False) + "\n" for one in found
                ).encode()
            )
            file.flush()
            bar.update(len(found))
            yield from found


def _cut(file: IO[bytes]) -> None:
    """The half line off the end."""
    file.seek(0)
    whole = file.read()
    file.truncate(whole.rfind(b"\n") + 1)


def _drawer(
    session: Session, settings: Settings, out: Path
) -> Callable[[Sequence[Example]], list[Predicted]]:
    """Draws captions as PNG files, each with its own seed."""
    painter = diffusion_decoder.load(
        settings.decoder,
        session.model_config,
        mesh=session.mesh,
        empty_prompt=lambda: session.generate_images([[]])[0],
    )
    folder = out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)

    def draw(examples: Sequence[Example]) -> list[Predicted]:
        visual = session.generate_images([[example.answers[0]] for example in examples])
        seeds = np.array([zlib.crc32(example.id.encode()) % 2**31 for example in examples])
        for example, picture in zip(examples, painter(visual, seeds), strict=True):
            Image.fromarray(picture).save(folder / f"{example.id}.png")
        return [Predicted(example.id, "", f"pictures/{example.id}.png", 0) for example in examples]

    return draw


def _drawn(planned: Plan, out: Path, inception_dir: str, clip_dir: str | None) -> Scores:
    """FID, and with a CLIP the score of each picture."""
    distance = {"count": len(planned.examples), "fid": _fid(planned, out, inception_dir)}
    if not clip_dir:
        return Scores(distance, {})
    pictures = {example.id: out / "pictures" / f"{example.id}.png" for example in planned.examples}
    scores = score.of_clip(
        clip_score.load(clip_dir),
        pictures,
        {example.id: example.answers for example in planned.examples},
    )
    return Scores(distance | scores.numbers, scores.each)


def _fid(planned: Plan, out: Path, inception_dir: str) -> float:
    """Of the drawn pictures, against those that the captions are of."""
    params = checkpoint.restore_params(inception_dir)
    real = [
        planned.paths[name]
        for name in dict.fromkeys(example.picture for example in planned.examples)
        if name in planned.paths
    ]
    if len(real) < 2:
        raise UserError(
            f"FID: {len(real)} of the pictures that the captions are of are there; it compares with them"
        )

    def statistics(paths, name):
        return fid.statistics(
            fid.features(params, map(_rgb, tqdm(paths, name, unit=" pictures", disable=None)))
        )

    theirs = fid.cached(
        out / f"inception-{len(real)}.npz", lambda: statistics(real, "true pictures")
    )
    return fid.distance(
        statistics(
            [out / "pictures" / f"{example.id}.png" for example in planned.examples],
            "drawn pictures",
        ),
        theirs,
    )


def _rgb(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}': {error}") from error


def _page(
    settings: Settings,
    planned: Plan,
    found: dict[str, Predicted],
    scores: Scores,
    told: dict[str, Any],
    out: Path,
) -> str:
    def shown(example: Example) -> gallery.Shown:
        one = found[example.id]
        path = (
            out / one.prediction
            if TASKS[settings.task].kind == "image"
            else planned.paths[example.picture]
        )
        image = Image.fromarray(
            media.load_video(path, SIDE)[0] if media.is_video(path) else _rgb(path)
        )
        image.thumbnail((SIDE, SIDE))
        said = one.prediction if isinstance(one.prediction, str) else one.said
        return gallery.Shown(
            np.asarray(image), example.question, said, example.answers, scores.each.get(example.id)
        )

    worst = sorted(
        (example for example in planned.examples if example.id in scores.each),
        key=lambda example: scores.each[example.id],
    )
    title = f"{settings.task}, {settings.split}: {TASKS[settings.task].what.partition(';')[0]}"
    return gallery.page(
        title,
        told,
        list(map(shown, worst[: gallery.SHOWN])),
        list(map(shown, planned.examples[: gallery.SHOWN])),
    )
