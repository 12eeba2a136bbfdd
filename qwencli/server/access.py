"""Who may ask: the key, the `Host` header, and no pages of other sites."""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable, Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwencli.server.api_errors import ApiError

# What says nothing that a stranger may not know: whether the server lives, and the page that asks
# for the key.
_OPEN = ("/health", "/")


class Access:
    """Refuses what may not ask, before anything of it is read.

    A name that a page's author had point here (DNS rebinding) is no host of ours, and a request
    that a page of another site sends has an `Origin` that is not its own host.

    Args:
        api_key: None = nobody is asked for one. hosts: see `ServerSettings`.
        replied: told the status of every reply that is sent through `send`.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_key: str | None,
        hosts: tuple[str, ...] | None,
        replied: Callable[[int], None],
    ) -> None:
        self._app, self._hosts, self._replied = app, hosts, replied
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._replied(message["status"])
            await send(message)

        # Of a name that comes twice the first.
        refused = self._refused(scope["path"], dict(reversed(scope["headers"])))
        answer = self._app if refused is None else refused.response()
        await answer(scope, receive, counted)

    def _refused(self, path: str, headers: Mapping[bytes, bytes]) -> ApiError | None:
        def said(name: bytes) -> str:
            return headers.get(name, b"").decode("latin-1")

        host = said(b"host")
        if self._hosts is not None and _name_of(host) not in self._hosts:
            return ApiError(403, "this name is not one of this server's", code="host_not_allowed")
        if b"origin" in headers and said(b"origin").partition("://")[2] != host:
            return ApiError(403, "pages of other sites may not ask", code="origin_not_allowed")
        if self._key is None or path in _OPEN:
            return None
        kind, _, given = said(b"authorization").partition(" ")
        if kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self._key):
            return None
        return ApiError(
            401,
            "the API key is missing or wrong",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )


# A name or address, and a port; what else might stand there is no host.
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:@/\\\[\]]+))(?::\d{0,5})?")


def _name_of(host: str) -> str:
    """A `Host` header without its port; empty where it is none."""
    found = _HOST.fullmatch(host)
    return (found[1] or found[2]).lower() if found else ""
