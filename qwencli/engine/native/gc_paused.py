"""Keeps the interpreter from interrupting a request."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# A thread that wants the interpreter lock back waits this long for another one to give it up.
# Python's 5 ms is longer than a token takes.
SWITCH_INTERVAL_S = 0.00005


@contextmanager
def gc_paused() -> Iterator[None]:
    """No garbage collection inside the block, and quick turns at the interpreter lock.

    A full collection walks every object of every library loaded, 100 ms and more in the middle of
    an answer. Reference counting still frees what is dropped.
    """
    collecting, interval = gc.isenabled(), sys.getswitchinterval()
    gc.disable()
    sys.setswitchinterval(min(interval, SWITCH_INTERVAL_S))
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        if collecting:
            gc.enable()


def gc_freeze_loaded() -> None:
    """Take everything that exists now out of later collections: it is here to stay."""
    gc.collect()
    gc.freeze()
