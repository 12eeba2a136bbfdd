"""A server as `qwencli serve` runs it, at a free port of this machine."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil

from qwencli.server.engine_thread import EngineThread
from qwencli.server.http_process import HttpProcess
from qwencli.server.listen import listening
from qwencli.server.settings import ServerSettings

# Threads by what they do.
_PARTS = {"engine": "engine", "prepare": "prepare", "send": "channel", "http requests": "channel"}


@dataclass
class Served:
    """A running server.

    Args:
        address: such as http://127.0.0.1:1234. http: None where this process speaks it.
    """

    address: str
    thread: EngineThread
    http: HttpProcess | None = None

    def cpu_s(self) -> dict[str, float]:
        """What the server has taken of a processor: its engine's thread, those that prepare
        prompts, those of the channel to the process that speaks HTTP, and that process, whose
        event loop is most of it. Empty where the system does not say.
        """
        if not hasattr(time, "pthread_getcpuclockid"):
            return {}
        found: Counter[str] = Counter()
        for each in threading.enumerate():
            name = _PARTS.get(each.name.partition("_")[0])
            if name is not None and each.ident is not None:
                found[name] += time.clock_gettime(time.pthread_getcpuclockid(each.ident))
        if self.http is not None and self.http.is_alive:
            taken = psutil.Process(self.http.pid).cpu_times()
            found["event loop"] = taken.user + taken.system
        return dict(found)


@contextmanager
def serving(engine: Any, settings: ServerSettings, max_waiting: int = 1024) -> Iterator[Served]:
    """Serve an engine that is not loaded yet; it is closed at the end."""
    thread = EngineThread(engine, max_waiting=max_waiting)
    opened = listening("127.0.0.1", 0)
    address = f"http://127.0.0.1:{opened.getsockname()[1]}"
    http = HttpProcess(opened, settings)
    try:
        thread.start()
        ready = threading.Event()
        http.begin(thread, ready.set)
        if not ready.wait(60):
            raise TimeoutError("the process that speaks HTTP is not ready after 60 s")
        yield Served(address, thread, http)
    finally:
        http.close()
        thread.close()
