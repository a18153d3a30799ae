"""Streamed text is never taken back, however tokens cut the bytes of a character."""

import pytest

from emu_jax.generate.stream import TextStream, truncate_at_stop


def decode(ids):
    return bytes(ids).decode("utf-8", errors="replace")


def pieces(text, stop=()):
    out = TextStream(decode, stop)
    found = []
    for byte in text.encode() if isinstance(text, str) else text:
        found.append(out.push(byte))
        if out.stopped:
            break
    return [*found, out.finish()]


@pytest.mark.parametrize("text", ["a dog", "naïve café", "日本語", "👩‍👧 and 🐕", ""])
def test_characters_of_several_bytes(text):
    found = pieces(text)
    assert "".join(found) == text
    assert not any("\ufffd" in piece for piece in found)


def test_bytes_that_are_no_character_come_at_the_end():
    assert "".join(pieces(b"a\xe6\x97")) == decode(b"a\xe6\x97")
    assert "".join(pieces(b"\xff\xff\xff\xff\xffz")) == decode(b"\xff\xff\xff\xff\xffz")


def test_a_stop_text_is_never_shown():
    assert "".join(pieces("one. two\nthree", (". ", "\n"))) == "one"
    assert "".join(pieces("a..b", (".b",))) == "a."
    # Text is held back until it cannot be the beginning of a stop string.
    assert pieces("ab", ("bc",)) == ["a", "", "b"]
    assert (
        truncate_at_stop("a\nb. c", (". ", "\n")) == "a"
        and truncate_at_stop("abc", ("x",)) == "abc"
    )
