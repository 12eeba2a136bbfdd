"""What Python itself does while the engine works, kept out of the way.

It looks for garbage, but not while something is made whose objects all stay, or is timed: reference
counting goes on and frees what is dropped; only circles wait. Threads take turns at its lock, quick
ones here. And for Triton, which reads the source of every kernel that is imported, `inspect` splits
each into tokens to see where it ends, two thirds of the time that importing our kernels takes: a
function's indentation says it sooner.
"""

from __future__ import annotations

import gc
import inspect
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

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
# How the source of a function begins, and what its first line may close further down.
_STARTS, _CLOSING = ("def ", "@"), ")]}"
_in_tokens = inspect.getblock
_quick_blocks, _quick_lock = 0, threading.Lock()


@contextmanager
def gc_paused() -> Iterator[None]:
    """No collection inside the block. A full one walks every object of every library loaded, 100 ms
    and more in the middle of an answer; of a large set's listing collections take a tenth."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@contextmanager
def gc_freeze_loaded() -> Iterator[None]:
    """Take everything that exists behind the block out of later collections: it is here to stay.

    What was there before is not even looked through for garbage, which takes 0.1 to 0.3 s of
    libraries alone. Where the block fails nothing is taken out.
    """
    gc.freeze()
    try:
        yield
        gc.collect()
    except BaseException:
        gc.unfreeze()
        raise
    gc.freeze()


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


@contextmanager
def quick_function_sources() -> Iterator[None]:
    """Inside the block `inspect` finds what it always finds, sooner; in every thread."""
    global _quick_blocks
    with _quick_lock:
        _quick_blocks += 1
        inspect.getblock = block_of  # type: ignore[assignment]
    try:
        yield
    finally:
        with _quick_lock:
            _quick_blocks -= 1
            if not _quick_blocks:
                inspect.getblock = _in_tokens


def block_of(lines: list[str]) -> list[str]:
    """The function that valid source begins with, as `inspect.getblock` finds it.

    It ends before the first line that is indented no more than its first one. Where such a line
    may be inside brackets, a string or a continued line, tokens decide; and where a comment ends
    the function.
    """
    indent, is_def, last = _indent(lines[0]), False, 0
    if not lines[0][indent:].startswith(_STARTS):
        return _in_tokens(lines)
    for number, line in enumerate(lines):
        column = _indent(line)
        text = line[column:]
        if not text.strip():
            continue
        if column <= indent and text[0] not in _CLOSING and text[0] != "#":
            if is_def or not text.startswith(_STARTS):
                break
            is_def = text.startswith("def ")
        if text[0] != "#" or column > indent:
            last = number
    found = lines[: last + 1]
    return found if is_def and _is_whole(found) else _in_tokens(lines)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _is_whole(found: list[str]) -> bool:
    """Whether lines end neither with a comment nor inside anything."""
    text = "".join(found)
    return (
        not found[-1].lstrip().startswith("#")
        and not found[-1].rstrip().endswith("\\")
        and "'''" not in text
        and text.count('"""') % 2 == 0
        and all(text.count(left) == text.count(right) for left, right in ("()", "[]", "{}"))
    )
