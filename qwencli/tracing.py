"""Notes what is done and when, and writes it as a Chrome trace (`--profile`).

`span` marks a phase wherever it runs, in any thread; while nothing is traced it costs next to
nothing. What other processes and GPUs did is added to the same trace, as their times are on the
same clock: `time.perf_counter`, which all processes of a machine share.

The file is JSON in the Trace Event Format, which chrome://tracing and ui.perfetto.dev open:
complete events ("X", microseconds from the process's start) on rows that metadata events ("M")
name. Where a viewer says process this has a group of rows: this process's threads, requests, a GPU.
"""

from __future__ import annotations

import importlib.machinery
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from qwencli.errors import OutputError, UsageError
from qwencli.results import GenerationResult

# A set of pictures may run for days; viewers open about so many.
MOST_EVENTS = 400_000
REQUESTS = "requests"
# What a request's own preparation does not account for, and an import that says something.
_WAITED_S, _IMPORTED_S = 0.005, 0.001
_NOTHING = nullcontext()


class Event(NamedTuple):
    """`name` was done from `start_s` to `end_s`, and stands in row `row` of group `group`."""

    group: str
    row: str
    name: str
    start_s: float
    end_s: float
    about: Mapping[str, Any] | None = None


class Trace:
    """What has been noted so far; any thread may add to it."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._requests: list[tuple[float, float, list[Event]]] = []
        self._room = MOST_EVENTS
        self.num_dropped = 0
        # What is missing, and why; a line each.
        self.notes: list[str] = []
        # Called as each answer is added, and at the end.
        self.listeners: list[Callable[[], None]] = []
        self.endings: list[Callable[[], None]] = []
        self._here = f"qwencli (process {os.getpid()})"

    def add(self, events: Iterable[Event]) -> None:
        for event in events:
            if self._room <= 0:
                self.num_dropped += 1
                continue
            self._room -= 1
            self._events.append(event)

    def add_here(
        self, name: str, start_s: float, end_s: float, about: Mapping[str, Any] | None = None
    ) -> None:
        """Something that this thread has done."""
        thread = threading.current_thread()
        row = f"{thread.name} ({threading.get_native_id()})"
        self.add([Event(self._here, row, name, start_s, end_s, about)])

    def add_answer(self, name: str, result: GenerationResult) -> None:
        """A request's phases and tokens, from its own timings, in a row that is free then.

        On CUDA these are times between events in the GPU's stream; of a server, what is seen of
        its stream from here.
        """
        for listener in self.listeners:
            listener()
        events = _answer_events(name, result)
        if len(events) > self._room:
            self.num_dropped += len(events)
            return
        self._room -= len(events)
        self._requests.append((events[0].start_s, events[0].end_s, events))

    @property
    def events(self) -> list[Event]:
        """All of it, requests side by side where they overlap."""
        placed = list(self._events)
        free_s: list[float] = []
        for start_s, end_s, events in sorted(self._requests, key=lambda each: each[:2]):
            row = next((n for n, until_s in enumerate(free_s) if until_s <= start_s), len(free_s))
            free_s[row:] = [end_s, *free_s[row + 1 :]]
            placed += [each._replace(row=f"row {row}") for each in events]
        return placed


def _answer_events(name: str, result: GenerationResult) -> list[Event]:
    t, tokens = result.timings, result.token_t_s
    first_s = tokens[0] if tokens else time.perf_counter()
    start_s = first_s - (t.e2e_s if t.ttft_s is None else t.ttft_s)
    about = {
        "finish_reason": result.finish_reason,
        "num_prompt_tokens": result.num_prompt_tokens,
        "num_image_tokens": result.num_image_tokens,
        "num_new_tokens": result.num_new_tokens,
        "ran": {key: str(value) for key, value in vars(result.effective).items()},
    }
    end_s = max(start_s + t.e2e_s, first_s, *tokens[-1:])
    events = [Event(REQUESTS, "", name, start_s, end_s, about)]

    def add(phase: str, begun_s: float, over_s: float) -> None:
        # What lies side by side must not overlap by what clocks differ by.
        begun_s = max(begun_s, events[-1].end_s if len(events) > 1 else start_s)
        if over_s > begun_s:
            events.append(Event(REQUESTS, "", phase, begun_s, over_s))

    prefill_s = start_s if t.prefill_s is None else first_s - t.prefill_s
    vision_s = prefill_s - (t.vision_encode_s or 0.0)
    if t.preprocess_s is not None:
        waited = vision_s - start_s - t.preprocess_s > _WAITED_S
        add("waiting and preprocess" if waited else "preprocess", start_s, vision_s)
    if t.vision_encode_s is not None:
        add("vision", vision_s, prefill_s)
    add("prefill" if t.prefill_s is not None else "first token", prefill_s, first_s)
    for before_s, at_s in itertools.pairwise(tokens):
        add("decode", before_s, at_s)
    return events


_active: Trace | None = None


def active() -> Trace | None:
    """The trace of this process, while one is made."""
    return _active


def trace_answer(name: str, result: GenerationResult) -> None:
    """Add an answer's phases, where a trace is made."""
    trace = active()
    if trace is not None:
        trace.add_answer(name, result)


