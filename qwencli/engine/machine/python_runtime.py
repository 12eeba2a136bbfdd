"""What Python itself does while the engine works, kept out of the way.

It looks for garbage, but not while something is made whose objects all stay, or is timed: reference
counting goes on and frees what is dropped; only circles wait. Threads take turns at its lock, quick
ones here. And for Triton, which reads the source of every kernel that is imported, `inspect` splits
each into tokens to see where it ends, two thirds of the time that importing our kernels takes: a
function's indentation says it sooner.
"""

from __future__ import annotations

import functools
import gc
import inspect
import operator
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ContextDecorator, contextmanager
from typing import Any, Generic, TypeVar

T = TypeVar("T")

# A thread that wants the interpreter lock back waits this long for another one to give it up;
# Python's 5 ms is longer than a token takes. A pass over prompts takes it back at each of hundreds
# of operations. A decode step does so a few times, and where a hundred streams are written
# meanwhile turns that are too short cost both sides.
PASS_TURN_S, STEP_TURN_S = 0.00005, 0.0005
# While a model loads, threads that read weights take turns with those that import and warm up; each
# needs the lock a few times for each piece (docs/experiments/2026-11-30-first-token.md).
LOAD_TURN_S = 0.0002
# How the source of a function begins, and what its first line may close further down.
_STARTS, _CLOSING = ("def ", "@"), ")]}"
_in_tokens = inspect.getblock
# Again by the same thread: what is collected while it is held may end a block.
_lock = threading.RLock()


class _Setting(Generic[T]):
    """A setting of the whole process that blocks want to be another.

    Args:
        joined: what was there before and what each block wants -> what is put.
    """

    _before: T

    def __init__(
        self,
        get: Callable[[], T],
        put: Callable[[T], object],
        joined: Callable[[Sequence[T]], T],
    ) -> None:
        self._get, self._put, self._joined = get, put, joined
        self._wanted: list[T] = []

    def begin(self, value: T) -> None:
        if not self._wanted:
            self._before = self._get()
        self._wanted.append(value)
        self._put(self._joined((self._before, *self._wanted)))

    def end(self, value: T) -> None:
        self._wanted.remove(value)
        self._put(self._joined((self._before, *self._wanted)))


class _Block(ContextDecorator):
    """A block that wants settings to be so.

    Blocks of several threads and streams may end in any order: what all that run want together is
    there for each, and the last one gives back what was there before the first. No generator: a
    step of rows is one, and that takes 10 us for each.
    """

    def __init__(self, *wanted: tuple[_Setting[Any], Any]) -> None:
        self._wanted = wanted

    def __enter__(self) -> None:
        with _lock:
            for setting, value in self._wanted:
                setting.begin(value)

    def __exit__(self, *exc: object) -> None:
        with _lock:
            for setting, value in self._wanted:
                setting.end(value)


_COLLECTS = _Setting(gc.isenabled, lambda on: gc.enable() if on else gc.disable(), all)
_TURN_S: _Setting[float] = _Setting(sys.getswitchinterval, sys.setswitchinterval, min)
_GETBLOCK: _Setting[Any] = _Setting(
    lambda: inspect.getblock,
    functools.partial(setattr, inspect, "getblock"),
    operator.itemgetter(-1),
)


def gc_paused() -> _Block:
    """No collection inside the block. A full one walks every object of every library loaded, 100 ms
    and more in the middle of an answer; of a large set's listing collections take a tenth."""
    return _Block((_COLLECTS, False))


def undisturbed(turn_s: float = PASS_TURN_S) -> _Block:
    """No garbage collection inside the block, and quick turns at the interpreter lock: the quickest
    that any block wants."""
    return _Block((_TURN_S, turn_s), (_COLLECTS, False))


def quick_function_sources() -> _Block:
    """Inside the block `inspect` finds what it always finds, sooner; in every thread."""
    return _Block((_GETBLOCK, block_of))


# Whose load has left something out of collections, and how many loads run.
_frozen_for: weakref.WeakSet[object] = weakref.WeakSet()
_num_loading = 0


@contextmanager
def gc_freeze_loaded(owner: object) -> Iterator[None]:
    """Take everything that exists behind the block out of later collections: it is here to stay,
    until `gc_thawed` of the same owner.

    What was there before is not even looked through for garbage, which takes 0.1 to 0.3 s of
    libraries alone. Blocks of several threads may end in any order. What is made in one that fails
    is not taken out, and nothing is while another runs: it may be garbage at its end.
    """
    global _num_loading
    with _lock:
        if not _num_loading:
            gc.freeze()
        _num_loading += 1
    try:
        yield
        gc.collect()
    except BaseException:
        with _lock:
            _num_loading -= 1
            if not (_num_loading or _frozen_for):
                gc.unfreeze()
        raise
    with _lock:
        _num_loading -= 1
        _frozen_for.add(owner)
        if not _num_loading:
            gc.freeze()


@contextmanager
def gc_thawed(owner: object) -> Iterator[None]:
    """Inside the block everything is looked through for garbage, of which the owner's is now part;
    behind it what there is for other owners is left out again."""
    with _lock:
        _frozen_for.discard(owner)
        gc.unfreeze()
    try:
        yield
    finally:
        with _lock:
            if _frozen_for and not _num_loading:
                gc.freeze()


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
