"""Bodies of `/v1/chat/completions`: what is asked, and the answer in the same form."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from qwencli.config import SamplingOptions
from qwencli.results import GenerationChunk, GenerationResult
from qwencli.server.api_errors import ApiError

MOST_STOPS = 16


class Body(BaseModel):
    """Types are as JSON has them: "1" is no number. What is not known is passed over."""

    model_config = ConfigDict(strict=True, extra="ignore")


class TextContent(Body):
    type: Literal["text"]
    text: str


class ImageUrl(Body):
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImageContent(Body):
    type: Literal["image_url"]
    image_url: ImageUrl


Content = Annotated[TextContent | ImageContent, Field(discriminator="type")]


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Content] | None = None


class JsonSchema(Body):
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    json_schema: dict[str, Any] = Field(alias="schema")


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    type: Literal["json_object"]


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]


class StreamOptions(Body):
    include_usage: bool = False


class ChatBody(Body):
    """What may be asked. top_k, min_p and repetition_penalty are ours, as they are vLLM's."""

    model: str | None = None
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, le=200)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=1, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    response_format: ResponseFormat | None = None

    @property
    def most_tokens(self) -> int | None:
        wanted = self.max_completion_tokens
        return self.max_tokens if wanted is None else wanted

    def schema_text(self) -> str | None:
        """The JSON schema that the answer is held to, as text."""
        wanted = self.response_format
        if isinstance(wanted, JsonSchemaFormat):
            return json.dumps(wanted.json_schema.json_schema)
        return '{"type": "object"}' if isinstance(wanted, JsonObjectFormat) else None

    def sampling(self) -> SamplingOptions:
        """Raises ApiError for what cannot be done."""
        for name in ("frequency_penalty", "presence_penalty"):
            if getattr(self, name):
                raise ApiError(400, f"{name} is not supported; use repetition_penalty", param=name)
        if self.n not in (None, 1):
            raise ApiError(400, "n must be 1: ask several times instead", param="n")
        return SamplingOptions(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            max_new_tokens=self.most_tokens,
            seed=None if self.seed is None else self.seed & 0xFFFFFFFF,
            stop=stops_of(self.stop),
        )


def stops_of(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if "" in stops or len(stops) > MOST_STOPS:
        raise ApiError(400, f"stop takes 1 to {MOST_STOPS} texts, none empty", param="stop")
    return stops


def usage_of(result: GenerationResult) -> dict[str, Any]:
    """Tokens as OpenAI counts them, and our timings in seconds."""
    new = result.num_new_tokens
    return {
        "prompt_tokens": result.num_prompt_tokens,
        "completion_tokens": new,
        "total_tokens": result.num_prompt_tokens + new,
        "prompt_tokens_details": {
            "cached_tokens": result.num_cached_tokens,
            "image_tokens": result.num_image_tokens,
        },
        "timings": asdict(result.timings),
    }


def ran_of(result: GenerationResult) -> dict[str, Any]:
    """What else we know of an answer, for our own clients: the modes that ran, and notes."""
    return {
        "effective": asdict(result.effective),
        "notes": list(result.notes),
        "image_sizes": [list(size) for size in result.image_sizes],
        "resized_sizes": [list(size) for size in result.resized_sizes],
        "token_ids": list(result.token_ids),
    }


class ChatFormat:
    """An answer as chat completions have it: whole, or in events."""

    def __init__(self, body: ChatBody, model: str) -> None:
        self._with_usage = body.stream_options is not None and body.stream_options.include_usage
        self.id, self._model = f"chatcmpl-{secrets.token_hex(12)}", model
        self._created = int(time.time())

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}

    def whole(self, pieces: Sequence[GenerationChunk], result: GenerationResult) -> dict[str, Any]:
        message = {"role": "assistant", "content": result.text, "refusal": None}
        if result.thoughts is not None:
            message["reasoning_content"] = result.thoughts
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": result.finish_reason,
        }
        return {
            **self._head("chat.completion"),
            "choices": [choice],
            "usage": usage_of(result),
            "qwencli": ran_of(result),
        }

    def begin(self) -> Iterator[bytes]:
        yield self._event({"role": "assistant", "content": ""})

    def events(self, pieces: Sequence[GenerationChunk]) -> Iterator[bytes]:
        """Pieces that have come together are one event."""
        delta = {
            name: text
            for name, text in (
                ("reasoning_content", "".join(piece.thoughts for piece in pieces)),
                ("content", "".join(piece.text for piece in pieces)),
            )
            if text
        }
        if delta:
            yield self._event(delta)
        result = pieces[-1].result
        if result is not None:
            yield self._event({}, result.finish_reason, qwencli=ran_of(result))
            if self._with_usage:
                head = self._head("chat.completion.chunk")
                yield event({**head, "choices": [], "usage": usage_of(result)})
            yield b"data: [DONE]\n\n"

    def _event(
        self, delta: Mapping[str, Any], finish_reason: str | None = None, **more: Any
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return event({**self._head("chat.completion.chunk"), "choices": [choice], **more})


def event(value: Mapping[str, Any], name: str | None = None) -> bytes:
    """A server-sent event."""
    data = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {data}\n\n".encode("utf-8", "replace")
