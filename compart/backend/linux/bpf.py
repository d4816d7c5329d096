"""Classic BPF for seccomp: rules in, an array of `struct sock_filter` out; and the way back, to read and to run it.

Pure data and pure functions, no system calls: any process may use it, and all of it is tested on every system. The
facts are from seccomp(2), <linux/filter.h>, <linux/seccomp.h> and, for what the kernel accepts, bpf_check_classic() and
seccomp_check_filter().

The size of a program is what a compartment pays for it, about 0.6 µs an instruction each time one is installed. So a
program is built as a graph in which equal parts are one part, and written out so that they stay one.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from compart.backend.linux import syscalls

__all__ = [
    "ALLOW",
    "KILL_PROCESS",
    "KILL_THREAD",
    "LOG",
    "NOTIFY",
    "Action",
    "Below",
    "Condition",
    "Descriptor",
    "Equals",
    "Masked",
    "OneOf",
    "Rule",
    "Zero",
    "compile",
    "disassemble",
    "errno_",
    "interpret",
    "trap",
    "verify",
]

_WORD: Final = 0xFFFFFFFF

# ------------------------------------------------------------------------------------------------------------ answers


@dataclass(frozen=True)
class Action:
    """What the kernel does with a call: `value` is the 32-bit word that the filter returns (SECCOMP_RET_*)."""

    value: int

    def __repr__(self) -> str:
        return _action_text(self.value)


ALLOW: Final = Action(0x7FFF0000)
LOG: Final = Action(0x7FFC0000)
NOTIFY: Final = Action(0x7FC00000)
KILL_PROCESS: Final = Action(0x80000000)
KILL_THREAD: Final = Action(0x00000000)


def errno_(number: int) -> Action:
    """The call is not made and fails with `number`: 0 to 4095 (larger ones the kernel would cut to 4095)."""
    if not 0 <= number <= 4095:
        raise ValueError(f"errno {number} is not in 0..4095")
    return Action(0x00050000 | number)


def trap(data: int) -> Action:
    """The thread gets SIGSYS with `data` (16 bits) in si_errno."""
    if not 0 <= data <= 0xFFFF:
        raise ValueError(f"trap data {data} does not fit 16 bits")
    return Action(0x00030000 | data)


def _action_text(word: int) -> str:
    data = word & 0xFFFF
    match word & 0xFFFF0000:
        case 0x7FFF0000:
            return "ALLOW"
        case 0x7FFC0000:
            return "LOG"
        case 0x7FC00000:
            return "NOTIFY"
        case 0x80000000:
            return "KILL_PROCESS"
        case 0x00000000:
            return "KILL_THREAD"
        case 0x00050000:
            return f"ERRNO({data})"
        case 0x00030000:
            return f"TRAP({data})"
        case 0x7FF00000:
            return f"TRACE({data})"
        case _:
            return f"{word:#010x}"


# -------------------------------------------------------------------------------------------------------------- rules


@dataclass(frozen=True)
class Equals:
    """The argument is `value`: its low 32 bits, or with `full` all 64."""

    arg: int
    value: int
    full: bool = False

    def __post_init__(self) -> None:
        _check_argument(self.arg)
        _check_fits(self.value, 64 if self.full else 32)


@dataclass(frozen=True)
class OneOf:
    """The low 32 bits of the argument are one of `values`."""

    arg: int
    values: frozenset[int] | tuple[int, ...]

    def __post_init__(self) -> None:
        _check_argument(self.arg)
        for value in self.values:
            _check_fits(value, 32)


@dataclass(frozen=True)
class Masked:
    """`argument & mask == value`, in the low 32 bits, or with `full` in all 64."""

    arg: int
    mask: int
    value: int
    full: bool = False

    def __post_init__(self) -> None:
        _check_argument(self.arg)
        bits = 64 if self.full else 32
        _check_fits(self.mask, bits)
        _check_fits(self.value, bits)
        if (self.value & ~self.mask) & ((1 << bits) - 1):
            raise ValueError(f"no argument has {self.value:#x} under the mask {self.mask:#x}")


@dataclass(frozen=True)
class Zero:
    """All 64 bits of the argument are 0: a null pointer."""

    arg: int

    def __post_init__(self) -> None:
        _check_argument(self.arg)


@dataclass(frozen=True)
class Below:
    """The low 32 bits of the argument, unsigned, are less than `bound`."""

    arg: int
    bound: int

    def __post_init__(self) -> None:
        _check_argument(self.arg)
        if not 0 <= self.bound <= 1 << 32:
            raise ValueError(f"bound {self.bound} is not in 0..2**32")


@dataclass(frozen=True)
class Descriptor:
    """The argument is a descriptor that the compartment may use for this.

    Numbers below the program's `base` are the compartment's own and pass. A granted descriptor has a number from
    `base + width*k` on, where k (0 to 31) stands for its set of rights; it passes when k is in `ranges`, given as the
    set of those k or as a bit mask. The kernel reads a descriptor as 32 bits, so the rest of the argument is ignored;
    AT_FDCWD (0xffffff9c) is far above every range and does not pass.
    """

    arg: int
    ranges: frozenset[int] | int

    def __post_init__(self) -> None:
        _check_argument(self.arg)
        if not 0 <= self.mask <= _WORD:
            raise ValueError(f"ranges {self.ranges!r} are not in 0..31")

    @property
    def mask(self) -> int:
        """`ranges` as a bit mask."""
        if isinstance(self.ranges, int):
            return self.ranges
        if any(not 0 <= index <= 31 for index in self.ranges):
            return -1
        return sum(1 << index for index in self.ranges)


Condition = Equals | OneOf | Masked | Zero | Below | Descriptor


@dataclass(frozen=True)
class Rule:
    """What happens to the call `name`.

    `when` is any of (all of conditions); the empty conjunction always holds, no conjunction never does. Where it holds
    the answer is `then`, elsewhere `otherwise`, or the program's default if that is None. `because` is for people.
    """

    name: str
    when: tuple[tuple[Condition, ...], ...] = ((),)
    then: Action = ALLOW
    otherwise: Action | None = None
    because: str = ""


def _check_argument(arg: int) -> None:
    if not 0 <= arg <= 5:
        raise ValueError(f"a system call has arguments 0 to 5, not {arg}")


def _check_fits(value: int, bits: int) -> None:
    if not -(1 << (bits - 1)) <= value < 1 << bits:
        raise ValueError(f"{value:#x} does not fit {bits} bits")


# ------------------------------------------------------------------------------------------------------- instructions

# struct sock_filter: code, jt, jf, k. In the machine's byte order; every architecture compart knows is little-endian.
_INSTRUCTION: Final = struct.Struct("<HBBI")
_MAX_INSTRUCTIONS: Final = 4096  # BPF_MAXINSNS

# The opcodes that seccomp admits (seccomp_check_filter), named as in the manual of bpf(4).
_LD, _LD_LEN, _LD_IMM, _LD_MEM = 0x20, 0x80, 0x00, 0x60
_LDX_LEN, _LDX_IMM, _LDX_MEM = 0x81, 0x01, 0x61
_ST, _STX = 0x02, 0x03
_ADD, _SUB, _MUL, _DIV, _OR, _AND, _LSH, _RSH, _XOR = 0x04, 0x14, 0x24, 0x34, 0x44, 0x54, 0x64, 0x74, 0xA4
_NEG = 0x84
_JA, _JEQ, _JGT, _JGE, _JSET = 0x05, 0x15, 0x25, 0x35, 0x45
_RET, _RET_A = 0x06, 0x16
_TAX, _TXA = 0x07, 0x87
_WITH_X: Final = 0x08  # the operand of an ALU or jump instruction is X, not k

_ALU: Final = {
    _ADD: "add", _SUB: "sub", _MUL: "mul", _DIV: "div", _OR: "or", _AND: "and", _LSH: "lsh", _RSH: "rsh", _XOR: "xor",
}  # fmt: skip
_JUMPS: Final = {_JEQ: "jeq", _JGT: "jgt", _JGE: "jge", _JSET: "jset"}

# struct seccomp_data: int nr; u32 arch; u64 instruction_pointer; u64 args[6].
_DATA: Final = struct.Struct("<IIQ6Q")
_NR, _ARCH, _ARGS = 0, 4, 16


def _low(arg: int) -> int:
    return _ARGS + 8 * arg


def _high(arg: int) -> int:
    return _ARGS + 8 * arg + 4


# -------------------------------------------------------------------------------------------------------------- graph


class _Graph:
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
        return self._node(_RET, action.value, -1, -1)

    def step(self, code: int, k: int, then: int) -> int:
        return self._node(code, k & _WORD, then, -1)

    def test(self, code: int, k: int, yes: int, no: int) -> int:
        return yes if yes == no else self._node(code, k & _WORD, yes, no)

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
        return len(self.reachable(root))


class _Writer:
    """Writes a graph out, last instruction first, because jumps only go forward and reach 255 instructions."""

    def __init__(self, graph: _Graph) -> None:
        self._graph = graph
        self._backwards: list[tuple[int, int, int, int]] = []
        self._at: dict[int, int] = {}  # where a jump to the node can go: the node's latest copy or trampoline
        self._next = -1  # the node that would follow an instruction written now

    def write(self, root: int) -> bytes:
        for node in self._graph.reachable(root):
            self._write(node)
        # The root is the last of all that is reachable, and so the first of the program.
        return b"".join(_INSTRUCTION.pack(*instruction) for instruction in reversed(self._backwards))

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
        self._backwards.append((_JA, 0, 0, self._distance(node)))
        self._at[node] = len(self._backwards) - 1
        self._next = node


# ----------------------------------------------------------------------------------------------------------- compiler

# What the accumulator holds on the way to a node: the offset of a word of seccomp_data, or nothing that is known.
_UNKNOWN: Final = -1
_Continue = Callable[[int], int]  # what the accumulator holds -> the node to go on to


def compile(
    rules: Sequence[Rule],
    *,
    arch: int,
    default: Action,
    foreign: Action,
    base: int = 512,
    width: int = 32,
    cached: bool = False,
    number: Callable[[int, str], int | None] = syscalls.number,
) -> bytes:
    """Turn `rules` into a program for seccomp(2): an array of `struct sock_filter`, little-endian.

    Calls of another architecture than `arch` (an AUDIT_ARCH_ word), and on x86-64 numbers from X32_BIT up (x32, and
    negative ones), are answered with `foreign`; calls without a rule with `default`. Rules for calls that `number` does
    not know on `arch` are left out. `base` and `width` say where granted descriptors live, see Descriptor.

    Raises ValueError when two rules have one name, when the ranges of descriptors do not fit in an int, and when the
    program would have more than 4096 instructions.

    `cached` chooses between two ways to find the rule of a call. Both search by comparisons; by default a group of up
    to 32 neighbouring numbers is told apart by bit masks, which makes a policy's program a quarter smaller. But the
    kernel (seccomp_cache_prepare) runs a new filter on every number there is, to remember which calls it always allows,
    and gives up at the first instruction that is not a comparison or an `and`. Measured on Linux 6.18 with 238 rules:

        default   168 instructions, 40 µs to install, 15 ns more for each later call that is always allowed
        cached    219 instructions, 60 to 70 µs to install

    So the default is for a filter that one call of a function pays for, `cached` for one that is inherited by many
    processes or serves a long-running one.
    """
    if base < 1 or width < 1 or base + 32 * width > 1 << 31:
        raise ValueError(f"32 ranges of {width} descriptors from {base} on do not fit in an int")
    compiler = _Compiler(default=default, base=base, width=width)
    outcomes: dict[int, int] = {}
    names: set[str] = set()
    for rule in rules:
        if rule.name in names:
            raise ValueError(f"two rules for {rule.name}")
        names.add(rule.name)
        call = number(arch, rule.name)
        if call is not None:
            outcomes[call] = compiler.rule(rule)
    program = _Writer(compiler.graph).write(compiler.program(outcomes, arch=arch, foreign=foreign, cached=cached))
    if len(program) > _MAX_INSTRUCTIONS * _INSTRUCTION.size:
        raise ValueError(f"the rules need {len(program) // _INSTRUCTION.size} instructions, more than the kernel takes")
    return program


class _Compiler:
    """Builds the graph of one program from its ends to its beginning."""

    def __init__(self, *, default: Action, base: int, width: int) -> None:
        self.graph = _Graph()
        self._default = self.graph.answer(default)
        self._base = base
        self._width = width

    def program(self, outcomes: Mapping[int, int], *, arch: int, foreign: Action, cached: bool) -> int:
        """The whole program: `outcomes` are the nodes that calls go to, by number; the rest go to the default."""
        graph = self.graph
        stranger = graph.answer(foreign)
        runs = _runs(outcomes, self._default)
        if arch == syscalls.AUDIT_ARCH_X86_64:
            runs = _cut(runs, syscalls.X32_BIT, stranger)
        known = self._dispatch(runs, cached=cached)
        return graph.step(_LD, _ARCH, graph.test(_JEQ, arch, graph.step(_LD, _NR, known), stranger))

    def rule(self, rule: Rule) -> int:
        """Where a call of this rule goes."""
        then = self.graph.answer(rule.then)
        otherwise = self._default if rule.otherwise is None else self.graph.answer(rule.otherwise)
        known: dict[tuple[int, int, int], int] = {}

        def check(case: int, position: int, holds: int) -> int:
            if case == len(rule.when):
                return otherwise
            if position == len(rule.when[case]):
                return then
            key = (case, position, holds)
            if key not in known:
                known[key] = self._condition(
                    rule.when[case][position],
                    holds,
                    lambda holds: check(case, position + 1, holds),
                    lambda holds: check(case + 1, 0, holds),
                )
            return known[key]

        return check(0, 0, _UNKNOWN)

    def _condition(self, condition: Condition, holds: int, yes: _Continue, no: _Continue) -> int:
        """Test one condition, with the word at offset `holds` in the accumulator, and go on to `yes` or `no`."""
        match condition:
            case Equals(arg, value, full):
                return self._masked(arg, -1 if full else _WORD, value, holds, yes, no)
            case Masked(arg, mask, value, full):
                return self._masked(arg, mask if full else mask & _WORD, value, holds, yes, no)
            case Zero(arg):
                return self._masked(arg, -1, 0, holds, yes, no)
            case OneOf(arg, values):
                return self._member(_low(arg), values, holds, yes, no)
            case Below(arg, bound):
                return self._below(_low(arg), bound, holds, yes, no)
            case Descriptor(arg, _):
                return self._descriptor(_low(arg), condition.mask, holds, yes, no)

    def _masked(self, arg: int, mask: int, value: int, holds: int, yes: _Continue, no: _Continue) -> int:
        """Compare the bits of the argument that are in `mask`, the low word and then the high one."""

        def high(holds: int) -> int:
            return self._word(_high(arg), mask >> 32 & _WORD, value >> 32 & _WORD, holds, yes, no)

        return self._word(_low(arg), mask & _WORD, value & _WORD, holds, high, no)

    def _word(self, offset: int, mask: int, value: int, holds: int, yes: _Continue, no: _Continue) -> int:
        graph = self.graph
        if mask == 0:
            return yes(holds)
        if value == 0 and mask != _WORD:
            test = graph.test(_JSET, mask, no(offset), yes(offset))
        elif value == mask and mask.bit_count() == 1:
            test = graph.test(_JSET, mask, yes(offset), no(offset))
        elif mask == _WORD:
            test = graph.test(_JEQ, value, yes(offset), no(offset))
        else:
            test = graph.step(_AND, mask, graph.test(_JEQ, value, yes(_UNKNOWN), no(_UNKNOWN)))
        return self._load(offset, holds, test)

    def _below(self, offset: int, bound: int, holds: int, yes: _Continue, no: _Continue) -> int:
        if bound > _WORD:
            return yes(holds)
        if bound == 0:
            return no(holds)
        return self._load(offset, holds, self.graph.test(_JGE, bound, no(offset), yes(offset)))

    def _member(self, offset: int, values: Iterable[int], holds: int, yes: _Continue, no: _Continue) -> int:
        """Test whether the word is one of `values`, in the way that takes the fewest instructions."""
        words = {value & _WORD for value in values}
        if not words:
            return no(holds)
        graph = self.graph
        any_of, all_of = 0, _WORD
        for word in words:
            any_of |= word
            all_of &= word
        free = any_of & ~all_of
        if len(words) == 1 << free.bit_count():
            # Every combination of the free bits is a member: only the others need to be compared.
            return self._word(offset, _WORD & ~free, all_of, holds, yes, no)
        runs = _runs(dict.fromkeys(words, yes(offset)), no(offset))
        test = self._select(runs)
        lowest = min(words) if max(words) > 31 else 0
        if max(words) - lowest < 32:
            bits = sum(1 << (word - lowest) for word in words)
            node = graph.test(_JSET, bits, yes(_UNKNOWN), no(_UNKNOWN))
            node = graph.step(_TAX, 0, graph.step(_LD_IMM, 1, graph.step(_LSH | _WITH_X, 0, node)))
            # The bound comes before the shift: a shift by more than 31 is not a number that BPF promises.
            node = graph.test(_JGE, 32, no(_UNKNOWN), node)
            if lowest:
                node = graph.step(_SUB, lowest, node)
            if graph.size(node) < graph.size(test):
                test = node
        return self._load(offset, holds, test)

    def _descriptor(self, offset: int, mask: int, holds: int, yes: _Continue, no: _Continue) -> int:
        """Test a descriptor's number against the ranges of granted ones, see Descriptor."""
        graph = self.graph
        base, width = self._base, self._width
        passes = [(0, True)]  # (from this number on, what)
        for index in range(33):
            here = bool(mask >> index & 1)
            if here != passes[-1][1]:
                passes.append((base + width * index, here))
        if len(passes) - 1 <= 8:
            return self._load(offset, holds, self._search([(at, (yes if here else no)(offset)) for at, here in passes]))
        node = graph.test(_JSET, mask, yes(_UNKNOWN), no(_UNKNOWN))
        node = graph.step(_TAX, 0, graph.step(_LD_IMM, 1, graph.step(_LSH | _WITH_X, 0, node)))
        node = graph.test(_JGE, 32, no(_UNKNOWN), node)
        if width & (width - 1):
            node = graph.step(_DIV, width, node)
        elif width > 1:
            node = graph.step(_RSH, width.bit_length() - 1, node)
        node = graph.test(_JGE, base, graph.step(_SUB, base, node), yes(offset))
        return self._load(offset, holds, node)

    def _load(self, offset: int, holds: int, then: int) -> int:
        return then if holds == offset else self.graph.step(_LD, offset, then)

    def _dispatch(self, runs: list[tuple[int, int]], *, cached: bool) -> int:
        """Go to a node by the number of the call, which is in the accumulator; `runs` as for _select."""
        graph = self.graph
        plain = self._select(runs)
        if cached:
            return plain
        # X gets the bit of the number modulo 32, for the windows.
        masks = graph.step(_LD, _NR, self._select(runs, windows=True))
        prepare = ((_AND, 31), (_TAX, 0), (_LD_IMM, 1), (_LSH | _WITH_X, 0), (_TAX, 0))
        for code, k in reversed(prepare):
            masks = graph.step(code, k, masks)
        # The preparation is cheaper than the kernel's run over every number (see compile), so it is not counted.
        return masks if graph.size(masks) - len(prepare) - 1 < graph.size(plain) else plain

    def _select(self, runs: list[tuple[int, int]], *, windows: bool = False) -> int:
        """Go to a node by the word in the accumulator. `runs` are (from this word on, the node), beginning with 0."""
        segments = _segments(runs, windows=windows)
        return self._search([(s.start, self._window(s) if s.window else self._chain(s)) for s in segments])

    def _chain(self, segment: _Segment) -> int:
        node = segment.node
        for value, other in reversed(segment.exceptions):
            node = self.graph.test(_JEQ, value, other, node)
        return node

    def _window(self, segment: _Segment) -> int:
        """Test the bit of the word, which is in X, against the mask of one node after the other."""
        # The largest mask is tested first, and the default is what is left.
        masks = sorted(segment.window, key=lambda entry: (entry[0] == self._default, -entry[1].bit_count()))
        node = masks[-1][0]
        for other, mask in reversed(masks[:-1]):
            node = self.graph.test(_JSET, mask, other, node)
        return self.graph.step(_TXA, 0, node)

    def _search(self, segments: Sequence[tuple[int, int]]) -> int:
        """A balanced search: one comparison for each border between two segments."""
        if len(segments) == 1:
            return segments[0][1]
        middle = len(segments) // 2
        return self.graph.test(
            _JGE, segments[middle][0], self._search(segments[middle:]), self._search(segments[:middle])
        )


