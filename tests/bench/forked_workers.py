"""Worker processes that are forked from one that has imported what all of them need.

    python -m tests.bench.forked_workers SOCKET

Python and its imports take longer than most campaigns of a fake engine. What is forked is a
process as any other is: with its own id and group, and whatever ends it is seen.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import runpy
import select
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

FOLDER = Path(__file__).parent
MOST_BYTES = 1 << 20


@functools.cache
def forker() -> socket.socket:
    """Starts the process that others are forked from, which ends with this one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MOST_BYTES)
    with theirs:
        command = [sys.executable, "-m", "tests.bench.forked_workers", str(theirs.fileno())]
        null, root = subprocess.DEVNULL, FOLDER.parents[1]
        process = subprocess.Popen(
            command, cwd=root, stdin=null, stdout=null, pass_fds=[theirs.fileno()]
        )
    atexit.register(process.wait)
    atexit.register(ours.close)  # which comes first
    return ours


def popen(command: Sequence[str], **how: Any) -> subprocess.Popen[bytes] | Forked:
    """As `subprocess.Popen`; what is no worker of these tests is started as ever."""
    python, *program = command
    if python == sys.executable and FOLDER in Path(program[0]).parents:
        return Forked(program, **how)
    return subprocess.Popen(command, **how)


INSTEAD_OF_SUBPROCESS = SimpleNamespace(
    Popen=popen, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired
)


class Forked:
    """What a campaign needs of `subprocess.Popen`."""

    def __init__(
        self,
        program: list[str],
        stdin: int,
        stdout: int,
        stderr: IO[bytes],
        start_new_session: bool,
    ) -> None:
        assert stdin == stdout == subprocess.PIPE
        assert start_new_session
        read, to_read = os.pipe()
        written, to_write = os.pipe()
        self._state, of_state = os.pipe()
        self.stdin, self.stdout = os.fdopen(to_read, "wb"), os.fdopen(written, "rb")
        self.returncode: int | None = None
        about = {"argv": program, "folder": str(Path.cwd()), "environment": dict(os.environ)}
        theirs = [read, to_write, stderr.fileno(), of_state]
        socket.send_fds(forker(), [json.dumps(about).encode()], theirs)
        for descriptor in (read, to_write, of_state):
            os.close(descriptor)
        self.pid = int(self._said())

    def _said(self) -> str:
        text = b""
        while not text.endswith(b"\n"):
            piece = os.read(self._state, 64)
            assert piece, "the process that forks has ended"
            text += piece
        return text.decode()

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._state], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            self.returncode = int(self._said())
            os.close(self._state)
        return self.returncode


def serve(asked: socket.socket) -> None:
    """Fork a worker for each message, until nobody is there to ask."""
    # What they import where they run.
    from tests.bench.inject import busy_engine  # noqa: F401
    from tests.bench.studies import studied_engine  # noqa: F401

    gc.freeze()  # or those that are forked look through all of it
    while True:
        message, descriptors, *_ = socket.recv_fds(asked, MOST_BYTES, 4)
        if not message:
            return
        if os.fork() == 0:
            asked.close()
            follow(json.loads(message), descriptors)
            return
        for descriptor in descriptors:
            os.close(descriptor)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def follow(about: dict[str, Any], descriptors: list[int]) -> None:
    """Be the worker that was asked for, in a process whose parent tells how it ends."""
    *standard, state = descriptors
    worker = os.fork()
    if worker:
        for descriptor in standard:
            os.close(descriptor)
        os.write(state, f"{worker}\n".encode())
        _, status = os.waitpid(worker, 0)
        os.write(state, f"{os.waitstatus_to_exitcode(status)}\n".encode())
        os._exit(0)
    os.close(state)
    os.setsid()
    for number, descriptor in enumerate(standard):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(about["folder"])
    os.environ.clear()
    os.environ.update(about["environment"])
    sys.argv = about["argv"]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        assert isinstance(ended.code, int), "as what is returned by `main`"
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended.code)  # to take down what was imported takes longer than what was run


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
