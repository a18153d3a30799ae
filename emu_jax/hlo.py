"""The communication of a compiled program, read from its HLO text.

Lists every collective with its bytes, the devices it joins and how often it runs. XLA's own cost
analysis counts the body of a loop once; here a collective in a loop counts once per iteration. Read
next: fit, which reports it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple

import numpy as np

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# A reduction between TPU slices. The Megascale runtime performs it over the hosts' network; the
# program contains only the `recv` of the sum.
BETWEEN_SLICES = "between-slices"
# Bits of the two types that the pattern in `_bytes` lists by name. The width of any other type is
# the first number in its name, as in f32, s8 and f8e4m3fn.
_WIDTHS = {"pred": 8, "bf16": 16}

_NAME = r"%?([\w.\-]+)"
_COLLECTIVE = re.compile(rf"{_NAME} = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_BETWEEN_SLICES = re.compile(rf"{_NAME} = (.*?) recv\(.*_xla_megascale_target")
_CALLED = re.compile(rf"(?:body|condition|calls|to_apply|_computation)={_NAME}")
_CALLED_LIST = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")


@dataclass(frozen=True)
class Collective:
    """One collective of a program, as one device sees it."""

    # One of KINDS, or BETWEEN_SLICES.
    kind: str
    name: str
    # Bytes of the complete array: the result of a gather, the operand of a reduction.
    bytes: int
    # Groups of devices that exchange data with each other; the pairs of a permutation.
    groups: tuple[tuple[int, ...], ...]
    # Number of times that it runs in one run of the program.
    runs: int
    in_loop: bool
    # Whether it may overlap with computation.
    asynchronous: bool
    # The operation in the program's source, "jit(train_step)/..."; "" if unknown.
    source: str

    @property
    def bytes_received(self) -> float:
        """Bytes that one device receives in one run, if the devices pass data around a ring."""
        members = len(self.groups[0]) if self.groups else 1
        return self._share(members) * self.bytes

    def bytes_between(self, place: Sequence[int]) -> float:
        """The part of `bytes_received` that comes from another slice or node.

        place: the index of each device's slice or node. Assumes the best algorithm, which reduces
        within each place before the transfer, or distributes within it afterwards. For a
        permutation, this is the mean over its pairs.
        """
        if self.kind == BETWEEN_SLICES:
            return self.bytes
        # Number of places in each group.
        places = []
        for group in self.groups:
            places.append(len({place[device] for device in group}))
        if self.kind == "collective-permute":
            crossing = sum(count > 1 for count in places)
            return self.bytes * crossing / len(places)
        # The devices in one place share the transfer.
        sharing = 1 if self.kind == "all-to-all" else len(self.groups[0]) // places[0]
        return self._share(places[0]) * self.bytes / sharing

    def _share(self, n: int) -> float:
        """Share of the bytes that reaches each of n members."""
        share = {
            "all-reduce": 2 * (n - 1) / n,
            "collective-permute": 1.0,
            "collective-broadcast": float(n > 1),
            BETWEEN_SLICES: 1.0,
        }
        return share.get(self.kind, (n - 1) / n)


class Call(NamedTuple):
    """A call of one computation by another."""

    caller: str
    # How often one run of the caller makes the call.
    runs: int
    # Whether the called computation is the body of a loop.
    loop: bool


@dataclass(frozen=True)
class Module:
    """The text of a compiled HLO module (`jit(...).lower(...).compile().as_text()`)."""

    text: str

    @cached_property
    def computations(self) -> dict[str, list[str]]:
        """{name of a computation: the lines of its body}."""
        found: dict[str, list[str]] = {}
        name = None
        for line in self.text.splitlines():
            if line and not line[0].isspace() and line.endswith("{"):
                name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
                found[name] = []
            elif name and line.startswith(" "):
                found[name].append(line.strip())
        return found

    @cached_property
    def devices(self) -> int:
        """Number of devices that run the module."""
        header = self.text.partition("\n")[0]
        return prod(int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", header))

    @cached_property
    def calls(self) -> dict[str, list[Call]]:
        """{computation: every call of it by another computation}."""
        found: dict[str, list[Call]] = {name: [] for name in self.computations}
        for caller, lines in self.computations.items():
            for line in lines:
                body = re.search(rf"body={_NAME}", line)
                for name in _called(line):
                    loop = body is not None and name == body[1]
                    if name in found:
                        found[name].append(
                            Call(caller, self._trip_count(line) if loop else 1, loop)
                        )
        return found

    @cached_property
    def runs(self) -> dict[str, int]:
        """{computation: how often it runs when the program runs once}."""
        known: dict[str, int] = {}

        def count(name: str) -> int:
            if name not in known:
                calls = self.calls[name]
                known[name] = sum(count(call.caller) * call.runs for call in calls) if calls else 1
            return known[name]

        return {name: count(name) for name in self.computations}

    @cached_property
    def in_loops(self) -> set[str]:
        """Computations that run in the body of a loop, at any depth."""
        inside: set[str] = set()
        size = -1
        while size != len(inside):
            size = len(inside)
            for name, calls in self.calls.items():
                if any(call.loop or call.caller in inside for call in calls):
                    inside.add(name)
        return inside

    def _trip_count(self, line: str) -> int:
        """The number of iterations of a `while`.

        If the compiler has not noted it, take the largest constant in the loop's condition: loops
        count up from 0, and the condition compares the counter with their end.
        """
        noted = re.search(r"known_trip_count[^\d}]*(\d+)", line)
        if noted:
            return int(noted[1])
        waiting = re.findall(rf"condition={_NAME}", line)
        seen = set()
        numbers = []
        while waiting:
            name = waiting.pop()
            if name in seen or name not in self.computations:
                continue
            seen.add(name)
            for inner in self.computations[name]:
                numbers += [int(n) for n in re.findall(r"[su]\d+\[\]\S* constant\((\d+)\)", inner)]
                waiting += re.findall(rf"calls={_NAME}", inner)
        return max(numbers, default=1)

    def collectives(self) -> list[Collective]:
        """Every collective. One that the TPU compiler splits into many fusions counts once."""
        found: dict[str, Collective] = {}
        for computation, lines in self.computations.items():
            for line in lines:
                if match := _BETWEEN_SLICES.search(line):
                    found[match[1]] = self._between_slices(match, computation)
                match = _COLLECTIVE.search(line)
                if not match:
                    continue
                chain = re.search(r'chain_id="([^"]*)"', line)
                key = f"chain {chain[1]}" if chain else match[1]
                one = self._collective(match, line, computation, chained=chain is not None)
                if key not in found or found[key].runs < one.runs:
                    found[key] = one
        return list(found.values())

    def _between_slices(self, match: re.Match, computation: str) -> Collective:
        return Collective(
            kind=BETWEEN_SLICES,
            name=match[1],
            bytes=_bytes(match[2]),
            groups=(),
            runs=self.runs[computation],
            in_loop=computation in self.in_loops,
            asynchronous=True,
            source="",
        )

    def _collective(
        self, match: re.Match, line: str, computation: str, *, chained: bool
    ) -> Collective:
        name, shape, kind, start = match.groups()
        joined = tuple(map(tuple, groups(line))) or (tuple(range(self.devices)),)
        n = len(joined[0])
        size = _bytes(shape)
        if kind == "collective-permute" and start:
            # The shape is (operand, result, two counters).
            size //= 2
        elif kind in ("all-gather", "reduce-scatter") and start:
            # The shape is (operands, results), and one of them is n times the other.
            size = size * n // (n + 1)
        elif kind == "reduce-scatter":
            size *= n
        # The TPU compiler fuses an all-reduce with the slice that follows.
        if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        source = re.search(r'op_name="([^"]*)"', line)
        overlaps = chained or "async_collective_name" in line or "async" in computation
        return Collective(
            kind=kind,
            name=name,
            bytes=size,
            groups=joined,
            runs=self.runs[computation],
            in_loop=computation in self.in_loops,
            asynchronous=bool(start) or overlaps,
            source=source[1] if source else "",
        )


def groups(line: str) -> list[list[int]]:
    """The groups of devices that a collective joins, each sorted; [] if the line names none.

    Notations: replica_groups={{0,1},{2,3}}; replica_groups=[2,2]<=[4], with an optional T(1,0);
    replica_groups=mesh['data'=2,'tensor'=2] {'tensor'}, with an optional device order
    device_ids=([2,2]T(1,0)) before the brace. The groups of a permutation are its pairs:
    source_target_pairs={{0,1},{1,0}}.
    """
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\]"
        r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}",
        line,
    )
    if mesh:
        return _mesh_groups(*mesh.groups())
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if iota:
        shape, dims, order = map(_numbers, iota.groups())
        return np.sort(_iota(dims, order).reshape(shape)).tolist()
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", line)
    if listed:
        return [sorted(_numbers(part)) for part in re.findall(r"\{([\d,]+)\}", listed[1])]
    return []


def _mesh_groups(axes: str, dims: str | None, order: str | None, joined: str) -> list[list[int]]:
    """Groups of devices that differ only along the `joined` axes of a mesh.

    axes: "'data'=2,'tensor'=2"; dims and order: the device order, "2,2" and "1,0"; joined:
    "'tensor'".
    """
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    names = list(sizes)
    inner = re.findall(r"'(\w+)'", joined)
    shape = list(sizes.values())
    devices = _iota(_numbers(dims) if dims else shape, _numbers(order)).reshape(shape)
    # Put the joined axes last.
    outer_first = sorted(range(len(names)), key=lambda axis: names[axis] in inner)
    members = prod(sizes[name] for name in inner)
    return np.sort(devices.transpose(outer_first).reshape(-1, members)).tolist()


def _iota(dims: list[int], order: list[int]) -> np.ndarray:
    """0, 1, ... in the shape `dims`, transposed by `order` if it is not empty."""
    numbers = np.arange(prod(dims)).reshape(dims)
    return numbers.transpose(order) if order else numbers


def _numbers(text: str | None) -> list[int]:
    """The numbers of "1,2"; [] for None."""
    return [int(n) for n in text.split(",")] if text else []


def _called(line: str) -> list[str]:
    """Names of the computations that an instruction calls, each once."""
    names = _CALLED.findall(line)
    for part in _CALLED_LIST.findall(line):
        names += [name.lstrip("%") for name in part.split(", ")]
    return list(dict.fromkeys(names))


def _bytes(shape: str) -> int:
    """Bytes of "f32[2,3]{1,0}", or of a tuple of such shapes.

    Tokens and scalars of type u32 count 0, because they are not transferred: such a scalar is a
    counter of an asynchronous operation.
    """
    total = 0
    for name, dims in re.findall(r"\b(pred|bf16|[a-z]\d+\w*)\[([\d,]*)\]", shape):
        if name == "u32" and not dims:
            continue
        width = _WIDTHS.get(name) or int(re.findall(r"\d+", name)[0])
        total += prod(_numbers(dims)) * width // 8
    return total