def _runs(outcomes: Mapping[int, int], default: int) -> list[tuple[int, int]]:
    """The words from 0 up as runs of one outcome: (from this word on, the node)."""
    runs = [(0, default)]
    for word in sorted(outcomes):
        _extend(runs, word, outcomes[word])
        if word < _WORD:
            _extend(runs, word + 1, default)
    return runs


def _cut(runs: list[tuple[int, int]], start: int, node: int) -> list[tuple[int, int]]:
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
class _Segment:
    """Words from `start` on that go to `node`, but for the exceptions; and the segments before it.

    Or a window of at most 32 words, in which `window` has a bit mask for each node; bit n is for the words that are n
    modulo 32.
    """

    start: int
    node: int
    exceptions: tuple[tuple[int, int], ...] = ()
    window: tuple[tuple[int, int], ...] = ()
    before: _Segment | None = None

    def all(self) -> list[_Segment]:
        """The segments from the first to this one."""
        segments: list[_Segment] = []
        segment: _Segment | None = self
        while segment is not None:
            segments.append(segment)
            segment = segment.before
        return segments[::-1]


_Grouping = tuple[int, _Segment]  # what it costs in instructions, its last segment


def _cost(grouping: _Grouping) -> int:
    return grouping[0]


def _segments(runs: list[tuple[int, int]], *, windows: bool) -> list[_Segment]:
    """Group runs so that as few instructions as possible tell them apart.

    The border between two segments costs one comparison and so does an exception (a word and the node it goes to): a
    lone call among others is cheaper as an exception than as a run of its own, which has two borders. A window costs
    one instruction and one more for each node after the first. The cheapest grouping is found from left to right: all
    that matters about what went before is the node of the open segment.
    """
    first, node = runs[0]
    still_open: dict[int, _Grouping] = {node: (0, _Segment(first, node))}
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
        following: dict[int, _Grouping] = {node: (cost + 1, _Segment(start, node, before=before))}
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
        masks[node] = masks.get(node, 0) | (bits | bits >> 32) & _WORD
        total = cost + 1 + len(masks)
        if after not in ending or total < _cost(ending[after]):
            ending[after] = (total, _Segment(start, node, window=tuple(masks.items()), before=before))


