"""How long threads keep the interpreter lock from each other while the engine works."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from qwencli.garbage import gc_paused

# A thread that wants the interpreter lock back waits this long for another one to give it up;
# Python's 5 ms is longer than a token takes. A pass over prompts takes it back at each of hundreds
# of operations. A decode step does so a few times, and where a hundred streams are written
# meanwhile turns that are too short cost both sides.
PASS_TURN_S, STEP_TURN_S = 0.00005, 0.0005
# While a model loads, threads that read weights take turns with those that import and warm up; each
# needs the lock a few times for each piece (docs/experiments/2026-11-30-first-token.md).
LOAD_TURN_S = 0.0002
# What blocks that run now want, and what there was before the first of them.
_turns_s: list[float] = []
_turn_before_s, _turns_lock = 0.0, threading.Lock()


@contextmanager
def undisturbed(turn_s: float = PASS_TURN_S) -> Iterator[None]:
    """No garbage collection inside the block, and quick turns at the interpreter lock.

    Blocks of several threads and streams may end in any order: the quickest turns that any of them
    wants are those of all, and the last one gives back what was there before the first.
    """
    global _turn_before_s
    with _turns_lock:
        if not _turns_s:
            _turn_before_s = sys.getswitchinterval()
        _turns_s.append(turn_s)
        sys.setswitchinterval(min(_turn_before_s, *_turns_s))
    try:
        with gc_paused():
            yield
    finally:
        with _turns_lock:
            _turns_s.remove(turn_s)
            sys.setswitchinterval(min(_turn_before_s, *_turns_s) if _turns_s else _turn_before_s)
