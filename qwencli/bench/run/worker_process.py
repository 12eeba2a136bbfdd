"""One worker process seen from the campaign: its messages, its death, its log."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from qwencli.errors import OutputError

# Signals with which somebody else (the out-of-memory killer, an operator) ends a process;
# any other means that it broke by itself.
_KILLED_BY = ("SIGKILL", "SIGTERM", "SIGHUP", "SIGINT")
_EXIT_GRACE_S = 30.0


@dataclass(frozen=True)
class Ending:
    """How a cell's process ended: a status of runs.csv and, unless it is ok, the reason.

    Args:
        of_model: the reason is one of the model's files, whatever the mode.
    """

    status: str
    reason: str | None = None
    of_model: bool = False


class WorkerProcess:
    """A context manager: leaving the block kills whatever is still alive.

    Args:
        command: what to start; speaks the protocol of `qwencli.bench.run.worker`.
        spec_line: the WorkerSpec as JSON.
        log: gets all that the worker prints.
        waiting: called about twice a second while no message comes.
    """

    def __init__(
        self,
        command: Sequence[str],
        spec_line: str,
        log: Path,
        timeout_s: float,
        waiting: Callable[[], None] = lambda: None,
    ) -> None:
        self.log = log
        self._waiting = waiting
        self.timeout_s = timeout_s
        self.ending = Ending("crashed", "ended without saying why")
        self._command = command
        self._spec = (spec_line + "\n").encode()
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        try:
            log = self.log.open("ab")
        except OSError as error:
            raise OutputError(f"{self.log} cannot be written: {error.strerror}") from error
        # A group of its own: Ctrl-C reaches the campaign alone, which then ends the worker.
        group: dict[str, Any] = (
            {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
            if sys.platform == "win32"
            else {"start_new_session": True}
        )
        with log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, **group
            )
        self._deadline = time.monotonic() + self.timeout_s
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    @property
    def pid(self) -> int:
        return self._process.pid

    def messages(self) -> Iterator[dict[str, Any]]:
        """The worker's messages as they come, but for the end, which `ending` has afterwards."""
        self._send_spec()
        while (line := self._next_line()) is not None:
            try:
                message = json.loads(line)
            except json.JSONDecodeError:
                self.ending = Ending("crashed", f"the worker wrote no JSON: {line[:80]!r}")
                return
            if message["type"] == "end":
                of_model = bool(message.get("of_model"))
                self.ending = Ending(message["status"], message["reason"], of_model)
                return
            yield message
        if self.ending.status != "timeout":
            self.ending = self._death()

    def _send_spec(self) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(self._spec)
            stdin.flush()
        except OSError:
            return  # it is dead already: the end of its messages tells how

    def _read(self) -> None:
        stdout = self._process.stdout
        assert stdout is not None
        for line in stdout:
            if line.endswith(b"\n"):  # else the worker was killed while writing it
                self._lines.put(line)
        self._lines.put(None)

    def _next_line(self) -> bytes | None:
        while True:
            left = self._deadline - time.monotonic()
            if left <= 0:
                reason = f"not done after {self.timeout_s:g} s{self._last_words()}"
                self.ending = Ending("timeout", reason)
                return None
            try:
                # In short waits, because Windows delivers Ctrl-C only between them.
                return self._lines.get(timeout=min(left, 0.5))
            except queue.Empty:
                self._waiting()

    def _death(self) -> Ending:
        try:
            code = self._process.wait(timeout=_EXIT_GRACE_S)
        except subprocess.TimeoutExpired:
            return Ending("crashed", f"closed its rows but did not exit{self._last_words()}")
        if code >= 0:
            return Ending("crashed", f"exit code {code}{self._last_words()}")
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        if name not in _KILLED_BY:
            return Ending("crashed", f"died of {name}{self._last_words()}")
        hint = " (out of host memory?)" if name == "SIGKILL" else ""
        return Ending("killed", f"ended from outside by {name}{hint}{self._last_words()}")

    def _last_words(self) -> str:
        """The last line of the log: for a Python error that is the exception itself; where a
        library crashed, the line that called it."""
        try:
            with self.log.open("rb") as log:
                log.seek(0, os.SEEK_END)
                log.seek(max(0, log.tell() - 4096))
                lines = log.read().decode(errors="replace").split("\n")
        except OSError:  # the folder was deleted meanwhile
            return ""
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        for before, line in pairwise(lines):
            if before.startswith("Current thread "):  # of faulthandler
                last = line.strip()
        return f": {last[-300:]}" if last else ""

    def __exit__(self, *exc: object) -> None:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        if exc[0] is None and self.ending.status != "timeout":
            try:
                process.wait(timeout=_EXIT_GRACE_S)
            except subprocess.TimeoutExpired:
                self._kill()
        else:
            self._kill()
        process.wait()
        self._reader.join()
        with suppress(OSError):  # it died before it had read its spec, which is still to be flushed
            process.stdin.close()
        process.stdout.close()

    def _kill(self) -> None:
        """End the worker and what it started (compilers, for one)."""
        if sys.platform == "win32":
            self._process.kill()
            return
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return  # it ended by itself meanwhile
