"""Turns a callback-driven call into a generator, in one thread.

`generate()` pushes tokens; our engines are pulled. A second thread would put a second holder of
the GIL into what we measure, and torch.compile's CUDA graphs are bound to the thread that made
them. A greenlet switches stacks inside the one thread instead.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeVar

from greenlet import GreenletExit, getcurrent, greenlet

T = TypeVar("T")


def pulled(push_all: Callable[[Callable[[T], None]], None]) -> Generator[T]:
    """Yield every value that `push_all(push)` pushes, as it pushes it.

    Closing the generator early raises GreenletExit at the pending `push`, so that `push_all`
    unwinds through its own `finally` blocks. An exception in `push_all` comes out here.
    """
    consumer = getcurrent()

    def push(value: T) -> None:
        consumer.switch(value)

    producer = greenlet(lambda: push_all(push))
    try:
        value = producer.switch()
        while not producer.dead:
            yield value
            # The consumer may pull from another greenlet or frame than the one that started.
            consumer = getcurrent()
            producer.parent = consumer
            value = producer.switch()
    finally:
        if not producer.dead:
            producer.throw(GreenletExit)
