"""A compiled filter answers as its rules say: by our interpreter, and by the kernel."""

import errno
import json
import os
import platform
import struct
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from compart.backend.linux import syscalls
from compart.backend.linux.bpf import (
    ALLOW,
    KILL_PROCESS,
    KILL_THREAD,
    LOG,
    NOTIFY,
    Action,
    Below,
    Descriptor,
    Equals,
    Masked,
    OneOf,
    Rule,
    Zero,
    compile,
    disassemble,
    errno_,
    interpret,
    trap,
    verify,
)
from compart.backend.linux.syscalls import AUDIT_ARCH_AARCH64, AUDIT_ARCH_I386, AUDIT_ARCH_X86_64, X32_BIT

X86 = AUDIT_ARCH_X86_64
WORD, LONG = (1 << 32) - 1, (1 << 64) - 1
HERE = {"x86_64": AUDIT_ARCH_X86_64, "aarch64": AUDIT_ARCH_AARCH64}.get(platform.machine())
on_linux = pytest.mark.skipif(sys.platform != "linux" or HERE is None, reason="asks the Linux kernel")


def program(*rules, arch=X86, default=NOTIFY, foreign=KILL_PROCESS, **options):
    return compile(rules, arch=arch, default=default, foreign=foreign, **options)


def answer(code, name, *args, arch=X86):
    """What a program answers to a call by name."""
    padded = (*args, *(0,) * (6 - len(args)))
    return Action(interpret(code, nr=syscalls.number(arch, name), args=padded, arch=arch))


# ------------------------------------------------------------------------- what rules mean, said in the simplest way


def holds(condition, args, base, width):
    argument = args[condition.arg] & LONG
    low = argument & WORD
    match condition:
        case Equals(_, value, full):
            return argument == value & LONG if full else low == value & WORD
        case OneOf(_, values):
            return low in {value & WORD for value in values}
        case Masked(_, mask, value, full):
            return argument & mask == value & LONG if full else low & mask & WORD == value & WORD
        case Zero():
            return argument == 0
        case Below(_, bound):
            return low < bound
        case Descriptor(_, ranges):
            granted = ranges if isinstance(ranges, frozenset) else {k for k in range(32) if ranges >> k & 1}
            return low < base or (low - base) // width in granted


def evaluate(rules, nr, args, arch, *, default, foreign, base=512, width=32):
    if arch[0] != arch[1] or (arch[0] == X86 and nr & WORD >= X32_BIT):
        return foreign
    for rule in rules:
        if syscalls.number(arch[0], rule.name) == nr:
            if any(all(holds(condition, args, base, width) for condition in case) for case in rule.when):
                return rule.then
            return default if rule.otherwise is None else rule.otherwise
    return default


words = st.sampled_from(
    [0, 1, 2, 3, 4, 5, 8, 31, 32, 33, 0x80, 0x5401, 0xFF00, 1 << 31, WORD, WORD - 99]
) | st.integers(0, WORD)
signed = words | st.integers(-5, 40)
longs = st.builds(lambda high, low: high << 32 | low, st.sampled_from([0, 0, 0, 1, 1 << 31, WORD]), words)
positions = st.integers(0, 2) | st.integers(0, 5)  # often the same, so that words are found loaded


@st.composite
def masked(draw):
    full = draw(st.booleans())
    mask = draw(longs if full else words)
    return Masked(draw(positions), mask, draw(longs) & mask, full)


conditions = st.one_of(
    st.builds(Equals, positions, signed),
    st.builds(Equals, positions, longs, st.just(True)),
    st.builds(OneOf, positions, st.frozensets(signed, max_size=6)),
    st.builds(OneOf, positions, st.frozensets(st.integers(0, 40), max_size=25)),
    st.builds(OneOf, positions, st.frozensets(st.integers(5000, 5031), max_size=25)),
    masked(),
    st.builds(Zero, positions),
    st.builds(Below, positions, words | st.just(1 << 32)),
    st.builds(Descriptor, positions, words),
    st.builds(Descriptor, positions, st.frozensets(st.integers(0, 31), max_size=4)),
)
actions = st.sampled_from([ALLOW, NOTIFY, LOG, KILL_PROCESS, KILL_THREAD, trap(7)]) | st.integers(1, 40).map(errno_)
cases = st.lists(st.lists(conditions, max_size=3).map(tuple), max_size=3).map(tuple)
bodies = st.tuples(cases | st.just(((),)), actions, st.none() | actions)
NAMES = sorted(set(syscalls.numbers(X86)) | set(syscalls.numbers(AUDIT_ARCH_AARCH64)))


@st.composite
def rule_sets(draw, largest=60):
    # A few bodies for many calls, as in a policy: parts that can be shared are shared.
    several = draw(st.lists(bodies, min_size=1, max_size=6))
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=largest))
    return [Rule(name, *draw(st.sampled_from(several))) for name in names]


