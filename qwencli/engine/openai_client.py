"""One server that speaks OpenAI's API: its address, what is asked of it, and what its errors mean.

What comes from it is bounded in size, and a server that says nothing is asked whether it is alive.
Tries nothing twice: a failure that another try may mend is a `RetryableError`, for `endpoint_pool`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from qwencli.config import ModelSpec
from qwencli.engine.openai_format import MalformedAnswerError, error_text, read_json
from qwencli.errors import AnswerError, EndpointError, InputError, UsageError, system_words

if TYPE_CHECKING:
    import httpx

# Requests that one server has from us; what it cannot run at once waits there.
ROWS = 32
# Of a list of models, an answer in one piece, or a line of a stream: logprobs of a long answer have
# some megabytes, and what never ends must not fill the memory.
MOST_BYTES = 32 << 20
CONNECT_S, LIST_S = 5.0, 10.0
# After so long without a word a server is asked whether it is alive, and after this given up.
SILENCE_S, HANG_S = 30.0, 600.0
# What a server is to blame for, and where the next try may go better.
_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529})
_BUSY = frozenset({429, 503, 529})
# What a busy server is left alone for, unless it says for how long.
_BUSY_PAUSE_S = 0.5
TRY_AGAIN = "try again, or ask another server"
_LOG = "its log tells more"
T = TypeVar("T")


class RetryableError(Exception):
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
            f"--endpoint {said!r} is not an address", "write it as http://127.0.0.1:8000/v1"
        )
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    return urlunsplit((parts.scheme, parts.netloc, path or "/v1", "", ""))


class Endpoint:
    """One server, and what its list of models says.

    Args:
        name: its address as it is shown, without what may be secret in it.
        model: as the server calls it; empty until it is known.
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
        self.can_think: bool | None = None
        self.model_type: str | None = None

    def choose_model(self, entries: list[Mapping[str, Any]] | None, model: ModelSpec) -> None:
        """Choose the entry of a server's list that `model` names, or the only one.

        Raises:
            EndpointError: there is none. UsageError: there are several, and none is named.
        """
        if entries is None:
            if not model.name:
                raise EndpointError(
                    f"{self.name} does not list its models", "name one with --model"
                )
            self.model = model.name
            return
        by_id = {each["id"]: each for each in entries}
        if not by_id:
            raise EndpointError(f"{self.name} has no model", "load one there")
        if not model.name and len(by_id) > 1:
            raise UsageError(
                f"{self.name} has {len(by_id)} models", f"choose with --model: {_few(by_id)}"
            )
        wanted = model.name or next(iter(by_id))
        names = (wanted, model.repo_id, f"{wanted}:latest")
        name = next((each for each in names if each in by_id), None)
        if name is None:
            raise EndpointError(
                f"{self.name} has no model {wanted!r}", f"--model names one of {_few(by_id)}"
            )
        entry = by_id[name]
        self.model, self.owner = name, entry.get("owned_by")
        length = entry.get("max_model_len")
        self.max_seq_len = length if type(length) is int and length > 0 else None
        thinks = entry.get("can_think")  # our own servers say it
        self.can_think = thinks if isinstance(thinks, bool) else None
        kind = entry.get("model_type")
        self.model_type = kind if isinstance(kind, str) else None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _few(names: Mapping[str, Any]) -> str:
    shown = list(names)[:8]
    return ", ".join(shown) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


