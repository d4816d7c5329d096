"""Rules for system calls, compiled to a filter for seccomp(2).

Pure data and pure functions, no system calls: any process may use it, and all of it is tested on every system. What a
program means and how to read and run one is in `bpf_code`; its public names are here too.

A compartment pays for the size of its program each time one is installed, so a program is built as a graph in which
equal parts are one part, and written out so that they stay one (`bpf_graph`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from compart.backend.linux import syscalls
from compart.backend.linux.bpf_code import (
    ALLOW,
    ARCH,
    INSTRUCTION,
    KILL_PROCESS,
    KILL_THREAD,
    LOG,
    MAX_INSTRUCTIONS,
    NOTIFY,
    NR,
    WITH_X,
    WORD,
    Action,
    Op,
    disassemble,
    errno_,
    high_word,
    interpret,
    low_word,
    trap,
    verify,
)
from compart.backend.linux.bpf_graph import Graph, Segment, Writer, cut, runs_of, segments_of

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
        if not 0 <= self.mask <= WORD:
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


# ------------------------------------------------------------------------------------------------------------ compiling


# What the accumulator holds on the way to a node: the offset of a word of seccomp_data, or nothing that is known.
_UNKNOWN = -1
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

    `cached` chooses how the rule of a call is found. Both ways search by comparisons; by default, groups of up to 32
    neighbouring numbers are then told apart by bit masks, which makes a policy's program a quarter smaller. But to
    remember which calls are always allowed, the kernel (seccomp_cache_prepare) runs a new filter on every number there
    is, and it gives up at the first instruction that is not a load, a comparison or an `and`: with masks, at once.
    Measured on Linux 6.18, x86-64, with 238 rules (installing a program of one instruction takes 16 µs):

        default   168 instructions, 40 µs to install, and each later call that is always allowed takes 15 ns more
        cached    219 instructions, 60 to 70 µs to install

    So the default is for a filter that one call of a function pays for, `cached` for one that many processes inherit or
    that serves a long-running one.
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
    program = Writer(compiler.graph).write(compiler.program(outcomes, arch=arch, foreign=foreign, cached=cached))
    if len(program) > MAX_INSTRUCTIONS * INSTRUCTION.size:
        raise ValueError(f"the rules need {len(program) // INSTRUCTION.size} instructions, more than the kernel takes")
    return program


class _Compiler:
    """Builds the graph of one program from its ends to its beginning."""

    def __init__(self, *, default: Action, base: int, width: int) -> None:
        self.graph = Graph()
        self._default = self.graph.answer(default)
        self._base = base
        self._width = width

    def program(self, outcomes: Mapping[int, int], *, arch: int, foreign: Action, cached: bool) -> int:
        """The whole program: `outcomes` are the nodes that calls go to, by number; the rest go to the default."""
        graph = self.graph
        stranger = graph.answer(foreign)
        runs = runs_of(outcomes, self._default)
        if arch == syscalls.AUDIT_ARCH_X86_64:
            runs = cut(runs, syscalls.X32_BIT, stranger)
        known = self._dispatch(runs, cached=cached)
        return graph.step(Op.LD, ARCH, graph.test(Op.JEQ, arch, graph.step(Op.LD, NR, known), stranger))

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
                return self._masked(arg, -1 if full else WORD, value, holds, yes, no)
            case Masked(arg, mask, value, full):
                return self._masked(arg, mask if full else mask & WORD, value, holds, yes, no)
            case Zero(arg):
                return self._masked(arg, -1, 0, holds, yes, no)
            case OneOf(arg, values):
                return self._member(low_word(arg), values, holds, yes, no)
            case Below(arg, bound):
                return self._below(low_word(arg), bound, holds, yes, no)
            case Descriptor(arg, _):
                return self._descriptor(low_word(arg), condition.mask, holds, yes, no)

    def _masked(self, arg: int, mask: int, value: int, holds: int, yes: _Continue, no: _Continue) -> int:
        """Compare the bits of the argument that are in `mask`, the low word and then the high one."""

        def high(holds: int) -> int:
            return self._word(high_word(arg), mask >> 32 & WORD, value >> 32 & WORD, holds, yes, no)

        return self._word(low_word(arg), mask & WORD, value & WORD, holds, high, no)

    def _word(self, offset: int, mask: int, value: int, holds: int, yes: _Continue, no: _Continue) -> int:
        graph = self.graph
        if mask == 0:
            return yes(holds)
        if value == 0 and mask != WORD:
            test = graph.test(Op.JSET, mask, no(offset), yes(offset))
        elif value == mask and mask.bit_count() == 1:
            test = graph.test(Op.JSET, mask, yes(offset), no(offset))
        elif mask == WORD:
            test = graph.test(Op.JEQ, value, yes(offset), no(offset))
        else:
            test = graph.step(Op.AND, mask, graph.test(Op.JEQ, value, yes(_UNKNOWN), no(_UNKNOWN)))
        return self._load(offset, holds, test)

    def _below(self, offset: int, bound: int, holds: int, yes: _Continue, no: _Continue) -> int:
        if bound > WORD:
            return yes(holds)
        if bound == 0:
            return no(holds)
        return self._load(offset, holds, self.graph.test(Op.JGE, bound, no(offset), yes(offset)))

    def _member(self, offset: int, values: Iterable[int], holds: int, yes: _Continue, no: _Continue) -> int:
        """Test whether the word is one of `values`, in the way that takes the fewest instructions."""
        words = {value & WORD for value in values}
        if not words:
            return no(holds)
        graph = self.graph
        any_of, all_of = 0, WORD
        for word in words:
            any_of |= word
            all_of &= word
        free = any_of & ~all_of
        if len(words) == 1 << free.bit_count():
            # Every combination of the free bits is a member: only the others need to be compared.
            return self._word(offset, WORD & ~free, all_of, holds, yes, no)
        runs = runs_of(dict.fromkeys(words, yes(offset)), no(offset))
        test = self._select(runs)
        lowest = min(words) if max(words) > 31 else 0
        if max(words) - lowest < 32:
            bits = sum(1 << (word - lowest) for word in words)
            node = graph.test(Op.JSET, bits, yes(_UNKNOWN), no(_UNKNOWN))
            node = graph.step(Op.TAX, 0, graph.step(Op.LD_IMM, 1, graph.step(Op.LSH | WITH_X, 0, node)))
            # The bound comes before the shift: a shift by more than 31 is not a number that BPF promises.
            node = graph.test(Op.JGE, 32, no(_UNKNOWN), node)
            if lowest:
                node = graph.step(Op.SUB, lowest, node)
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
        node = graph.test(Op.JSET, mask, yes(_UNKNOWN), no(_UNKNOWN))
        node = graph.step(Op.TAX, 0, graph.step(Op.LD_IMM, 1, graph.step(Op.LSH | WITH_X, 0, node)))
        node = graph.test(Op.JGE, 32, no(_UNKNOWN), node)
        if width & (width - 1):
            node = graph.step(Op.DIV, width, node)
        elif width > 1:
            node = graph.step(Op.RSH, width.bit_length() - 1, node)
        node = graph.test(Op.JGE, base, graph.step(Op.SUB, base, node), yes(offset))
        return self._load(offset, holds, node)

    def _load(self, offset: int, holds: int, then: int) -> int:
        return then if holds == offset else self.graph.step(Op.LD, offset, then)

    def _dispatch(self, runs: list[tuple[int, int]], *, cached: bool) -> int:
        """Go to a node by the number of the call, which is in the accumulator; `runs` as for _select."""
        graph = self.graph
        plain = self._select(runs)
        if cached:
            return plain
        # X gets the bit of the number modulo 32, for the windows.
        masks = graph.step(Op.LD, NR, self._select(runs, windows=True))
        prepare = ((Op.AND, 31), (Op.TAX, 0), (Op.LD_IMM, 1), (Op.LSH | WITH_X, 0), (Op.TAX, 0))
        for code, k in reversed(prepare):
            masks = graph.step(code, k, masks)
        # The preparation is cheaper than the kernel's run over every number (see compile), so it is not counted.
        return masks if graph.size(masks) - len(prepare) - 1 < graph.size(plain) else plain

    def _select(self, runs: list[tuple[int, int]], *, windows: bool = False) -> int:
        """Go to a node by the word in the accumulator. `runs` are (from this word on, the node), beginning with 0."""
        segments = segments_of(runs, windows=windows)
        return self._search([(s.start, self._window(s) if s.window else self._chain(s)) for s in segments])

    def _chain(self, segment: Segment) -> int:
        node = segment.node
        for value, other in reversed(segment.exceptions):
            node = self.graph.test(Op.JEQ, value, other, node)
        return node

    def _window(self, segment: Segment) -> int:
        """Test the bit of the word, which is in X, against the mask of one node after the other."""
        # The largest mask is tested first, and the default is what is left.
        masks = sorted(segment.window, key=lambda entry: (entry[0] == self._default, -entry[1].bit_count()))
        node = masks[-1][0]
        for other, mask in reversed(masks[:-1]):
            node = self.graph.test(Op.JSET, mask, other, node)
        return self.graph.step(Op.TXA, 0, node)

    def _search(self, segments: Sequence[tuple[int, int]]) -> int:
        """A balanced search: one comparison for each border between two segments."""
        if len(segments) == 1:
            return segments[0][1]
        middle = len(segments) // 2
        return self.graph.test(
            Op.JGE, segments[middle][0], self._search(segments[middle:]), self._search(segments[:middle])
        )
