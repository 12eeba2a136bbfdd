"""A command's side of the resident engine: find it or start it, ask it, and be it an `Engine`.

Imports neither torch nor transformers: a second caption is there before those would be.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from qwencli.config import EngineConfig
from qwencli.engine.protocol import WAIT_S, ManyRequests, RequestQueue, drain, stream_alone
from qwencli.engine.request import RequestId, RequestSource, StepOutput, request_of
from qwencli.errors import EngineError, OutputError, QwenCliError
from qwencli.messages import GenerationRequest
from qwencli.results import EffectiveConfig, GenerationChunk, GenerationResult
from qwencli.server.frames import HEAD_BYTES, lengths, packed, unpacked
from qwencli.server.resident_state import (
    LOG_FILE,
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
# Pictures that are opened and sent at once.
_OPENERS = 4
Message = dict[str, Any]


class LostError(Exception):
    """The resident process is gone."""


class _Connection:
    """Frames to and from the resident process.

    Raises:
        LostError: nobody is there who knows the token.
    """

    def __init__(self, state: State) -> None:
        self.state = state
        self._sending = threading.Lock()
        try:
            self._socket = socket.create_connection(("127.0.0.1", state.port), CONNECT_S)
        except OSError as error:
            raise LostError from error
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
            pieces = packed(message)
            with self._sending:
                for piece in pieces:
                    self._socket.sendall(piece)
        except OSError as error:
            raise LostError from error

    def read(self) -> Message:
        try:
            num_text, num_pixels = lengths(self._exactly(HEAD_BYTES))
            return unpacked(self._exactly(num_text), self._exactly(num_pixels))
        except (OSError, ValueError, QwenCliError) as error:
            raise LostError from error

    def _exactly(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) < count:
            raise LostError
        return data

    def ask(self, message: Mapping[str, Any]) -> Message:
        self.send(message)
        return self.read()

    def until_gone(self) -> None:
        """Wait until the other end has closed."""
        self._socket.settimeout(LEAVING_S)
        with contextlib.suppress(LostError):
            while True:
                self.read()

    def close(self) -> None:
        # A thread that reads would keep it open.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            self._file.close()
            self._socket.close()


def _found(folder: Path) -> _Connection | None:
    """A connection to the process that the state file tells of; None where nobody is there."""
    state = read_state(folder)
    if state is None or not is_alive(state.pid):
        return None  # its port may be another program's by now, which would keep us waiting
    try:
        return _Connection(state)
    except LostError:
        return None


def _connected(folder: Path) -> _Connection | None:
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
        if again is not None and not _made_way(again):
            return None
        state = start_process(folder)
        try:
            return None if state is None else _Connection(state)
        except LostError:
            return None


def _made_way(connection: _Connection) -> bool:
    """Whether a process of another build has ended, as it does where nothing runs."""
    try:
        if connection.ask({"op": "status"})["running"]:
            return False
        connection.send({"op": "stop"})
        connection.until_gone()
    except LostError:
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
    except LostError:
        return None
    finally:
        connection.close()
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
            return Status(**{name: value for name, value in said.items() if name != "op"})
        except LostError:
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


class ResidentEngine(ManyRequests):
    """Implements `Engine` over the resident process.

    Args:
        keep_s: how long the engine stays after the last request.
        say: takes a line about what had to be done anew.
    """

    def __init__(self, config: EngineConfig, keep_s: float, say: Callable[[str], None]) -> None:
        model = config.model
        if model.path is not None:
            # The process has another working folder.
            config = replace(config, model=replace(model, path=model.path.absolute()))
        self.config = self._asked = config
        self._keep_s, self._say = keep_s, say
        self._line: _Line | None = None
        self._ready: Message = {}
        self._load_s = 0.0
        self._max_rows: int | None = None
        # Why it cannot be used here and now; empty where it can.
        self.unusable = ""

    @property
    def effective(self) -> EffectiveConfig:
        ran: EffectiveConfig = self._ready["effective"]
        return ran

    @property
    def load_s(self) -> float:
        return self._load_s

    @property
    def max_seq_len(self) -> int | None:
        length: int | None = self._ready["max_seq_len"]
        return length

    @property
    def memory_plan(self) -> Mapping[str, int]:
        plan: Mapping[str, int] = self._ready["memory_plan"]
        return plan

    @property
    def load_warnings(self) -> tuple[str, ...]:
        warnings: tuple[str, ...] = self._ready["load_warnings"]
        return warnings

    @property
    def max_rows(self) -> int:
        if self._max_rows is None:
            self._max_rows = self._asked_rows()
        return self._max_rows

    def _asked_rows(self) -> int:
        box: queue.SimpleQueue[tuple[int, Message | None]] = queue.SimpleQueue()
        line = self.line()
        number = line.number(box)
        line.send({"op": "rows", "id": number})
        try:
            _, message = box.get()
        finally:
            line.drop(number)
        if message is None:
            raise self._gone("while it made room for many requests")
        if "error" in message:
            raise message["error"]
        rows: int = message["rows"]
        return rows

    def load(self) -> None:
        """Have the model loaded there.

        Raises:
            QwenCliError: it cannot be; or the process is busy or does not start (`unusable`).
        """
        if self._line is not None:
            return
        begun_s = time.perf_counter()
        try:
            connection, answer = self._introduced()
        except LostError:
            # It may have been leaving just then; one that loads the model may also have crashed.
            try:
                connection, answer = self._introduced()
            except LostError as error:
                raise self._gone("while it was loading the model") from error
        if answer["op"] != "ready":
            connection.close()
            if answer["op"] == "error":
                raise answer["error"]
            raise self._is_unusable(f"the resident engine is busy with {answer['model']}")
        self._ready, self._load_s = answer, time.perf_counter() - begun_s
        self.config = answer["config"]
        self._line = _Line(connection)

    def _introduced(self) -> tuple[_Connection, Message]:
        """A connection, and what the process says to our configuration."""
        try:
            connection = _connected(state_folder())
        except OutputError as error:  # the folder cannot be written
            raise self._is_unusable(f"no resident engine can be had: {error.message}") from error
        except OSError as error:
            why = f"{state_folder()}: {error.strerror or error}"
            raise self._is_unusable(f"no resident engine can be had: {why}") from error
        if connection is None:
            raise self._is_unusable(f"no resident engine can be had ({state_folder() / LOG_FILE})")
        try:
            use = {"op": "use", "config": self._asked, "keep_s": self._keep_s}
            return connection, connection.ask(use)
        except BaseException:
            connection.close()
            raise

    def _is_unusable(self, why: str) -> EngineError:
        self.unusable = why
        return EngineError(why, "use --keep-loaded 0")

    def _gone(self, when: str) -> EngineError:
        return EngineError(
            f"the resident engine has ended {when}",
            f"{state_folder() / LOG_FILE} may tell why; --keep-loaded 0 does without it",
        )

    def stream(self, request: GenerationRequest) -> Iterator[GenerationChunk]:
        """Yield the answer as its pieces come.

        Raises:
            QwenCliError: as the engine there does, or it has ended.
        """
        self.load()
        return self._streamed(request, stream=True)

    def generate(self, request: GenerationRequest) -> GenerationResult:
        self.load()
        return drain(self._streamed(request, stream=False))

    def _streamed(self, request: GenerationRequest, *, stream: bool) -> Iterator[GenerationChunk]:
        yield from stream_alone(_ResidentQueue(self, in_batch=False), request, stream=stream)

    def _make_queue(self) -> RequestQueue:
        return _ResidentQueue(self, in_batch=True)

    def line(self) -> _Line:
        self.load()
        assert self._line is not None, "it was just loaded"
        return self._line

    def anew(self, *, may_go_on: bool) -> None:
        """The process is gone: start another.

        Raises:
            EngineError: what was asked cannot be asked again.
        """
        if self._line is not None:
            self._line.close()
            self._line = None
        if not may_go_on:
            raise self._gone("in the middle of an answer")
        self._say("the resident engine has ended; starting it again")
        self.load()

    def timed(self, chunk: GenerationChunk) -> GenerationChunk:
        """With the time that this command waited for the model, which may have been there."""
        if chunk.result is None:
            return chunk
        timings = replace(chunk.result.timings, load_s=self._load_s)
        return replace(chunk, result=replace(chunk.result, timings=timings))

    def close(self) -> None:
        if self._line is not None:
            self._close_queue()
            self._line.close()
            self._line = None

    def __enter__(self) -> Self:
        self.load()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Line:
    """One connection in use: a thread reads what comes, those who ask look into their boxes."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self._numbers = itertools.count()
        self._boxes: dict[int, queue.SimpleQueue[tuple[int, Message | None]]] = {}
        self._lost = False
        self._guard = threading.Lock()
        threading.Thread(target=self._read, name="resident", daemon=True).start()

    def number(self, box: queue.SimpleQueue[tuple[int, Message | None]]) -> int:
        with self._guard:
            number = next(self._numbers)
            self._boxes[number] = box
            if self._lost:
                box.put((number, None))
            return number

    def send(self, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(LostError):  # which the reading thread will tell
            self._connection.send(message)

    def drop(self, number: int) -> None:
        with self._guard:
            self._boxes.pop(number, None)

    def _read(self) -> None:
        with contextlib.suppress(LostError):
            while True:
                message = self._connection.read()
                box = self._boxes.get(message["id"])
                if box is not None:
                    box.put((message["id"], message))
        with self._guard:
            self._lost = True
            for number, box in self._boxes.items():
                box.put((number, None))

    def close(self) -> None:
        self._connection.close()


class _ResidentQueue:
    """The requests of one caller. One whose pieces were read is lost with the process; another is
    asked for again."""

    def __init__(self, engine: ResidentEngine, *, in_batch: bool) -> None:
        self._engine, self._in_batch = engine, in_batch
        self._openers = ThreadPoolExecutor(_OPENERS, "open pictures") if in_batch else None
        self._box: queue.SimpleQueue[tuple[int, Message | None]] = queue.SimpleQueue()
        self._ids = itertools.count()
        # Ours -> what was asked, and whether its pieces are read; and the line's number -> ours.
        self._sources: dict[RequestId, tuple[RequestSource, bool]] = {}
        self._asked: dict[int, RequestId] = {}
        self._begun = False
        self._num_lost = 0
        self._line = engine.line()

    @property
    def max_rows(self) -> int:
        return self._engine.max_rows

    @property
    def has_unfinished(self) -> bool:
        return bool(self._sources)

    def add(self, request: RequestSource, *, stream: bool = True) -> RequestId:
        number = next(self._ids)
        self._sources[number] = request, stream
        self._ask(number)
        return number

    def _ask(self, number: RequestId) -> None:
        asked = self._line.number(self._box)
        self._asked[asked] = number
        if self._openers is None:
            self._send(self._line, asked, *self._sources[number])
        else:
            self._openers.submit(self._send, self._line, asked, *self._sources[number])

    def _send(self, line: _Line, asked: int, source: RequestSource, stream: bool) -> None:
        try:
            request = request_of(source)
            message = {"op": "add", "id": asked, "stream": stream, "in_batch": self._in_batch}
            line.send(message | {"request": request})
        except QwenCliError as error:
            self._box.put((asked, {"error": error}))
        except Exception as error:  # noqa: BLE001 - told where the answer is awaited
            failure = EngineError(f"{type(error).__name__}: {error}", "report this fault")
            failure.__cause__ = error
            self._box.put((asked, {"error": failure}))

    def step(self) -> list[StepOutput]:
        """What has come; waits for something, but not for long."""
        while self._sources:
            try:
                asked, message = self._box.get(timeout=WAIT_S)
            except queue.Empty:
                return []
            number = self._asked.get(asked)
            if number is None or number not in self._sources:
                continue
            if message is None:
                self._ask_again()
                continue
            chunk = message.get("chunk")
            output = StepOutput(
                number, None if chunk is None else self._engine.timed(chunk), message.get("error")
            )
            self._begun = self._begun or (self._sources[number][1] and chunk is not None)
            if output.finished:
                self._forget(number)
            return [output]
        return []

    def _ask_again(self) -> None:
        """The process is gone, and all that it held."""
        self._num_lost += 1
        self._asked.clear()
        self._engine.anew(may_go_on=not self._begun and self._num_lost < 2)
        self._line = self._engine.line()
        for number in self._sources:
            self._ask(number)

    def _forget(self, number: RequestId) -> list[int]:
        """Drop a request; the line's numbers for it."""
        self._sources.pop(number, None)
        asked = [each for each, ours in self._asked.items() if ours == number]
        for each in asked:
            del self._asked[each]
            self._line.drop(each)
        return asked

    def abort(self, request: RequestId) -> None:
        if request in self._sources:
            for asked in self._forget(request):
                self._line.send({"op": "abort", "id": asked})

    def close(self) -> None:
        if self._openers is not None:
            self._openers.shutdown(wait=False, cancel_futures=True)
        for number in list(self._sources):
            self.abort(number)


def default_keep_s(device: str) -> float:
    """Loading a model onto a GPU takes long enough that keeping it pays."""
    if device != "auto" and not device.startswith("cuda"):
        return 0.0
    from qwencli.engine.machine.host import num_gpus

    return 300.0 if num_gpus() else 0.0
