"""The resident process: one loaded engine, kept for the commands of one user.

    python -m qwencli.server.resident_process FOLDER BUILD

It listens on a port of this machine before it loads anything, answers those who know the token in
FOLDER's state file, and ends when nothing was asked for as long as the last command wished. One
engine at a time: another configuration takes its place once nothing runs.

What a connection says, each a frame:
    hello {token, build}               answered by welcome {build}; else the connection ends
    use {config, keep_s}               answered by ready {...}, busy {model} or error {error};
                                       without keep_s by absent {} where that is not loaded
    add {id, request, stream, in_batch}  answered by out {id, chunk} ..., or out {id, error}
    rows {id}                          answered by out {id, rows}, or out {id, error}
    abort {id}
    status, stop                       answered by status {...}
"""

from __future__ import annotations

import asyncio
import gc
import hmac
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from qwencli.config import EngineConfig
from qwencli.engine.protocol import Engine
from qwencli.errors import EngineError, QwenCliError
from qwencli.results import GenerationChunk
from qwencli.server.answers import Answer, ClientGoneError
from qwencli.server.engine_thread import EngineThread
from qwencli.server.frames import HEAD_BYTES, decode_frame, encode_frame, frame_lengths
from qwencli.server.resident_state import State, forget_state, read_state, write_state

# How long a request waits for another command's, which took the place between two of its own.
BUSY_S = 60.0
# How often one looks whether it is time to leave.
LOOK_EVERY_S = 0.2
# Of what comes, so much is held before it is read: pictures are large.
_BUFFER_BYTES = 2**22
# Before the token is known nobody may send much, or take long.
_HELLO_BYTES, _HELLO_S = 4096, 5.0
# Of a process that was started and never told for how long.
_FIRST_KEEP_S = 60.0


class _Loaded:
    """The engine of the moment, and for what it was loaded."""

    def __init__(self, config: EngineConfig, engine: Engine, thread: EngineThread) -> None:
        self.config, self.engine, self.thread = config, engine, thread
        self.since = time.time()


