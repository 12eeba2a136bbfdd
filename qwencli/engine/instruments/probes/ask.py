"""Asks the probe process, and turns its death, silence and errors into answers."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

from qwencli.engine.instruments.probes.answers import PROBES, decode, dumps
from qwencli.engine.machine.child_process import python_command

# What leaves the device as it was.
_HARMLESS = ("ImportError", "ModuleNotFoundError")


class Outcome(StrEnum):
    OK = "ok"
    FAILED = "failed"
    CRASHED = "crashed"
    TIMEOUT = "timeout"


@dataclass(frozen=True)
class ProbeAnswer:
    """How one probe ended.

    Args:
        value: of the type that the table names, for OK alone.
        kind: the exception's class, for FAILED; the signal or exit code, for CRASHED.
        error: its message, or the last line the process wrote.
    """

    outcome: Outcome
    seconds: float
    value: Any = None
    kind: str = ""
    error: str = ""


class ProbeProcess:
    """A context manager around a process that is started when first asked, and again after it died.

    Args:
        command: what to start; speaks the protocol of `qwencli.engine.instruments.probes.child`.
    """

    def __init__(self, command: list[str] | None = None) -> None:
        self._command = command or python_command("qwencli.engine.instruments.probes.child")
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._end()

    def ask(self, name: str, device: str, work: Any, timeout_s: float | None = None) -> ProbeAnswer:
        """The probe's answer; never raises for what happens over there.

        Args:
            timeout_s: None = what the table allows.
        """
        started = time.monotonic()
        limit = PROBES[name].timeout_s if timeout_s is None else timeout_s
        process = self._process or self._start()
        assert process.stdin is not None
        with suppress(OSError):  # it is dead already: the missing answer tells how
            process.stdin.write(
                (dumps({"probe": name, "device": device, "work": work}) + "\n").encode()
            )
            process.stdin.flush()
        try:
            line = self._lines.get(timeout=limit)
        except queue.Empty:
            self._end()
            return ProbeAnswer(Outcome.TIMEOUT, limit, error=f"no answer after {limit:g} s")
        seconds = time.monotonic() - started
        if line is None:
            return self._death(seconds)
        message: Mapping[str, Any] = json.loads(line)
        if "value" in message:
            value = decode(PROBES[name].answer, message["value"])
            return ProbeAnswer(Outcome.OK, seconds, value)
        if message["kind"] not in _HARMLESS:
            # An error on the device may have broken the process's context for good.
            self._end()
        return ProbeAnswer(
            Outcome.FAILED, seconds, kind=message["kind"], error=first_line(message["error"])
        )

    def _start(self) -> subprocess.Popen[bytes]:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process, in _end
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log
        )
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._reader = threading.Thread(
            target=self._read, args=(self._process, self._lines), daemon=True
        )
        self._reader.start()
        return self._process

    @staticmethod
    def _read(process: subprocess.Popen[bytes], lines: queue.SimpleQueue[bytes | None]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    def _death(self, seconds: float) -> ProbeAnswer:
        assert self._process is not None
        code = self._process.wait()
        self._log.seek(0)
        words = self._log.read()[-4096:].decode(errors="replace").strip().splitlines()
        self._end()
        return ProbeAnswer(
            Outcome.CRASHED, seconds, kind=_death_name(code), error=words[-1] if words else ""
        )

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        self._reader.join()
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(OSError):  # a request that it never read
            process.stdin.close()
        process.stdout.close()
        self._log.close()


def first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:300]


def _death_name(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
