"""Cues by hand, and against the common libraries where these agree with the formats."""

import pytest
import srt
import webvtt

from emu_jax.data.subtitles import Cue, parse

VTT = """WEBVTT - a title
Kind: captions

NOTE a comment
of two lines

STYLE
::cue { color: red }

1
00:00:01.000 --> 00:00:03.000 align:start
Plain <i>tilted</i> words
second line

00:02.500 --> 00:04.000
- a
- b

named cue
01:00:00.000 --> 01:00:01.000
{curly} and 3 < 4
"""
SRT = """1
00:00:01,000 --> 00:00:02,000
<font color="red">Hi</font> there
line two

2
00:00:01,500 --> 00:00:03,000
overlapping

3
00:01:04,500 --> 00:01:06,000
last
"""


def plain(cues):
    return [(cue.start, cue.end, cue.text) for cue in cues]


@pytest.mark.parametrize(
    "change",
    [
        str,
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\n", "\r"),
    ],
)
def test_vtt_is_as_webvtt_reads_it(change):
    theirs = [(cue.start_in_seconds, " ".join(cue.text.split())) for cue in webvtt.from_string(VTT)]
    assert [(int(cue.start), cue.text) for cue in parse(change(VTT))] == theirs
    assert plain(parse(change(VTT)))[1] == (2.5, 4.0, "- a - b")


@pytest.mark.parametrize(
    "change", [str, lambda text: "\ufeff" + text, lambda text: text.replace("\n", "\r\n")]
)
def test_srt_is_as_srt_reads_it(change):
    theirs = [(cue.start.total_seconds(), cue.end.total_seconds()) for cue in srt.parse(SRT)]
    assert [(cue.start, cue.end) for cue in parse(change(SRT))] == theirs
    assert [cue.text for cue in parse(change(SRT))] == ["Hi there line two", "overlapping", "last"]


def test_entities_voices_and_karaoke():
    text = (
        "WEBVTT\n\n00:01.000 --> 00:02.000\n"
        "<v.loud Ann Bee>Tom &amp; J&eacute;r&lrm;ry<00:01.500><c.red> sing</c>\n"
    )
    assert [cue.text for cue in parse(text)] == ["Tom & Jér\u200ery sing"]


def test_srt_with_blank_lines_bad_numbers_and_short_fractions():
    text = (
        "7\n0:00:01.5 --> 00:00:02,000\nbefore\n\nafter a blank\n\n"
        "00:00:03,000 --> 00:00:04,000\n{\\an8}<b>no number\n\n9\n00:00:05,000 --> 00:00:06,000\n\n"
    )
    assert plain(parse(text)) == [(1.5, 2.0, "before after a blank"), (3.0, 4.0, "no number")]


def test_rolling_captions_count_once():
    text = (
        "WEBVTT\n\n00:00.000 --> 00:02.000\n \nhello<00:00.500><c> my</c>\n\n"
        "00:02.000 --> 00:02.010\nhello my\n \n\n"
        "00:02.010 --> 00:04.000\nhello my\ngood<00:02.500><c> friends</c>\n\n"
        "00:04.000 --> 00:04.010\ngood friends\n \n"
    )
    assert [cue.text for cue in parse(text)] == ["hello my", "good friends"]


def test_a_line_repeated_in_the_next_cue_is_kept():
    assert [
        cue.text
        for cue in parse(
            "1\n00:00:01,000 --> 00:00:02,000\nNo.\n\n2\n00:00:02,000 --> 00:00:03,000\nNo.\n"
        )
    ] == ["No.", "No."]


def test_cues_are_sorted_by_start():
    text = "1\n00:00:05,000 --> 00:00:06,000\nb\n\n2\n00:00:01,000 --> 00:00:02,000\na\n"
    assert parse(text) == [Cue(1.0, 2.0, "a"), Cue(5.0, 6.0, "b")]


def test_cues_with_malformed_times_are_left_out_with_their_text():
    text = (
        "1\n00:00:01,000 --> 00:00:02,000\na\n\n2\n-00:00:01,000 --> 00:00:02,500\nnegative\n\n"
        "3\n00:00:05,000 --> 00:00:03,000\nbackwards\n\n"
        "4\n00:00:06 --> 00:00:07\nno fraction, go --> there\n\n5\n01:09,5 --> 01:10,25\nno hours\n"
    )
    assert plain(parse(text)) == [
        (1.0, 2.0, "a"),
        (5.0, 3.0, "backwards"),
        (6.0, 7.0, "no fraction, go --> there"),
        (69.5, 70.25, "no hours"),
    ]
    vtt = "WEBVTT\n\n00:01.000 --> 00:02.000\na\nx --> 1\nb\n\n00:03.000 --> 00:04.000\nc\n"
    assert plain(parse(vtt)) == [(1.0, 2.0, "a"), (3.0, 4.0, "c")]


@pytest.mark.parametrize("text", ["", "WEBVTT\n", "hello", "1\n00:00:01 -> 00:00:02\nx"])
def test_no_cue(text):
    with pytest.raises(ValueError, match="no cue"):
        parse(text)
