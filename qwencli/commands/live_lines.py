"""Lines at the end of a terminal that are drawn again in place, without flicker."""

from __future__ import annotations

import re
import shutil
from typing import TextIO

# Terminals that know this show all of a drawing at once; the others ignore it.
_BEGIN, _END = "\x1b[?2026h", "\x1b[?2026l"
_HIDE_CURSOR, _SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
_ERASE_REST, _ERASE_BELOW = "\x1b[K", "\x1b[J"
_STYLE = re.compile(r"\x1b\[[0-9;]*m")


class LiveLines:
    """Writes a growing list of lines whose end may change.

    Nothing is cleared and drawn again: the first line that differs is found, and from there on each
    line is written over the old one. Lines that have left the screen at its top are not reached
    any more and stay as they are. The cursor rests behind the last line.

    Lines must be narrower than the screen: one that a terminal breaks would be two.
    """

    def __init__(self, terminal: TextIO) -> None:
        self._terminal = terminal
        # What may be written over, from the top; the cursor is in the last one.
        self._drawn = [""]
        self._columns = 0

    def draw(self, done: list[str], live: list[str]) -> None:
        """Show lines that are final, and below them those that the next call may replace."""
        columns, rows = shutil.get_terminal_size()
        new = [*done, *(live or [""])]
        resized = self._columns not in (0, columns)
        if resized:
            # The terminal itself has broken the lines that are too long now.
            first, up = 0, sum(_rows(line, columns) for line in self._drawn) - 1
        else:
            first = self._first_difference(new, rows)
            up = max(len(self._drawn) - 1 - first, 0)
        self._columns = columns
        if resized or new != self._drawn:
            up = min(up, rows - 1)
            text = "\r" + (f"\x1b[{up}A" if up else "") + (_ERASE_BELOW if resized else "")
            text += "\n".join(line + _ERASE_REST for line in new[first:])
            text += _ERASE_BELOW if len(new) < len(self._drawn) else ""
            self._write(_BEGIN + _HIDE_CURSOR + text + _END)
        self._drawn = live or [""]

    def close(self) -> None:
        """Begin a line of its own for what comes next; what was drawn stays."""
        self._write(("\n" if self._drawn[-1] else "") + _SHOW_CURSOR)
        self._drawn = [""]

    def _first_difference(self, new: list[str], rows: int) -> int:
        """The first line to write: it differs, is on the screen, and there is one."""
        pairs = zip(self._drawn, new, strict=False)
        equal = next((n for n, (a, b) in enumerate(pairs) if a != b), len(self._drawn))
        reached = max(min(equal, len(self._drawn) - 1), len(self._drawn) - rows)
        return min(reached, len(new) - 1)

    def _write(self, text: str) -> None:
        self._terminal.write(text)
        self._terminal.flush()


def _rows(line: str, columns: int) -> int:
    """Rows that a line takes on a screen of `columns`."""
    from rich.cells import cell_len

    return max(-(-cell_len(_STYLE.sub("", line)) // columns), 1)
