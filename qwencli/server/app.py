"""An OpenAI-compatible application over one engine.

What comes in is checked before the engine hears of it; what goes wrong has OpenAI's form
(`api_errors`). It reads no file that a client names and keeps nothing of what it is asked.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from qwencli import __version__
from qwencli.engine.request import RequestSource
from qwencli.errors import QwenCliError
from qwencli.results import GenerationChunk, GenerationResult
from qwencli.server.access import Access
from qwencli.server.answers import Answer, ClientGoneError, EngineHandle, RequestTimeoutError
from qwencli.server.api_errors import ApiError, api_error, body_error, json_response
from qwencli.server.body_requests import BodyRequests
from qwencli.server.chat_api import ChatBody, ChatFormat, event
from qwencli.server.metrics import Metrics
from qwencli.server.openapi import openapi_document
from qwencli.server.page import PAGE_HEADERS, chat_page
from qwencli.server.responses_api import ResponsesBody, ResponsesFormat
from qwencli.server.settings import ServerSettings

T = TypeVar("T", bound=BaseModel)


class Format(Protocol):
    """How an API writes an answer."""

    def whole(
        self, pieces: Sequence[GenerationChunk], result: GenerationResult
    ) -> dict[str, Any]: ...

    def begin(self) -> Iterator[bytes]: ...

    def events(self, pieces: Sequence[GenerationChunk]) -> bytes: ...


class Stream(Protocol):
    """See `listen.Stream`."""

    @property
    def is_full(self) -> bool: ...

    async def room(self) -> None: ...

    def write(self, data: bytes, *, last: bool = False) -> None: ...


class Connection(Protocol):
    """What a request came over, as its `state["connection"]`.

    `body` is all of a body where it is here already, to be had once, and None where it is not.
    `when_lost` says what to call once the client is gone, at once where it is, and `over` that it
    is not to be called any more. `stream` begins an answer in pieces, of which `filler` is one that
    says nothing, and `abort` ends the connection for a client that takes nothing of one.
    """

    @property
    def body(self) -> bytes | None: ...

    def when_lost(self, call: Callable[[], None]) -> None: ...

    def over(self, call: Callable[[], None]) -> None: ...

    def stream(self, headers: Sequence[tuple[bytes, bytes]], filler: bytes) -> Stream: ...

    def abort(self) -> None: ...


_EVENT_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
)
_COMMENT = b":\n\n"


def create_app(engine_thread: EngineHandle, settings: ServerSettings) -> Starlette:
    """The application. The engine thread is started and closed by the caller."""
    server = _Server(engine_thread, settings)
    app = Starlette(
        routes=[
            # Those are tried in turn: what is asked most is first.
            Route("/v1/chat/completions", server.chat_completions, methods=["POST"]),
            Route("/v1/responses", server.responses, methods=["POST"]),
            Route("/health", server.health),
            Route("/v1/models", server.models),
            Route("/v1/models/{name:path}", server.model),
            Route("/metrics", server.metrics_text),
            Route("/status", server.status),
            Route("/openapi.json", server.openapi),
            Route("/", server.page),
        ],
        exception_handlers={
            ApiError: _api_error_response,
            QwenCliError: _qwencli_error_response,
            HTTPException: _http_error,
            ClientDisconnect: _nobody,
            Exception: _fault,
        },
    )
    app.state.end_answers = engine_thread.end_answers
    app.add_middleware(
        Access, api_key=settings.api_key, hosts=settings.hosts, replied=server.replied
    )
    return app


class _Server:
    def __init__(self, engine_thread: EngineHandle, settings: ServerSettings) -> None:
        self._thread, self._settings = engine_thread, settings
        self._started = int(time.time())
        self._metrics: Metrics | None = None
        self._replies: Counter[int] = Counter()
        self._requests = BodyRequests(settings, engine_thread)

    def replied(self, status: int) -> None:
        self._replies[status] += 1

    @property
    def metrics(self) -> Metrics:
        # Not before the engine is loaded.
        if self._metrics is None:
            self._metrics = Metrics(self._thread, self._settings.model, self._replies)
        return self._metrics

    async def health(self, request: Request) -> Response:
        failed = self._thread.failure is not None
        body = {"status": "failed" if failed else "ok", "version": __version__}
        return json_response(body, 503 if failed else 200)

    async def metrics_text(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def status(self, request: Request) -> Response:
        return json_response(self.metrics.state())

    async def openapi(self, request: Request) -> Response:
        return json_response(openapi_document())

    async def page(self, request: Request) -> Response:
        asks_key = self._settings.api_key is not None
        return HTMLResponse(chat_page(self._settings.model, asks_key), headers=PAGE_HEADERS)

    async def models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._model_entry()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return json_response(self._model_entry())

    def _model_entry(self) -> dict[str, Any]:
        return {
            "id": self._settings.model,
            "object": "model",
            "created": self._started,
            "owned_by": "qwencli",
            "max_model_len": self._thread.engine.max_seq_len,
            "model_type": self._thread.engine.model_type,
            "can_think": self._thread.engine.can_think,
        }

    def _check_model(self, name: str | None) -> None:
        known = (self._settings.model, *self._settings.aliases)
        if name is not None and name not in known:
            raise ApiError(
                404,
                f"the model {name[:200]!r} is not served here; {self._settings.model!r} is",
                param="model",
                code="model_not_found",
            )

    async def chat_completions(self, request: Request) -> ASGIApp:
        body = await self._body(request, ChatBody)
        self._check_model(body.model)
        return self._reply(
            await self._requests.request_of(body),
            ChatFormat(body, self._settings.model),
            stream=bool(body.stream),
            in_batch=body.num_logprobs is not None,
        )

    async def responses(self, request: Request) -> ASGIApp:
        body = await self._body(request, ResponsesBody)
        chat = body.as_chat()
        self._check_model(body.model)
        form = ResponsesFormat(body, self._settings.model)
        return self._reply(await self._requests.request_of(chat), form, stream=bool(body.stream))

    async def _body(self, request: Request, kind: type[T]) -> T:
        data = await self._read(request)
        try:
            return kind.model_validate_json(data)
        except ValidationError as error:
            raise body_error(error, data) from error

    async def _read(self, request: Request) -> bytes:
        most = self._settings.max_body_bytes
        too_large = ApiError(413, f"the body is larger than {most >> 20} MiB")
        if not request.headers.get("content-type", "").startswith("application/json"):
            # A page elsewhere can send other types without asking first.
            raise ApiError(415, "send the body as application/json")
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length[:19]) > most:
            raise too_large
        connection: Connection = request.scope["state"]["connection"]
        whole = connection.body
        if whole is not None:
            if len(whole) > most:
                raise too_large
            return whole
        data = bytearray()
        try:
            async with asyncio.timeout(self._settings.body_s):
                async for piece in request.stream():
                    data += piece
                    if len(data) > most:
                        raise too_large
        except TimeoutError as error:
            raise ApiError(408, "the body did not arrive in time") from error
        return bytes(data)

    def _reply(
        self, source: RequestSource, form: Format, *, stream: bool, in_batch: bool = False
    ) -> ASGIApp:
        # With logprobs every piece says something that the result does not.
        whole = not (stream or in_batch)

        async def reply(scope: Scope, receive: Receive, send: Send) -> None:
            connection: Connection = scope["state"]["connection"]
            try:
                with self._answering(source, connection, whole, in_batch) as answer:
                    if stream:
                        await self._stream(answer, form, connection)
                    else:
                        pieces, result = await _whole(answer)
                        self.metrics.answered(result)
                        response = json_response(form.whole(pieces, result))
                        async with asyncio.timeout(self._settings.write_s):
                            await response(scope, receive, send)
            except QwenCliError as error:
                await api_error(error).response()(scope, receive, send)
            except TimeoutError:  # a reader that takes nothing
                connection.abort()

        return reply

    @contextmanager
    def _answering(
        self, source: RequestSource, connection: Connection, whole: bool, in_batch: bool
    ) -> Iterator[Answer]:
        """An answer that ends when its reader goes, or when it takes too long."""
        answer = self._thread.submit(source, whole=whole, in_batch=in_batch)
        late = RequestTimeoutError(
            f"the answer was not complete within {self._settings.answer_s:g} seconds"
        )
        timer = asyncio.get_running_loop().call_later(self._settings.answer_s, answer.end, late)
        gone = functools.partial(answer.end, ClientGoneError("the client has gone"))
        connection.when_lost(gone)
        try:
            yield answer
        finally:
            timer.cancel()
            connection.over(gone)
            gone()

    async def _stream(self, answer: Answer, form: Format, connection: Connection) -> None:
        # What is wrong with a request is known before its first piece: it has a status of its own.
        pieces = await answer.pieces()
        stream, over = connection.stream(_EVENT_HEADERS, _COMMENT), False
        self.replied(200)

        def write(pieces: Sequence[GenerationChunk], before: bytes = b"") -> bool:
            """Write pieces; whether more may be written at once."""
            nonlocal over
            data = before + form.events(pieces)
            result = pieces[-1].result
            if result is None:
                if data:
                    stream.write(data)
                return not stream.is_full
            self.metrics.answered(result)
            over = True
            stream.write(data, last=True)
            return False

        write(pieces, b"".join(form.begin()))
        while not over:
            if stream.is_full:
                async with asyncio.timeout(self._settings.write_s):
                    await stream.room()
            try:
                await answer.read_by(write)
            except QwenCliError as error:
                stream.write(event(api_error(error).body), last=True)
                over = True


async def _whole(answer: Answer) -> tuple[list[GenerationChunk], GenerationResult]:
    pieces: list[GenerationChunk] = []
    while True:
        pieces += await answer.pieces()
        result = pieces[-1].result
        if result is not None:
            return pieces, result


async def _api_error_response(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError), "registered for it"
    return error.response()


async def _qwencli_error_response(request: Request, error: Exception) -> Response:
    assert isinstance(error, QwenCliError), "registered for it"
    return api_error(error).response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "registered for it"
    path = request.url.path[:200]
    said = {404: f"there is no {path} here", 405: f"{path} does not take {request.method}"}
    headers = dict(error.headers) if error.headers else None
    told = said.get(error.status_code, error.detail)
    return ApiError(error.status_code, told, headers=headers).response()


async def _nobody(request: Request, error: Exception) -> Response:
    return ApiError(499, "the client has gone").response()


async def _fault(request: Request, error: Exception) -> Response:
    return ApiError(500, f"a fault of the server: {type(error).__name__}").response()
