"""Conversations for instruction tuning, each kind in the JSON format of its authors.

llava: {id, image, conversations: [{from: human|gpt, value}]}; "<image>" marks the image's place.
sharegpt: {id, conversations (or items): [{from, value}]}. alpaca: {instruction, input, output}.
videochat: {video (or image), QA: [{i, q, a}]}; `i` of the first entry is the system message.
videochatgpt: {q, a, video_id}, or LLaVA's format with `video` and "<video>".
An "<image>" that no image belongs to is plain text. Read next: webpages.py.
"""

import itertools
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from emu_jax.data import video
from emu_jax.data.documents import Document, Picture, Skipped, Text
from emu_jax.data.images import MAX_BYTES
from emu_jax.data.sources import archives, tables
from emu_jax.data.sources.options import SourceOptions
from emu_jax.data.sources.tables import InputShard
from emu_jax.data.sources.videos import frames

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
}
# Without --images, media files are looked up in these folders next to the JSON file.
FOLDERS = ["images", "videos", "."]

Turn = Text | Picture


def list_shards(path: Path) -> list[InputShard]:
    """One shard per file."""
    return [InputShard(file) for file in archives.list_files(path, tables.JSONS)]


def reader(
    parse: Callable[[dict, list[archives.Files], SourceOptions, str], list[Turn]],
) -> Callable[[InputShard, SourceOptions], Iterator[Document | Skipped]]:
    """Make a `read_documents` function for a kind of conversations.

    parse: returns the turns of one record, or raises a one-line ValueError.
    """

    def read_documents(shard: InputShard, options: SourceOptions) -> Iterator[Document | Skipped]:
        places = archives.media_archives(options.images, shard.path.parent, FOLDERS)
        for number, record in tables.json_records(shard.path):
            id = f"{shard.name}:{number}"
            if isinstance(record, Skipped):
                yield record
                continue
            try:
                if not isinstance(record, dict):
                    raise ValueError("record is not an object")
                given = record.get("id")
                id = str(given) if isinstance(given, (str, int)) and given != "" else id
                parts = _trim(parse(record, places, options, id))
            except ValueError as error:
                yield Skipped(id, str(error))
            else:
                yield Document(id, tuple(parts), shard.name)

    return read_documents


def llava(
    record: dict, places: list[archives.Files], options: SourceOptions, id: str
) -> list[Turn]:
    names = record.get("image", [])
    if names is None:
        names = []
    elif not isinstance(names, list):
        names = [names]
    if not all(isinstance(name, str) for name in names):
        raise ValueError("`image` is not a file name")
    media = [[Picture(_fetch(name, places, MAX_BYTES), "user")] for name in names]
    return _conversation(record.get("conversations"), media, "<image>")


def sharegpt(
    record: dict, places: list[archives.Files], options: SourceOptions, id: str
) -> list[Turn]:
    return _conversation(record.get("conversations", record.get("items")), [], "")


def alpaca(
    record: dict, places: list[archives.Files], options: SourceOptions, id: str
) -> list[Turn]:
    fields = [record.get(name, "") or "" for name in ("instruction", "input", "output")]
    if not all(isinstance(text, str) for text in fields):
        raise ValueError("instruction, input and output must be text")
    instruction, given, output = (text.strip() for text in fields)
    return [
        Text(f"{instruction}\n{given}" if given else instruction, role="user"),
        Text(output, role="assistant"),
    ]


def videochat(
    record: dict, places: list[archives.Files], options: SourceOptions, id: str
) -> list[Turn]:
    questions = record.get("QA")
    if (
        not isinstance(questions, list)
        or not questions
        or not all(isinstance(one, dict) for one in questions)
    ):
        raise ValueError("no QA")
    turns: list[Turn] = []
    if isinstance(questions[0].get("i"), str):
        turns.append(Text(questions[0]["i"], role="system"))
    if isinstance(record.get("video"), str):
        turns += _frames(record["video"], places, options, id)
    elif isinstance(record.get("image"), str):
        turns.append(Picture(_fetch(record["image"], places, MAX_BYTES), "user"))
    else:
        raise ValueError("no video")
    for one in questions:
        turns += [_text(one.get("q"), "user"), _text(one.get("a"), "assistant")]
    return turns