# ----------------------------------------------------------------------------------------------- reading and running


def _decode(program: bytes) -> list[tuple[int, int, int, int]]:
    if len(program) % _INSTRUCTION.size:
        raise ValueError(f"{len(program)} bytes are no whole number of instructions")
    return list(_INSTRUCTION.iter_unpack(program))


def verify(program: bytes) -> None:
    """Check `program` as the kernel does before it takes it. Raises ValueError saying what it would refuse.

    From bpf_check_classic() and seccomp_check_filter(): 1 to 4096 instructions, opcodes that seccomp admits, jumps
    forward to an instruction of the program, aligned loads within struct seccomp_data, no division by a constant 0, no
    constant shift by more than 31, scratch memory read only after it was written on every path, a return at the end.
    """
    instructions = _decode(program)
    if not 1 <= len(instructions) <= _MAX_INSTRUCTIONS:
        raise ValueError(f"{len(instructions)} instructions are not in 1..{_MAX_INSTRUCTIONS}")
    # Which words of scratch memory have been written on every path to an instruction, as far as jumps have said.
    written = [0xFFFF] * len(instructions)
    here = 0
    for at, (code, jt, jf, k) in enumerate(instructions):
        here &= written[at]
        left = len(instructions) - at - 1
        if code == _LD:
            if k % 4 or k >= _DATA.size:
                raise ValueError(f"{at}: loads from {k}, which is no word of seccomp_data")
        elif code in (_LD_MEM, _LDX_MEM, _ST, _STX):
            if k > 15:
                raise ValueError(f"{at}: scratch memory has 16 words, no word {k}")
            if code in (_ST, _STX):
                here |= 1 << k
            elif not here >> k & 1:
                raise ValueError(f"{at}: reads scratch word {k} before it was written")
        elif code == _JA:
            if k >= left:
                raise ValueError(f"{at}: jumps past the end")
            written[at + 1 + k] &= here
            here = 0xFFFF
        elif code & ~_WITH_X in _JUMPS:
            if max(jt, jf) >= left:
                raise ValueError(f"{at}: jumps past the end")
            written[at + 1 + jt] &= here
            written[at + 1 + jf] &= here
            here = 0xFFFF
        elif (code == _DIV and k == 0) or (code in (_LSH, _RSH) and k > 31):
            raise ValueError(f"{at}: {_ALU[code]} by {k}")
        elif code not in _PLAIN and code & ~_WITH_X not in _ALU:
            raise ValueError(f"{at}: no instruction has the code {code:#04x}")
    if instructions[-1][0] not in (_RET, _RET_A):
        raise ValueError("does not end in a return")


