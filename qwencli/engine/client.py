"""Many answers from one engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from qwencli.engine.protocol import Engine, RequestQueue, SerialQueue
from qwencli.engine.request import RequestSource
from qwencli.errors import QwenCliError
from qwencli.results import GenerationResult

# Requests that have given nothing yet: enough that some are ready whenever rows end, few because
# their pictures are held in memory.
REQUESTS_AHEAD = 32

T = TypeVar("T")


def generate_many(
    engine: Engine, requests: Iterable[RequestSource], *, expected: int | None = None
) -> Iterator[GenerationResult | QwenCliError]:
    """Answer requests together, as many at a time as the engine runs; results in their order.

    Requests are taken from the iterable as there is room for them. One that cannot be answered
    gives its error in place of a result. Closing the iterator aborts what is unfinished.

    Args:
        expected: see `answers`.
    """
    source = enumerate(requests)
    results: dict[int, GenerationResult | QwenCliError] = {}
    due = 0
    for number, result in answers(engine, lambda: next(source, None), expected=expected):
        results[number] = result
        while due in results:
            yield results.pop(due)
            due += 1


def answers(
    engine: Engine,
    take: Callable[[], tuple[T, RequestSource] | None],
    *,
    stopping: Callable[[], bool] = lambda: False,
    expected: int | None = None,
) -> Iterator[tuple[T, GenerationResult | QwenCliError]]:
    """Answer requests together, as many at a time as the engine runs, each as it is finished.

    Args:
        take: gives a request and what it is called, when there is room for one; None = nothing
            now. It may give more later, once answers were handed out. Over when it gives nothing
            and nothing is unfinished.
        stopping: once it is true no more is taken, and what has not begun yet is dropped.
        expected: how many there are; fewer than `Engine.batch_from` are answered one after the
            other.
    """
    engine.load()
    queue: RequestQueue = engine
    if expected is not None and expected < engine.batch_from:
        queue = SerialQueue(engine.stream)
    ahead = REQUESTS_AHEAD if queue.max_rows > 1 else 1
    unfinished: dict[int, T] = {}
    silent: set[int] = set()
    more = True
    try:
        while more or unfinished:
            if stopping():
                more = False
                while silent:
                    number = silent.pop()
                    queue.abort(number)
                    del unfinished[number]
            while more and len(silent) < ahead and (ahead > 1 or not unfinished):
                taken = take()
                if taken is None:
                    more = bool(unfinished)
                    break
                name, request = taken
                # Not kept here: pictures are held no longer than the engine needs them.
                del taken
                number = queue.add(request, stream=False)
                del request
                unfinished[number] = name
                silent.add(number)
            if not unfinished:
                continue
            for output in queue.step():
                silent.discard(output.request)
                if output.finished and output.request in unfinished:
                    result = output.chunk.result if output.chunk else None
                    name = unfinished.pop(output.request)
                    yield name, output.error or _require_result(result)
                    more = not stopping()
    finally:
        for number in unfinished:
            queue.abort(number)


def _require_result(result: GenerationResult | None) -> GenerationResult:
    assert result is not None, "a finished output without an error has a result"
    return result
