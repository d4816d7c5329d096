"""Lines for a terminal.

Texts that come from a compartment are a stranger's: no escape sequence in them may reach the terminal.
"""

import os
import sys

WIDTHS = (13, 25, 14, 46, 5, 7)
GREEN, RED, PLAIN = "\x1b[32m", "\x1b[31m", "\x1b[0m"


def one_line(text: str, width: int) -> str:
    """The text on one line, only of printable characters, cut to the width."""
    printable = "".join(c if c.isprintable() else " " for c in text[: 4 * width])
    line = " ".join(printable.split())
    return line if len(line) <= width else line[: width - 3] + "..."


def row(*cells: str) -> str:
    """One line of the table. The next to last column is a number."""
    *texts, number, verdict = [one_line(cell, width) for cell, width in zip(cells, WIDTHS, strict=True)]
    padded = [text.ljust(width) for text, width in zip(texts, WIDTHS, strict=False)]
    return "  ".join([*padded, number.rjust(WIDTHS[-2]), _coloured(verdict)])


def _coloured(verdict: str) -> str:
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return verdict
    # Small letters are good news.
    colour = GREEN if verdict.islower() else RED
    return f"{colour}{verdict}{PLAIN}"