_PLAIN: Final = {_LD_LEN, _LD_IMM, _LDX_LEN, _LDX_IMM, _NEG, _RET, _RET_A, _TAX, _TXA}


def interpret(program: bytes, *, nr: int, args: Sequence[int] = (0,) * 6, arch: int, ip: int = 0) -> int:
    """Run `program` on one system call as the kernel would. Returns the SECCOMP_RET_ word.

    `args` are the six arguments, 64 bits each (negative numbers as two's complement), `ip` the instruction pointer.
    Raises ValueError for a program that verify() refuses.
    """
    verify(program)
    instructions = _decode(program)
    long = (1 << 64) - 1
    data = _DATA.pack(nr & _WORD, arch & _WORD, ip & long, *(value & long for value in args))
    a = x = 0
    memory = [0] * 16
    at = 0
    while True:
        code, jt, jf, k = instructions[at]
        at += 1
        operand = x if code & _WITH_X else k
        match code:
            case 0x20:  # ld [k]
                a = int.from_bytes(data[k : k + 4], "little")
            case 0x00:
                a = k
            case 0x80:
                a = len(data)
            case 0x60:
                a = memory[k]
            case 0x01:
                x = k
            case 0x81:
                x = len(data)
            case 0x61:
                x = memory[k]
            case 0x02:
                memory[k] = a
            case 0x03:
                memory[k] = x
            case 0x07:  # tax
                x = a
            case 0x87:  # txa
                a = x
            case 0x06:  # ret k
                return k
            case 0x16:  # ret a
                return a
            case 0x05:  # ja
                at += k
            case 0x84:  # neg
                a = -a & _WORD
            case 0x34 | 0x3C if operand == 0:
                return KILL_THREAD.value  # a division by X = 0 ends the program with 0
            case _ if code & ~_WITH_X in _JUMPS:
                at += jt if _jumps(code & ~_WITH_X, a, operand) else jf
            case _:
                a = _calculated(code & ~_WITH_X, a, operand)


