"""The lexer: the longest match, the first rule among equals, and sets of code units."""

import re

import numpy as np
import pytest

from emu_jax.evaluate.metrics.automaton import UNITS, Automaton, char_set


def match(patterns, text, start=0, **names):
    lexer = Automaton(patterns, names)
    found = lexer.match(lexer.classes(text), start)
    return found.rule, text[start : found.end]


def test_the_longest_match_wins_then_the_first_rule():
    assert match(["a", "ab", "abcd"], "abcx") == (1, "ab")
    assert match(["ab|abc", "[a-c]+"], "abc") == (0, "abc")
    assert match(["[a-z]+", "if"], "if") == (0, "if")
    assert match(["if", "[a-z]+"], "if") == (0, "if")
    assert match(["if", "[a-z]+"], "iffy") == (1, "iffy")
    assert match(["b"], "abc") == (-1, "")
    assert match(["b"], "abc", 1) == (0, "b")


def test_letters_match_in_either_case_and_brackets_as_written():
    assert match(["abc"], "aBC") == (0, "aBC")
    assert match(["[a]bc"], "ABC")[0] == -1
    assert match(["s"], "\u017f") == (0, "\u017f")


@pytest.mark.parametrize(
    ("pattern", "texts"),
    [
        ("a{2,3}b?", ["aa", "aaa", "aaab", "a", "aaaa"]),
        ("(a|b)*c", ["c", "abbac", "ab"]),
        ("x(yz)?", ["x", "xyz", "xy"]),
        (r"\(\{\u00E9", ["({\u00e9", "("]),
        ("[^a-c]+", ["xyz", "xa", "a"]),
        ("(ab){2}", ["abab", "ab"]),
    ],
)
def test_it_accepts_what_re_accepts(pattern, texts):
    lexer = Automaton([pattern], {})
    for text in texts:
        whole = lexer.match(lexer.classes(text)).end == len(text)
        assert whole == bool(re.fullmatch(pattern.replace(r"\u00E9", "\u00e9"), text)), text


def test_names_stand_for_patterns_and_sets():
    vowels = np.isin(np.arange(UNITS), [ord(letter) for letter in "aeiou"])
    assert match(["{word}!"], "oui!", V=vowels, word="{V}+") == (0, "oui!")


def test_ends_are_every_place_a_match_may_end():
    lexer = Automaton(["a+b?"], {})
    assert lexer.ends(lexer.classes("aab"), 0, 3) == [3, 2, 1]


def test_a_set_by_hand():
    assert np.flatnonzero(char_set(r"[a-c\-\u0100]")).tolist() == [45, 97, 98, 99, 0x100]
    assert (~char_set("[^x]")).sum() == 1
