"""Conversations, for instruction tuning: LLaVA, ShareGPT, Alpaca, VideoChat and Video-ChatGPT, each
in its authors' JSON.

  llava         {id, image, conversations: [{from: human|gpt, value}]}; a line "<image>" of the
  human stands for the picture sharegpt      {id, conversations (or items): [{from, value}]} alpaca
  {instruction, input, output} videochat     {video (or image), QA: [{i, q, a}]}; i, of the first,
  is the system's message videochatgpt  {q, a, video_id}, or LLaVA's form with `video` and "<video>"
A placeholder is one only where a picture belongs to it: any other "<image>" is text. Parts carry
roles. Read next: webpages.py.
"""

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
# beside the JSON, where --images names none
FOLDERS = ["images", "videos", "."]

Turn = Text | Picture


def list_shards(path: Path) -> list[InputShard]:
    """A unit a file."""
    return [InputShard(file) for file in archives.list_files(path, tables.JSONS)]


def reader(
    parse: Callable[[dict, list[archives.Files], SourceOptions, str], list[Turn]],
) -> Callable[[InputShard, SourceOptions], Iterator[Document | Skipped]]:
    """The reader of a kind whose records `parse` makes turns of; `parse` raises ValueError, in one
    line, for a record that is none.
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
                    raise ValueError("the record is no object")
                given = record.get("id")
                id = str(given) if isinstance(given, (str, int)) and given != "" else id
                parts = _checked(parse(record, places, options, id))
            except ValueError as error:
                yield Skipped(id, str(error))
            else:
                yield Document(id, tuple(parts), shard.name)

    return read_documents


def llava(
    record: dict, places: list[archives.Files], options: SourceOptions, id: str
) -> list[Turn]:
    names = record.get("image")
    names = [] if names is None else names if isinstance(names, list) else [names]
    if not all(isinstance(name, str) for name in names):
        raise ValueError("`image` is no name of a file")
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
        raise ValueError("instruction, input and output are not texts")
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
    turns: list[Turn] = (
        [Text(questions[0]["i"], role="system")] if isinstance(questions[0].get("i"), str) else []
    )
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
    # the training form names files of features
    media = _frames(name.removesuffix(".pkl"), places, options, id)
    if "conversations" in record:
        return _conversation(record["conversations"], [media], "<video>")
    return [*media, _text(record.get("q"), "user"), _text(record.get("a"), "assistant")]


def _conversation(turns: Any, media: list[list[Picture]], mark: str) -> list[Turn]:
    """The turns as parts; each of `media` stands where the user's texts say `mark` as a
    placeholder, in order, and those that no placeholder asks for stand first. Where there are as
    many marks, every mark is one.
    """
    if (
        not isinstance(turns, list)
        or not turns
        or not all(isinstance(turn, dict) for turn in turns)
    ):
        raise ValueError("no conversation")
    said: list[Text] = []
    for turn in turns:
        speaker = str(turn.get("from", turn.get("role")))
        if speaker.lower() not in ROLES:
            raise ValueError(f"an unknown speaker: {speaker[:40]!r}")
        said.append(_text(turn.get("value", turn.get("content")), ROLES[speaker.lower()]))
    anywhere = sum(text.text.count(mark) for text in said if text.role == "user") == len(media)
    parts: list[Turn] = []
    for text in said:
        for piece in (
            _pieces(text.text, mark, len(media), anywhere)
            if media and text.role == "user"
            else [text.text]
        ):
            parts += media.pop(0) if piece is None else [Text(piece.strip(), role=text.role)]
    at = next((number for number, part in enumerate(parts) if part.role == "user"), 0)
    return parts[:at] + [picture for pictures in media for picture in pictures] + parts[at:]


def _pieces(text: str, mark: str, count: int, anywhere: bool) -> list[str | None]:
    """`text` cut at its first `count` placeholders, which are None: a `mark` alone in its line, or
    with which the text begins or ends; any, if `anywhere`.
    """
    pieces: list[str | None] = []
    done = 0
    for found in re.finditer(re.escape(mark), text):
        before = text[: found.start()]
        after = text[found.end() :]
        around = (before, after, before.rpartition("\n")[2] + after.partition("\n")[0])
        if count and (anywhere or any(not piece.replace(mark, "").strip() for piece in around)):
            pieces += [text[done : found.start()], None]
            done = found.end()
            count = count - 1
    return [piece for piece in (*pieces, text[done:]) if piece is None or piece.strip()]


def _checked(parts: list[Turn]) -> list[Turn]:
    """Without empty texts; a first answer that nobody asked for and a last question that nobody
    answers are cut off.

    Raises ValueError where nothing is left, or where one speaker has two turns.
    """
    parts = [part for part in parts if isinstance(part, Picture) or part.text.strip()]
    first = next((number for number, part in enumerate(parts) if part.role == "user"), len(parts))
    parts = [part for part in parts[:first] if part.role == "system"] + parts[first:]
    while parts and parts[-1].role != "assistant":
        parts.pop()
    if not any(part.role == "user" for part in parts):
        raise ValueError("no question and answer")
    if any(one.role == other.role == "assistant" for one, other in pairwise(parts)):
        raise ValueError("the assistant speaks twice in a row")
    return parts


def _text(value: Any, role: str) -> Text:
    if not isinstance(value, str):
        raise ValueError("a turn without text")
    return Text(value.strip(), role=role)


def _fetch(name: str, places: list[archives.Files], limit: int) -> bytes:
    data = archives.fetch(name, places, limit)
    if isinstance(data, str):
        raise ValueError(data.replace("a picture whose file", f"the file '{name}'"))
    return data


def _frames(
    name: str, places: list[archives.Files], options: SourceOptions, id: str
) -> list[Picture]:
    known = name.lower().endswith(video.SUFFIXES)
    names = [name] if known else [name + suffix for suffix in video.SUFFIXES]
    name = next((one for one in names if any(one in place for place in places)), names[0])
    return [
        Picture(picture.data, "user", picture.time)
        for picture in frames(_fetch(name, places, archives.MAX_FILE), id, options)
    ]
