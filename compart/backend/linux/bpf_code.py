"""Classic BPF as seccomp(2) runs it: the instructions, the answers, and how to check, run and read a program.

Pure data and pure functions, no system calls: any process may use it, and all of it is tested on every system. The
facts are from seccomp(2), <linux/filter.h>, <linux/seccomp.h> and, for what the kernel accepts, bpf_check_classic() and
seccomp_check_filter().
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import lru_cache
from typing import Final

from compart.backend.linux import syscalls

WORD: Final = 0xFFFFFFFF

INSTRUCTION: Final = struct.Struct("<HBBI")
"""struct sock_filter: code, jt, jf, k. Every architecture compart knows is little-endian."""

MAX_INSTRUCTIONS: Final = 4096
"""BPF_MAXINSNS"""

DATA: Final = struct.Struct("<IIQ6Q")
"""struct seccomp_data, what a program may load: int nr; u32 arch; u64 instruction_pointer; u64 args[6]."""

NR, ARCH, ARGS = 0, 4, 16


def low_word(arg: int) -> int:
    """Where in seccomp_data the low word of an argument is."""
    return ARGS + 8 * arg


def high_word(arg: int) -> int:
    """Where in seccomp_data the high word of an argument is."""
    return ARGS + 8 * arg + 4


class Op(IntEnum):
    """The instructions that seccomp admits (seccomp_check_filter). A is the accumulator, X the index register."""

    LD = 0x20  # A = the word at k of seccomp_data
    LD_LEN = 0x80
    LD_IMM = 0x00
    LD_MEM = 0x60
    LDX_LEN = 0x81
    LDX_IMM = 0x01
    LDX_MEM = 0x61
    ST = 0x02
    STX = 0x03
    ADD = 0x04
    SUB = 0x14
    MUL = 0x24
    DIV = 0x34
    OR = 0x44
    AND = 0x54
    LSH = 0x64
    RSH = 0x74
    NEG = 0x84
    XOR = 0xA4
    JA = 0x05
    JEQ = 0x15
    JGT = 0x25
    JGE = 0x35
    JSET = 0x45
    RET = 0x06
    RET_A = 0x16
    TAX = 0x07
    TXA = 0x87


WITH_X: Final = 0x08
"""Added to an arithmetic or jump instruction: its operand is X, not k."""

_ALU: Final[dict[int, str]] = {
    Op.ADD: "add", Op.SUB: "sub", Op.MUL: "mul", Op.DIV: "div", Op.OR: "or",
    Op.AND: "and", Op.LSH: "lsh", Op.RSH: "rsh", Op.XOR: "xor",
}  # fmt: skip
_JUMPS: Final[dict[int, str]] = {Op.JEQ: "jeq", Op.JGT: "jgt", Op.JGE: "jge", Op.JSET: "jset"}

# ------------------------------------------------------------------------------------------------------------ answers


@dataclass(frozen=True)
class Action:
    """What the kernel does with a call: `value` is the 32-bit word that the filter returns (SECCOMP_RET_*)."""

    value: int

    def __repr__(self) -> str:
        return action_text(self.value)


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


def action_text(word: int) -> str:
    """A SECCOMP_RET_ word as text: "ALLOW", "ERRNO(1)"."""
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


# ------------------------------------------------------------------------------------------------- checking and running


def decode(program: bytes) -> list[tuple[int, int, int, int]]:
    """The instructions of a program: code, jt, jf, k. Raises ValueError when the last one is cut short."""
    if len(program) % INSTRUCTION.size:
        raise ValueError(f"{len(program)} bytes are no whole number of instructions")
    return list(INSTRUCTION.iter_unpack(program))


def verify(program: bytes) -> None:
    """Check `program` as the kernel does before it takes it. Raises ValueError saying what it would refuse.

    From bpf_check_classic() and seccomp_check_filter(): 1 to 4096 instructions, opcodes that seccomp admits, jumps
    forward to an instruction of the program, aligned loads within struct seccomp_data, no division by a constant 0, no
    constant shift by more than 31, scratch memory read only after it was written on every path, a return at the end.
    """
    instructions = decode(program)
    if not 1 <= len(instructions) <= MAX_INSTRUCTIONS:
        raise ValueError(f"{len(instructions)} instructions are not in 1..{MAX_INSTRUCTIONS}")
    # Which words of scratch memory have been written on every path to an instruction, as far as jumps have said.
    written = [0xFFFF] * len(instructions)
    here = 0
    for at, (code, jt, jf, k) in enumerate(instructions):
        here &= written[at]
        left = len(instructions) - at - 1
        if code == Op.LD:
            if k % 4 or k >= DATA.size:
                raise ValueError(f"{at}: loads from {k}, which is no word of seccomp_data")
        elif code in (Op.LD_MEM, Op.LDX_MEM, Op.ST, Op.STX):
            if k > 15:
                raise ValueError(f"{at}: scratch memory has 16 words, no word {k}")
            if code in (Op.ST, Op.STX):
                here |= 1 << k
            elif not here >> k & 1:
                raise ValueError(f"{at}: reads scratch word {k} before it was written")
        elif code == Op.JA:
            if k >= left:
                raise ValueError(f"{at}: jumps past the end")
            written[at + 1 + k] &= here
            here = 0xFFFF
        elif code & ~WITH_X in _JUMPS:
            if max(jt, jf) >= left:
                raise ValueError(f"{at}: jumps past the end")
            written[at + 1 + jt] &= here
            written[at + 1 + jf] &= here
            here = 0xFFFF
        elif (code == Op.DIV and k == 0) or (code in (Op.LSH, Op.RSH) and k > 31):
            raise ValueError(f"{at}: {_ALU[code]} by {k}")
        elif code not in _PLAIN and code & ~WITH_X not in _ALU:
            raise ValueError(f"{at}: no instruction has the code {code:#04x}")
    if instructions[-1][0] not in (Op.RET, Op.RET_A):
        raise ValueError("does not end in a return")


_PLAIN: Final = {Op.LD_LEN, Op.LD_IMM, Op.LDX_LEN, Op.LDX_IMM, Op.NEG, Op.RET, Op.RET_A, Op.TAX, Op.TXA}


def interpret(program: bytes, *, nr: int, args: Sequence[int] = (0,) * 6, arch: int, ip: int = 0) -> int:
    """Run `program` on one system call as the kernel would. Returns the SECCOMP_RET_ word.

    `args` are the six arguments, 64 bits each (negative numbers as two's complement), `ip` the instruction pointer.
    Raises ValueError for a program that verify() refuses.
    """
    instructions = _verified(program)
    long = (1 << 64) - 1
    data = DATA.pack(nr & WORD, arch & WORD, ip & long, *(value & long for value in args))
    a = x = 0
    memory = [0] * 16
    at = 0
    while True:
        code, jt, jf, k = instructions[at]
        at += 1
        operation, operand = code & ~WITH_X, x if code & WITH_X else k
        match code:
            case Op.LD:
                a = int.from_bytes(data[k : k + 4], "little")
            case Op.LD_IMM:
                a = k
            case Op.LD_LEN:
                a = len(data)
            case Op.LD_MEM:
                a = memory[k]
            case Op.LDX_IMM:
                x = k
            case Op.LDX_LEN:
                x = len(data)
            case Op.LDX_MEM:
                x = memory[k]
            case Op.ST:
                memory[k] = a
            case Op.STX:
                memory[k] = x
            case Op.TAX:
                x = a
            case Op.TXA:
                a = x
            case Op.RET:
                return k
            case Op.RET_A:
                return a
            case Op.JA:
                at += k
            case Op.NEG:
                a = -a & WORD
            case _ if operation == Op.DIV and operand == 0:
                return KILL_THREAD.value  # a division by X = 0 ends the program with 0
            case _ if operation in _JUMPS:
                at += jt if _jumps(operation, a, operand) else jf
            case _:
                a = _calculated(operation, a, operand)


@lru_cache(maxsize=4)
def _verified(program: bytes) -> list[tuple[int, int, int, int]]:
    # Whoever runs a program runs it on many calls.
    verify(program)
    return decode(program)


def _jumps(code: int, a: int, operand: int) -> bool:
    match code:
        case Op.JEQ:
            return a == operand
        case Op.JGT:
            return a > operand
        case Op.JGE:
            return a >= operand
        case _:  # Op.JSET
            return bool(a & operand)


def _calculated(code: int, a: int, operand: int) -> int:
    match code:
        case Op.ADD:
            return (a + operand) & WORD
        case Op.SUB:
            return (a - operand) & WORD
        case Op.MUL:
            return (a * operand) & WORD
        case Op.DIV:
            return a // operand
        case Op.OR:
            return a | operand
        case Op.AND:
            return a & operand
        case Op.LSH:  # the kernel shifts by the amount modulo 32
            return (a << (operand & 31)) & WORD
        case Op.RSH:
            return a >> (operand & 31)
        case _:  # Op.XOR
            return a ^ operand


# -------------------------------------------------------------------------------------------------------------- reading


def disassemble(program: bytes) -> list[str]:
    """One readable line for each instruction, such as "   4: jge  59, 5, 9                 ; nr: execve".

    A jump names the instructions that it leads to: if it holds, if not. Where every path to it has the same word of
    seccomp_data in the accumulator, the comment says which, and names the system calls that are compared.
    """
    instructions = decode(program)
    arch = next((k for code, _, _, k in instructions if code == Op.JEQ and k in _TABLES), 0)
    lines = []
    for at, ((code, jt, jf, k), known) in enumerate(zip(instructions, _knowledge(instructions), strict=True)):
        text = _instruction_text(at, code, jt, jf, k, known)
        comment = _comment(arch, code, k, known) if code & ~WITH_X in _JUMPS else ""
        lines.append(f"{at:4}: " + (f"{text:<31}; {comment}" if comment else text))
    return lines


_TABLES: Final = (syscalls.AUDIT_ARCH_X86_64, syscalls.AUDIT_ARCH_AARCH64)

# What a register may be known to hold besides a word of seccomp_data (its offset). The bit is 1 << (nr & 31).
_UNKNOWN, _NR_MODULO_32, _ONE, _BIT = -1, -2, -3, -4


@dataclass(frozen=True)
class _Known:
    """What is known before an instruction: what the registers hold, and between which bounds the call's number is."""

    a: int = _UNKNOWN
    x: int = _UNKNOWN
    low: int = 0
    high: int = WORD

    def merge(self, other: _Known) -> _Known:
        return _Known(
            a=self.a if self.a == other.a else _UNKNOWN,
            x=self.x if self.x == other.x else _UNKNOWN,
            low=min(self.low, other.low),
            high=max(self.high, other.high),
        )

    def after(self, code: int, k: int) -> _Known:
        match code:
            case Op.LD:
                return replace(self, a=k)
            case Op.LD_IMM:
                return replace(self, a=_ONE if k == 1 else _UNKNOWN)
            case Op.TAX:
                return replace(self, x=self.a)
            case Op.TXA:
                return replace(self, a=self.x)
            case Op.AND if self.a == NR and k == 31:
                return replace(self, a=_NR_MODULO_32)
            case _ if code == Op.LSH | WITH_X and self.a == _ONE and self.x == _NR_MODULO_32:
                return replace(self, a=_BIT)
            case Op.LDX_IMM | Op.LDX_MEM | Op.LDX_LEN:
                return replace(self, x=_UNKNOWN)
            case Op.ST | Op.STX:
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
        if code == Op.JA:
            reach(at + 1 + k, now)
        elif code & ~WITH_X in _JUMPS:
            low, high = (k, k - 1) if code == Op.JGE and now.a == NR else (0, WORD)
            reach(at + 1 + jt, replace(now, low=max(now.low, low)))
            reach(at + 1 + jf, replace(now, high=min(now.high, high)))
        elif code not in (Op.RET, Op.RET_A):
            reach(at + 1, now.after(code, k))
    return [now or _Known() for now in known[: len(instructions)]]


def _comment(arch: int, code: int, k: int, known: _Known) -> str:
    if known.a == NR and code in (Op.JEQ, Op.JGE, Op.JGT):
        return f"nr: {'x32' if k == syscalls.X32_BIT else syscalls.name(arch, k)}"
    if known.a == _BIT and code == Op.JSET and known.high - known.low < 32:
        members = [number for number in range(known.low, known.high + 1) if k >> (number & 31) & 1]
        return "nr: " + " ".join(syscalls.name(arch, number) for number in members)
    return _field_text(known.a) if known.a >= 0 else ""


def _instruction_text(at: int, code: int, jt: int, jf: int, k: int, known: _Known) -> str:
    operation = code & ~WITH_X
    value = str(k) if k < 10 or known.a in (NR, _NR_MODULO_32) else f"{k:#x}"
    if operation in _JUMPS:
        return f"{_JUMPS[operation]:<4} {'x' if code & WITH_X else value}, {at + 1 + jt}, {at + 1 + jf}"
    if operation in _ALU:
        return f"{_ALU[operation]:<4} {'x' if code & WITH_X else value}"
    match code:
        case Op.LD:
            return f"ld   {_field_text(k)}"
        case Op.JA:
            return f"ja   {at + 1 + k}"
        case Op.RET:
            return f"ret  {action_text(k)}"
        case _ if code in _OTHERS:
            return _OTHERS[code].format(value)
        case _:
            return f"{code:#06x} {jt}, {jf}, {k:#x}"


_OTHERS: Final[dict[int, str]] = {
    Op.LD_IMM: "ld   #{}", Op.LD_MEM: "ld   M[{}]", Op.LD_LEN: "ld   len",
    Op.LDX_IMM: "ldx  #{}", Op.LDX_MEM: "ldx  M[{}]", Op.LDX_LEN: "ldx  len",
    Op.ST: "st   M[{}]", Op.STX: "stx  M[{}]", Op.NEG: "neg", Op.TAX: "tax", Op.TXA: "txa", Op.RET_A: "ret  a",
}  # fmt: skip


def _field_text(offset: int) -> str:
    if offset >= ARGS:
        return f"args[{(offset - ARGS) // 8}].{'high' if offset % 8 else 'low'}"
    return {NR: "nr", ARCH: "arch", 8: "ip.low", 12: "ip.high"}.get(offset, f"[{offset}]")
