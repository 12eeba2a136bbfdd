"""A command's side of the resident process: find it or start it, connect to it, look at it, end it.

`resident_engine` is the `Engine` over it. Imports neither torch nor transformers.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwencli.errors import OutputError, QwenCliError
from qwencli.server.frames import HEAD_BYTES, decode_frame, encode_frame, frame_lengths
from qwencli.server.resident_state import (
    State,
    build,
    forget_state,
    is_alive,
    make_folder,
    read_state,
    start_process,
    starting_alone,
    state_folder,
)

# Whoever listens answers at once, or, while a model is loaded, soon.
CONNECT_S, ANSWER_S, LEAVING_S = 2.0, 15.0, 10.0
Message = dict[str, Any]


class ConnectionLostError(Exception):
    """The resident process is gone."""


class Connection:
    """Frames to and from the resident process.

    Raises:
        ConnectionLostError: nobody is there who knows the token.
    """

    def __init__(self, state: State) -> None:
        self.state = state
        self._sending = threading.Lock()
        try:
            self._socket = socket.create_connection(("127.0.0.1", state.port), CONNECT_S)
        except OSError as error:
            raise ConnectionLostError from error
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.settimeout(ANSWER_S)
        self._file = self._socket.makefile("rb")
        try:
            self.send({"op": "hello", "token": state.token})
            self.build = str(self.read()["build"])
        except BaseException:
            self.close()
            raise
        self._socket.settimeout(None)

    def send(self, message: Mapping[str, Any]) -> None:
        try:
            pieces = encode_frame(message)
            with self._sending:
                for piece in pieces:
                    self._socket.sendall(piece)
        except OSError as error:
            raise ConnectionLostError from error

    def read(self) -> Message:
        try:
            num_text, num_pixels = frame_lengths(self._exactly(HEAD_BYTES))
            return decode_frame(self._exactly(num_text), self._exactly(num_pixels))
        except (OSError, ValueError, QwenCliError) as error:
            raise ConnectionLostError from error

    def _exactly(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) < count:
            raise ConnectionLostError
        return data

    def ask(self, message: Mapping[str, Any]) -> Message:
        self.send(message)
        return self.read()

    def until_gone(self) -> None:
        """Wait until the other end has closed."""
        self._socket.settimeout(LEAVING_S)
        with contextlib.suppress(ConnectionLostError):
            while True:
                self.read()

    def close(self) -> None:
        # A thread that reads would keep it open.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            self._file.close()
            self._socket.close()


def _found(folder: Path) -> Connection | None:
    """A connection to the process that the state file tells of; None where nobody is there."""
    state = read_state(folder)
    if state is None or not is_alive(state.pid):
        return None  # its port may be another program's by now, which would keep us waiting
    try:
        return Connection(state)
    except ConnectionLostError:
        return None


def running(folder: Path) -> Connection | None:
    """A connection to the resident process of this build; None where there is none."""
    found = _found(folder)
    if found is not None and found.build != build():
        found.close()
        return None
    return found


def connect(folder: Path) -> Connection | None:
    """A connection to a resident process of this build, started where there is none; None where
    one of another build is busy, or none starts."""
    wanted = build()
    found = _found(folder)
    if found is not None and found.build == wanted:
        return found
    if found is not None:
        found.close()
    make_folder(folder)
    with starting_alone(folder):
        again = _found(folder)  # another command has started one meanwhile
        if again is not None and again.build == wanted:
            return again
        if again is not None and not _ended_for_us(again):
            return None
        state = start_process(folder)
        try:
            return None if state is None else Connection(state)
        except ConnectionLostError:
            return None


def _ended_for_us(connection: Connection) -> bool:
    """Whether a process of another build has ended, as it does where nothing runs."""
    try:
        if connection.ask({"op": "status"})["running"]:
            return False
        connection.send({"op": "stop"})
        connection.until_gone()
    except ConnectionLostError:
        return True
    finally:
        connection.close()
    return True


@dataclass(frozen=True)
class Status:
    """What the resident engine is doing.

    Args:
        model, device: None where nothing is loaded.
        memory_bytes: of its GPU; of the CPU, what the process has.
        running: requests that run or wait.
        until_s: seconds until it ends, where nothing is asked.
    """

    pid: int
    model: str | None
    device: str | None
    quantization: str | None
    memory_bytes: int | None
    running: int
    until_s: float


def status() -> Status | None:
    """None where no resident process answers."""
    connection = _found(state_folder())
    if connection is None:
        return None
    try:
        said = connection.ask({"op": "status"})
    except ConnectionLostError:
        return None
    finally:
        connection.close()
    return _status_in(said)


def _status_in(said: Message) -> Status:
    return Status(**{name: value for name, value in said.items() if name != "op"})


def stop() -> Status | None:
    """End the resident process; what it did. None where there is none.

    Raises:
        OutputError: it does not answer, and cannot be ended.
    """
    folder = state_folder()
    state = read_state(folder)
    if state is None:
        return None
    connection = _found(folder)
    if connection is not None:
        try:
            said = connection.ask({"op": "stop"})
            connection.until_gone()
            return _status_in(said)
        except ConnectionLostError:
            pass
        finally:
            connection.close()
    killed = _killed(state)
    forget_state(folder, state)
    return Status(state.pid, None, None, None, None, 0, 0.0) if killed else None


def _killed(state: State) -> bool:
    """End a process that does not answer; False where it is none of ours, or gone."""
    import psutil

    try:
        process = psutil.Process(state.pid)
        if "qwencli.server.resident_process" not in process.cmdline():
            return False
        process.kill()
        process.wait(LEAVING_S)
    except psutil.NoSuchProcess:
        return False
    except psutil.Error as error:
        raise OutputError(f"process {state.pid} does not end: {error}", "end it by hand") from error
    return True
