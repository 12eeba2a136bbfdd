"""A process that stops another one for a while: nothing can wake itself up again.

    python -m qwencli.bench.inject.pauser PID

Reads seconds from stdin, a line each; stops PID for so long and prints when it did and when it let
it go on.

    python -m qwencli.bench.inject.pauser PID guard

Lets PID go on once its stdin closes without a word: when a pauser has been killed meanwhile.
Signals that a process can answer do not end a pauser; nothing may leave PID stopped.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

from qwencli.engine.machine.child_process import python_command
from qwencli.errors import BenchError

_ANSWERED = (signal.SIGTERM, signal.SIGINT, *filter(None, (getattr(signal, "SIGHUP", None),)))


class Pauser:
    """Stops this process from outside."""

    def __init__(self) -> None:
        self._asked = 0
        self._process = subprocess.Popen(
            python_command("qwencli.bench.inject.pauser", str(os.getpid())),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def pause(self, seconds: float) -> None:
        """Ask for a pause; it comes within a millisecond or so, while this process goes on."""
        assert self._process.stdin is not None
        self._asked += 1
        with suppress(BrokenPipeError):  # `pauses` says so
            self._process.stdin.write(f"{seconds}\n")
            self._process.stdin.flush()

    def pauses(self) -> list[tuple[float, float]]:
        """When the pauses asked for since the last call began and ended; waits for them.

        Raises:
            BenchError: the process that makes them is gone.
        """
        assert self._process.stdout is not None
        lines = [self._process.stdout.readline() for _ in range(self._asked)]
        self._asked = 0
        if not all(lines):
            raise BenchError("the process that pauses this one was killed", "inject again")
        pairs = [line.split() for line in lines]
        return [(float(start), float(end)) for start, end in pairs]

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self._process.communicate()  # its stdin closes, so it ends


def main(pid: int) -> int:
    """Pause `pid` as stdin says, until that closes."""
    if sys.platform == "win32":
        raise NotImplementedError("`kinds` looks before this is called")
    for name in _ANSWERED:
        signal.signal(name, signal.SIG_IGN)
    command = python_command("qwencli.bench.inject.pauser", str(pid), "guard")
    with subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0) as guard:
        assert guard.stdin is not None
        try:
            for line in sys.stdin:
                start = time.perf_counter()
                os.kill(pid, signal.SIGSTOP)
                try:
                    time.sleep(float(line))
                finally:
                    os.kill(pid, signal.SIGCONT)
                print(start, time.perf_counter(), flush=True)
            guard.stdin.write(b"over")
        except (ProcessLookupError, BrokenPipeError):
            # Who was to be paused is gone, or the guard. What is not printed is not tried again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 0


def watch(pid: int) -> int:
    """Let `pid` go on when the pauser has gone without having said that it is over."""
    for name in _ANSWERED:
        signal.signal(name, signal.SIG_IGN)
    if sys.platform != "win32" and not sys.stdin.buffer.read():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    return 0


if __name__ == "__main__":
    sys.exit((watch if sys.argv[2:] else main)(int(sys.argv[1])))