def _jumps(code: int, a: int, operand: int) -> bool:
    match code:
        case 0x15:  # jeq
            return a == operand
        case 0x25:  # jgt
            return a > operand
        case 0x35:  # jge
            return a >= operand
        case _:  # jset
            return bool(a & operand)


def _calculated(code: int, a: int, operand: int) -> int:
    match code:
        case 0x04:  # add
            return (a + operand) & _WORD
        case 0x14:  # sub
            return (a - operand) & _WORD
        case 0x24:  # mul
            return (a * operand) & _WORD
        case 0x34:  # div
            return a // operand
        case 0x44:  # or
            return a | operand
        case 0x54:  # and
            return a & operand
        case 0x64:  # lsh: the kernel runs these as 32-bit operations, which take the amount modulo 32
            return (a << (operand & 31)) & _WORD
        case 0x74:  # rsh
            return a >> (operand & 31)
        case _:  # xor
            return a ^ operand


def disassemble(program: bytes) -> list[str]:
    """One readable line for each instruction, such as "   4: jge  59, 5, 9                 ; nr: execve".

    A jump names the instructions that it leads to: if it holds, if not. Where every path to it has the same word of
    seccomp_data in the accumulator, the comment says which, and names the system calls that are compared.
    """
    instructions = _decode(program)
    arch = next((k for code, _, _, k in instructions if code == _JEQ and k in _TABLES), 0)
    lines = []
    for at, ((code, jt, jf, k), known) in enumerate(zip(instructions, _knowledge(instructions), strict=True)):
        text = _instruction_text(at, code, jt, jf, k, known)
        comment = _comment(arch, code, k, known) if code & ~_WITH_X in _JUMPS else ""
        lines.append(f"{at:4}: " + (f"{text:<31}; {comment}" if comment else text))
    return lines


