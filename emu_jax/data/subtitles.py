"""Parser of subtitles in WebVTT (a W3C standard) and SubRip (no standard).

It is our own because three common libraries each failed on some files with byte order marks, CRLF,
tags, entities or cue identifiers. Read next: sources/subtitled.py.
"""

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass

_CLOCK = r"(?:(\d{1,3}):)?(\d{1,2}):(\d{1,2})(?:[.,](\d{1,3}))?"
_TIMES = re.compile(rf"^\s*{_CLOCK}\s*-->\s*{_CLOCK}(?:\s.*)?$")
# A line that looks like the times of a cue, valid or not: times may be negative, for example.
_LIKE_TIMES = re.compile(r"^\s*-?\d[\d:.,]*\s*-->\s*-?\d[\d:.,]*(?:\s.*)?$")
# <i>, <v Bob>, <c.red>, <00:01.000>, and SubRip's {\an8}
_TAG = re.compile(r"</?[a-zA-Z](?:[^<>]*)>|<\d[\d:.]*>|\{\\[^{}]*\}")
# A time stamp inside a cue, as in rolling captions.
_KARAOKE = re.compile(r"<\d[\d:.]*>")


@dataclass(frozen=True)
class Cue:
    """A text, and the seconds when it appears and disappears."""

    start: float
    end: float
    text: str


def parse(text: str) -> list[Cue]:
    """The cues of a file, sorted by start, as plain text.

    The lines of a cue are joined by spaces. Cues without text or with invalid (negative) times are
    left out; a cue may end before it starts. In rolling captions, as on YouTube, each cue repeats
    lines of the previous one, and the repeated lines are dropped. Raises ValueError for a file
    without cues.
    """
    text = text.removeprefix("\ufeff").replace("\0", "\ufffd")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    is_vtt = lines[0].startswith("WEBVTT")
    is_rolling = bool(_KARAOKE.search(text))
    cues = []
    before: list[str] = []
    before_end = -1.0
    for start, end, block in _blocks(lines, is_vtt):
        shown = [plain for line in block if (plain := _plain(line))]
        if not shown:
            continue
        repeated = _overlap(before, shown) if is_rolling or start < before_end else 0
        before = shown
        before_end = end
        if shown[repeated:]:
            cues.append(Cue(start, end, " ".join(shown[repeated:])))
    return sorted(cues, key=lambda cue: cue.start)


def _blocks(lines: list[str], is_vtt: bool) -> Iterator[tuple[float, float, list[str]]]:
    """(start, end, lines) of every cue with valid times."""
    # Number of a line with the times of a cue -> the match of its times, or None if they are
    # invalid.
    headers: dict[int, re.Match | None] = {}
    for number, line in enumerate(lines):
        times = _TIMES.match(line)
        looks_like_times = "-->" in line if is_vtt else _LIKE_TIMES.match(line)
        if times or looks_like_times:
            headers[number] = times
    if not any(headers.values()):
        raise ValueError("no cues in the subtitles")
    for (number, times), following in zip(headers.items(), [*[*headers][1:], None]):
        if times is None:
            continue
        block = lines[number + 1 : following]
        if is_vtt:
            end_of_cue = block.index("") if "" in block else len(block)
            block = block[:end_of_cue]
        elif following is not None and block and block[-1].strip().isdigit():
            # The line before the times of the next cue may be its number, which is not text.
            block = block[:-1]
        yield _seconds(*times.groups()[:4]), _seconds(*times.groups()[4:]), block


def _overlap(before: list[str], shown: list[str]) -> int:
    """The number of lines that `shown` repeats from the end of `before`, as many as possible."""
    for count in range(min(len(before), len(shown)), 0, -1):
        if before[-count:] == shown[:count]:
            return count
    return 0


def _seconds(hours: str | None, minutes: str, seconds: str, fraction: str | None) -> float:
    return (
        int(hours or 0) * 3600
        + int(minutes) * 60
        + int(seconds)
        + int((fraction or "").ljust(3, "0")) / 1000
    )


def _plain(line: str) -> str:
    return " ".join(html.unescape(_TAG.sub("", line)).split())
