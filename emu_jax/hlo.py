"""What a compiled program says to the other devices, read from its HLO text: every collective, its
bytes, how often it runs.

XLA's own cost analysis counts a loop's body once; here a collective inside loops counts as often as
they turn. Read next: fit.py.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# of TPU slices: what a device receives from the runtime that sums for them (Megascale), over their
# hosts' network
BETWEEN_SLICES = "between-slices"
# bits; of the other types the name ends with them: f32, s8, u64, f8e4m3fn
WIDTHS = {"pred": 8, "bf16": 16}
_COLLECTIVE = re.compile(rf"%?([\w.\-]+) = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_BETWEEN = re.compile(r"%?([\w.\-]+) = (.*?) recv\(.*_xla_megascale_target")


@dataclass(frozen=True)
class Collective:
    """One collective of a program. `bytes` is the whole array on one device once: of the result of
    a gather, of the operand of a reduction. `groups` lists the devices that it joins; `times`
    counts its runs a step.
    """

    kind: str
    name: str
    bytes: int
    groups: tuple[tuple[int, ...], ...]
    times: int
    in_loop: bool
    # computing goes on meanwhile
    asynchronous: bool
    # the operation in the program's source, "jit(train_step)/..."
    source: str

    @property
    def received(self) -> float:
        """Bytes that reach one device a run, by the best algorithm there is (a ring's)."""
        return self._share(len(self.groups[0]) if self.groups else 1) * self.bytes

    def crossing(self, place: Sequence[int]) -> float:
        """Those of `received` that come from devices of another place (a slice, a node), where each
        place first reduces, or in the end spreads, among its own; `place` is each device's. Of a
        permutation, the mean over its pairs.
        """
        if self.kind == BETWEEN_SLICES:
            return self.bytes
        places = [len({place[device] for device in group}) for group in self.groups]
        if self.kind == "collective-permute":
            return self.bytes * sum(count > 1 for count in places) / len(places)
        # devices of a place share the bytes out
        alike = 1 if self.kind == "all-to-all" else len(self.groups[0]) // places[0]
        return self._share(places[0]) * self.bytes / alike

    def _share(self, n: int) -> float:
        """Of the bytes, among n devices."""
        share = {
            "all-reduce": 2 * (n - 1) / n,
            "collective-permute": 1.0,
            "collective-broadcast": float(n > 1),
            BETWEEN_SLICES: 1.0,
        }
        return share.get(self.kind, (n - 1) / n)


@dataclass(frozen=True)
class Module:
    """The text of a compiled HLO module (`jit(...).lower(...).compile().as_text()`)."""

    text: str

    @cached_property
    def computations(self) -> dict[str, list[str]]:
        """{name: its lines}."""
        found = {}
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
        """Devices that run it."""
        header = self.text[: self.text.find("\n")]
        sizes = [
            int(found[1])
            for what in ("num_partitions", "replica_count")
            if (found := re.search(rf"{what}=(\d+)", header))
        ]
        return prod(sizes)

    @cached_property
    def calls(self) -> dict[str, list[tuple[str, int, bool]]]:
        """{computation: (caller, how often one run of the caller runs it, as the body of a
        loop?)}.
        """
        found: dict[str, list[tuple[str, int, bool]]] = {name: [] for name in self.computations}
        for caller, lines in self.computations.items():
            for line in lines:
                body = re.search(r"body=%?([\w.\-]+)", line)
                for name in dict.fromkeys(
                    re.findall(r"(?:body|condition|calls|to_apply|_computation)=%?([\w.\-]+)", line)
                    + _listed(line)
                ):
                    if name in found:
                        loop = bool(body) and name == body[1]
                        found[name].append((caller, self._trips(line) if loop else 1, loop))
        return found

    def times(self, computation: str) -> int:
        """How often a computation runs when the program runs once."""
        return self._times[computation]

    @cached_property
    def _times(self) -> dict[str, int]:
        known: dict[str, int] = {}

        def of(name: str) -> int:
            if name not in known:
                callers = self.calls[name]
                known[name] = (
                    sum(of(caller) * trips for caller, trips, _ in callers) if callers else 1
                )
            return known[name]

        return {name: of(name) for name in self.computations}

    @cached_property
    def looped(self) -> set[str]:
        """Computations that run inside the body of some loop."""
        inside = {
            name for name, callers in self.calls.items() if any(loop for _, _, loop in callers)
        }
        while more := {
            name
            for name, callers in self.calls.items()
            if name not in inside and any(caller in inside for caller, _, _ in callers)
        }:
            inside |= more
        return inside

    def _trips(self, line: str) -> int:
        """How often a `while` turns: what the compiler noted, else the number that its condition
        compares with (loops count up from 0).
        """
        noted = re.search(r"known_trip_count[^\d}]*(\d+)", line)
        if noted:
            return int(noted[1])
        waiting = re.findall(r"condition=%?([\w.\-]+)", line)
        seen = set()
        numbers = []
        while waiting:
            name = waiting.pop()
            if name in seen or name not in self.computations:
                continue
            seen.add(name)
            for inner in self.computations[name]:
                numbers += [int(n) for n in re.findall(r"[su]\d+\[\]\S* constant\((\d+)\)", inner)]
                waiting += re.findall(r"calls=%?([\w.\-]+)", inner)
        return max(numbers, default=1)

    def collectives(self) -> list[Collective]:
        """Every collective, each once: one that the TPU's compiler spread over several fusions (a
        chain), too.
        """
        found: dict[str, Collective] = {}
        for name, lines in self.computations.items():
            for line in lines:
                if match := _BETWEEN.search(line):
                    found[match[1]] = Collective(
                        BETWEEN_SLICES,
                        match[1],
                        _bytes(match[2]),
                        (),
                        self.times(name),
                        name in self.looped,
                        True,
                        "",
                    )
                match = _COLLECTIVE.search(line)
                if not match:
                    continue
                chain = re.search(r'chain_id="([^"]*)"', line)
                key = f"chain {chain[1]}" if chain else match[1]
                one = self._collective(match, line, name, bool(chain))
                if key not in found or found[key].times < one.times:
                    found[key] = one
        return list(found.values())

    def _collective(
        self, match: re.Match, line: str, computation: str, chained: bool
    ) -> Collective:
        kind = match[3]
        started = bool(match[4])
        joined = tuple(map(tuple, groups(line))) or (tuple(range(self.devices)),)
        n = len(joined[0])
        size = _bytes(match[2])
        # (operand, result, two counters)
        if kind == "collective-permute" and started:
            size //= 2
        # (operands, results), one n times the other
        elif kind in ("all-gather", "reduce-scatter") and started:
            size = size * n // (n + 1)
        elif kind == "reduce-scatter":
            size *= n
        # the TPU's fusion of it with the slice that follows
        if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        source = re.search(r'op_name="([^"]*)"', line)
        behind = started or chained or "async_collective_name" in line or "async" in computation
        return Collective(
            kind,
            match[1],
            size,
            joined,
            self.times(computation),
            computation in self.looped,
            behind,
            source[1] if source else "",
        )


def groups(line: str) -> list[list[int]]:
    """The devices that a collective joins, a list of sorted lists; [] for all of them, and where
    the notation is not one of these: replica_groups={{0,1},{2,3}}, =[2,2]<=[4] (or <=[2,2]T(1,0)),
    and =mesh['data'=2,'tensor'=2] {'tensor'}, where device_ids=([2,2]T(1,0)) before the brace says
    which device is where; for a permutation, source_target_pairs={{0,1},{1,0}}, the pairs.
    """
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}",
        line,
    )
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        joined = re.findall(r"'(\w+)'", named[4])
        dims, order = (
            [int(n) for n in part.split(",")] if part else None for part in (named[2], named[3])
        )
        places = np.arange(np.prod(list(sizes.values())))
        places = (places.reshape(dims).transpose(order) if dims else places).reshape(
            list(sizes.values())
        )
        places = places.transpose(
            sorted(range(len(sizes)), key=lambda axis: list(sizes)[axis] in joined)
        )
        return np.sort(places.reshape(-1, int(np.prod([sizes[name] for name in joined])))).tolist()
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if iota:
        shape, dims, order = (
            [int(n) for n in part.split(",")] if part else None for part in iota.groups()
        )
        return np.sort(
            np.arange(np.prod(dims)).reshape(dims).transpose(order).reshape(shape)
        ).tolist()
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", line)
    return (
        [sorted(int(n) for n in part.split(",")) for part in re.findall(r"\{([\d,]+)\}", listed[1])]
        if listed
        else []
    )


def _listed(line: str) -> list[str]:
    """Computations in braces: the branches of a conditional, the computations that a call names."""
    return [
        name.lstrip("%")
        for part in re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", line)
        for name in part.split(", ")
    ]


def _bytes(shape: str) -> int:
    """Bytes of "f32[2,3]{1,0}" or of a tuple of such; counters and tokens, which go nowhere, are
    nothing.
    """
    total = 0
    for name, dims in re.findall(r"\b(pred|bf16|[a-z]\d+\w*)\[([\d,]*)\]", shape):
        if name != "u32" or dims:
            width = WIDTHS[name] if name in WIDTHS else int(re.search(r"\d+", name)[0])
            total += prod(int(n) for n in dims.split(",") if n) * width // 8
    return total
