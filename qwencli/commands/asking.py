"""Asking a person at the terminal."""

from __future__ import annotations

import sys

from qwencli.output import Sink


def at_terminal() -> bool:
    """Whether somebody is there to read a question and to answer it."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def says_yes(question: str) -> bool:
    """The answer to a question on stderr; anything but a yes, and no answer, is a no."""
    sink = Sink()
    sink.prompt(f"{question} [y/N] ")
    try:
        return input().strip().lower() in ("y", "yes")
    except EOFError:
        sink.notice("")
        return False
