"""The inside of the compiler: a program as a graph, how to tell many numbers apart, and how to write a graph out.

Pure functions; `bpf` uses them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from compart.backend.linux.bpf_code import INSTRUCTION, WORD, Action, Op


class Graph:
    """A program as a graph of instructions in which no two are the same: equal ends of two rules are one piece of code.

    A node is a number. A step goes on to one node, a test to one of two, a return nowhere; there are no cycles because
    a node is made after those that it leads to.
    """

    def __init__(self) -> None:
        self.code: list[int] = []
        self.k: list[int] = []
        self.yes: list[int] = []  # the only successor of a step
        self.no: list[int] = []
        self._known: dict[tuple[int, int, int, int], int] = {}

    def answer(self, action: Action) -> int:
        """A return."""
        return self._node(Op.RET, action.value, -1, -1)

    def step(self, code: int, k: int, then: int) -> int:
        """An instruction that goes on to `then`."""
        return self._node(code, k & WORD, then, -1)

    def test(self, code: int, k: int, yes: int, no: int) -> int:
        """A conditional jump."""
        return yes if yes == no else self._node(code, k & WORD, yes, no)

    def _node(self, code: int, k: int, yes: int, no: int) -> int:
        key = (code, k, yes, no)
        node = self._known.get(key)
        if node is None:
            node = self._known[key] = len(self.code)
            self.code.append(code)
            self.k.append(k)
            self.yes.append(yes)
            self.no.append(no)
        return node

    def reachable(self, root: int) -> list[int]:
        """Every node from `root`, each after all that it leads to."""
        order: list[int] = []
        seen: set[int] = set()
        stack = [root]
        while stack:
            node = stack[-1]
            ahead = [n for n in (self.yes[node], self.no[node]) if n >= 0 and n not in seen]
            if node in seen or not ahead:
                stack.pop()
                if node not in seen:
                    seen.add(node)
                    order.append(node)
            else:
                stack.append(ahead[0])
        return order

    def size(self, root: int) -> int:
        """How many instructions a program from `root` has, but for the few that long jumps add."""
        return len(self.reachable(root))


class Writer:
    """Writes a graph out, last instruction first, because jumps only go forward and reach 255 instructions."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._backwards: list[tuple[int, int, int, int]] = []
        self._at: dict[int, int] = {}  # where a jump to the node can go: the node's latest copy or trampoline
        self._next = -1  # the node that would follow an instruction written now

    def write(self, root: int) -> bytes:
        """The program that begins with `root`."""
        for node in self._graph.reachable(root):
            self._write(node)
        # The root is the last of all that is reachable, and so the first of the program.
        return b"".join(INSTRUCTION.pack(*instruction) for instruction in reversed(self._backwards))

    def _write(self, node: int) -> None:
        graph = self._graph
        code, k, yes, no = graph.code[node], graph.k[node], graph.yes[node], graph.no[node]
        if no < 0 and yes < 0:
            self._put(node, (code, 0, 0, k))
        elif no < 0:
            self._follow_with(yes)
            self._put(node, (code, 0, 0, k))
        else:
            self._bring_within_reach(yes, no)
            self._put(node, (code, self._distance(yes), self._distance(no), k))

    def _put(self, node: int, instruction: tuple[int, int, int, int]) -> None:
        self._at[node] = len(self._backwards)
        self._next = node
        self._backwards.append(instruction)

    def _distance(self, node: int) -> int:
        return len(self._backwards) - self._at[node] - 1

    def _follow_with(self, node: int) -> None:
        """Make `node` what follows the next instruction: a step has no jump of its own."""
        if self._next == node:
            return
        if self._graph.yes[node] >= 0 and self._graph.no[node] < 0:
            self._trampoline(node)
        else:
            self._write(node)  # a test or a return again costs what a jump to it would, and takes one step less

    def _bring_within_reach(self, *nodes: int) -> None:
        while far := [node for node in nodes if self._distance(node) > 255]:
            if self._graph.yes[far[0]] < 0:
                self._write(far[0])
            else:
                self._trampoline(far[0])

    def _trampoline(self, node: int) -> None:
        """Write a long jump to `node`, which stands for it from here on."""
        self._backwards.append((Op.JA, 0, 0, self._distance(node)))
        self._at[node] = len(self._backwards) - 1
        self._next = node