class ResidentServer:
    """Answers connections, and says when it is over."""

    def __init__(self, folder: Path, build: str) -> None:
        self._folder, self._build = folder, build
        self._state: State | None = None
        self._loaded: _Loaded | None = None
        self._changing = asyncio.Lock()
        self._keep_s, self._used_s = _FIRST_KEEP_S, time.monotonic()
        self.over = asyncio.Event()

    async def run(self) -> None:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0, limit=_BUFFER_BYTES)
        port = server.sockets[0].getsockname()[1]
        self._state = write_state(self._folder, port, self._build)
        print(f"process {os.getpid()} listens", flush=True)
        watching = asyncio.ensure_future(self._watch())
        await self.over.wait()
        watching.cancel()
        server.close()
        forget_state(self._folder, self._state)
        print("over", flush=True)

    async def _watch(self) -> None:
        """Leave when nothing was asked for long enough, or when another has taken our place."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if self._is_busy or self._changing.locked():
                self._used_s = time.monotonic()
            idle_s = time.monotonic() - self._used_s
            replaced = idle_s > 1.0 and read_state(self._folder) != self._state
            if idle_s > self._keep_s or replaced:
                self.over.set()

    @property
    def _is_busy(self) -> bool:
        return self._loaded is not None and self._loaded.thread.num_unfinished > 0

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(self, reader, writer)
        try:
            if await self._knows_the_token(connection):
                await connection.serve()
        except (OSError, EOFError, QwenCliError, TimeoutError, asyncio.CancelledError):
            return  # gone, or it talks nonsense, or this process leaves
        finally:
            connection.end()

    async def _knows_the_token(self, connection: _Connection) -> bool:
        async with asyncio.timeout(_HELLO_S):
            hello = await connection.read(_HELLO_BYTES)
        said = str(hello.get("token")).encode("utf-8", "replace")
        known = self._state is not None and hmac.compare_digest(said, self._state.token.encode())
        if known:
            connection.send({"op": "welcome", "build": self._build})
        return known

    def status(self) -> dict[str, Any]:
        loaded = self._loaded
        left_s = self._keep_s - (0.0 if self._is_busy else time.monotonic() - self._used_s)
        return {
            "op": "status",
            "pid": os.getpid(),
            "model": loaded and loaded.config.model.name,
            "device": loaded and loaded.engine.effective.device,
            "quantization": loaded and loaded.engine.effective.quantization,
            "memory_bytes": _memory_bytes(loaded),
            "running": loaded.thread.num_unfinished if loaded else 0,
            "until_s": max(0.0, left_s),
        }

    def has(self, config: EngineConfig) -> bool:
        loaded = self._loaded
        return loaded is not None and loaded.config == config and loaded.thread.failure is None

    async def use(self, config: EngineConfig, keep_s: float | None) -> dict[str, Any]:
        """Have the engine of this configuration; what is to be known of it."""
        if keep_s is not None:
            self._keep_s = keep_s
        async with self._changing:
            self._used_s = time.monotonic()
            loaded = self._loaded
            if loaded is not None and loaded.thread.failure is not None:
                await self._unload()
                loaded = None
            if loaded is not None and loaded.config != config:
                if self._is_busy:
                    return {"op": "busy", "model": loaded.config.model.name}
                await self._unload()
                loaded = None
            if loaded is None:
                loaded = self._loaded = await asyncio.to_thread(_load, config)
                print(f"loaded {config.model.name}", flush=True)
            self._used_s = time.monotonic()
        engine = loaded.engine
        return {
            "op": "ready",
            "config": engine.config,
            "keep_s": self._keep_s,
            "effective": engine.effective,
            "load_s": engine.load_s,
            "max_seq_len": engine.max_seq_len,
            "model_type": engine.model_type,
            "can_think": engine.can_think,
            "memory_plan": dict(engine.memory_plan),
            "load_warnings": tuple(engine.load_warnings),
        }

    async def thread_for(self, config: EngineConfig) -> EngineThread:
        """The engine that answers requests of this configuration, loaded again if it has to be.

        Raises:
            QwenCliError: it cannot be loaded, or another is busy for longer than `BUSY_S`.
        """
        until_s = time.monotonic() + BUSY_S
        while not self.has(config):
            answer = await self.use(config, None)
            if answer["op"] != "busy":
                break
            if time.monotonic() > until_s:
                raise EngineError(
                    f"the resident engine is busy with {answer['model']}", "ask again later"
                )
            await asyncio.sleep(LOOK_EVERY_S)
        loaded = self._loaded
        assert loaded is not None, "it was just loaded"
        self._used_s = time.monotonic()
        return loaded.thread

    async def _unload(self) -> None:
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            print(f"unloading {loaded.config.model.name}", flush=True)
            await asyncio.to_thread(loaded.thread.close)
            del loaded
            gc.collect()


class _Connection:
    """One command, and its requests."""

    def __init__(
        self, server: ResidentServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._server, self._reader, self._writer = server, reader, writer
        self._config: EngineConfig | None = None
        self._answers: dict[int, Answer] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}

    async def read(self, most_bytes: int | None = None) -> dict[str, Any]:
        num_text, num_pixels = frame_lengths(await self._reader.readexactly(HEAD_BYTES))
        if most_bytes is not None and num_text + num_pixels > most_bytes:
            raise EOFError
        text = await self._reader.readexactly(num_text)
        return decode_frame(text, await self._reader.readexactly(num_pixels))

    def send(self, message: dict[str, Any]) -> None:
        if not self._writer.is_closing():
            self._writer.writelines(encode_frame(message))

    async def serve(self) -> None:
        while True:
            message = await self.read()
            match message.get("op"):
                case "use":
                    await self._use(message)
                case "add":
                    number = message["id"]
                    self._tasks[number] = asyncio.ensure_future(self._answer(number, message))
                case "rows":
                    number = message["id"]
                    self._tasks[number] = asyncio.ensure_future(self._rows(number))
                case "abort":
                    self._abort(message["id"])
                case "status":
                    self.send(self._server.status())
                case "stop":
                    self.send(self._server.status())
                    await self._writer.drain()
                    self._server.over.set()

    async def _use(self, message: dict[str, Any]) -> None:
        config, keep_s = message["config"], message["keep_s"]
        if keep_s is None and not self._server.has(config):
            self.send({"op": "absent"})
            return
        try:
            answer = await self._server.use(config, keep_s)
        except QwenCliError as error:
            answer = {"op": "error", "error": error}
        except Exception as error:  # noqa: BLE001 - told where the engine is wanted
            answer = {"op": "error", "error": _unforeseen(error)}
        else:
            self._config = config
        self.send(answer)

    async def _answer(self, number: int, message: dict[str, Any]) -> None:
        try:
            assert self._config is not None, "use comes first"
            thread = await self._server.thread_for(self._config)
            whole, in_batch = not message["stream"], message["in_batch"]
            answer = thread.submit(message.pop("request"), whole=whole, in_batch=in_batch)
            self._answers[number] = answer
            last: GenerationChunk | None = None
            while last is None or last.result is None:
                for last in await answer.pieces():
                    self.send({"op": "out", "id": number, "chunk": last})
                await self._writer.drain()
        except OSError:
            self._abort(number)
        except QwenCliError as error:
            self.send({"op": "out", "id": number, "error": error})
        except Exception as error:  # noqa: BLE001 - told where the answer is awaited
            self.send({"op": "out", "id": number, "error": _unforeseen(error)})
        finally:
            self._answers.pop(number, None)
            self._tasks.pop(number, None)

    async def _rows(self, number: int) -> None:
        try:
            assert self._config is not None, "use comes first"
            thread = await self._server.thread_for(self._config)
            rows = await asyncio.wrap_future(thread.rows())
            self.send({"op": "out", "id": number, "rows": rows})
        except QwenCliError as error:
            self.send({"op": "out", "id": number, "error": error})
        except Exception as error:  # noqa: BLE001 - told where it is awaited
            self.send({"op": "out", "id": number, "error": _unforeseen(error)})
        finally:
            self._tasks.pop(number, None)

    def _abort(self, number: int) -> None:
        answer, task = self._answers.pop(number, None), self._tasks.get(number)
        if answer is not None:
            answer.end(ClientGoneError("nobody waits for it"))
        elif task is not None:
            task.cancel()  # it waits for the engine

    def end(self) -> None:
        for number in list(self._answers):
            self._abort(number)
        for task in list(self._tasks.values()):
            task.cancel()
        self._writer.close()


def _load(config: EngineConfig) -> _Loaded:
    """Raises QwenCliError where the model cannot be loaded here."""
    from qwencli.engine.factory import create_engine
    from qwencli.engine.resolve import resolve_device

    engine = create_engine(config)
    resolve_device(config.device)
    thread = EngineThread(engine, rows_at_once=False)
    thread.start()
    return _Loaded(config, engine, thread)


def _memory_bytes(loaded: _Loaded | None) -> int | None:
    """What the engine has on its GPU; of the CPU, what this process has."""
    if loaded is None:
        return None
    from qwencli.engine.machine.device import memory_stats

    stats = memory_stats(loaded.engine.effective.device)
    if stats is not None:
        return stats.reserved_bytes
    import psutil

    return int(psutil.Process().memory_info().rss)


def _unforeseen(error: Exception) -> EngineError:
    line = (str(error).strip() or "no message").splitlines()[0]
    return EngineError(f"{type(error).__name__}: {line}", "this is a fault of qwencli; report it")


def main() -> None:
    folder, build = Path(sys.argv[1]), sys.argv[2]
    # Read when these are loaded, as in the command line.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    async def serve() -> None:
        server = ResidentServer(folder, build)
        with suppress(NotImplementedError):  # Windows
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.over.set)
        await server.run()

    asyncio.run(serve(), debug=False)
    # Memory is free when this process is gone; giving it back piece by piece takes longer.
    os._exit(0)


if __name__ == "__main__":
    main()
