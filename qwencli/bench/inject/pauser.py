"""A process that stops another one for a while: nothing can wake itself up again.

    python -m qwencli.bench.inject.pauser PID

Reads seconds from stdin, a line each; stops PID for so long and prints when it did and when it let
it go on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from qwencli.engine.child_process import python_command


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
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        self._asked += 1

    def pauses(self) -> list[tuple[float, float]]:
        """When the pauses asked for since the last call began and ended; waits for them."""
        assert self._process.stdout is not None
        lines = [self._process.stdout.readline() for _ in range(self._asked)]
        self._asked = 0
        pairs = [line.split() for line in lines]
        return [(float(start), float(end)) for start, end in pairs]

    def close(self) -> None:
        self._process.communicate()  # its stdin closes, so it ends


def main(pid: int) -> int:
    for line in sys.stdin:
        start = time.perf_counter()
        os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(float(line))
        finally:
            os.kill(pid, signal.SIGCONT)
        print(start, time.perf_counter(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
