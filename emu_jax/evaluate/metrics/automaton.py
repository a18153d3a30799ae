"""A lexer that chooses the longest match, and among equally long ones the first rule.

That is how lex and JFlex work; Python's `re` takes the first alternative that matches. The regular
expressions are compiled to one non-deterministic automaton, whose deterministic states are computed
when a text first reaches them. Read next: ptb.py.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

# Size of the alphabet, the code units of UTF-16.
UNITS = 0x10000
# Special targets of a deterministic state: no match is possible any more; not computed yet.
DEAD = -1
UNKNOWN = -2
# A set of code units.
Set = Bool[np.ndarray, "65536"]
# ((first state, last state) of a parsed part of a pattern, tokens that follow it).
Parsed = tuple[tuple[int, int], list[str]]


class Match(NamedTuple):
    """A rule that matches, and where the match ends."""

    # Number of the rule; -1 if no rule matches.
    rule: int
    # One past the last code unit, including the lookahead.
    end: int


class Automaton:
    """An automaton that matches several patterns at once.

    A pattern may contain letters, which match in either case; \\c, [a-z] and [^a-z], which match as
    written; (x), x|y, x*, x+, x?, x{2,3} and x{2}; and {name}, which stands for a pattern or a set
    of code units in `names`.
    """

    def __init__(self, patterns: Sequence[str], names: Mapping[str, str | Set]):
        self._names = names
        # The sets of code units that edges read, and the number of each set by its bytes.
        self._sets: list[Set] = []
        self._set_numbers: dict[bytes, int] = {}
        # For each state, the states that it reaches without reading a code unit.
        self._silent: list[list[int]] = []
        # For each state, (number of the set that it reads, next state), or None.
        self._edges: list[tuple[int, int] | None] = []
        # Accepting state -> number of its rule.
        self._accepts: dict[int, int] = {}
        start = self._state()
        for number, pattern in enumerate(patterns):
            first, last = self._parse(pattern)
            self._silent[start].append(first)
            self._accepts[last] = number
        # Code units that are in exactly the same sets form one class.
        packed = np.packbits(np.stack(self._sets), axis=0).T
        _, self._class_of = np.unique(packed, axis=0, return_inverse=True)
        self._class_of = self._class_of.ravel()
        members = np.zeros((len(self._sets), self._class_of.max() + 1), bool)
        for row, units in zip(members, self._sets, strict=True):
            row[self._class_of[units]] = True
        # _members[set][class]: whether the set contains the class.
        self._members = members.tolist()
        # Deterministic states are subsets of the states. Each has a number, a row of targets by
        # class, and a rule, or -1 if it does not accept.
        self._numbers: dict[frozenset[int], int] = {}
        self._subsets: list[frozenset[int]] = []
        self._rows: list[list[int]] = []
        self._rules: list[int] = []
        self._reach = [self._closure(state) for state in range(len(self._silent))]
        self._number(self._reach[start])

    def classes(self, text: str) -> list[int]:
        """The class of each code unit of a text.

        Characters beyond U+FFFF must be given as surrogates.
        """
        units = np.frombuffer(text.encode("utf-16-le", "surrogatepass"), "<u2")
        return self._class_of[units].tolist()

    def match(self, classes: Sequence[int], start: int = 0) -> Match:
        """The longest match that begins at `start`."""
        state = 0
        found = Match(-1, start)
        for position in range(start, len(classes)):
            target = self._rows[state][classes[position]]
            if target == UNKNOWN:
                target = self._compute_target(state, classes[position])
            if target == DEAD:
                break
            state = target
            if self._rules[state] >= 0:
                found = Match(self._rules[state], position + 1)
        return found

    def ends(self, classes: Sequence[int], start: int, stop: int) -> list[int]:
        """All ends, at most `stop`, of matches that begin at `start`; the largest comes first."""
        return [
            end for end in range(stop, start, -1) if self.match(classes[:end], start).end == end
        ]

    def _compute_target(self, number: int, unit_class: int) -> int:
        """Compute the deterministic state after reading a class, and store it in `_rows`."""
        reached: set[int] = set()
        for state in self._subsets[number]:
            edge = self._edges[state]
            if edge is not None and self._members[edge[0]][unit_class]:
                reached |= self._reach[edge[1]]
        target = self._number(frozenset(reached)) if reached else DEAD
        self._rows[number][unit_class] = target
        return target

    def _number(self, subset: frozenset[int]) -> int:
        """The number of a deterministic state; adds the state if it is new."""
        if subset not in self._numbers:
            self._numbers[subset] = len(self._subsets)
            self._subsets.append(subset)
            self._rows.append([UNKNOWN] * len(self._members[0]))
            rules = [self._accepts[state] for state in subset if state in self._accepts]
            self._rules.append(min(rules, default=-1))
        return self._numbers[subset]

    def _closure(self, state: int) -> frozenset[int]:
        """The states reached without reading a code unit that read or accept themselves."""
        waiting = [state]
        seen = {state}
        while waiting:
            for other in self._silent[waiting.pop()]:
                if other not in seen:
                    seen.add(other)
                    waiting.append(other)
        return frozenset(one for one in seen if self._edges[one] or one in self._accepts)

    def _state(self) -> int:
        """Add a state and return its number."""
        self._silent.append([])
        self._edges.append(None)
        return len(self._silent) - 1

    def _parse(self, pattern: str) -> tuple[int, int]:
        """Add the states of a pattern; returns (first, last)."""
        tokens = re.findall(
            r"\[\^?(?:\\.|[^\]\\])*\]|\{\w+(?:,\d+)?\}|\\u[0-9A-F]{4}|\\.|.", pattern, re.DOTALL
        )
        piece, rest = self._either(tokens)
        assert not rest, f"pattern {pattern!r}: unbalanced at {''.join(rest)!r}"
        return piece

    def _either(self, tokens: list[str]) -> Parsed:
        """Parse x|y|... and add its states."""
        first = self._state()
        last = self._state()
        while True:
            (begin, end), tokens = self._sequence(tokens)
            self._silent[first].append(begin)
            self._silent[end].append(last)
            if tokens[:1] != ["|"]:
                return (first, last), tokens
            tokens = tokens[1:]

    def _sequence(self, tokens: list[str]) -> Parsed:
        """Parse atoms with their repetitions, up to | or ), and add their states."""
        first = self._state()
        last = first
        while tokens and tokens[0] not in "|)":
            atom, tokens = self._split_atom(tokens)
            least, most, tokens = self._split_repetition(tokens)
            # Copies beyond `least` can be skipped; without a maximum, the last copy repeats.
            copies = least + 1 if most is None else most
            for copy in range(copies):
                begin, end = self._atom(atom)
                self._silent[last].append(begin)
                if copy >= least:
                    self._silent[begin].append(end)
                if most is None and copy == copies - 1:
                    self._silent[end].append(begin)
                last = end
        return (first, last), tokens

    def _split_repetition(self, tokens: list[str]) -> tuple[int, int | None, list[str]]:
        """Parse a repetition: (minimum, maximum, other tokens); (1, 1, tokens) without one."""
        if not tokens:
            return 1, 1, tokens
        counts = re.fullmatch(r"\{(\d+)(?:,(\d+))?\}", tokens[0])
        if counts:
            return int(counts[1]), int(counts[2] or counts[1]), tokens[1:]
        if tokens[0] in "*+?":
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[tokens[0]]
            return least, most, tokens[1:]
        return 1, 1, tokens

    def _split_atom(self, tokens: list[str]) -> tuple[list[str], list[str]]:
        """Split the tokens into those of the first atom and the others."""
        depth = 0
        for count, token in enumerate(tokens, 1):
            depth += (token == "(") - (token == ")")
            if not depth:
                return tokens[:count], tokens[count:]
        raise AssertionError(f"unbalanced: {''.join(tokens)!r}")

    def _atom(self, tokens: list[str]) -> tuple[int, int]:
        """Add the states of a group, a name or a set; returns (first, last)."""
        if tokens[0] == "(":
            return self._either(tokens[1:-1])[0]
        if tokens[0][0] == "{" and len(tokens[0]) > 1:
            named = self._names[tokens[0][1:-1]]
            return self._parse(named) if isinstance(named, str) else self._read(named)
        return self._read(char_set(tokens[0]))

    def _read(self, units: Set) -> tuple[int, int]:
        """Add two states with an edge that reads one of `units`; returns (first, last)."""
        key = units.tobytes()
        if key not in self._set_numbers:
            self._set_numbers[key] = len(self._sets)
            self._sets.append(units)
        first = self._state()
        last = self._state()
        self._edges[first] = (self._set_numbers[key], last)
        return first, last


def char_set(token: str) -> Set:
    """The code units that "a", "\\a", "\\u00AD", "[a-z]" or "[^a-z]" stand for.

    Letters outside brackets stand for both cases.
    """
    units = np.zeros(UNITS, bool)
    if token[0] != "[" or len(token) == 1:
        letter = chr(_unit(token))
        # A letter also matches other characters that a case conversion turns into it.
        alike = {"i": "\u0130\u0131", "k": "\u212a", "s": "\u017f"}.get(letter.lower(), "")
        for case in {letter, letter.lower(), letter.upper(), *alike}:
            if len(case) == 1:
                units[ord(case)] = True
        return units
    part = r"(\\u[0-9A-F]{4}|\\.|[^\\])"
    for low, high in re.findall(rf"{part}(?:-{part})?", token[1:-1].removeprefix("^"), re.DOTALL):
        units[_unit(low) : _unit(high or low) + 1] = True
    return ~units if token[1] == "^" else units


def _unit(text: str) -> int:
    if len(text) == 6:
        return int(text[2:], 16)
    return ord({"\\n": "\n", "\\r": "\r", "\\t": "\t", "\\f": "\f"}.get(text, text[-1]))
