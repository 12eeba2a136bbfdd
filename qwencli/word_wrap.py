"""Breaks a stream of text into lines between words, piece by piece as it arrives."""

from __future__ import annotations

import unicodedata


class WordWrap:
    """All pieces together are the text, with a line feed in the place of some of its spaces.

    The word at the end of what has arrived is held back until it is whole. Wide characters
    (Chinese, Japanese, Korean) are words of their own, as their scripts have no spaces. A word
    that is longer than a line is the terminal's to break.

    Args:
        columns: width of a line.
    """

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self._column = 0
        self._space = ""
        self._word = ""

    def push(self, text: str) -> str:
        """What may be written now."""
        return "".join(self._char(char) for char in text)

    def finish(self) -> str:
        """What was held back."""
        rest = self._flush() + self._space
        self._space = ""
        return rest

    def _char(self, char: str) -> str:
        if char == "\n":
            done = self._flush() + self._space
            self._space, self._column = "", 0
            return done + char
        if char.isspace():
            done = self._flush()
            self._space += char
            return done
        if _cells(char) == 2:
            done = self._flush()
            self._word = char
            return done
        done = self._flush() if self._word and _cells(self._word[-1]) == 2 else ""
        self._word += char
        return done

    def _flush(self) -> str:
        """The held word, on this line if it fits, else on the next."""
        if not self._word:
            return ""
        width = sum(map(_cells, self._word))
        space, word = self._space, self._word
        self._space = self._word = ""
        if self._column and self._column + len(space) + width > self._columns:
            space, self._column = "\n", 0
        self._column += len(space.strip("\n")) + width
        return space + word


def _cells(char: str) -> int:
    """Columns of a terminal that `char` takes (Unicode Standard Annex 11)."""
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1