def videochatgpt(
    record: dict, places: list[archives.Files], options: SourceOptions, id: str
) -> list[Turn]:
    name = record.get("video_id", record.get("video"))
    if not isinstance(name, str):
        raise ValueError("no video")
    # The published training data names files of features, VIDEO.pkl, where the video is meant.
    media = _frames(name.removesuffix(".pkl"), places, options, id)
    if "conversations" in record:
        return _conversation(record["conversations"], [media], "<video>")
    return [*media, _text(record.get("q"), "user"), _text(record.get("a"), "assistant")]


def _conversation(turns: Any, media: list[list[Picture]], mark: str) -> list[Turn]:
    """The turns as parts, with `media` in place of the `mark`s in the user's texts.

    If there are as many marks as media, every mark is a placeholder; otherwise only those that
    stand alone (_split_at_marks). Media without a placeholder come before the first question.
    """
    if (
        not isinstance(turns, list)
        or not turns
        or not all(isinstance(turn, dict) for turn in turns)
    ):
        raise ValueError("no conversation")
    texts = [_turn_text(turn) for turn in turns]
    marks = sum(text.text.count(mark) for text in texts if text.role == "user")
    anywhere = marks == len(media)
    parts: list[Turn] = []
    # The media that have not been placed so far.
    left = list(media)
    for text in texts:
        if not left or text.role != "user":
            parts.append(Text(text.text.strip(), role=text.role))
            continue
        for piece in _split_at_marks(text.text, mark, len(left), anywhere):
            if piece is None:
                parts += left.pop(0)
            else:
                parts.append(Text(piece.strip(), role=text.role))
    first = next((number for number, part in enumerate(parts) if part.role == "user"), 0)
    return [*parts[:first], *itertools.chain.from_iterable(left), *parts[first:]]


def _turn_text(turn: dict) -> Text:
    speaker = str(turn.get("from", turn.get("role")))
    if speaker.lower() not in ROLES:
        raise ValueError(f"unknown speaker {speaker[:40]!r}")
    return _text(turn.get("value", turn.get("content")), ROLES[speaker.lower()])


def _split_at_marks(text: str, mark: str, count: int, anywhere: bool) -> list[str | None]:
    """Split `text` at its first `count` placeholders, each of which becomes None.

    A placeholder is a `mark` that is alone on its line or at the start or end of the text; with
    `anywhere`, any mark is.
    """
    pieces: list[str | None] = []
    done = 0
    for found in re.finditer(re.escape(mark), text):
        before = text[: found.start()]
        after = text[found.end() :]
        line = before.rpartition("\n")[2] + after.partition("\n")[0]
        stands_apart = any(not rest.replace(mark, "").strip() for rest in (before, after, line))
        if count and (anywhere or stands_apart):
            pieces += [text[done : found.start()], None]
            done = found.end()
            count -= 1
    pieces.append(text[done:])
    return [piece for piece in pieces if piece is None or piece.strip()]


def _trim(parts: list[Turn]) -> list[Turn]:
    """Drop empty texts, answers before the first question, and unanswered last questions.

    Raises ValueError if nothing is left, or if two assistant turns follow each other.
    """
    parts = [part for part in parts if isinstance(part, Picture) or part.text.strip()]
    first = next((number for number, part in enumerate(parts) if part.role == "user"), len(parts))
    system = [part for part in parts[:first] if part.role == "system"]
    parts = system + parts[first:]
    while parts and parts[-1].role != "assistant":
        parts.pop()
    if not any(part.role == "user" for part in parts):
        raise ValueError("no question and answer")
    if any(one.role == other.role == "assistant" for one, other in pairwise(parts)):
        raise ValueError("two assistant turns in a row")
    return parts


def _text(value: Any, role: str) -> Text:
    if not isinstance(value, str):
        raise ValueError("turn without text")
    return Text(value.strip(), role=role)


def _fetch(name: str, places: list[archives.Files], limit: int) -> bytes:
    found = archives.find_file(name, places)
    if found is None:
        raise ValueError(f"file '{name}' is missing")
    archive, inside = found
    try:
        return archive.read(inside, limit)
    except ValueError as error:
        raise ValueError(f"file cannot be read: {error}") from error


def _frames(
    name: str, places: list[archives.Files], options: SourceOptions, id: str
) -> list[Picture]:
    known = name.lower().endswith(video.SUFFIXES)
    names = [name] if known else [name + suffix for suffix in video.SUFFIXES]
    present = [one for place in places for one in names if one in place]
    name = min(present, key=names.index, default=names[0])
    return [
        Picture(picture.data, "user", picture.time)
        for picture in frames(_fetch(name, places, archives.MAX_FILE), id, options)
    ]