def edges(rules, base, width):
    """Arguments that the rules tell apart, and their neighbours."""
    values = {0, 1, WORD, base - 1, base, base + 32 * width - 1, base + 32 * width, 0xFFFFFF9C}
    for condition in {condition for rule in rules for case in rule.when for condition in case}:
        match condition:
            case Equals(_, value, _):
                values |= {value, value + 1}
            case OneOf(_, several):
                values |= {value + step for value in several for step in (-1, 0, 1)}
            case Masked(_, mask, value, _):
                values |= {value, value | ~mask & LONG, mask}
            case Below(_, bound):
                values |= {bound - 1, bound}
            case Descriptor(_, _):
                values |= {base + width * k + offset for k in range(33) for offset in (-1, 0)}
    return sorted(value & LONG for value in values)


@settings(max_examples=150, deadline=None)
@given(st.data(), rule_sets(), st.booleans(), st.sampled_from([X86, AUDIT_ARCH_AARCH64]))
def test_a_program_answers_as_its_rules_say(data, rules, cached, arch):
    base, width = data.draw(st.sampled_from([(512, 32), (480, 32), (1, 1), (100, 7)]))
    default, foreign = data.draw(actions), data.draw(actions)
    code = compile(rules, arch=arch, default=default, foreign=foreign, base=base, width=width, cached=cached)
    verify(code)
    ours = sorted({n for rule in rules if (n := syscalls.number(arch, rule.name)) is not None})
    numbers = st.sampled_from([*ours, *(n + 1 for n in ours), 0, 470, 600, X32_BIT, X32_BIT | 2, -1, 1 << 31])
    arguments = st.sampled_from(edges(rules, base, width))
    arguments |= st.builds(lambda value, high: value & WORD | high << 32, arguments, st.sampled_from([1, WORD]))
    for _ in range(12):
        nr, args = data.draw(numbers), data.draw(st.tuples(*[arguments] * 6))
        came = data.draw(st.sampled_from([arch, arch, arch, AUDIT_ARCH_I386, X86, AUDIT_ARCH_AARCH64]))
        expected = evaluate(rules, nr, args, (arch, came), default=default, foreign=foreign, base=base, width=width)
        assert Action(interpret(code, nr=nr, args=args, arch=came)) == expected, "\n".join(disassemble(code))


@settings(max_examples=30, deadline=None)
@given(rule_sets(largest=250), st.booleans())
def test_every_number_goes_where_it_should(rules, cached):
    """Without conditions, all numbers there are can be asked."""
    rules = [Rule(rule.name, then=rule.then) for rule in rules]
    code = program(*rules, default=errno_(99), cached=cached)
    for nr in [*range(480), X32_BIT - 1, X32_BIT, WORD]:
        expected = evaluate(rules, nr, (0,) * 6, (X86, X86), default=errno_(99), foreign=KILL_PROCESS)
        assert Action(interpret(code, nr=nr, arch=X86)) == expected


@settings(max_examples=60, deadline=None)
@given(st.frozensets(words | st.integers(0, 70), max_size=40), st.lists(words, max_size=5))
@example(frozenset(), [])
@example(frozenset({WORD}), [])
@example(frozenset({0, WORD}), [1])
@example(frozenset(range(3, 35)), [])
@example(frozenset({0, WORD - 3, WORD - 2, WORD - 1, WORD}), [])
def test_one_of_is_membership(values, others):
    code = program(Rule("read", ((OneOf(2, values),),)), default=errno_(1))
    near = {(value + step) & WORD for value in values for step in (-1, 0, 1)}
    for word in near | set(others) | {0, 31, 32, 63}:
        for high in (0, 5):
            assert (answer(code, "read", 0, 0, word | high << 32) == ALLOW) is (word in values)


