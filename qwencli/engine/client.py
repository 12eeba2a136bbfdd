"""Many answers from one engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from qwencli.engine.protocol import Engine
from qwencli.engine.request import RequestSource
from qwencli.errors import QwenCliError
from qwencli.results import GenerationResult

# Requests that have given nothing yet: enough that some are ready whenever rows end, few because
# their pictures are held in memory.
REQUESTS_AHEAD = 32


def generate_many(
    engine: Engine, requests: Iterable[RequestSource]
) -> Iterator[GenerationResult | QwenCliError]:
    """Answer requests together, as many at a time as the engine runs; results in their order.

    Requests are taken from the iterable as there is room for them. One that cannot be answered
    gives its error in place of a result. Closing the iterator aborts what is unfinished.
    """
    engine.load()
    ahead = REQUESTS_AHEAD if engine.max_rows > 1 else 1
    source = iter(requests)
    order: dict[int, None] = {}  # those not handed out yet, in the order they came
    unfinished: set[int] = set()
    silent: set[int] = set()
    results: dict[int, GenerationResult | QwenCliError] = {}
    more = True
    try:
        while more or order:
            while more and len(silent) < ahead and (ahead > 1 or not unfinished):
                request = next(source, None)
                if request is None:
                    more = False
                    break
                number = engine.add(request)
                order[number] = None
                unfinished.add(number)
                silent.add(number)
            if unfinished:
                for output in engine.step():
                    silent.discard(output.request)
                    if output.finished:
                        unfinished.discard(output.request)
                        result = output.chunk.result if output.chunk else None
                        results[output.request] = output.error or _known(result)
            while order and (first := next(iter(order))) in results:
                del order[first]
                yield results.pop(first)
    finally:
        for number in unfinished:
            engine.abort(number)


def _known(result: GenerationResult | None) -> GenerationResult:
    assert result is not None, "a finished output without an error has a result"
    return result