class OpenAIClient:
    """The connections to one server; to be used within one event loop.

    Raises:
        UsageError: the API key cannot be sent, on creation.
    """

    def __init__(self, endpoint: Endpoint, key_variable: str) -> None:
        import ssl

        import httpx

        self.endpoint, self._key_variable = endpoint, key_variable
        key = os.environ.get(key_variable)
        if key and not (key.isascii() and key.isprintable()):
            raise UsageError("--api-key has characters that no header can carry", "check the key")
        # For plain HTTP: reading the authorities' certificates takes longer than an answer.
        trusts_nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(None, connect=CONNECT_S, write=60.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=ROWS),
            # A proxy of the network does not lead back to this machine.
            trust_env=not endpoint.is_local,
            verify=endpoint.url.startswith("https:") or trusts_nobody,
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def learn_model(self, model: ModelSpec) -> None:
        """Ask what models the server has, and choose one; see `Endpoint.choose_model`.

        Raises:
            RetryableError: it cannot be reached. EndpointError: it is of no use.
            UsageError: it has several, and none was named.
        """
        self.endpoint.choose_model(await self._models(), model)

    async def _models(self) -> list[Mapping[str, Any]] | None:
        """The entries of the server's list; None where it has no list."""
        async with self._request("GET", "/models", None, LIST_S) as response:
            if response.status_code in (404, 405):
                return None
            try:
                answer = await _whole(response)
                self._check(response.status_code, response.headers, answer)
                listed = read_json(answer)
                entries = listed["data"] if isinstance(listed, dict) else listed
                return [each for each in entries if isinstance(each.get("id"), str)]
            except (MalformedAnswerError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise EndpointError(
                    f"{self.endpoint.name} does not answer as OpenAI's API does",
                    "check the address: it ends in /v1 with most servers",
                ) from error

    async def is_alive(self) -> bool:
        try:
            async with self._request("GET", "/models", None, LIST_S) as response:
                return response.status_code < 500
        except (EndpointError, RetryableError):
            return False

    async def chat(self, body: bytes) -> AsyncGenerator[Any]:
        """The JSON values of an answer: events of a stream, or the whole.

        Raises:
            MalformedAnswerError: something else came.
            RetryableError: the server cannot be reached, broke off, or is busy.
            InputError, EndpointError: see `_check`.
        """
        async with self._request("POST", "/chat/completions", body, None) as response:
            if response.status_code != 200:
                answer = await _whole(response)
                self._check(response.status_code, response.headers, answer)
            async for event in self._events(response):
                yield event

    def connection_lost(self) -> RetryableError:
        said = f"{self.endpoint.name} broke off its answer"
        return RetryableError(AnswerError(said, TRY_AGAIN), unreachable=True)

    def malformed_answer(self, error: MalformedAnswerError) -> RetryableError:
        return RetryableError(AnswerError(f"{self.endpoint.name} sent {error}", TRY_AGAIN))

    async def _events(self, response: httpx.Response) -> AsyncIterator[Any]:
        """The JSON values of an answer: events of a stream, or the whole.

        Raises:
            MalformedAnswerError: something else came.
            RetryableError: it broke off, or nothing comes any more.
        """
        if "json" in response.headers.get("content-type", ""):
            whole = _Bounded()
            async for _ in self._read(response, whole.push):
                pass
            yield _json(bytes(whole.data).decode("utf-8", "replace"))
            return
        lines = _Lines()
        async for line in self._read(response, lines.push):
            if not line.startswith("data:"):
                if line[0] in "<{":
                    raise MalformedAnswerError("something that is not a stream of events")
                continue
            data = line[5:].strip()
            if data == "[DONE]":
                return
            yield _json(data)

    async def _read(
        self, response: httpx.Response, read: Callable[[bytes], list[T]]
    ) -> AsyncIterator[T]:
        """What `read` finds in the bytes of a server, nothing once it ends; while it finds nothing
        the server is asked whether it is alive."""
        import httpx

        source = response.aiter_bytes()
        waiting = asyncio.ensure_future(anext(source))
        silent_since_s = time.monotonic()
        try:
            while True:
                done, _ = await asyncio.wait({waiting}, timeout=SILENCE_S)
                silent_s = time.monotonic() - silent_since_s
                if not done:
                    if silent_s > HANG_S or not await self.is_alive():
                        raise self._hangs(silent_s)
                    continue
                try:
                    found = read(waiting.result())
                except StopAsyncIteration:
                    break
                except httpx.HTTPError as error:
                    raise self.connection_lost() from error
                for each in found:
                    silent_since_s = time.monotonic()
                    yield each
                if not found and silent_s > HANG_S:
                    raise self._hangs(HANG_S)
                waiting = asyncio.ensure_future(anext(source))
            for each in read(b""):
                yield each
        finally:
            waiting.cancel()
            with contextlib.suppress(BaseException):
                await waiting

    @contextlib.asynccontextmanager
    async def _request(
        self, method: str, path: str, body: bytes | None, most_s: float | None
    ) -> AsyncIterator[httpx.Response]:
        """Send a request; yields the response before its body has come.

        Raises:
            RetryableError: the server cannot be reached.
        """
        import httpx

        request = self._http.build_request(
            method,
            self.endpoint.url + path,
            content=body,
            headers={"Content-Type": "application/json"} if body else None,
        )
        if most_s is not None:
            request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write"), most_s)
            request.extensions["timeout"] |= {"connect": CONNECT_S, "pool": None}
        sending = asyncio.ensure_future(self._http.send(request, stream=True))
        begun_s = time.monotonic()
        try:
            patience_s = SILENCE_S if most_s is None else None
            while not (await asyncio.wait({sending}, timeout=patience_s))[0]:
                silent_s = time.monotonic() - begun_s
                if silent_s > HANG_S or not await self.is_alive():
                    raise self._hangs(silent_s)
            response = sending.result()
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        finally:
            sending.cancel()
        try:
            yield response
        except httpx.HTTPError as error:
            raise self.connection_lost() from error
        finally:
            await response.aclose()

    def _check(self, status: int, headers: Mapping[str, str], answer: bytes) -> None:
        """Raise what a status means that is not 200."""
        if status == 200:
            return
        name = self.endpoint.name
        try:
            said = error_text(read_json(answer))
        except ValueError:
            said = f"status {status}"
        if 300 <= status < 400:
            target = " ".join(headers.get("location", "").split())[:200] or "another address"
            raise EndpointError(
                f"{name} sends its clients on to {target}", "give that as --endpoint"
            )
        if status < 300:
            said = f"{name} sent status {status} for an answer"
            raise RetryableError(AnswerError(said, TRY_AGAIN))
        if status in (401, 403):
            given = os.environ.get(self._key_variable)
            wants = "refuses the API key" if given else "wants an API key"
            raise EndpointError(f"{name} {wants} ({said})", "give it with --api-key")
        if status == 404:
            raise EndpointError(
                f"{name} has no model {self.endpoint.model!r}, or no such API: {said}",
                "check --model, and the address: it ends in /v1 with most servers",
            )
        if status in _RETRIED or status >= 500:
            failure = AnswerError(f"{name} failed with status {status}: {said}", _LOG)
            pause_s = _retry_after_s(headers) if status in _BUSY else 0.0
            raise RetryableError(failure, pause_s=pause_s)
        hint = "lower --max-pixels" if status == 413 else "change what it names"
        raise InputError(f"{name} refuses the request: {said}", hint)

    def _hangs(self, seconds: float) -> RetryableError:
        said = f"{self.endpoint.name} has said nothing for {seconds:.0f} s"
        return RetryableError(AnswerError(said, TRY_AGAIN), unreachable=True)

    def _unreachable(self, error: Exception) -> RetryableError:
        import httpx

        hint = "start the server there, or correct --endpoint"
        if isinstance(error, httpx.TimeoutException):
            what = "does not answer"
        elif isinstance(error, httpx.ConnectError):
            what = f"cannot be reached ({system_words(error)})"
        elif isinstance(error, httpx.RemoteProtocolError) and "disconnected" in str(error):
            what, hint = "closed the connection without an answer", _LOG
        elif isinstance(error, httpx.RemoteProtocolError):
            what, hint = "does not speak HTTP", "check the port of --endpoint"
        else:
            what = f"broke the connection off ({system_words(error)})"
        return RetryableError(AnswerError(f"{self.endpoint.name} {what}", hint), unreachable=True)


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
            MalformedAnswerError: there are more.
        """
        self.data += piece
        if len(self.data) > MOST_BYTES:
            raise MalformedAnswerError(f"more than {MOST_BYTES >> 20} MiB where it has to be less")
        return [piece]


class _Lines:
    """The lines of a stream of events that say something: no comments, which keep a connection
    alive."""

    def __init__(self) -> None:
        self._begun = _Bounded()

    def push(self, piece: bytes) -> list[str]:
        """The lines that this piece completes; an empty piece ends the last one.

        Raises:
            MalformedAnswerError: one is longer than `MOST_BYTES`.
        """
        found = []
        for number, part in enumerate(re.split(rb"\r\n|\r|\n", piece or b"\n")):
            if number:
                found.append(bytes(self._begun.data).decode("utf-8", "replace"))
                self._begun = _Bounded()
            self._begun.push(part)
        return [line for line in found if line and not line.startswith(":")]


def _json(text: str) -> Any:
    try:
        return read_json(text)
    except ValueError as error:
        raise MalformedAnswerError("something that is not JSON") from error


def _retry_after_s(headers: Mapping[str, str]) -> float:
    said = headers.get("retry-after", "")
    return float(said) if said.isascii() and said.isdecimal() else _BUSY_PAUSE_S