@pytest.mark.parametrize("first", [0, 1, 5000, WORD - 31])
@pytest.mark.parametrize("last", [30, 31, 32])
def test_scattered_neighbours_are_one_mask_if_they_fit_in_one(first, last):
    values = {first + step & WORD for step in (0, 2, 3, 5, 7, 11, 13, 17, 19, 23, 29, last)}
    code = program(Rule("read", ((OneOf(0, frozenset(values)),),)))
    for word in [*range(150), *(first + step & WORD for step in range(-70, 150))]:
        assert (answer(code, "read", word) == ALLOW) is (word in values)
    # As long as the first fits as well, or nothing has to be taken away: arch, nr, the argument, a mask, answers.
    assert (len(code) // 8 <= 15) is (last < 32 and first + last <= WORD)


@pytest.mark.parametrize("pattern", [lambda n: n % 3, lambda n: n // 3 % 4, lambda n: n % 7 % 4, lambda n: n // 2 % 3])
@pytest.mark.parametrize("first", [0, 5, 20, 31, 100])
@pytest.mark.parametrize("count", [31, 32, 33, 70])
def test_masks_end_after_32_numbers(first, count, pattern):
    outcomes = {first + n: errno_(1 + pattern(n)) for n in range(count)}
    rules = [Rule(str(nr), then=then) for nr, then in outcomes.items()]
    code = program(*rules, number=lambda arch, name: int(name))
    for nr in range(first + count + 70):
        assert Action(interpret(code, nr=nr, arch=X86)) == outcomes.get(nr, NOTIFY)


# ------------------------------------------------------------------------------------------------------------ details


def test_a_small_filter_reads_like_this():
    code = program(
        Rule("read", ((Descriptor(0, 0b10),),)),
        Rule("brk"),
        Rule("munmap"),
        Rule("clone3", then=errno_(errno.ENOSYS)),
        Rule("kill", ((Equals(0, 7), Zero(1)),), otherwise=errno_(errno.EPERM)),
        cached=True,
    )
    assert disassemble(code) == [
        "   0: ld   arch",
        "   1: jeq  0xc000003e, 2, 23         ; arch",
        "   2: ld   nr",
        "   3: jge  11, 9, 4                  ; nr: munmap",
        "   4: jge  1, 13, 5                  ; nr: write",
        "   5: ld   args[0].low",
        "   6: jge  0x220, 8, 7               ; args[0].low",
        "   7: jge  0x200, 13, 22             ; args[0].low",
        "   8: jge  0x240, 13, 22             ; args[0].low",
        "   9: jge  13, 10, 22                ; nr: rt_sigaction",
        "  10: jge  1073741824, 23, 11        ; nr: x32",
        "  11: jeq  62, 15, 12                ; nr: kill",
        "  12: jeq  435, 14, 13               ; nr: clone3",
        "  13: ret  NOTIFY",
        "  14: ret  ERRNO(38)",
        "  15: ld   args[0].low",
        "  16: jeq  7, 17, 21                 ; args[0].low",
        "  17: ld   args[1].low",
        "  18: jeq  0, 19, 21                 ; args[1].low",
        "  19: ld   args[1].high",
        "  20: jeq  0, 22, 21                 ; args[1].high",
        "  21: ret  ERRNO(1)",
        "  22: ret  ALLOW",
        "  23: ret  KILL_PROCESS",
    ]


@pytest.mark.parametrize("arch", [AUDIT_ARCH_I386, AUDIT_ARCH_AARCH64, 0, X86 ^ 1])
def test_another_architecture_is_foreign(arch):
    code = program(Rule("read"), default=ALLOW, foreign=errno_(5))
    assert Action(interpret(code, nr=0, arch=X86)) == ALLOW
    assert Action(interpret(code, nr=0, arch=arch)) == errno_(5)


@pytest.mark.parametrize("nr", [X32_BIT, X32_BIT | 1, X32_BIT | 520, 0x7FFFFFFF, 0x80000000, -1])
def test_x32_and_negative_numbers_are_foreign(nr):
    code = program(Rule("read"), Rule("write"), Rule("execve"), default=ALLOW, foreign=errno_(5))
    assert Action(interpret(code, nr=nr, arch=X86)) == errno_(5)
    assert Action(interpret(code, nr=X32_BIT - 1, arch=X86)) == ALLOW


def test_aarch64_has_no_x32():
    code = program(Rule("read"), arch=AUDIT_ARCH_AARCH64, default=errno_(1), foreign=errno_(5))
    assert Action(interpret(code, nr=X32_BIT | 63, arch=AUDIT_ARCH_AARCH64)) == errno_(1)
    assert answer(code, "read", arch=AUDIT_ARCH_AARCH64) == ALLOW


@pytest.mark.parametrize(
    ("condition", "passes", "refused"),
    [
        (Equals(0, 5), [5, 5 | 1 << 32], [4, 6, 1 << 32]),
        (Equals(0, -100), [0xFFFFFF9C, LONG - 99], [100, 0x9C]),
        (Equals(0, 5, full=True), [5], [5 | 1 << 32, 5 | 1 << 63, 4]),
        (Equals(0, 5 << 32, full=True), [5 << 32], [0, 5, 5 << 32 | 1]),
        (Equals(0, -1, full=True), [LONG], [WORD, LONG - 1]),
        (Zero(0), [0], [1, 1 << 32, 1 << 63]),
        (Masked(0, 0x20, 0x20), [0x20, 0x21, 1 << 32 | 0x20], [0, 0x10, 0x20 << 32]),
        (Masked(0, 4, 0), [0, 3, 4 << 32], [4, 7]),
        (Masked(0, 0x7E020000, 0, full=True), [0x11, 1 << 32], [0x10000000, 0x20000]),
        (Masked(0, WORD << 32, 0, full=True), [0, WORD], [1 << 32]),
        (Masked(0, 0, 0), [0, 1, LONG], []),
        (Below(0, 3), [0, 2, 1 << 32], [3, WORD]),
        (Below(0, 0), [], [0, 1, LONG]),
        (Below(0, 1 << 32), [0, LONG], []),
        (OneOf(0, (1, 2, 3)), [1, 3, 1 << 32 | 2], [0, 4, 1 << 32]),
        (OneOf(0, ()), [], [0, 1]),
        (Descriptor(0, 0), [0, 511, 1 << 32 | 3], [512, 0xFFFFFF9C, WORD, 1535]),
        (Descriptor(0, 0b101), [0, 512, 543, 576, 607], [544, 575, 608, 1 << 31]),
        (Descriptor(0, frozenset({31})), [5, 1504, 1535], [512, 1503, 1536, 512 + 32 * 63]),
        (Descriptor(0, 0x55555555), [511, 512, 576, 1472], [544, 1504, 1536, 512 + 32 * 32, 512 + 32 * 34]),
        (Descriptor(0, WORD), [0, 1535], [1536, 0xFFFFFF9C]),
    ],
)  # fmt: skip
def test_what_a_condition_lets_pass(condition, passes, refused):
    code = program(Rule("read", ((condition,),)))
    assert [hex(value) for value in passes if answer(code, "read", value) != ALLOW] == []
    assert [hex(value) for value in refused if answer(code, "read", value) != NOTIFY] == []


@pytest.mark.parametrize(
    ("when", "passes", "refused"),
    [
        # A word is loaded once for several conditions, but not after a mask has changed the accumulator.
        (((Masked(0, 0xF0, 0x50), Equals(0, 0x5F)),), [0x5F], [0x50, 0xF, 0x5E]),
        (((Masked(0, 0xF0, 0x50),), (Equals(0, 0x15),)), [0x50, 0x15], [0x10, 0x14]),
        (((OneOf(0, (0, 2, 3, 5, 7, 11, 13, 17, 19, 23, 29)),), (Equals(0, 40), Below(0, 41))), [0, 29, 40], [1, 41]),
        (((Descriptor(0, 0x55555555), Below(0, 600)),), [511, 512, 576], [544, 640]),
        (((Descriptor(0, 0x55555555),), (Equals(0, 545),)), [545, 576], [544, 546]),
        (((Equals(0, 5, full=True),), (Equals(0, 1 << 32, full=True),)), [5, 1 << 32], [5 | 1 << 32, 0]),
        (((Below(0, 9), Masked(0, 1, 0), Zero(1)), (Equals(0, 3),)), [3, 4, 8], [5, 10]),
    ],
)
def test_conditions_on_one_argument_follow_each_other(when, passes, refused):
    code = program(Rule("read", when))
    assert [value for value in passes if answer(code, "read", value) != ALLOW] == []
    assert [value for value in refused if answer(code, "read", value) != NOTIFY] == []


def test_no_case_never_holds_and_an_empty_case_always_does():
    code = program(Rule("read", ()), Rule("write", ((),)), Rule("close", (), otherwise=errno_(3)))
    assert answer(code, "read") == NOTIFY
    assert answer(code, "write") == ALLOW
    assert answer(code, "close") == errno_(3)


def test_rules_for_calls_that_the_architecture_lacks_are_left_out():
    rules = [Rule("open"), Rule("read")]
    code = compile(rules, arch=AUDIT_ARCH_AARCH64, default=NOTIFY, foreign=KILL_PROCESS)
    assert code == compile(rules[1:], arch=AUDIT_ARCH_AARCH64, default=NOTIFY, foreign=KILL_PROCESS)


def test_names_are_looked_up_where_one_says():
    numbers = {(X86, "frobnicate"): 77}
    code = program(Rule("frobnicate"), Rule("read"), number=lambda arch, name: numbers.get((arch, name)))
    assert Action(interpret(code, nr=77, arch=X86)) == ALLOW
    assert Action(interpret(code, nr=0, arch=X86)) == NOTIFY


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: program(Rule("read"), Rule("write"), Rule("read")),
        lambda: program(base=0),
        lambda: program(width=0),
        lambda: program(base=1 << 30, width=1 << 26),
        lambda: errno_(4096),
        lambda: errno_(-1),
        lambda: trap(1 << 16),
        lambda: Equals(6, 0),
        lambda: Equals(-1, 0),
        lambda: Equals(0, 1 << 32),
        lambda: Equals(0, 1 << 64, full=True),
        lambda: OneOf(0, (1, 1 << 32)),
        lambda: Masked(0, 1, 2),
        lambda: Masked(0, 1 << 32, 0),
        lambda: Below(0, (1 << 32) + 1),
        lambda: Descriptor(0, 1 << 32),
        lambda: Descriptor(0, frozenset({32})),
        lambda: Descriptor(0, frozenset({-1})),
    ],
)  # fmt: skip
def test_mistakes_are_errors(wrong):
    with pytest.raises(ValueError):
        wrong()


def test_masks_tell_neighbours_apart_unless_the_kernels_cache_matters():
    names = sorted(syscalls.numbers(X86), key=syscalls.numbers(X86).__getitem__)[100:132]
    rules = [Rule(name, then=errno_(n % 4)) for n, name in enumerate(names)]
    masks, comparisons = program(*rules), program(*rules, cached=True)
    assert len(masks) < len(comparisons)
    comments = [line.partition("; nr: ")[2] for line in disassemble(masks)]
    # Three masks; the fourth group is what is left.
    assert sum(" ".join(names[n::4]) in comments for n in range(4)) == 3
    # All that seccomp_cache_prepare() follows; from there on a call is allowed without running the filter.
    followed = {0x20, 0x15, 0x25, 0x35, 0x45, 0x05, 0x54, 0x06}
    assert {code for code, _, _, _ in struct.iter_unpack("<HBBI", comparisons)} <= followed
    assert not {code for code, _, _, _ in struct.iter_unpack("<HBBI", masks)} <= followed


def size(*rules, **options):
    return len(program(*rules, **options)) // 8


def test_equal_bodies_are_written_once():
    body = ((Masked(2, 4, 0), OneOf(1, (7, 70, 700))), (Zero(3),))
    one = size(Rule("read", body))
    assert size(Rule("read", body), Rule("write", body)) <= one + 1
    assert size(Rule("read", body), Rule("kill", body, because="another reason")) <= one + 1
    assert size(Rule("read", body), Rule("kill", (*body, (Zero(4),)))) < 2 * one


def test_neighbours_with_one_outcome_are_one_run():
    names = sorted(syscalls.numbers(X86), key=syscalls.numbers(X86).__getitem__)[:300]
    # arch, is it; nr, up to 299, x32; two answers and the foreign one.
    assert size(*(Rule(name) for name in names)) == 8
    # Rules that say what happens anyway cost nothing.
    assert size(*(Rule(name, then=NOTIFY) for name in names)) == size()


def test_ranges_of_descriptors_take_the_shorter_way():
    assert size(Rule("read", ((Descriptor(0, 0b11),),))) == size(Rule("read", ((Below(0, 99),),)))
    scattered = size(Rule("read", ((Descriptor(0, 0b01010101010101010101),),)))
    assert scattered == size(Rule("read", ((Descriptor(0, 0b0101010101010101010101010),),)))


def test_far_jumps_go_by_trampolines():
    """Bodies that cannot be shared push what is shared out of the reach of a jump (255 instructions)."""
    names = sorted(syscalls.numbers(X86))[:200]
    rules = [
        Rule(name, ((Equals(0, 1000 + n), Masked(1, 0xF0, 0x50)), (Equals(2, n),)), then=errno_(n % 5 + 1))
        for n, name in enumerate(names)
    ]
    for cached in (False, True):
        code = program(*rules, cached=cached)
        verify(code)
        assert len(code) // 8 > 1000
        assert any(instruction[0] == 0x05 for instruction in struct.iter_unpack("<HBBI", code))
        for n, rule in enumerate(rules):
            assert answer(code, rule.name, 1000 + n, 0x5F) == rule.then
            assert answer(code, rule.name, 0, 0, n) == rule.then
            assert answer(code, rule.name, 1000 + n, 0x60, n + 1) == NOTIFY


def test_more_than_the_kernel_takes_is_an_error():
    rules = [
        Rule(name, tuple((Equals(0, 31 * n + k), Equals(1, k)) for k in range(5)))
        for n, name in enumerate(syscalls.numbers(X86))
    ]
    with pytest.raises(ValueError, match="more than the kernel takes"):
        program(*rules)


ALWAYS = """
brk munmap mremap madvise mincore msync membarrier mlock munlock mlock2 exit exit_group futex futex_waitv futex_wake
futex_wait set_robust_list rseq set_tid_address sched_yield getcpu restart_syscall wait4 waitid getpid gettid getppid
getuid geteuid getgid getegid getresuid getresgid getgroups getpgrp umask uname sysinfo getrlimit getrusage times getcwd
rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack rt_sigpending rt_sigtimedwait rt_sigsuspend pause nanosleep
gettimeofday time getrandom timer_settime timer_gettime timer_getoverrun timer_delete alarm getitimer setitimer
timerfd_settime timerfd_gettime pipe pipe2 eventfd eventfd2 epoll_create epoll_create1 poll ppoll select pselect6
close close_range landlock_create_ruleset landlock_add_rule landlock_restrict_self mbind get_mempolicy set_mempolicy
pkey_alloc pkey_free io_setup io_destroy io_getevents io_cancel memfd_create sync capget inotify_init inotify_init1
"""
BY_RIGHTS = {
    0b0110: "read readv getdents getdents64 recvfrom fadvise64 mq_timedreceive readahead",
    0b1010: "write writev fallocate vmsplice",
    0b0010: "pread64 preadv preadv2 lseek",
    0b1000: "pwrite64 pwritev pwritev2 ftruncate fsync fdatasync sync_file_range",
    0b1110: "fstat fstatfs epoll_wait epoll_pwait epoll_pwait2",
    0b0000: "dup dup2 dup3 fchmod fchown flock fsetxattr fgetxattr flistxattr fremovexattr shutdown getsockname "
    "getpeername getsockopt setsockopt accept accept4 listen sendmsg recvmsg epoll_ctl inotify_rm_watch syncfs tee",
}
SPECIAL = [
    Rule("clone3", then=errno_(errno.ENOSYS)),
    Rule("clone", ((Masked(0, 0xFFBFFFFF, 0x3D0F00),),)),
    Rule("mprotect", ((Masked(2, 4, 0),),)),
    Rule("mmap", ((Masked(2, 4, 0), Masked(3, 0x20, 0x20)), (Masked(2, 4, 0), Descriptor(4, 0b0010)))),
    Rule("ioctl", ((OneOf(1, (0x5401, 0x5413, 0x5450, 0x5451)),), (Below(0, 512), OneOf(1, (0x541B, 0x5421))))),
    Rule("fcntl", ((OneOf(1, (1, 2, 3, 1032)),), (Below(0, 512), OneOf(1, (0, 1030, 4))))),
    Rule("prctl", ((OneOf(0, (3, 15, 16, 21, 23, 38, 39, 0x53564D41)),),)),
    Rule("sendto", ((Descriptor(0, 0b1010), Zero(4)),)),
    Rule("splice", ((Descriptor(0, 0b0010), Descriptor(2, 0b1000)),)),
    Rule("copy_file_range", ((Descriptor(0, 0b0010), Descriptor(2, 0b1000)),)),
    Rule("statx", ((Masked(2, 0x1000, 0x1000),),), then=errno_(errno.ENOSYS)),
    Rule("newfstatat", ((Masked(3, 0x1000, 0x1000),),), then=trap(1)),
    Rule("socketpair", ((Equals(0, 1),),)),
    Rule("personality", ((Equals(0, 0xFFFFFFFF),),)),
    *(Rule(name, ((Equals(0, 0),),)) for name in ("prlimit64", "sched_getaffinity", "sched_getparam")),
    *(Rule(name, ((Below(0, 16),),)) for name in ("clock_gettime", "clock_getres", "clock_nanosleep", "timer_create")),
    *(Rule(name, ((Equals(0, 0xFFFFFFFF),),)) for name in ("signalfd", "signalfd4")),
]


def policy():
    """A table of the size and kind that a compartment has."""
    rules = [Rule(name) for name in ALWAYS.split()]
    for mask, names in BY_RIGHTS.items():
        rules += [Rule(name, ((Descriptor(0, mask),),)) for name in names.split()]
    return rules + SPECIAL


def test_a_policys_program_is_small():
    rules = policy()
    small, cached = size(*rules), size(*rules, cached=True)
    print(f"\n{len(rules)} rules: {small} instructions, {cached} for the kernel's cache")
    assert len(rules) > 160
    assert small < 190
    assert cached < 235


# ---------------------------------------------------------------------------------------------- reading and refusing


def assembled(*instructions):
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in instructions)


