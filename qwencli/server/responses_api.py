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
        for number, item in enumerate(items):
            _add(messages, item, f"input.{number}")
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
        ).at("input")

    def _format(self) -> TextFormat | JsonObjectFormat | JsonSchemaFormat | None:
        wanted = self.text.format if self.text else None
        if isinstance(wanted, SchemaFormat):
            schema = JsonSchema.model_validate({"schema": wanted.json_schema})
            return JsonSchemaFormat(type="json_schema", json_schema=schema)
        return wanted


def _add(messages: list[ChatMessage], item: Item, place: str) -> None:
    if isinstance(item, InputMessage):
        content: str | list[TextContent | ImageContent]
        if isinstance(item.content, str):
            content = item.content
        else:
            content = [
                TextContent(type="text", text=part.text)
                if isinstance(part, InputText)
                else ImageContent(
                    type="image_url",
                    image_url=ImageUrl(url=part.image_url).at(f"{place}.content.{index}.image_url"),
                )
                for index, part in enumerate(item.content)
            ]
        messages.append(ChatMessage(role=item.role, content=content))
    elif isinstance(item, FunctionOutput):
        messages.append(ChatMessage(role="tool", content=item.output))
    elif isinstance(item, FunctionCall):
        function = CalledFunction(name=item.name, arguments=item.arguments)
        call = CalledTool(function=function.at(f"{place}.arguments"))
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
        self._id = f"resp_{secrets.token_hex(16)}"
        self._created = int(time.time())
        self._number = 0
        # Items that have ended; what was said of a message that has not, which has an id then.
        self._output: list[dict[str, Any]] = []
        self._text: list[str] = []
        self._message_id = ""

    def whole(self, pieces: Sequence[GenerationChunk], result: GenerationResult) -> dict[str, Any]:
        text, calls = self._calls.take(result.text, is_last=True)
        items = list(map(_call_item, calls))
        if text or not calls:
            items.insert(0, _message(_message_id(), text, _status(result)))
        return self._response(result, items)

    def begin(self) -> Iterator[bytes]:
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._response(None, []))

    def events(self, pieces: Sequence[GenerationChunk]) -> bytes:
        return b"".join(self._events(pieces))

    def _events(self, pieces: Sequence[GenerationChunk]) -> Iterator[bytes]:
        """Items one after the other, each added when it begins: a message may come before calls,
        behind them, or not at all."""
        result = pieces[-1].result
        pushed = "".join(piece.text for piece in pieces)
        text, calls = self._calls.take(pushed, is_last=result is not None)
        if text:
            yield from self._said(text)
        for call in calls:
            yield from self._message_ended("completed")
            yield from self._called(call)
        if result is None:
            return
        if not self._output:
            yield from self._said("")
        status = _status(result)
        yield from self._message_ended(status)
        yield self._event(f"response.{status}", response=self._response(result, self._output))

    def _said(self, text: str) -> Iterator[bytes]:
        if not self._message_id:
            self._message_id = _message_id()
            begun = {**_message(self._message_id, "", "in_progress"), "content": []}
            yield self._item_event("response.output_item.added", item=begun)
            yield self._part_event("response.content_part.added", part=_output_text(""))
        if text:
            self._text.append(text)
            yield self._part_event("response.output_text.delta", delta=text, logprobs=[])

    def _message_ended(self, status: str) -> Iterator[bytes]:
        """The end of the message, where there is one that has not ended."""
        if not self._message_id:
            return
        text = "".join(self._text)
        yield self._part_event("response.output_text.done", text=text, logprobs=[])
        yield self._part_event("response.content_part.done", part=_output_text(text))
        yield self._item_ended(_message(self._message_id, text, status))
        self._message_id = ""
        self._text.clear()

    def _called(self, call: Call) -> Iterator[bytes]:
        item = _call_item(call)
        begun = {**item, "arguments": "", "status": "in_progress"}
        yield self._item_event("response.output_item.added", item=begun)
        yield self._item_event(
            "response.function_call_arguments.delta", item_id=call.id, delta=call.arguments
        )
        yield self._item_event(
            "response.function_call_arguments.done",
            item_id=call.id,
            arguments=call.arguments,
            name=call.name,
        )
        yield self._item_ended(item)

    def _item_ended(self, item: dict[str, Any]) -> bytes:
        told = self._item_event("response.output_item.done", item=item)
        self._output.append(item)
        return told

    def _event(self, kind: str, **more: Any) -> bytes:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number - 1, **more}, kind)

    def _item_event(self, kind: str, **more: Any) -> bytes:
        """Of the item that is being told."""
        return self._event(kind, output_index=len(self._output), **more)

    def _part_event(self, kind: str, **more: Any) -> bytes:
        return self._item_event(kind, item_id=self._message_id, content_index=0, **more)

    def _response(
        self, result: GenerationResult | None, output: Sequence[dict[str, Any]]
    ) -> dict[str, Any]:
        status = "in_progress" if result is None else _status(result)
        body = self._body
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"}
            if status == "incomplete"
            else None,
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


def _status(result: GenerationResult) -> str:
    return "incomplete" if result.finish_reason == "length" else "completed"


def _message_id() -> str:
    return f"msg_{secrets.token_hex(16)}"


def _message(message_id: str, text: str, status: str) -> dict[str, Any]:
    return {
        "type": "message",
        "id": message_id,
        "status": status,
        "role": "assistant",
        "content": [_output_text(text)],
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