def span(name: str, /, **about: object) -> AbstractContextManager[object]:
    """Marks what the block does, where a trace is made."""
    return _NOTHING if _active is None else _Span(_active, name, about)


class _Span:
    __slots__ = ("_about", "_name", "_start_s", "_trace")

    def __init__(self, trace: Trace, name: str, about: Mapping[str, object]) -> None:
        self._trace, self._name, self._about = trace, name, about

    def __enter__(self) -> None:
        self._start_s = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        self._trace.add_here(self._name, self._start_s, time.perf_counter(), self._about or None)


@contextmanager
def tracing() -> Iterator[Trace]:
    """Makes a trace while the block runs: what is marked, and each package that is imported."""
    global _active
    trace = _active = Trace()
    finder = _ImportTimer(trace)
    sys.meta_path.insert(0, finder)
    try:
        yield trace
    finally:
        _active = None
        sys.meta_path.remove(finder)
        for end in trace.endings:
            end()


class _ImportTimer:
    """Finds packages as Python does, and notes how long each takes that others do not contain."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        if "." in name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name)
        run = getattr(spec and spec.loader, "exec_module", None)
        if spec is None or run is None:
            return None

        def timed(module: Any) -> None:
            started_s = time.perf_counter()
            try:
                run(module)
            finally:
                ended_s = time.perf_counter()
                if ended_s - started_s > _IMPORTED_S:
                    self._trace.add_here(f"import {name}", started_s, ended_s)

        with suppress(AttributeError):  # one that is written in C has no room for it
            spec.loader.exec_module = timed  # type: ignore[union-attr,method-assign]
        return spec


@dataclass
class TraceFile:
    """Where a trace goes; `check` before the work, `write` after it."""

    path: Path
    option: str = "--profile"
    _began_s: float = field(default_factory=time.perf_counter)

    def check(self) -> None:
        """Raises UsageError where the file cannot be made, or is there already."""
        path, folder = self.path, self.path.parent
        if path.is_dir():
            raise UsageError(f"{self.option} {path} is a folder", "name a file, as trace.json")
        if os.path.lexists(path):
            raise UsageError(f"{self.option} {path} exists", "name another file, or delete it")
        if not folder.is_dir():
            what = "is not a folder" if folder.exists() else "does not exist"
            raise UsageError(f"{self.option} {path}: {folder} {what}", "make it, or name another")
        try:
            self._beside().touch()
            self._beside().unlink()
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise UsageError(
                f"{self.option} {path} cannot be written ({why})", "name another file"
            ) from error

    def write(self, trace: Trace, about: Mapping[str, Any]) -> None:
        """Write the file whole, or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        beside = self._beside()
        try:
            with beside.open("w", encoding="utf-8") as stream:
                _write(stream.write, trace, self._began_s, about)
            beside.replace(self.path)
        except OSError as error:
            with suppress(OSError):
                beside.unlink()
            raise OutputError(
                f"{self.option} {self.path} cannot be written ({error.strerror or error})",
                "free space, or name another file",
            ) from error

    def _beside(self) -> Path:
        return self.path.with_name(f".{self.path.name[:100]}.{_MARK}")


_MARK = os.urandom(4).hex()


def _write(
    write: Callable[[str], object], trace: Trace, began_s: float, about: Mapping[str, Any]
) -> None:
    events = sorted(trace.events, key=lambda each: (each.start_s, -each.end_s))
    began_s = min([began_s, *(each.start_s for each in events[:1])])
    groups: dict[str, int] = {}
    rows: dict[tuple[str, str], int] = {}
    write('{"displayTimeUnit": "ms", "otherData": ')
    write(json.dumps({**about, "notes": trace.notes, "events_left_out": trace.num_dropped}))
    write(', "traceEvents": [')
    mark = "\n"
    for each in events:
        # A trace without what it can show says as little as no trace.
        one: dict[str, Any] = {
            "ph": "X",
            "name": each.name,
            "ts": round((each.start_s - began_s) * 1e6, 3),
            "dur": round(max(each.end_s - each.start_s, 0.0) * 1e6, 3),
            "pid": groups.setdefault(each.group, len(groups) + 1),
            "tid": rows.setdefault((each.group, each.row), len(rows) + 1),
        }
        if each.about:
            one["args"] = each.about
        write(mark + json.dumps(one))
        mark = ",\n"
    names = [("process_name", pid, 0, group) for group, pid in groups.items()]
    names += [("thread_name", groups[group], tid, row) for (group, row), tid in rows.items()]
    for name, pid, tid, text in names:
        one = {"ph": "M", "name": name, "pid": pid, "tid": tid, "args": {"name": text}}
        write(mark + json.dumps(one))
        mark = ",\n"
    write("\n]}\n")