RET = (0x06, 0, 0, 0x7FFF0000)


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        (b"", "0 instructions"),
        (assembled(RET)[:-1], "no whole number"),
        (assembled(*[RET] * 4097), "4097 instructions"),
        (assembled((0x20, 0, 0, 0)), "does not end in a return"),
        (assembled((0x20, 0, 0, 2), RET), "no word of seccomp_data"),
        (assembled((0x20, 0, 0, 64), RET), "no word of seccomp_data"),
        (assembled((0x15, 0, 1, 0), RET), "jumps past the end"),
        (assembled((0x15, 1, 0, 0), RET), "jumps past the end"),
        (assembled((0x05, 0, 0, 1), RET), "jumps past the end"),
        (assembled((0x05, 0, 0, 0xFFFFFFFF), RET), "jumps past the end"),
        (assembled(RET, (0x05, 0, 0, 0)), "jumps past the end"),
        (assembled((0x34, 0, 0, 0), RET), "div by 0"),
        (assembled((0x64, 0, 0, 32), RET), "lsh by 32"),
        (assembled((0x74, 0, 0, 32), RET), "rsh by 32"),
        (assembled((0x94, 0, 0, 3), RET), "no instruction"),  # mod: not for seccomp
        (assembled((0x28, 0, 0, 0), RET), "no instruction"),  # a load of 16 bits
        (assembled((0x48, 0, 0, 0), RET), "no instruction"),  # an indirect load
        (assembled((0x0E, 0, 0, 0), RET), "no instruction"),
        (assembled((0x106, 0, 0, 0), RET), "no instruction"),
        (assembled((0x60, 0, 0, 0), RET), "before it was written"),
        (assembled((0x61, 0, 0, 1), (0x02, 0, 0, 1), RET), "before it was written"),
        (assembled((0x15, 0, 1, 0), (0x02, 0, 0, 3), (0x60, 0, 0, 3), RET), "before it was written"),
        (assembled((0x02, 0, 0, 16), RET), "no word 16"),
    ],
)
def test_what_the_kernel_refuses_is_refused(code, complaint):
    with pytest.raises(ValueError, match=complaint):
        verify(code)
    with pytest.raises(ValueError):
        interpret(code, nr=0, arch=X86)