_TABLES: Final = (syscalls.AUDIT_ARCH_X86_64, syscalls.AUDIT_ARCH_AARCH64)

# What a register may be known to hold besides a word of seccomp_data (its offset) and _UNKNOWN.
_NR_MODULO_32, _ONE, _BIT = -2, -3, -4


@dataclass(frozen=True)
class _Known:
    """What is known before an instruction: what the registers hold, and between which bounds the call's number is."""

    a: int = _UNKNOWN
    x: int = _UNKNOWN
    low: int = 0
    high: int = _WORD

    def merge(self, other: _Known) -> _Known:
        return _Known(
            a=self.a if self.a == other.a else _UNKNOWN,
            x=self.x if self.x == other.x else _UNKNOWN,
            low=min(self.low, other.low),
            high=max(self.high, other.high),
        )

    def after(self, code: int, k: int) -> _Known:
        match code:
            case 0x20:
                return replace(self, a=k)
            case 0x00:
                return replace(self, a=_ONE if k == 1 else _UNKNOWN)
            case 0x07:
                return replace(self, x=self.a)
            case 0x87:
                return replace(self, a=self.x)
            case 0x54 if self.a == _NR and k == 31:
                return replace(self, a=_NR_MODULO_32)
            case 0x6C if self.a == _ONE and self.x == _NR_MODULO_32:
                return replace(self, a=_BIT)
            case 0x01 | 0x61 | 0x81:
                return replace(self, x=_UNKNOWN)
            case 0x02 | 0x03:
                return self
            case _:
                return replace(self, a=_UNKNOWN)


