"""From the body of a request to what the engine is asked, checked but for pictures and length."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from qwencli.capabilities import check_thinking
from qwencli.config import SamplingOptions
from qwencli.engine.constrained import read_schema
from qwencli.errors import QwenCliError
from qwencli.messages import GenerationRequest, ImagePart, Message, Role, TextPart, ToolCall
from qwencli.server.answers import EngineHandle
from qwencli.server.api_errors import ApiError
from qwencli.server.background import BackgroundThreads
from qwencli.server.chat_api import ChatBody, ChatMessage, TextContent
from qwencli.server.image_urls import opened_picture, picture_bytes
from qwencli.server.settings import ServerSettings

# Schemas that are read at once, each on a core, and pictures that are fetched.
_SCHEMAS_AT_ONCE, _FETCHES_AT_ONCE = 4, 32
# A picture's file, and where in the body it stood.
_Picture = tuple[bytes, str]


@dataclass(frozen=True)
class AskedMessage:
    """A message whose pictures are files: texts and pictures in their order."""

    role: Role
    parts: tuple[str | _Picture, ...]
    calls: tuple[ToolCall, ...]


@dataclass(frozen=True)
class AskedRequest:
    """Makes a `GenerationRequest` when it is its turn, where the engine is: it may be sent there.

    Args:
        max_pixels: of a picture. about: what the request says beside its messages.
    """

    messages: tuple[AskedMessage, ...]
    max_pixels: int
    about: dict[str, Any]

    def __call__(self) -> GenerationRequest:
        """Opens the pictures.

        Raises:
            PictureError: one that is none, or too large.
        """
        found: list[Message] = []
        shown: list[ImagePart] = []
        for message in self.messages:
            held: list[TextPart | ImagePart] = []
            for part in message.parts:
                if isinstance(part, str):
                    held.append(TextPart(part))
                else:
                    picture = opened_picture(*part, self.max_pixels, shown)
                    shown.append(picture)
                    held.append(picture)
            found.append(Message(message.role, tuple(held), message.calls))
        return GenerationRequest(tuple(found), **self.about)


class BodyRequests:
    """Makes requests of bodies; of an event loop."""

    def __init__(self, settings: ServerSettings, engine_thread: EngineHandle) -> None:
        self._settings, self._thread = settings, engine_thread
        self._schemas = BackgroundThreads(_SCHEMAS_AT_ONCE)
        self._fetches = BackgroundThreads(_FETCHES_AT_ONCE) if settings.allow_image_urls else None

    async def request_of(self, body: ChatBody) -> AskedRequest:
        """What a body asks for.

        Raises:
            ApiError, QwenCliError: what is wrong with it.
        """
        self._check_thinking(body)
        sampling = self._over_defaults(body.sampling())
        self._check_tokens(body.most_tokens)
        schema = body.schema_text()
        if schema is not None:
            # Compiling a large one takes time.
            schema = await self._schemas.run(read_schema, schema, "response_format")
        begun = body.begun
        asked = body.messages[:-1] if begun else body.messages
        messages = await self._messages(asked, body.place_or("messages"))
        about = {
            "sampling": sampling,
            "ignore_eos": bool(body.ignore_eos),
            "starts_with": begun,
            "schema": schema,
            "thinking": body.thinks,
            "thinking_budget": body.most_thinking,
            "tools": tuple(map(json.dumps, body.offered)),
            "cut_to_fit": body.most_tokens is None,
            "logprobs": body.num_logprobs,
        }
        return AskedRequest(messages, self._settings.max_pixels, about)

    def _check_thinking(self, body: ChatBody) -> None:
        wanted = body.thinks and body.most_thinking != 0
        can_think = self._thread.engine.can_think
        try:
            check_thinking(self._settings.model, can_think=can_think, wanted=wanted)
        except QwenCliError as error:
            raise ApiError(
                400,
                f"{error.message} (leave out enable_thinking, reasoning_effort and the budget of "
                "thoughts)",
            ) from error

    def _over_defaults(self, said: SamplingOptions) -> SamplingOptions:
        """What a request says, over what the server was started with."""
        asked: dict[str, Any] = {}
        if self._settings.sampling.max_new_tokens is None:
            asked["max_new_tokens"] = self._settings.usual_tokens
        asked |= {
            f.name: value
            for f in fields(said)
            if (value := getattr(said, f.name)) not in (None, ())
        }
        if not asked.keys().isdisjoint(("temperature", "top_p", "top_k", "min_p")):
            asked["do_sample"] = None
        return replace(self._settings.sampling, **asked)

    def _check_tokens(self, wanted: int | None) -> None:
        if wanted is not None and wanted > self._settings.max_tokens:
            raise ApiError(
                400,
                f"{wanted} new tokens are asked for, at most {self._settings.max_tokens} are given",
                param="max_tokens",
            )

    async def _messages(
        self, messages: Sequence[ChatMessage], where: str
    ) -> tuple[AskedMessage, ...]:
        """The conversation, which stands at `where`; pictures are here, but not decoded yet."""
        settings = self._settings
        if len(messages) > settings.max_messages:
            raise ApiError(
                400,
                f"{len(messages)} messages are more than the {settings.max_messages} of a request",
                param=where,
            )
        pictures = sum(
            not isinstance(part, TextContent)
            for message in messages
            for part in (message.content or ())
            if not isinstance(part, str)
        )
        if pictures > settings.max_images:
            raise ApiError(
                400,
                f"{pictures} pictures are more than the {settings.max_images} of a request",
                param=where,
            )
        made: list[AskedMessage] = []
        for number, message in enumerate(messages):
            parts: list[str | _Picture] = []
            content = message.content or ""
            for index, part in enumerate([content] if isinstance(content, str) else content):
                if isinstance(part, str):
                    parts.append(part)
                elif isinstance(part, TextContent):
                    parts.append(part.text)
                else:
                    usual = f"{where}.{number}.content.{index}.image_url.url"
                    place = part.image_url.place_or(usual)
                    data = await picture_bytes(part.image_url.url, place, self._fetches)
                    parts.append((data, place))
            role: Role = "system" if message.role == "developer" else message.role
            made.append(AskedMessage(role, tuple(parts), message.called(f"{where}.{number}")))
        return tuple(made)