def test_scratch_memory_may_be_read_where_every_path_wrote_it():
    code = assembled((0x15, 1, 0, 0), (0x00, 0, 0, 5), (0x02, 0, 0, 3), (0x60, 0, 0, 3), (0x16, 0, 0, 0))
    assert interpret(code, nr=0, arch=X86) == 0
    verify(assembled((0x15, 0, 2, 0), (0x02, 0, 0, 3), (0x05, 0, 0, 1), (0x02, 0, 0, 3), (0x61, 0, 0, 3), RET))


def test_the_interpreter_reads_all_of_seccomp_data():
    def word(offset):
        code = assembled((0x20, 0, 0, offset), (0x16, 0, 0, 0))
        args = tuple((2 * n + 1) << 32 | 2 * n for n in range(6))
        return interpret(code, nr=-7, args=args, arch=X86, ip=0x1122334455667788)

    assert [word(offset) for offset in range(0, 16, 4)] == [-7 & WORD, X86, 0x55667788, 0x11223344]
    assert [word(offset) for offset in range(16, 64, 4)] == list(range(12))
    length = assembled((0x80, 0, 0, 0), (0x16, 0, 0, 0))
    assert interpret(length, nr=0, arch=X86) == 64


@pytest.mark.parametrize(
    ("instruction", "text"),
    [
        ((0x00, 0, 0, 12), "ld   #0xc"), ((0x01, 0, 0, 3), "ldx  #3"), ((0x60, 0, 0, 4), "ld   M[4]"),
        ((0x02, 0, 0, 4), "st   M[4]"), ((0x80, 0, 0, 0), "ld   len"), ((0x20, 0, 0, 8), "ld   ip.low"),
        ((0x20, 0, 0, 44), "ld   args[3].high"), ((0x04, 0, 0, 16), "add  0x10"), ((0x0C, 0, 0, 0), "add  x"),
        ((0x84, 0, 0, 0), "neg"), ((0x07, 0, 0, 0), "tax"), ((0x16, 0, 0, 0), "ret  a"), ((0x05, 0, 0, 3), "ja   4"),
        ((0x2D, 1, 2, 0), "jgt  x, 2, 3"), ((0xFF, 1, 2, 3), "0x00ff 1, 2, 0x3"),
        ((0x06, 0, 0, 0x7FC00000), "ret  NOTIFY"), ((0x06, 0, 0, 0x50026), "ret  ERRNO(38)"),
        ((0x06, 0, 0, 0x30001), "ret  TRAP(1)"), ((0x06, 0, 0, 0), "ret  KILL_THREAD"),
        ((0x06, 0, 0, 0x80000000), "ret  KILL_PROCESS"), ((0x06, 0, 0, 0x7FFC0000), "ret  LOG"),
        ((0x06, 0, 0, 0x7FF00002), "ret  TRACE(2)"), ((0x06, 0, 0, 0x12340000), "ret  0x12340000"),
    ],
)  # fmt: skip
def test_how_an_instruction_reads(instruction, text):
    assert disassemble(assembled(instruction)) == ["   0: " + text]