def _knowledge(instructions: list[tuple[int, int, int, int]]) -> list[_Known]:
    """What is known before each instruction, on whatever path it is reached."""
    known: list[_Known | None] = [_Known(), *(None for _ in instructions)]

    def reach(at: int, now: _Known) -> None:
        before = known[at] if at < len(known) else now
        if at < len(known):
            known[at] = now if before is None else before.merge(now)

    for at, (code, jt, jf, k) in enumerate(instructions):
        now = known[at] or _Known()
        if code == _JA:
            reach(at + 1 + k, now)
        elif code & ~_WITH_X in _JUMPS:
            low, high = (k, k - 1) if code == _JGE and now.a == _NR else (0, _WORD)
            reach(at + 1 + jt, replace(now, low=max(now.low, low)))
            reach(at + 1 + jf, replace(now, high=min(now.high, high)))
        elif code not in (_RET, _RET_A):
            reach(at + 1, now.after(code, k))
    return [now or _Known() for now in known[: len(instructions)]]


def _comment(arch: int, code: int, k: int, known: _Known) -> str:
    if known.a == _NR and code in (_JEQ, _JGE, _JGT):
        return f"nr: {'x32' if k == syscalls.X32_BIT else syscalls.name(arch, k)}"
    if known.a == _BIT and code == _JSET and known.high - known.low < 32:
        members = [number for number in range(known.low, known.high + 1) if k >> (number & 31) & 1]
        return "nr: " + " ".join(syscalls.name(arch, number) for number in members)
    return _field_text(known.a) if known.a >= 0 else ""


