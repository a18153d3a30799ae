"""Subtitles: WebVTT (W3C) and SubRip (no standard: what its writers write), to cues of plain text.

The common libraries were tried on files with byte order marks, CRLF, tags, entities and cue
identifiers: each of three got some wrong, and both formats are a page. Read next:
sources/subtitled.py.
"""

import html
import re
from dataclasses import dataclass

_CLOCK = r"(?:(\d{1,3}):)?(\d{1,2}):(\d{1,2})(?:[.,](\d{1,3}))?"
_TIMES = re.compile(rf"^\s*{_CLOCK}\s*-->\s*{_CLOCK}(?:\s.*)?$")
# of a cue that is none: negative, for one
_LIKE_TIMES = re.compile(r"^\s*-?\d[\d:.,]*\s*-->\s*-?\d[\d:.,]*(?:\s.*)?$")
# <i>, <v Bob>, <c.red>, <00:01.000>, and SubRip's {\an8}
_TAG = re.compile(r"</?[a-zA-Z](?:[^<>]*)>|<\d[\d:.]*>|\{\\[^{}]*\}")
# times within a cue: captions that roll
_KARAOKE = re.compile(r"<\d[\d:.]*>")


@dataclass(frozen=True)
class Cue:
    """A text and when it is shown, in seconds."""

    start: float
    end: float
    text: str


def parse(text: str) -> list[Cue]:
    """The cues of a file, by start (equal starts in the file's order), their lines joined by a
    space, tags gone; cues without text are left out.

    A cue whose times are none (negative ones) is left out; one that ends before it starts is not.
    In captions that roll (every cue shows the line before it again, as YouTube's do) a line counts
    once. Raises ValueError for a file with no cue at all.
    """
    text = (
        text.removeprefix("\ufeff")
        .replace("\r\n", "\n")
        .replace("\r", "\n")
        .replace("\0", "\ufffd")
    )
    lines = text.split("\n")
    vtt = lines[0].startswith("WEBVTT")
    times = {
        number: found.groups() for number, line in enumerate(lines) if (found := _TIMES.match(line))
    }
    places = [
        number
        for number, line in enumerate(lines)
        if number in times or ("-->" in line if vtt else _LIKE_TIMES.match(line))
    ]
    if not times:
        raise ValueError("no cue in the subtitles")
    cues = []
    rolls = bool(_KARAOKE.search(text))
    before = []
    until = -1.0
    for place, following in zip(places, [*places[1:], None]):
        if place not in times:
            continue
        block = lines[place + 1 : following]
        if vtt:
            block = block[: next((n for n, line in enumerate(block) if not line), len(block))]
        elif following is not None and block and block[-1].strip().isdigit():
            # the number of the next cue
            block = block[:-1]
        start = _seconds(*times[place][:4])
        end = _seconds(*times[place][4:])
        shown = [plain for line in block if (plain := _plain(line))]
        fresh = shown
        if rolls or start < until:
            again = next(
                (n for n in range(min(len(before), len(shown)), 0, -1) if before[-n:] == shown[:n]),
                0,
            )
            fresh = shown[again:]
        if shown:
            before = shown
            until = end
        if fresh:
            cues.append(Cue(start, end, " ".join(fresh)))
    return sorted(cues, key=lambda cue: cue.start)


def _seconds(hours: str | None, minutes: str, seconds: str, fraction: str | None) -> float:
    return (
        int(hours or 0) * 3600
        + int(minutes) * 60
        + int(seconds)
        + int((fraction or "").ljust(3, "0")) / 1000
    )


def _plain(line: str) -> str:
    return " ".join(html.unescape(_TAG.sub("", line)).split())