def test_an_action_reads_as_what_it_does():
    assert [repr(action) for action in (ALLOW, NOTIFY, errno_(1), trap(2))] == [
        "ALLOW",
        "NOTIFY",
        "ERRNO(1)",
        "TRAP(2)",
    ]


# ---------------------------------------------------------------------------------------------------------- the kernel

PROBE = """
import ctypes, json, os, sys
from tests import replay
program, probes = json.load(sys.stdin)
call = ctypes.CDLL(None, use_errno=True).syscall
call.restype = ctypes.c_long
answers = []
replay.install(bytes.fromhex(program))
for nr, args in probes:
    ctypes.set_errno(0)
    result = call(ctypes.c_long(nr), *map(ctypes.c_uint64, args))
    answers.append(ctypes.get_errno() if result == -1 else result)
os.write(1, json.dumps(answers).encode())
os._exit(0)
"""

# What the probing interpreter itself needs; nobody asks about these.
NEEDED = "write exit_group brk mmap munmap mremap mprotect madvise futex rt_sigprocmask rt_sigreturn"


def ask_kernel(code, probes):
    """Install a program in a process of its own and make calls there. The errno of each, 0 where it was told so."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        input=json.dumps([code.hex(), probes]),
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def errno_of(word):
    assert word & 0xFFFF0000 == 0x00050000
    return word & 0xFFFF


@on_linux
@settings(max_examples=6, deadline=None)
@given(st.integers(0, WORD), rule_sets(largest=150), st.booleans())
def test_the_kernel_agrees_with_the_interpreter(seed, rules, cached):
    """Every rule answers an errno, so any call can be made in earnest."""
    needed = NEEDED.split()
    rules = [
        Rule(rule.name, rule.when, errno_(n % 50 + 1), errno_(n % 50 + 51))
        for n, rule in enumerate(rules)
        if rule.name not in needed
    ]
    code = program(*map(Rule, needed), *rules, arch=HERE, default=errno_(120), foreign=errno_(121), cached=cached)
    # uretprobe and uprobe are the kernel's own and pass any filter.
    free = [n for n in range(480) if syscalls.name(HERE, n) not in needed and n not in (335, 336)]
    free += [X32_BIT, X32_BIT | 1, X32_BIT | 520]
    values, random = edges(rules, 512, 32), Random(seed)
    probes = [(nr, [random.choice(values) for _ in range(6)]) for nr in free for _ in range(4)]
    expected = [errno_of(interpret(code, nr=nr, args=args, arch=HERE)) for nr, args in probes]
    assert ask_kernel(code, probes) == expected


@on_linux
def test_arithmetic_is_the_kernels():
    """Each case is a call number of its own, answered with 12 bits of what was calculated."""
    operations = [0x04, 0x14, 0x24, 0x34, 0x44, 0x54, 0x64, 0x74, 0xA4]
    pairs = [(0xFFFFFFFF, 2), (0x12345678, 31), (5, 0x80000001), (0x80000000, 33)]
    cases = [[(0x00, 0, 0, a), (0x01, 0, 0, x), (op | 8, 0, 0, 0)] for op in operations for a, x in pairs]
    cases += [[(0x00, 0, 0, a), (op, 0, 0, k % 32 or 1)] for op in operations for a, k in pairs]
    cases += [[(0x00, 0, 0, a), (0x84, 0, 0, 0)] for a, _ in pairs]
    cases += [[(0x00, 0, 0, a), (0x02, 0, 0, 7), (0x00, 0, 0, x), (0x61, 0, 0, 7), (0x1C, 0, 0, 0)] for a, x in pairs]
    jumps = [0x15, 0x25, 0x35, 0x45]
    sides = [(7, 7), (7, 8), (8, 7), (0xFFFFFFFF, 0x80000000)]
    cases += [[(0x00, 0, 0, a), (op, 1, 0, k), (0x00, 0, 0, 99)] for op in jumps for a, k in sides]
    cases += [[(0x00, 0, 0, a), (0x01, 0, 0, x), (op | 8, 1, 0, 0), (0x00, 0, 0, 99)] for op in jumps for a, x in sides]
    blocks, probes = [], []
    for n, (case, shift) in enumerate((case, shift) for case in cases for shift in (0, 12, 24)):
        block = [*case, (0x74, 0, 0, shift), (0x54, 0, 0, 0xFFF), (0x44, 0, 0, 0x50000), (0x16, 0, 0, 0)]
        blocks += [(0x20, 0, 0, 0), (0x15, 0, len(block), 1000 + n), *block]
        probes.append((1000 + n, [0] * 6))
    code = assembled(*blocks, RET)
    assert ask_kernel(code, probes) == [errno_of(interpret(code, nr=nr, arch=HERE)) for nr, _ in probes]


@on_linux
@pytest.mark.parametrize("cached", [False, True])
def test_the_kernel_takes_a_policys_program(cached):
    code = program(*policy(), arch=HERE, default=errno_(1), foreign=errno_(2), cached=cached)
    names = ("getppid", "sched_getparam", "keyctl", "clone3", "sync_file_range")
    numbers = [syscalls.number(HERE, name) for name in names]
    parent, *errors = ask_kernel(code, [(nr, [3, 0, 0, 0, 0, 0]) for nr in numbers])
    assert parent == os.getpid()
    assert errors == [errno.EPERM, errno.EPERM, errno.ENOSYS, errno.EBADF]


TRY = """
import json, sys
from tests import replay
accepted = []
for program in json.load(sys.stdin):
    try:
        replay.install(bytes.fromhex(program))
        accepted.append(True)
    except OSError:
        accepted.append(False)
