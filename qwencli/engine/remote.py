"""The remote engine: asks servers that speak OpenAI's API, as many at once as they like.

Each request goes to the server that has the fewest of ours at the moment. One that cannot be
reached, or whose answer breaks off, is left alone for a while that grows each time, and what it
held goes to the others; where there are none it is asked again. Connections live in the event loop
of one thread of their own. Knows no torch.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import ipaddress
import itertools
import os
import queue
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, TypeVar
from urllib.parse import urlsplit, urlunsplit

from qwencli.capabilities import why_not
from qwencli.config import DType, EngineConfig, EngineName, LoadFormat, ModelSource, ModelSpec
from qwencli.engine.openai_format import (
    AnswerReader,
    BadAnswerError,
    Sent,
    error_text,
    prepared,
    read_json,
)
from qwencli.engine.protocol import WAIT_S, ManyRequests, RequestQueue, drain, stream_alone
from qwencli.engine.request import RequestId, RequestSource, StepOutput, request_of
from qwencli.errors import (
    AnswerError,
    EndpointError,
    InputError,
    QwenCliError,
    UnsupportedModeError,
    UsageError,
)
from qwencli.messages import GenerationRequest
from qwencli.results import EffectiveConfig, GenerationChunk, GenerationResult

if TYPE_CHECKING:
    import httpx

KEY_VARIABLE = "QWENCLI_API_KEY"
# Requests that one server has from us; what it cannot run at once waits there.
ROWS = 32
# Of a list of models, an answer in one piece, or a line of a stream: logprobs of a long answer have
# some megabytes, and what never ends must not fill the memory.
MOST_BYTES = 32 << 20
# How often a request is tried; the pauses between double from the first on.
ATTEMPTS, FIRST_PAUSE_S, LONGEST_PAUSE_S = 5, 0.5, 30.0
CONNECT_S, LIST_S = 5.0, 10.0
# After so long without a word a server is asked whether it lives, and after this given up.
SILENCE_S, HANG_S = 30.0, 600.0
# Pictures that are opened and encoded at once.
_OPENERS = 4
# What a server is to blame for, and where the next try may go better.
_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529})
_BUSY = frozenset({429, 503, 529})
T = TypeVar("T")


def endpoint_url(said: str) -> str:
    """The base address of a server's API: the version's folder, without a slash at the end.

    Raises:
        UsageError: it is no address.
    """
    text = said.strip()
    if "://" not in text:
        text = f"http://{text}"
    try:
        parts = urlsplit(text)
        parts.port  # noqa: B018 - raises where it is none
        host = parts.hostname
    except ValueError:
        host = None
    if not host or parts.scheme not in ("http", "https") or any(c.isspace() for c in text):
        raise UsageError(
            f"--endpoint {said!r} is no address", "write it as http://127.0.0.1:8000/v1"
        )
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    return urlunsplit((parts.scheme, parts.netloc, path or "/v1", "", ""))


class Endpoint:
    """One server, and what is known of it.

    Args:
        name: its address as it is shown, without what may be secret in it.
    """

    def __init__(self, url: str) -> None:
        self.url, parts = url, urlsplit(url)
        port = "" if parts.port is None else f":{parts.port}"
        shown = f"[{parts.hostname}]" if ":" in str(parts.hostname) else parts.hostname
        self.name = urlunsplit((parts.scheme, f"{shown}{port}", parts.path, "", ""))
        self.is_local = _is_loopback(str(parts.hostname))
        self.model = ""
        self.owner: str | None = None
        self.max_seq_len: int | None = None
        self.num_running = 0
        self.num_failures = 0
        self.rests_until_s = 0.0
        # Why it is not asked any more.
        self.refusal: EndpointError | None = None

    def failed(self) -> None:
        """What runs there fails together, and counts once."""
        if self.rests_until_s <= time.monotonic():
            self.num_failures += 1
            self.rest(pause_s(self.num_failures))

    def rest(self, seconds: float) -> None:
        self.rests_until_s = max(self.rests_until_s, time.monotonic() + seconds)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def pause_s(failures: int) -> float:
    return float(min(FIRST_PAUSE_S * 2 ** min(failures - 1, 16), LONGEST_PAUSE_S))


class _Retry(Exception):
    """A try that failed, which another one may not.

    Args:
        unreachable: the server itself is to blame, and not what it was asked.
        pause_s: for how long it wants to be left alone.
    """

    def __init__(
        self, error: AnswerError, *, unreachable: bool = False, pause_s: float = 0.0
    ) -> None:
        super().__init__(error.message)
        self.error, self.unreachable, self.pause_s = error, unreachable, pause_s


def remote_model(
    endpoints: Sequence[str],
    name: str | None,
    *,
    offline: bool = False,
    key_variable: str = KEY_VARIABLE,
) -> ModelSpec:
    """The model that is asked for by this name, or the only one that the servers have.

    Args:
        key_variable: see `RemoteEngine`.

    Raises:
        UsageError: there are several, and none was named.
        EndpointError: no server answers.
    """
    if not name:
        config = EngineConfig(
            ModelSpec("", ModelSource.REMOTE), EngineName.REMOTE, endpoints=tuple(endpoints)
        )
        with RemoteEngine(replace(config, offline=offline), key_variable) as engine:
            name = engine.config.model.name
    from qwencli.models.builtin import builtin_spec, find_builtin

    entry = find_builtin(name)
    known = None if entry is None else builtin_spec(entry)
    return ModelSpec(
        name,
        ModelSource.REMOTE,
        repo_id=known.repo_id if known else None,
        hub_config=known.hub_config if known else None,
    )


class RemoteEngine(ManyRequests):
    """Implements `Engine` over servers; `load` asks each what models it has.

    Args:
        key_variable: the environment variable that holds the servers' API key.

    Raises:
        UsageError: no endpoint, or one that is no address, on creation.
        UnsupportedModeError: a mode that is the server's own, on creation.
    """

    batch_from = 2

    def __init__(self, config: EngineConfig, key_variable: str = KEY_VARIABLE) -> None:
        config = replace(config, engine=EngineName.REMOTE)
        self._key_variable = key_variable
        _check_settings(config)
        self.config = config
        self.endpoints = [
            Endpoint(url) for url in dict.fromkeys(map(endpoint_url, config.endpoints))
        ]
        for endpoint in self.endpoints:
            if config.offline and not endpoint.is_local:
                raise UsageError(
                    f"--offline: {endpoint.name} is not on this machine", "leave --offline out"
                )
        self._calls: _Calls | None = None
        self._warnings: tuple[str, ...] = ()
        self._load_s = 0.0

    @property
    def effective(self) -> EffectiveConfig:
        names = ", ".join(endpoint.name for endpoint in self.endpoints)
        return EffectiveConfig("remote", None, None, None, names, None, None, speculate=None)

    @property
    def load_s(self) -> float:
        return self._load_s

    @property
    def max_seq_len(self) -> int | None:
        lengths = [each.max_seq_len for each in self.endpoints if each.max_seq_len is not None]
        return min(lengths, default=None)

    @property
    def memory_plan(self) -> Mapping[str, int]:
        return {}

    @property
    def load_warnings(self) -> tuple[str, ...]:
        return self._warnings

    def load(self) -> None:
        """Ask the servers for their models.

        Raises:
            EndpointError: none of them can be used.
            UsageError: no model was named, and there are several.
        """
        if self._calls is not None:
            return
        started_s = time.perf_counter()
        calls = _Calls(self.endpoints, self._key_variable)
        try:
            refusals = calls.wait(calls.introduce(self.config.model))
            name = self.config.model.name or calls.wait(calls.only_model())
        except BaseException:
            calls.close()
            raise
        self.config = replace(self.config, model=replace(self.config.model, name=name))
        self._calls, self._load_s = calls, time.perf_counter() - started_s
        self._warnings = tuple(
            f"{error.message}; the others are asked meanwhile" for error in refusals
        )

    def stream(self, request: GenerationRequest) -> Iterator[GenerationChunk]:
        """Yield the answer as its pieces come.

        Raises:
            InputError: the server refuses the request, or a picture cannot be used.
            AnswerError: it gave no usable answer. EndpointError: nor does any other.
        """
        self.load()
        return self._streamed(request, stream=True)

    def generate(self, request: GenerationRequest) -> GenerationResult:
        self.load()
        return drain(self._streamed(request, stream=False))

    def _streamed(self, request: GenerationRequest, *, stream: bool) -> Iterator[GenerationChunk]:
        yield from stream_alone(self._make_queue(), request, stream=stream)

    def _make_queue(self) -> RequestQueue:
        return _RemoteQueue(self._opened_calls(), self.config)

    def _opened_calls(self) -> _Calls:
        assert self._calls is not None, "load() comes first"
        return self._calls

    def close(self) -> None:
        if self._calls is not None:
            self._close_queue()
            self._calls.close()
            self._calls = None

    def __enter__(self) -> Self:
        self.load()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _check_settings(config: EngineConfig) -> None:
    if not config.endpoints:
        raise UsageError(
            "--engine remote needs a server", "give --endpoint http://127.0.0.1:8000/v1"
        )
    modes = {axis: getattr(config, axis) for axis in ("engine", *_SERVERS_MODES)}
    refusal = why_not(modes)
    if refusal is not None:
        raise refusal.error()
    for name, default in _SERVERS_SETTINGS.items():
        if getattr(config, name) != default:
            flag = f"--{name.replace('_', '-')}"
            raise UnsupportedModeError(
                f"{flag} cannot be set from here: it belongs to the server of --endpoint",
                f"set it where that server is started, and leave {flag} out",
            )


_SERVERS_MODES = ("quantization", "attention", "cache", "kernels", "kv_dtype", "speculate")
_SERVERS_SETTINGS: Mapping[str, object] = {
    "device": "auto",
    "dtype": DType.AUTO,
    "load_format": LoadFormat.AUTO,
    "max_seq_len": None,
    "threads": None,
    "batch_invariant": False,
    "allow_pickle": False,
}


class _RemoteQueue:
    """The requests of one caller, each a task of the loop. One whose pieces were read is over
    when it breaks off; another is asked for again."""

    def __init__(self, calls: _Calls, config: EngineConfig) -> None:
        self._calls, self._config = calls, config
        self._ids = itertools.count()
        self._outputs: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
        self._unfinished: dict[RequestId, concurrent.futures.Future[None]] = {}

    @property
    def max_rows(self) -> int:
        return ROWS * sum(each.refusal is None for each in self._calls.endpoints)

    @property
    def has_unfinished(self) -> bool:
        return bool(self._unfinished)

    def add(self, request: RequestSource, *, stream: bool = True) -> RequestId:
        number = next(self._ids)

        def tell(chunk: GenerationChunk) -> None:
            if stream or chunk.result is not None:
                self._outputs.put(StepOutput(number, chunk))
            elif chunk.text:  # it has begun
                self._outputs.put(StepOutput(number, GenerationChunk("", ())))

        async def answer() -> None:
            try:
                await self._calls.answer(request, self._config, tell, live=stream)
            except QwenCliError as error:
                self._outputs.put(StepOutput(number, error=error))
            except Exception as error:  # noqa: BLE001 - told to the one that waits for it
                failure = AnswerError(f"{type(error).__name__}: {error}", "report this fault")
                failure.__cause__ = error
                self._outputs.put(StepOutput(number, error=failure))

        self._unfinished[number] = self._calls.begin(answer())
        return number

    def step(self) -> list[StepOutput]:
        """What has come; waits for something."""
        if not self._unfinished:
            return []
        try:
            outputs = [self._outputs.get(timeout=WAIT_S)]
        except queue.Empty:
            return []
        with contextlib.suppress(queue.Empty):
            while True:
                outputs.append(self._outputs.get_nowait())
        outputs = [output for output in outputs if output.request in self._unfinished]
        for output in outputs:
            if output.finished:
                self._unfinished.pop(output.request, None)
        return outputs

    def abort(self, request: RequestId) -> None:
        running = self._unfinished.pop(request, None)
        if running is not None:
            running.cancel()

    def close(self) -> None:
        for number in list(self._unfinished):
            self.abort(number)


class _Calls:
    """The connections to all servers, in the event loop of a thread."""

    def __init__(self, endpoints: Sequence[Endpoint], key_variable: str) -> None:
        import ssl

        import httpx

        self.endpoints = endpoints
        self._key_variable = key_variable
        key = os.environ.get(key_variable)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        if key and not (key.isascii() and key.isprintable()):
            raise UsageError("--api-key has characters that no header can carry", "check the key")
        trusts_nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        timeout = httpx.Timeout(None, connect=CONNECT_S, write=60.0)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=ROWS)
        self._clients = {
            endpoint: httpx.AsyncClient(
                headers=headers,
                timeout=timeout,
                limits=limits,
                # A proxy of the network does not lead back to this machine.
                trust_env=not endpoint.is_local,
                # Reading the authorities' certificates takes longer than an answer.
                verify=endpoint.url.startswith("https:") or trusts_nobody,
            )
            for endpoint in endpoints
        }
        self._openers = concurrent.futures.ThreadPoolExecutor(_OPENERS, "open pictures")
        self._loop = asyncio.new_event_loop()
        self._freed = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, name="remote", daemon=True)
        self._thread.start()

    def begin(self, task: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        return asyncio.run_coroutine_threadsafe(task, self._loop)

    def wait(self, task: Coroutine[Any, Any, T]) -> T:
        return self.begin(task).result()

    def close(self) -> None:
        self._openers.shutdown(wait=False, cancel_futures=True)
        with contextlib.suppress(concurrent.futures.TimeoutError):
            self.begin(self._end_all()).result(CONNECT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end_all(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for client in self._clients.values():
            await client.aclose()

    async def introduce(self, model: ModelSpec) -> list[EndpointError]:
        """Learn what each server has; why some of them are of no use.

        Raises:
            EndpointError: all of them.
        """
        refusals = await asyncio.gather(*(self._introduce(each, model) for each in self.endpoints))
        found = [error for error in refusals if error is not None]
        if len(found) == len(self.endpoints):
            raise found[0]
        return found

    async def _introduce(self, endpoint: Endpoint, model: ModelSpec) -> EndpointError | None:
        try:
            await self._choose_model(endpoint, await self._models(endpoint), model)
        except _Retry as failure:
            endpoint.failed()
            return EndpointError(failure.error.message, failure.error.hint)
        except EndpointError as error:
            endpoint.refusal = error
            return error
        except InputError as error:
            endpoint.refusal = EndpointError(error.message, "check the address of --endpoint")
            return endpoint.refusal
        return None

    async def _models(self, endpoint: Endpoint) -> list[Mapping[str, Any]] | None:
        """The entries of a server's list; None where it has no list."""
        async with self._asked(endpoint, "GET", "/models", None, LIST_S) as response:
            if response.status_code in (404, 405):
                return None
            try:
                answer = await _whole(response)
                self._check(endpoint, response.status_code, response.headers, answer)
                listed = read_json(answer)
                entries = listed["data"] if isinstance(listed, dict) else listed
                return [each for each in entries if isinstance(each.get("id"), str)]
            except (BadAnswerError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise EndpointError(
                    f"{endpoint.name} does not answer as OpenAI's API does",
                    "check the address: it ends in /v1 with most servers",
                ) from error

    async def _choose_model(
        self, endpoint: Endpoint, entries: list[Mapping[str, Any]] | None, model: ModelSpec
    ) -> None:
        if entries is None:
            if not model.name:
                raise EndpointError(
                    f"{endpoint.name} does not list its models", "name one with --model"
                )
            endpoint.model = model.name
            return
        by_id = {each["id"]: each for each in entries}
        if not by_id:
            raise EndpointError(f"{endpoint.name} has no model", "load one there")
        wanted = model.name or _only(by_id, endpoint)
        names = (wanted, model.repo_id, f"{wanted}:latest")
        name = next((each for each in names if each in by_id), None)
        if name is None:
            raise EndpointError(
                f"{endpoint.name} has no model {wanted!r}", f"--model names one of {_few(by_id)}"
            )
        entry = by_id[name]
        endpoint.model, endpoint.owner = name, entry.get("owned_by")
        length = entry.get("max_model_len")
        endpoint.max_seq_len = length if type(length) is int and length > 0 else None

    async def only_model(self) -> str:
        return next(each.model for each in self.endpoints if each.model)

    async def answer(
        self,
        source: RequestSource,
        config: EngineConfig,
        tell: Callable[[GenerationChunk], None],
        *,
        live: bool,
    ) -> None:
        """Have one request answered, by whichever server can.

        Raises:
            InputError, AnswerError: this request has no answer.
            EndpointError: no server is left.
        """
        started_s = time.perf_counter()
        sent = await self._loop.run_in_executor(self._openers, _prepare, source, config)
        del source  # pictures are held no longer than needed
        try:
            await self._answer_prepared(sent, started_s, tell, live=live)
        except (InputError, AnswerError) as error:
            names = ", ".join(sent.names)
            if not names:
                raise
            raise type(error)(f"{names}: {error.message}", error.hint) from error

    async def _answer_prepared(
        self,
        sent: Sent,
        started_s: float,
        tell: Callable[[GenerationChunk], None],
        *,
        live: bool,
    ) -> None:
        for attempt in itertools.count(1):
            endpoint = await self._free_endpoint()
            endpoint.num_running += 1
            try:
                await self._answer_from(endpoint, sent, started_s, tell, live=live)
                endpoint.num_failures = 0
                return
            except _Retry as failure:
                if failure.unreachable:
                    endpoint.failed()
                elif failure.pause_s:
                    endpoint.rest(failure.pause_s)
                if attempt >= ATTEMPTS:
                    if failure.unreachable and not await self._any_lives():
                        raise EndpointError(failure.error.message, failure.error.hint) from None
                    raise failure.error from None
                pause = max(failure.pause_s, pause_s(attempt))
            except EndpointError as error:
                if isinstance(error, AnswerError):
                    raise
                endpoint.refusal, pause = error, 0.0
            finally:
                endpoint.num_running -= 1
                self._freed.set()
            if not any(self._is_ready(each) for each in self.endpoints if each is not endpoint):
                await asyncio.sleep(pause)

    @staticmethod
    def _is_ready(endpoint: Endpoint) -> bool:
        return endpoint.refusal is None and endpoint.rests_until_s <= time.monotonic()

    async def _free_endpoint(self) -> Endpoint:
        """The server that has the fewest requests, once one has room.

        Raises:
            EndpointError: none is left.
        """
        while True:
            able = [each for each in self.endpoints if each.refusal is None]
            if not able:
                raise next(each.refusal for each in self.endpoints if each.refusal is not None)
            ready = [each for each in able if self._is_ready(each)]
            # One that rests is asked all the same where there is no other: `answer` has waited.
            ready = ready or [min(able, key=lambda each: each.rests_until_s)]
            best = min(ready, key=lambda each: each.num_running)
            if best.num_running < ROWS:
                return best
            self._freed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._freed.wait(), 1.0)

    async def _any_lives(self) -> bool:
        for endpoint in self.endpoints:
            if endpoint.refusal is None and await self._lives(endpoint):
                return True
        return False

    async def _lives(self, endpoint: Endpoint) -> bool:
        try:
            async with self._asked(endpoint, "GET", "/models", None, LIST_S) as response:
                return response.status_code < 500
        except (EndpointError, _Retry):
            return False

    async def _answer_from(
        self,
        endpoint: Endpoint,
        sent: Sent,
        started_s: float,
        tell: Callable[[GenerationChunk], None],
        *,
        live: bool,
    ) -> None:
        if not endpoint.model:  # it did not answer before
            await self._choose_model(endpoint, await self._models(endpoint), self._wanted())
        reader = AnswerReader(sent, started_s, endpoint.name)
        told = False
        body = sent.json_for(endpoint.model, endpoint.owner)
        try:
            async with self._asked(endpoint, "POST", "/chat/completions", body, None) as response:
                if response.status_code != 200:
                    answer = await _whole(response)
                    self._check(endpoint, response.status_code, response.headers, answer)
                async for event in self._events(endpoint, response):
                    piece = reader.read(event)
                    if piece.text or piece.thoughts:
                        tell(GenerationChunk(piece.text, (), thoughts=piece.thoughts))
                        told = True
                if reader.finish_reason is None:
                    raise _cut(endpoint)
        except BadAnswerError as error:
            raise self._given_up(
                _Retry(AnswerError(f"{endpoint.name} sent {error}", _TRY_AGAIN)), told and live
            ) from error
        except _Retry as failure:
            raise self._given_up(failure, told and live) from failure
        last = reader.finish()
        tell(GenerationChunk(last.text, (), reader.result(), last.thoughts))

    @staticmethod
    def _given_up(failure: _Retry, shown: bool) -> _Retry | AnswerError:
        """What is shown to a reader already cannot be begun anew."""
        return failure.error if shown else failure

    def _wanted(self) -> ModelSpec:
        name = next((each.model for each in self.endpoints if each.model), "")
        return ModelSpec(name, ModelSource.REMOTE)

    async def _events(self, endpoint: Endpoint, response: httpx.Response) -> AsyncIterator[Any]:
        """The JSON values of an answer: events of a stream, or the whole.

        Raises:
            BadAnswerError: something else came. _Retry: it broke off, or nothing comes any more.
        """
        if "json" in response.headers.get("content-type", ""):
            whole = _Bounded()
            async for _ in self._read(endpoint, response, whole.push):
                pass
            yield _json(bytes(whole.data).decode("utf-8", "replace"))
            return
        lines = _Lines()
        async for line in self._read(endpoint, response, lines.push):
            if not line.startswith("data:"):
                if line[0] in "<{":
                    raise BadAnswerError("something that is no stream of events")
                continue
            data = line[5:].strip()
            if data == "[DONE]":
                return
            yield _json(data)

    async def _read(
        self, endpoint: Endpoint, response: httpx.Response, read: Callable[[bytes], list[T]]
    ) -> AsyncIterator[T]:
        """What `read` finds in the bytes of a server, nothing once it ends; while it finds nothing
        the server is asked whether it lives."""
        import httpx

        source = response.aiter_bytes()
        waiting = asyncio.ensure_future(anext(source))
        silent_since_s = time.monotonic()
        try:
            while True:
                done, _ = await asyncio.wait({waiting}, timeout=SILENCE_S)
                silent_s = time.monotonic() - silent_since_s
                if not done:
                    if silent_s > HANG_S or not await self._lives(endpoint):
                        raise _hangs(endpoint, silent_s)
                    continue
                try:
                    found = read(waiting.result())
                except StopAsyncIteration:
                    break
                except httpx.HTTPError as error:
                    raise _cut(endpoint) from error
                for each in found:
                    silent_since_s = time.monotonic()
                    yield each
                if not found and silent_s > HANG_S:
                    raise _hangs(endpoint, HANG_S)
                waiting = asyncio.ensure_future(anext(source))
            for each in read(b""):
                yield each
        finally:
            waiting.cancel()
            with contextlib.suppress(BaseException):
                await waiting

    @contextlib.asynccontextmanager
    async def _asked(
        self, endpoint: Endpoint, method: str, path: str, body: bytes | None, most_s: float | None
    ) -> AsyncIterator[httpx.Response]:
        """Send a request; yields the response before its body has come.

        Raises:
            _Retry: the server cannot be reached.
        """
        import httpx

        client = self._clients[endpoint]
        request = client.build_request(
            method,
            endpoint.url + path,
            content=body,
            headers={"Content-Type": "application/json"} if body else None,
        )
        if most_s is not None:
            request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write"), most_s)
            request.extensions["timeout"] |= {"connect": CONNECT_S, "pool": None}
        sending = asyncio.ensure_future(client.send(request, stream=True))
        begun_s = time.monotonic()
        try:
            patience_s = SILENCE_S if most_s is None else None
            while not (await asyncio.wait({sending}, timeout=patience_s))[0]:
                silent_s = time.monotonic() - begun_s
                if silent_s > HANG_S or not await self._lives(endpoint):
                    raise _hangs(endpoint, silent_s)
            response = sending.result()
        except httpx.HTTPError as error:
            raise _unreachable(endpoint, error) from error
        finally:
            sending.cancel()
        try:
            yield response
        except httpx.HTTPError as error:
            raise _cut(endpoint) from error
        finally:
            await response.aclose()

    def _check(
        self, endpoint: Endpoint, status: int, headers: Mapping[str, str], answer: bytes
    ) -> None:
        """Raise what a status means that is not 200."""
        if status == 200:
            return
        try:
            said = error_text(read_json(answer))
        except ValueError:
            said = f"status {status}"
        if 300 <= status < 400:
            target = " ".join(headers.get("location", "").split())[:200] or "another address"
            raise EndpointError(
                f"{endpoint.name} sends its clients on to {target}", "give that as --endpoint"
            )
        if status < 300:
            failure = AnswerError(f"{endpoint.name} sent status {status} for an answer", _TRY_AGAIN)
            raise _Retry(failure)
        if status in (401, 403):
            given = os.environ.get(self._key_variable)
            wants = "refuses the API key" if given else "wants an API key"
            raise EndpointError(f"{endpoint.name} {wants} ({said})", "give it with --api-key")
        if status == 404:
            raise EndpointError(
                f"{endpoint.name} has no model {endpoint.model!r}, or no such API: {said}",
                "check --model, and the address: it ends in /v1 with most servers",
            )
        if status in _RETRIED or status >= 500:
            failure = AnswerError(f"{endpoint.name} failed with status {status}: {said}", _LOG)
            raise _Retry(failure, pause_s=_wanted_pause(headers) if status in _BUSY else 0.0)
        hint = "lower --max-pixels" if status == 413 else "change what it names"
        raise InputError(f"{endpoint.name} refuses the request: {said}", hint)


