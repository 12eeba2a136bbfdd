"""Calls that may take seconds, in threads that the end of the server does not wait for."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class BackgroundThreads:
    """Threads for an event loop's long calls. Those of `asyncio.to_thread` are joined at the end,
    and nothing stops a look-up of a name, or a server that answers slowly.

    Args:
        most: calls at once; others wait for their turn.
    """

    def __init__(self, most: int) -> None:
        self._turns = asyncio.Semaphore(most)

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `call` returns, or raises."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def tell(outcome: Callable[[], None]) -> None:
            if not done.done():  # nobody may wait any more
                outcome()

        def work() -> None:
            try:
                outcome = functools.partial(done.set_result, call(*args, **kwargs))
            except Exception as error:  # noqa: BLE001 - raised where it is waited for
                outcome = functools.partial(done.set_exception, error)
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(tell, outcome)

        async with self._turns:
            threading.Thread(target=work, name="background", daemon=True).start()
            return await done
