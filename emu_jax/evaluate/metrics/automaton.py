"""A lexer: the longest match among rules, the first rule among equals, as lex and JFlex define it.

Regular expressions become one non-deterministic automaton, whose deterministic states are made when
a text first reaches them. Python's own `re` takes the first alternative that matches, not the
longest: it cannot say what such a lexer says. Read next: ptb.py.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

# the alphabet is UTF-16's code units
UNITS = 0x10000
DEAD = -1
UNKNOWN = -2
Set = Bool[np.ndarray, "65536"]


class Match(NamedTuple):
    # its number; -1 where no rule matches
    rule: int
    # one past the last code unit, lookahead included
    end: int


class Automaton:
    """`patterns` know: letters (in either case), \\c, [a-z], [^a-z] (cases as written), (x), x|y,
    x*, x+, x?, x{2,3}, x{2} and {name}. A name stands for the pattern in `names`, or for the set of
    code units there.
    """

    def __init__(self, patterns: Sequence[str], names: Mapping[str, str | Set]):
        self._names = names
        self._sets = []
        self._set_of = {}
        # state -> states that cost nothing to reach
        self._silent: list[list[int]] = []
        # state -> (set, target)
        self._edges: list[tuple[int, int] | None] = []
        # state -> rule
        self._accepts: dict[int, int] = {}
        start = self._state()
        for number, pattern in enumerate(patterns):
            first, last = self._parse(pattern)
            self._silent[start].append(first)
            self._accepts[last] = number
        # code units that no set tells apart are one class
        packed = np.packbits(np.stack(self._sets), axis=0).T
        _, self._class_of = np.unique(packed, axis=0, return_inverse=True)
        self._class_of = self._class_of.ravel()
        members = np.zeros((len(self._sets), self._class_of.max() + 1), bool)
        for row, units in zip(members, self._sets, strict=True):
            row[self._class_of[units]] = True
        self._members = members.tolist()
        self._numbers: dict[frozenset[int], int] = {}
        self._subsets: list[frozenset[int]] = []
        self._rows: list[list[int]] = []
        self._rules: list[int] = []
        self._reach = [self._closure(state) for state in range(len(self._silent))]
        self._number(self._reach[start])

    def classes(self, text: str) -> list[int]:
        """The class of each code unit of a text without characters beyond U+FFFF (surrogates stand
        for those).
        """
        return self._class_of[
            np.frombuffer(text.encode("utf-16-le", "surrogatepass"), "<u2")
        ].tolist()

    def match(self, classes: Sequence[int], start: int = 0) -> Match:
        """The longest match from `start` on."""
        state = 0
        found = Match(-1, start)
        for place in range(start, len(classes)):
            following = self._rows[state][classes[place]]
            if following == UNKNOWN:
                following = self._follow(state, classes[place])
            if following == DEAD:
                break
            state = following
            if self._rules[state] >= 0:
                found = Match(self._rules[state], place + 1)
        return found

    def ends(self, classes: Sequence[int], start: int, stop: int) -> list[int]:
        """Every place up to `stop` where some rule's match from `start` may end, the furthest
        first.
        """
        return [
            end for end in range(stop, start, -1) if self.match(classes[:end], start).end == end
        ]

    def _follow(self, state: int, kind: int) -> int:
        reached = {
            self._edges[one][1]
            for one in self._subsets[state]
            if self._edges[one] and self._members[self._edges[one][0]][kind]
        }
        self._rows[state][kind] = (
            self._number(frozenset().union(*(self._reach[one] for one in reached)))
            if reached
            else DEAD
        )
        return self._rows[state][kind]

    def _number(self, subset: frozenset[int]) -> int:
        if subset not in self._numbers:
            self._numbers[subset] = len(self._subsets)
            self._subsets.append(subset)
            self._rows.append([UNKNOWN] * len(self._members[0]))
            self._rules.append(
                min(
                    (self._accepts[state] for state in subset if state in self._accepts), default=-1
                )
            )
        return self._numbers[subset]

    def _closure(self, state: int) -> frozenset[int]:
        """What is reached from a state at no cost: of that, the states that read or accept."""
        waiting = [state]
        seen = {state}
        while waiting:
            for other in self._silent[waiting.pop()]:
                if other not in seen:
                    seen.add(other)
                    waiting.append(other)
        return frozenset(one for one in seen if self._edges[one] or one in self._accepts)

    def _state(self) -> int:
        self._silent.append([])
        self._edges.append(None)
        return len(self._silent) - 1

    def _parse(self, pattern: str) -> tuple[int, int]:
        """(first state, last state) of a pattern's own piece of the automaton."""
        tokens = re.findall(
            r"\[\^?(?:\\.|[^\]\\])*\]|\{\w+(?:,\d+)?\}|\\u[0-9A-F]{4}|\\.|.", pattern, re.DOTALL
        )
        piece, rest = self._either(tokens)
        assert not rest, f"pattern {pattern!r}: unbalanced at {''.join(rest)!r}"
        return piece

    def _either(self, tokens):
        first = self._state()
        last = self._state()
        while True:
            (begin, end), tokens = self._sequence(tokens)
            self._silent[first].append(begin)
            self._silent[end].append(last)
            if tokens[:1] != ["|"]:
                return (first, last), tokens
            tokens = tokens[1:]

    def _sequence(self, tokens):
        first = last = self._state()
        while tokens and tokens[0] not in "|)":
            atom, tokens = self._atom_length(tokens)
            least = 1
            most = 1
            if tokens and (counts := re.fullmatch(r"\{(\d+)(?:,(\d+))?\}", tokens[0])):
                least = int(counts[1])
                most = int(counts[2] or counts[1])
            elif tokens and tokens[0] in "*+?":
                least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[tokens[0]]
            tokens = tokens if (least, most) == (1, 1) else tokens[1:]
            for copy in range(max(least, most or least + 1)):
                (begin, end) = self._atom(atom)
                self._silent[last].append(begin)
                if copy >= least:
                    self._silent[begin].append(end)
                if most is None and copy == max(least, most or least + 1) - 1:
                    self._silent[end].append(begin)
                last = end
        return (first, last), tokens

    def _atom_length(self, tokens):
        """(the tokens of the first atom, the others)."""
        depth = 0
        for count, token in enumerate(tokens, 1):
            depth += (token == "(") - (token == ")")
            if not depth:
                return tokens[:count], tokens[count:]
        raise AssertionError(f"unbalanced: {''.join(tokens)!r}")

    def _atom(self, tokens):
        if tokens[0] == "(":
            return self._either(tokens[1:-1])[0]
        name = tokens[0][1:-1] if tokens[0][0] == "{" and len(tokens[0]) > 1 else None
        if name and isinstance(self._names[name], str):
            return self._parse(self._names[name])
        units = self._names[name] if name else char_set(tokens[0])
        key = units.tobytes()
        if key not in self._set_of:
            self._set_of[key] = len(self._sets)
            self._sets.append(units)
        first = self._state()
        last = self._state()
        self._edges[first] = (self._set_of[key], last)
        return first, last


def char_set(token: str) -> Set:
    """The code units that "a", "\\a", "\\u00AD", "[a-z]" or "[^a-z]" stand for; letters outside of
    brackets in either case.
    """
    units = np.zeros(UNITS, bool)
    if token[0] != "[" or len(token) == 1:
        one = chr(_unit(token))
        alike = {"i": "\u0130\u0131", "k": "\u212a", "s": "\u017f"}.get(one.lower(), "")
        units[[ord(case) for case in {one, one.lower(), one.upper(), *alike} if len(case) == 1]] = (
            True
        )
        return units
    part = r"(\\u[0-9A-F]{4}|\\.|[^\\])"
    for low, high in re.findall(rf"{part}(?:-{part})?", token[1:-1].removeprefix("^"), re.DOTALL):
        units[_unit(low) : _unit(high or low) + 1] = True
    return ~units if token[1] == "^" else units


def _unit(text: str) -> int:
    if len(text) == 6:
        return int(text[2:], 16)
    return ord({"\\n": "\n", "\\r": "\r", "\\t": "\t", "\\f": "\f"}.get(text, text[-1]))
