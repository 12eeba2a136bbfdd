"""`Engine` over the resident process: what a command asks runs there, as if it ran here.

Imports neither torch nor transformers: a second caption is there before those would be.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from qwencli.config import EngineConfig
from qwencli.engine.protocol import WAIT_S, QueuedEngine, RequestQueue
from qwencli.engine.request import RequestId, RequestSource, StepOutput, request_of
from qwencli.errors import EngineError, OutputError, QwenCliError, RequestError
from qwencli.results import EffectiveConfig, GenerationChunk
from qwencli.server.resident import Connection, ConnectionLostError, Message, connect, running
from qwencli.server.resident_state import LOG_FILE, state_folder

# Pictures that are opened and sent at once.
_OPENERS = 4
_NOT_THERE = "no resident engine has this model loaded"
Inbox = queue.SimpleQueue[tuple[int, Message | None]]


class ResidentEngine(QueuedEngine):
    """Implements `Engine` over the resident process.

    Args:
        keep_s: how long the engine stays after the last request; None = as long as was said of it
            last, and only where it is loaded already.
        say: takes a line about what had to be done anew.

    `stream` raises what the engine there says, and EngineError where it has ended.
    """

    def __init__(
        self, config: EngineConfig, keep_s: float | None, say: Callable[[str], None]
    ) -> None:
        model = config.model
        if model.path is not None:
            # The process has another working folder.
            config = replace(config, model=replace(model, path=model.path.absolute()))
        self.config = self._asked = config
        self._keep_s, self._say = keep_s, say
        self._shared: _SharedConnection | None = None
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
    def model_type(self) -> str | None:
        kind: str | None = self._ready["model_type"]
        return kind

    @property
    def can_think(self) -> bool | None:
        thinks: bool | None = self._ready["can_think"]
        return thinks

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
        inbox: Inbox = queue.SimpleQueue()
        shared = self.shared()
        number = shared.register(inbox)
        shared.send({"op": "rows", "id": number})
        try:
            _, message = inbox.get()
        finally:
            shared.drop(number)
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
        if self._shared is not None:
            return
        begun_s = time.perf_counter()
        try:
            connection, answer = self._introduced()
        except ConnectionLostError:
            # It may have been leaving just then; one that loads the model may also have crashed.
            try:
                connection, answer = self._introduced()
            except ConnectionLostError as error:
                raise self._gone("while it was loading the model") from error
        if answer["op"] != "ready":
            connection.close()
            if answer["op"] == "absent":
                raise self._is_unusable(_NOT_THERE)
            if answer["op"] == "error":
                raise answer["error"]
            raise self._is_unusable(f"the resident engine is busy with {answer['model']}")
        self._ready, self._load_s = answer, time.perf_counter() - begun_s
        self._keep_s = answer["keep_s"]
        self.config = answer["config"]
        self._shared = _SharedConnection(connection)

    def _introduced(self) -> tuple[Connection, Message]:
        """A connection, and what the process says to our configuration."""
        try:
            there_only = self._keep_s is None
            connection = (running if there_only else connect)(state_folder())
        except OutputError as error:  # the folder cannot be written
            raise self._is_unusable(f"no resident engine can be had: {error.message}") from error
        except OSError as error:
            why = f"{state_folder()}: {error.strerror or error}"
            raise self._is_unusable(f"no resident engine can be had: {why}") from error
        if connection is None and there_only:
            raise self._is_unusable(_NOT_THERE)
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

    def _make_queue(self) -> RequestQueue:
        return _ResidentQueue(self, in_batch=True)

    def _lone_queue(self) -> RequestQueue:
        return _ResidentQueue(self, in_batch=False)

    def shared(self) -> _SharedConnection:
        self.load()
        assert self._shared is not None, "it was just loaded"
        return self._shared

    def anew(self, *, may_go_on: bool) -> None:
        """The process is gone: start another.

        Raises:
            EngineError: what was asked cannot be asked again.
        """
        if self._shared is not None:
            self._shared.close()
            self._shared = None
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
        if self._shared is not None:
            self._close_queue()
            self._shared.close()
            self._shared = None


class _SharedConnection:
    """One connection for many requests.

    A thread reads what comes and puts it into the inbox of the one that asked; None tells all of
    them that the process is gone.
    """

    # Of all connections: what the last one still says is about no request of the next.
    _numbers = itertools.count()

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._inboxes: dict[int, Inbox] = {}
        self._lost = False
        self._guard = threading.Lock()
        threading.Thread(target=self._read, name="resident", daemon=True).start()

    def register(self, inbox: Inbox) -> int:
        with self._guard:
            number = next(self._numbers)
            self._inboxes[number] = inbox
            if self._lost:
                inbox.put((number, None))
            return number

    def send(self, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(ConnectionLostError):  # which the reading thread will tell
            self._connection.send(message)

    def drop(self, number: int) -> None:
        with self._guard:
            self._inboxes.pop(number, None)

    def _read(self) -> None:
        with contextlib.suppress(ConnectionLostError):
            while True:
                message = self._connection.read()
                inbox = self._inboxes.get(message["id"])
                if inbox is not None:
                    inbox.put((message["id"], message))
        with self._guard:
            self._lost = True
            for number, inbox in self._inboxes.items():
                inbox.put((number, None))

    def close(self) -> None:
        self._connection.close()


class _ResidentQueue:
    """The requests of one caller. One whose pieces were read is lost with the process; another is
    asked for again."""

    def __init__(self, engine: ResidentEngine, *, in_batch: bool) -> None:
        self._engine, self._in_batch = engine, in_batch
        self._openers = ThreadPoolExecutor(_OPENERS, "open pictures") if in_batch else None
        self._inbox: Inbox = queue.SimpleQueue()
        self._ids = itertools.count()
        # Our number -> what was asked, and whether its pieces are read; the connection's -> ours.
        self._sources: dict[RequestId, tuple[RequestSource, bool]] = {}
        self._asked: dict[int, RequestId] = {}
        self._begun = False
        # How often the process ended while it had this request of ours.
        self._times_lost: dict[RequestId, int] = {}
        self._shared = engine.shared()

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
        asked = self._shared.register(self._inbox)
        self._asked[asked] = number
        if self._openers is None:
            self._send(self._shared, asked, *self._sources[number])
        else:
            self._openers.submit(self._send, self._shared, asked, *self._sources[number])

    def _send(
        self, shared: _SharedConnection, asked: int, source: RequestSource, stream: bool
    ) -> None:
        try:
            request = request_of(source)
            message = {"op": "add", "id": asked, "stream": stream, "in_batch": self._in_batch}
            shared.send(message | {"request": request})
        except QwenCliError as error:
            self._inbox.put((asked, {"error": error}))
        except Exception as error:  # noqa: BLE001 - told where the answer is awaited
            self._inbox.put((asked, {"error": RequestError.of(error, "preparing it")}))

    def step(self) -> list[StepOutput]:
        """What has come; waits for something, but not for long."""
        while self._sources:
            try:
                asked, message = self._inbox.get(timeout=WAIT_S)
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
        self._times_lost = {each: self._times_lost.get(each, 0) + 1 for each in self._sources}
        self._asked.clear()
        # One that it ends at whenever it is asked is not asked for ever.
        may_go_on = not self._begun and max(self._times_lost.values()) < 2
        self._engine.anew(may_go_on=may_go_on)
        self._shared = self._engine.shared()
        for number in self._sources:
            self._ask(number)

    def _forget(self, number: RequestId) -> list[int]:
        """Drop a request; the connection's numbers for it."""
        self._sources.pop(number, None)
        asked = [each for each, ours in self._asked.items() if ours == number]
        for each in asked:
            del self._asked[each]
            self._shared.drop(each)
        return asked

    def abort(self, request: RequestId) -> None:
        if request in self._sources:
            for asked in self._forget(request):
                self._shared.send({"op": "abort", "id": asked})

    def close(self) -> None:
        if self._openers is not None:
            self._openers.shutdown(wait=False, cancel_futures=True)
        for number in list(self._sources):
            self.abort(number)
