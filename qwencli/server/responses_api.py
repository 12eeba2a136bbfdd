"""Bodies of `/v1/responses`, without state: the same answers in the newer form."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from qwencli.results import GenerationChunk, GenerationResult
from qwencli.server.api_errors import ApiError
from qwencli.server.chat_api import (
    Body,
    CalledFunction,
    CalledTool,
    ChatBody,
    ChatMessage,
    Function,
    ImageContent,
    ImageUrl,
    JsonObjectFormat,
    JsonSchema,
    JsonSchemaFormat,
    TextContent,
    TextFormat,
    Tool,
    event,
    ran_of,
)
from qwencli.server.tool_calls import Call, CallSplitter

_LOGPROBS = "message.output_text.logprobs"


class InputText(Body):
    type: Literal["input_text", "output_text"]
    text: str


class InputImage(Body):
    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto", "low", "high"] | None = None


class InputMessage(Body):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[InputText | InputImage, Field(discriminator="type")]]


class FunctionCall(Body):
    type: Literal["function_call"]
    call_id: str | None = None
    name: str
    arguments: str


class FunctionOutput(Body):
    type: Literal["function_call_output"]
    call_id: str | None = None
    output: str


class Reasoning(Body):
    type: Literal["reasoning"]


def _kind(item: Any) -> str | None:
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)
    return kind if isinstance(kind, str) else None


Item = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionOutput, Tag("function_call_output")]
    | Annotated[Reasoning, Tag("reasoning")],
    Discriminator(
        _kind,
        custom_error_type="item_kind",
        custom_error_message="an item is of type message, function_call, function_call_output "
        "or reasoning",
    ),
]


class FunctionTool(Body):
    type: Literal["function"]
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class SchemaFormat(JsonSchema):
    type: Literal["json_schema"]


class TextSettings(Body):
    format: (
        Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")] | None
    ) = None


class ReasoningSettings(Body):
    effort: str | None = None


class ResponsesBody(Body):
    """What may be asked; see `ChatBody` for what is ours."""

    model: str | None = None
    input: str | list[Item]
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=200)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=1, le=2)
    seed: int | None = None
    text: TextSettings | None = None
    tools: list[FunctionTool] | None = Field(default=None, max_length=128)
    tool_choice: Literal["none", "auto"] | None = None
    reasoning: ReasoningSettings | None = None
    thinking_token_budget: int | None = Field(default=None, ge=0)
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    background: bool | None = None
    include: list[str] | None = None
    top_logprobs: int | None = None

    def as_chat(self) -> ChatBody:
        """The same request of chat completions.

        Raises:
            ApiError: it needs answers that are kept, or says nothing.
        """
        for name in ("previous_response_id", "conversation", "prompt", "background"):
            if getattr(self, name):
                raise ApiError(400, f"{name}: nothing is kept here; send it all", param=name)
        asks = {"top_logprobs": self.top_logprobs, "include": _LOGPROBS in (self.include or ())}
        for name in filter(asks.get, asks):
            told = f"{name}: chat completions have log-probabilities, responses have none here"
            raise ApiError(400, told, param=name)
        messages: list[ChatMessage] = []
        if self.instructions:
            messages.append(ChatMessage(role="system", content=self.instructions))
        items = (
            [InputMessage(role="user", content=self.input)]
            if isinstance(self.input, str)
            else self.input
        )
        for item in items:
            _add(messages, item)
        if not messages:
            raise ApiError(400, "input: there is no message", param="input")
        tools = [
            Tool(
                type="function",
                function=Function(
                    name=tool.name, description=tool.description, parameters=tool.parameters
                ),
            )
            for tool in self.tools or ()
        ]
        return ChatBody(
            model=self.model,
            messages=messages,
            stream=self.stream,
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            response_format=self._format(),
            tools=tools or None,
            tool_choice=self.tool_choice,
            reasoning_effort=self.reasoning.effort if self.reasoning else None,
            thinking_token_budget=self.thinking_token_budget,
        )

    def _format(self) -> TextFormat | JsonObjectFormat | JsonSchemaFormat | None:
        wanted = self.text.format if self.text else None
        if isinstance(wanted, SchemaFormat):
            schema = JsonSchema.model_validate({"schema": wanted.json_schema})
            return JsonSchemaFormat(type="json_schema", json_schema=schema)
        return wanted


def _add(messages: list[ChatMessage], item: Item) -> None:
    if isinstance(item, InputMessage):
        content: str | list[TextContent | ImageContent]
        if isinstance(item.content, str):
            content = item.content
        else:
            content = [
                TextContent(type="text", text=part.text)
                if isinstance(part, InputText)
                else ImageContent(type="image_url", image_url=ImageUrl(url=part.image_url))
                for part in item.content
            ]
        messages.append(ChatMessage(role=item.role, content=content))
    elif isinstance(item, FunctionOutput):
        messages.append(ChatMessage(role="tool", content=item.output))
    elif isinstance(item, FunctionCall):
        call = CalledTool(function=CalledFunction(name=item.name, arguments=item.arguments))
        last = messages[-1] if messages else None
        if last is not None and last.role == "assistant":
            # Calls of one answer stand in one message.
            last.tool_calls = [*(last.tool_calls or ()), call]
        else:
            messages.append(ChatMessage(role="assistant", tool_calls=[call]))


class ResponsesFormat:
    """An answer as the responses API has it: whole, or in events."""

    def __init__(self, body: ResponsesBody, model: str) -> None:
        self._body, self._model = body, model
        self._calls = CallSplitter(body.as_chat().offered)
        self._id, self._message_id = (f"{kind}_{secrets.token_hex(16)}" for kind in ("resp", "msg"))
        self._created = int(time.time())
        self._number = 0
        self._text: list[str] = []
        self._called: list[Call] = []

    def whole(self, pieces: Sequence[GenerationChunk], result: GenerationResult) -> dict[str, Any]:
        text, calls = self._calls.take(result.text, is_last=True)
        return self._response(result, text, calls)

    def begin(self) -> Iterator[bytes]:
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._response(None, "", []))
        message = {**self._message("", "in_progress"), "content": []}
        yield self._event("response.output_item.added", output_index=0, item=message)
        yield self._part_event("response.content_part.added", part=_output_text(""))

    def events(self, pieces: Sequence[GenerationChunk]) -> bytes:
        return b"".join(self._events(pieces))

    def _events(self, pieces: Sequence[GenerationChunk]) -> Iterator[bytes]:
        result = pieces[-1].result
        pushed = "".join(piece.text for piece in pieces)
        text, calls = self._calls.take(pushed, is_last=result is not None)
        self._called += calls
        if text:
            self._text.append(text)
            yield self._part_event("response.output_text.delta", delta=text, logprobs=[])
        if result is None:
            return
        whole = "".join(self._text)
        yield self._part_event("response.output_text.done", text=whole, logprobs=[])
        yield self._part_event("response.content_part.done", part=_output_text(whole))
        response = self._response(result, whole, self._called)
        done = self._message(whole, response["status"])
        yield self._event("response.output_item.done", output_index=0, item=done)
        for index, call in enumerate(self._called, start=1):
            item = _call_item(call)
            begun = {**item, "arguments": "", "status": "in_progress"}
            where = {"output_index": index, "item_id": call.id}
            yield self._event("response.output_item.added", output_index=index, item=begun)
            yield self._event(
                "response.function_call_arguments.delta", delta=call.arguments, **where
            )
            yield self._event(
                "response.function_call_arguments.done",
                arguments=call.arguments,
                name=call.name,
                **where,
            )
            yield self._event("response.output_item.done", output_index=index, item=item)
        yield self._event(f"response.{response['status']}", response=response)

    def _event(self, kind: str, **more: Any) -> bytes:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number - 1, **more}, kind)

    def _part_event(self, kind: str, **more: Any) -> bytes:
        return self._event(kind, item_id=self._message_id, output_index=0, content_index=0, **more)

    def _message(self, text: str, status: str) -> dict[str, Any]:
        return {
            "type": "message",
            "id": self._message_id,
            "status": status,
            "role": "assistant",
            "content": [_output_text(text)],
        }

    def _response(
        self, result: GenerationResult | None, text: str, calls: Sequence[Call]
    ) -> dict[str, Any]:
        cut = result is not None and result.finish_reason == "length"
        status = "in_progress" if result is None else "incomplete" if cut else "completed"
        output: list[dict[str, Any]] = []
        if result is not None:
            output = [self._message(text, status)] if text or not calls else []
            output += map(_call_item, calls)
        body = self._body
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": {},
            "model": self._model,
            "output": output,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "top_p": body.top_p,
            "usage": None if result is None else _usage(result),
            **({} if result is None else {"qwencli": ran_of(result)}),
        }


def _usage(result: GenerationResult) -> dict[str, Any]:
    new = result.num_new_tokens
    return {
        "input_tokens": result.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": result.num_cached_tokens},
        "output_tokens": new,
        "output_tokens_details": {"reasoning_tokens": result.num_thinking_tokens},
        "total_tokens": (result.num_prompt_tokens or 0) + new,
        "timings": vars(result.timings),
    }


def _output_text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call_item(call: Call) -> dict[str, Any]:
    return {
        "type": "function_call",
        "id": call.id,
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
        "status": "completed",
    }