def runs_of(outcomes: Mapping[int, int], default: int) -> list[tuple[int, int]]:
    """The words from 0 up as runs of one outcome: (from this word on, the node)."""
    runs = [(0, default)]
    for word in sorted(outcomes):
        _extend(runs, word, outcomes[word])
        if word < WORD:
            _extend(runs, word + 1, default)
    return runs


def cut(runs: list[tuple[int, int]], start: int, node: int) -> list[tuple[int, int]]:
    """The runs with everything from `start` on replaced by one."""
    kept = [run for run in runs if run[0] < start]
    _extend(kept, start, node)
    return kept


def _extend(runs: list[tuple[int, int]], start: int, node: int) -> None:
    if runs[-1][0] == start:
        runs.pop()
    if not runs or runs[-1][1] != node:
        runs.append((start, node))


@dataclass(frozen=True)
class Segment:
    """Words from `start` on that go to `node`, but for the exceptions; and the segments before it.

    Or a window of at most 32 words, in which `window` has a bit mask for each node; bit n is for the words that are n
    modulo 32.
    """

    start: int
    node: int
    exceptions: tuple[tuple[int, int], ...] = ()
    window: tuple[tuple[int, int], ...] = ()
    before: Segment | None = None

    def all(self) -> list[Segment]:
        """The segments from the first to this one."""
        segments: list[Segment] = []
        segment: Segment | None = self
        while segment is not None:
            segments.append(segment)
            segment = segment.before
        return segments[::-1]


_Grouping = tuple[int, Segment]  # what it costs in instructions, its last segment


def _cost(grouping: _Grouping) -> int:
    return grouping[0]


def segments_of(runs: list[tuple[int, int]], *, windows: bool) -> list[Segment]:
    """Group runs so that as few instructions as possible tell them apart.

    The border between two segments costs one comparison and so does an exception (a word and the node it goes to): a
    lone call among others is cheaper as an exception than as a run of its own, which has two borders. A window costs
    one instruction and one more for each node after the first. The cheapest grouping is found from left to right: all
    that matters about what went before is the node of the open segment.
    """
    first, node = runs[0]
    still_open: dict[int, _Grouping] = {node: (0, Segment(first, node))}
    ending: dict[int, _Grouping] = {}  # the cheapest grouping that ends with a window, by the run that comes after
    if windows:
        _add_windows(ending, runs, 0, None)
    for index in range(1, len(runs)):
        start, node = runs[index]
        length = runs[index + 1][0] - start if index + 1 < len(runs) else 1 << 32
        closed = min(still_open.values(), key=_cost)
        if index in ending:
            closed = min(closed, ending.pop(index), key=_cost)
        cost, before = closed
        following: dict[int, _Grouping] = {node: (cost + 1, Segment(start, node, before=before))}
        for open_node, (cost, segment) in still_open.items():
            if open_node == node:
                following[node] = min((cost, segment), following[node], key=_cost)
            elif length <= 2:
                exceptions = (*segment.exceptions, *((word, node) for word in range(start, start + length)))
                following[open_node] = (cost + length, replace(segment, exceptions=exceptions))
        if windows:
            _add_windows(ending, runs, index, closed)
        # A grouping that costs more than another by one or more is never needed: the other can open the same segment.
        cheapest = min(_cost(grouping) for grouping in following.values())
        still_open = {node: grouping for node, grouping in following.items() if grouping[0] <= cheapest}
    _, segment = min(still_open.values(), key=_cost)
    return segment.all()


def _add_windows(
    ending: dict[int, _Grouping], runs: list[tuple[int, int]], index: int, closed: _Grouping | None
) -> None:
    """Note every window that begins with the run `index`, after the grouping `closed`, if none as cheap ends there."""
    start = runs[index][0]
    cost, before = (-1, None) if closed is None else closed
    masks: dict[int, int] = {}
    for after in range(index + 1, len(runs)):
        begin, node = runs[after - 1]
        end = runs[after][0]
        if end - start > 32:
            break
        bits = (1 << (end - begin)) - 1 << (begin & 31)
        masks[node] = masks.get(node, 0) | (bits | bits >> 32) & WORD
        total = cost + 1 + len(masks)
        if after not in ending or total < _cost(ending[after]):
            ending[after] = (total, Segment(start, node, window=tuple(masks.items()), before=before))