print(json.dumps(accepted))
"""


def is_taken(code):
    try:
        verify(code)
    except ValueError:
        return False
    return True


@on_linux
def test_the_kernel_refuses_exactly_what_verify_refuses():
    """Every opcode there could be, in programs that allow everything if they are taken."""
    begin = [(0x01, 0, 0, 1), (0x00, 0, 0, ALLOW.value)]
    codes = [code for code in [*range(0x100), 0x106, 0x1005, 0x8020] if code != 0x06]
    programs = [assembled(*begin, (code, 0, 0, k), RET) for code in codes for k in (0, 2, 15, 31, 32, 60, 64)]
    programs += [assembled(*begin, (0x15, 1, 0, 0), (0x02, 0, 0, 3), (load, 0, 0, 3), RET) for load in (0x60, 0x61)]
    programs += [assembled(*begin, (0x05, 0, 0, 1), (0x02, 0, 0, 3), (0x02, 0, 0, 3), (0x60, 0, 0, 3), RET)]
    programs += [assembled(*begin, (0x45, jt, jf, 0), RET) for jt, jf in ((0, 1), (1, 0), (0, 0), (255, 0))]
    programs += [assembled(*begin), b"", assembled(*[RET] * 4096), assembled(*[RET] * 4097)]
    done = subprocess.run(
        [sys.executable, "-c", TRY],
        input=json.dumps([code.hex() for code in programs]),
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    verdicts = dict(zip((code.hex() for code in programs), json.loads(done.stdout), strict=True))
    assert {code.hex(): is_taken(code) for code in programs} == verdicts
    assert set(verdicts.values()) == {True, False}
