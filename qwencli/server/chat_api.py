"""Bodies of `/v1/chat/completions`: what is asked, and the answer in the same form."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from qwencli.config import SamplingOptions
from qwencli.messages import ToolCall
from qwencli.results import GenerationChunk, GenerationResult, TokenLogprob
from qwencli.server.api_errors import ApiError
from qwencli.server.tool_calls import Call, CallSplitter

MOST_STOPS = 16
# Of a call's arguments; a body as a whole may not be deeper than 200 either.
MOST_NESTED = 100
# JSON has no minus infinity.
LEAST_LOGPROB = -9999.0


# What would change the answer and cannot be done is refused, where it asks for anything.
_NOT_DONE = {
    "frequency_penalty": "use repetition_penalty",
    "presence_penalty": "use repetition_penalty",
    "logit_bias": "hold the answer to a response_format",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "audio": "answers are text",
}


class Body(BaseModel):
    """Types are as JSON has them: "1" is no number. What is not known is passed over."""

    model_config = ConfigDict(strict=True, extra="ignore")


class Placed(Body):
    """Knows its place in what the client sent, where that is no body of chat completions."""

    _place: str = PrivateAttr("")

    def at(self, place: str) -> Self:
        self._place = place
        return self

    def place_or(self, usual: str) -> str:
        return self._place or usual


class TextContent(Body):
    type: Literal["text"]
    text: str


class ImageUrl(Placed):
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImageContent(Body):
    type: Literal["image_url"]
    image_url: ImageUrl


Content = Annotated[TextContent | ImageContent, Field(discriminator="type")]


class CalledFunction(Placed):
    name: str
    arguments: str


class CalledTool(Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Content] | None = None
    tool_calls: list[CalledTool] | None = Field(default=None, max_length=128)

    def called(self, place: str) -> tuple[ToolCall, ...]:
        """Raises ApiError for arguments that are no JSON object."""
        calls = [call.function for call in self.tool_calls or ()]
        for number, call in enumerate(calls):
            where = call.place_or(f"{place}.tool_calls.{number}.function.arguments")
            arguments = _json(call.arguments)
            if not isinstance(arguments, dict):
                raise ApiError(400, f"{where}: is not a JSON object", param=where)
            if _is_deeper(arguments, MOST_NESTED):
                raise ApiError(400, f"{where}: is nested deeper than {MOST_NESTED}", param=where)
        return tuple(ToolCall(call.name, call.arguments) for call in calls)


class Function(Body):
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class TemplateSettings(Body):
    enable_thinking: bool | None = None
    thinking_budget: int | None = Field(default=None, ge=0)


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


class ChatBody(Placed):
    """What may be asked. top_k, min_p, repetition_penalty and ignore_eos are vLLM's too, and so is
    thinking_token_budget, which Qwen's own servers call thinking_budget and llama.cpp
    thinking_budget_tokens."""

    model: str | None = None
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=200)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=1, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    logit_bias: dict[str, float] | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[Tool] | None = Field(default=None, max_length=128)
    tool_choice: Literal["none", "auto"] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: TemplateSettings | None = None
    enable_thinking: bool | None = None
    thinking_token_budget: int | None = Field(default=None, ge=0)
    thinking_budget: int | None = Field(default=None, ge=0)
    thinking_budget_tokens: int | None = Field(default=None, ge=0)
    continue_final_message: bool | None = None

    @property
    def begun(self) -> str:
        """What the answer begins with: the text of a last message that is to be gone on with.

        Raises:
            ApiError: that message is no text of the assistant's.
        """
        if not self.continue_final_message:
            return ""
        last = self.messages[-1]
        if last.role != "assistant" or not isinstance(last.content, str) or last.tool_calls:
            raise ApiError(
                400,
                "continue_final_message: the last message is no text of the assistant's",
                param="continue_final_message",
            )
        return last.content

    @property
    def thinks(self) -> bool:
        """Off unless asked for: thoughts may take the whole answer."""
        if self._switched is not None:
            return self._switched
        if self.reasoning_effort is not None:
            return self.reasoning_effort != "none"
        return bool(self.most_thinking)

    @property
    def _switched(self) -> bool | None:
        own = self.chat_template_kwargs
        if own is not None and own.enable_thinking is not None:
            return own.enable_thinking
        return self.enable_thinking

    @property
    def most_thinking(self) -> int | None:
        """Tokens that thoughts may have; None where nobody bounds them. 0 where they are switched
        off, whatever else is said: a model that has no switch for them has none then, either."""
        own = self.chat_template_kwargs
        said = (
            self.thinking_token_budget,
            self.thinking_budget,
            self.thinking_budget_tokens,
            None if own is None else own.thinking_budget,
        )
        most = next((each for each in said if each is not None), None)
        off = self._switched is False or self.reasoning_effort == "none"
        return 0 if off else most

    @property
    def offered(self) -> list[dict[str, Any]]:
        """The tools that the model may call."""
        if self.tool_choice == "none":
            return []
        return [tool.model_dump(exclude_none=True) for tool in self.tools or ()]

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

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
        for name, instead in _NOT_DONE.items():
            if getattr(self, name):
                raise ApiError(400, f"{name} is not supported; {instead}", param=name)
        if self.modalities not in (None, [], ["text"]):
            raise ApiError(400, "modalities: answers are text", param="modalities")
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
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


def _is_deeper(value: Any, most: int) -> bool:
    """Whether lists and objects of a JSON value hold each other more than so often."""
    level = [value]
    for _ in range(most):
        held = (each.values() if isinstance(each, dict) else each for each in level)
        level = [part for parts in held for part in parts if isinstance(part, dict | list)]
        if not level:
            return False
    return True


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


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
        "total_tokens": (result.num_prompt_tokens or 0) + new,
        "completion_tokens_details": {"reasoning_tokens": result.num_thinking_tokens},
        "prompt_tokens_details": {
            "cached_tokens": result.num_cached_tokens,
            "image_tokens": result.num_image_tokens,
        },
        "timings": vars(result.timings),
    }


def ran_of(result: GenerationResult) -> dict[str, Any]:
    """What else we know of an answer, for our own clients: the modes that ran, and notes."""
    return {
        "effective": vars(result.effective),
        "notes": list(result.notes),
        "image_sizes": [list(size) for size in result.image_sizes],
        "resized_sizes": [list(size) for size in result.resized_sizes],
        "token_ids": list(result.token_ids),
    }


class ChatFormat:
    """An answer as chat completions have it: whole, or in events."""

    def __init__(self, body: ChatBody, model: str) -> None:
        self._calls = CallSplitter(body.offered)
        self._num_calls = 0
        self._with_logprobs = body.num_logprobs is not None
        self._with_usage = body.stream_options is not None and body.stream_options.include_usage
        self.id, self._model = f"chatcmpl-{secrets.token_hex(12)}", model
        self._created = int(time.time())
        # Whether its pieces have nothing but text, and thoughts.
        self._is_plain = not (body.offered or self._with_logprobs)
        # What stands before the delta of each event.
        head = _json_bytes(self._head("chat.completion.chunk")).removesuffix(b"}")
        self._before = b'data: %b,"choices":[{"index":0,"delta":' % head

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}

    def whole(self, pieces: Sequence[GenerationChunk], result: GenerationResult) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": result.text, "refusal": None}
        text, calls = self._calls.take(result.text, is_last=True)
        if calls:
            message |= {"content": text or None, "tool_calls": list(map(_called, calls))}
        if result.thoughts is not None:
            message["reasoning_content"] = result.thoughts
        choice = {
            "index": 0,
            "message": message,
            "logprobs": self._logprobs(pieces),
            "finish_reason": "tool_calls" if calls else result.finish_reason,
        }
        return {
            **self._head("chat.completion"),
            "choices": [choice],
            "usage": usage_of(result),
            "qwencli": ran_of(result),
        }

    def begin(self) -> Iterator[bytes]:
        yield self._plain(b'"role":"assistant",', "")

    def events(self, pieces: Sequence[GenerationChunk]) -> bytes:
        """Pieces that have come together are one event."""
        if self._is_plain and len(pieces) == 1:
            (piece,) = pieces
            if piece.result is None and not piece.thoughts:
                return self._plain(b"", piece.text) if piece.text else b""
        return b"".join(self._events(pieces))

    def _events(self, pieces: Sequence[GenerationChunk]) -> Iterator[bytes]:
        result = pieces[-1].result
        pushed = "".join([piece.text for piece in pieces])
        text, calls = self._calls.take(pushed, is_last=result is not None)
        delta: dict[str, Any] = {}
        if thoughts := "".join([piece.thoughts for piece in pieces]):
            delta["reasoning_content"] = thoughts
        if text:
            delta["content"] = text
        logprobs = self._logprobs(pieces)
        if text and not (thoughts or logprobs):
            yield self._plain(b"", text)
        elif delta or (logprobs and logprobs["content"]):
            yield self._event(delta, logprobs=logprobs)
        for call in calls:
            # Whole: its arguments are known to be JSON only once they are complete.
            yield self._event({"tool_calls": [{"index": self._num_calls, **_called(call)}]})
            self._num_calls += 1
        if result is not None:
            reason = "tool_calls" if self._num_calls else result.finish_reason
            yield self._event({}, reason, qwencli=ran_of(result))
            if self._with_usage:
                head = self._head("chat.completion.chunk")
                yield event({**head, "choices": [], "usage": usage_of(result)})
            yield b"data: [DONE]\n\n"

    def _logprobs(self, pieces: Sequence[GenerationChunk]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        found = [each for piece in pieces for each in piece.logprobs]
        return {
            "content": [
                {**_token_logprob(each.chosen), "top_logprobs": list(map(_token_logprob, each.top))}
                for each in found
            ],
            "refusal": None,
        }

    def _plain(self, before: bytes, text: str) -> bytes:
        """An event with nothing but a delta of text, as most are, and `before` in front of it."""
        return b'%b{%b"content":%b},"logprobs":null,"finish_reason":null}]}\n\n' % (
            self._before, before, _quoted(text).encode("utf-8", "replace"),
        )  # fmt: skip

    def _event(
        self,
        delta: Mapping[str, Any],
        finish_reason: str | None = None,
        logprobs: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> bytes:
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        return event({**self._head("chat.completion.chunk"), "choices": [choice], **more})


def _called(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _token_logprob(token: TokenLogprob) -> dict[str, Any]:
    return {
        "token": token.text.decode("utf-8", "replace"),
        "logprob": max(token.logprob, LEAST_LOGPROB),
        "bytes": list(token.text),
    }


# `json.dumps` with settings makes an encoder at each call.
_encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
# What that does with a text.
_quoted = json.encoder.encode_basestring


def _json_bytes(value: Any) -> bytes:
    return _encoder.encode(value).encode("utf-8", "replace")


def event(value: Mapping[str, Any], name: str | None = None) -> bytes:
    """A server-sent event."""
    head = f"event: {name}\n".encode() if name else b""
    return b"%bdata: %b\n\n" % (head, _json_bytes(value))