async def _whole(response: httpx.Response) -> bytes:
    whole = _Bounded()
    async for piece in response.aiter_bytes():
        whole.push(piece)
    return bytes(whole.data)


class _Bounded:
    """Bytes that come in pieces, up to `MOST_BYTES`."""

    def __init__(self) -> None:
        self.data = bytearray()

    def push(self, piece: bytes) -> list[bytes]:
        """Returns the piece.

        Raises:
            BadAnswerError: there are more.
        """
        self.data += piece
        if len(self.data) > MOST_BYTES:
            raise BadAnswerError(f"more than {MOST_BYTES >> 20} MiB where it has to be less")
        return [piece]


class _Lines:
    """The lines of a stream of events that say something: no comments, which keep a connection
    alive."""

    def __init__(self) -> None:
        self._begun = _Bounded()

    def push(self, piece: bytes) -> list[str]:
        """Those that this piece ends; nothing is the end of all.

        Raises:
            BadAnswerError: one is longer than `MOST_BYTES`.
        """
        found = []
        for number, part in enumerate(re.split(rb"\r\n|\r|\n", piece or b"\n")):
            if number:
                found.append(bytes(self._begun.data).decode("utf-8", "replace"))
                self._begun = _Bounded()
            self._begun.push(part)
        return [line for line in found if line and not line.startswith(":")]