def _instruction_text(at: int, code: int, jt: int, jf: int, k: int, known: _Known) -> str:
    operation = code & ~_WITH_X
    value = str(k) if k < 10 or known.a in (_NR, _NR_MODULO_32) else f"{k:#x}"
    if operation in _JUMPS:
        return f"{_JUMPS[operation]:<4} {'x' if code & _WITH_X else value}, {at + 1 + jt}, {at + 1 + jf}"
    if operation in _ALU:
        return f"{_ALU[operation]:<4} {'x' if code & _WITH_X else value}"
    match code:
        case 0x20:
            return f"ld   {_field_text(k)}"
        case 0x05:
            return f"ja   {at + 1 + k}"
        case 0x06:
            return f"ret  {_action_text(k)}"
        case _ if code in _OTHERS:
            return _OTHERS[code].format(value)
        case _:
            return f"{code:#06x} {jt}, {jf}, {k:#x}"


_OTHERS: Final = {
    _LD_IMM: "ld   #{}", _LD_MEM: "ld   M[{}]", _LD_LEN: "ld   len",
    _LDX_IMM: "ldx  #{}", _LDX_MEM: "ldx  M[{}]", _LDX_LEN: "ldx  len",
    _ST: "st   M[{}]", _STX: "stx  M[{}]", _NEG: "neg", _TAX: "tax", _TXA: "txa", _RET_A: "ret  a",
}  # fmt: skip


def _field_text(offset: int) -> str:
    if offset >= _ARGS:
        return f"args[{(offset - _ARGS) // 8}].{'high' if offset % 8 else 'low'}"
    return {_NR: "nr", _ARCH: "arch", 8: "ip.low", 12: "ip.high"}.get(offset, f"[{offset}]")
