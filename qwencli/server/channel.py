"""A pipe between two processes of ours, whose messages nobody waits for.

What travels is pickled: both ends are one program, started by one user, and no other process has an
end. What clients of a server send is checked before it comes here.
"""

from __future__ import annotations

import contextlib
import pickle
import queue
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    if sys.platform == "win32":  # what `Pipe` gives there
        from multiprocessing.connection import PipeConnection as Connection
    else:
        from multiprocessing.connection import Connection


class Channel:
    """One end. `send` returns at once, whatever the other side does: a thread of its own writes."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._waiting: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="send", daemon=True)
        self._writer.start()

    def send(self, message: tuple[Any, ...]) -> None:
        """Send it, unless the other side is gone. Raises whatever keeps it from being pickled."""
        self._waiting.put(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))

    def messages(self) -> Iterator[Any]:
        """What the other side says, until it closes its end or is gone."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                yield pickle.loads(self._connection.recv_bytes())

    def finish(self) -> None:
        """Return once all is written; nothing is sent after that."""
        self._waiting.put(b"")
        self._writer.join()

    def close(self) -> None:
        """Close this end; nobody may read from it any more."""
        self.finish()
        self._connection.close()

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # which whoever reads finds too
            while data := self._waiting.get():
                self._connection.send_bytes(data)
                del data  # a body may be large, and the next message far away