_TRY_AGAIN = "try again, or ask another server"
_LOG = "its log tells more"


def _prepare(source: RequestSource, config: EngineConfig) -> Sent:
    return prepared(request_of(source), config)


def _json(text: str) -> Any:
    try:
        return read_json(text)
    except ValueError as error:
        raise BadAnswerError("something that is no JSON") from error


def _wanted_pause(headers: Mapping[str, str]) -> float:
    """The seconds of Retry-After, within bounds."""
    said = headers.get("retry-after", "")
    seconds = float(said) if said.isascii() and said.isdecimal() else FIRST_PAUSE_S
    return min(seconds, LONGEST_PAUSE_S)


def _only(by_id: Mapping[str, Any], endpoint: Endpoint) -> str:
    if len(by_id) > 1:
        raise UsageError(
            f"{endpoint.name} has {len(by_id)} models", f"choose with --model: {_few(by_id)}"
        )
    return next(iter(by_id))


def _few(names: Mapping[str, Any]) -> str:
    shown = list(names)[:8]
    return ", ".join(shown) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _cut(endpoint: Endpoint) -> _Retry:
    return _Retry(
        AnswerError(f"{endpoint.name} broke off its answer", _TRY_AGAIN), unreachable=True
    )


def _hangs(endpoint: Endpoint, seconds: float) -> _Retry:
    said = f"{endpoint.name} has said nothing for {seconds:.0f} s"
    return _Retry(AnswerError(said, _TRY_AGAIN), unreachable=True)


def _unreachable(endpoint: Endpoint, error: Exception) -> _Retry:
    import httpx

    hint = "start the server there, or correct --endpoint"
    if isinstance(error, httpx.TimeoutException):
        what = "does not answer"
    elif isinstance(error, httpx.ConnectError):
        what = f"cannot be reached ({_reason(error)})"
    elif isinstance(error, httpx.RemoteProtocolError) and "disconnected" in str(error):
        what, hint = "closed the connection without an answer", _LOG
    elif isinstance(error, httpx.RemoteProtocolError):
        what, hint = "does not speak HTTP", "check the port of --endpoint"
    else:
        what = f"broke the connection off ({_reason(error)})"
    return _Retry(AnswerError(f"{endpoint.name} {what}", hint), unreachable=True)


def _reason(error: BaseException) -> str:
    """The system's own words, from whatever it is wrapped in."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError) and inner.errno is not None:
            # asyncio has words of its own; those of a name that is not found are below zero.
            said = os.strerror(inner.errno) if inner.errno > 0 else str(inner.strerror)
            return said.lower()
        inner = inner.__cause__ or inner.__context__
    return (str(error).strip() or type(error).__name__).splitlines()[0].lower()
