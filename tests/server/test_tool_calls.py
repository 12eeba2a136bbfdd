"""Calls in what a model says: both forms, however the stream is cut, and what is no call."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwencli.engine.frontend.chat_template import ChatTemplate
from qwencli.messages import GenerationRequest
from qwencli.results import EffectiveConfig, GenerationChunk, GenerationResult, Timings
from qwencli.server.responses_api import ResponsesBody, ResponsesFormat
from qwencli.server.tool_calls import CallSplitter
from tests.dataset.fake_engine import FakeEngine
from tests.server.conftest import serving

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        },
    },
}
AS_JSON = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>'
AS_TAGS = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n"
    "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>"
)


def split(text: str, cuts: list[int], tools=(WEATHER,)) -> tuple[str, list[tuple[str, dict]]]:
    splitter = CallSplitter(tools)
    places = sorted({min(cut, len(text)) for cut in cuts})
    said, calls = "", []
    for first, last in zip([0, *places], [*places, len(text)], strict=True):
        more, found = splitter.push(text[first:last])
        said, calls = said + more, calls + found
    more, found = splitter.finish()
    return said + more, [(c.name, json.loads(c.arguments)) for c in calls + found]


CALL = ("weather", {"city": "Rome", "days": 2})
CASES = {
    "Let me look.\n\n" + AS_JSON: ("Let me look.", [CALL]),
    AS_TAGS: ("", [CALL]),
    AS_JSON + "\n" + AS_TAGS: ("", [CALL, CALL]),
    AS_JSON.removesuffix("</tool_call>"): ("", [CALL]),
    "a < b and <tool": ("a < b and <tool", []),
    "<tool_call>nothing</tool_call> then": ("<tool_call>nothing</tool_call> then", []),
    "<tool_call>cut": ("<tool_call>cut", []),
    # What is no call is text as it was, and so is what is said behind one.
    "see\n\n <tool_call>no</tool_call> \n": ("see\n\n <tool_call>no</tool_call> \n", []),
    "see\n <tool_call>cut": ("see\n <tool_call>cut", []),
    AS_JSON + "\n\nNow it  is\ndone.": ("Now it  is\ndone.", [CALL]),
    AS_JSON + "\n <tool_call>a b": ("<tool_call>a b", [CALL]),
    "line\n\nline\n": ("line\n\nline\n", []),
}


@pytest.mark.parametrize("text", CASES)
@given(cuts=st.lists(st.integers(0, 200), max_size=6))
def test_calls_are_found_whatever_pieces_they_come_in(text: str, cuts: list[int]) -> None:
    assert split(text, cuts) == CASES[text]


def test_without_tools_text_stays_as_it_is() -> None:
    assert split(AS_JSON, [5], tools=()) == (AS_JSON, [])


def streamed(*texts: str, finish_reason: Any = "stop") -> list[dict[str, Any]]:
    """The events of an answer that comes in these pieces."""
    tools = [{"type": "function", **WEATHER["function"]}]
    form = ResponsesFormat(ResponsesBody(input="?", stream=True, tools=tools), "m")
    ran = EffectiveConfig("native", "none", "sdpa", "static", "cpu", "float32")
    timings = Timings(None, None, None, None, 0.1, 0.1, 0.2, None)
    result = GenerationResult("".join(texts), (1,), finish_reason, 1, 0, timings, ran, (), None)
    sent = b"".join(form.begin())
    for text in texts:
        sent += form.events([GenerationChunk(text, (1,))])
    sent += form.events([GenerationChunk("", (), result)])
    lines = (line for line in sent.decode().splitlines() if line.startswith("data: {"))
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def items_of(events: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(type, what it says) of each item; checks that they come one after the other."""
    open_index, ended = None, 0
    found = []
    for each in events:
        kind = each["type"]
        if kind == "response.output_item.added":
            assert open_index is None and each["output_index"] == ended
            assert each["item"]["status"] == "in_progress"
            open_index = ended
        elif "output_index" in each:
            assert each["output_index"] == open_index, "events of an item that has begun"
        if kind == "response.output_item.done":
            item = each["item"]
            said = item["arguments"] if "arguments" in item else item["content"][0]["text"]
            found.append((item["type"], said))
            open_index, ended = None, ended + 1
    assert [item["type"] for item in events[-1]["response"]["output"]] == [t for t, _ in found]
    return found


ROME = ("function_call", '{"city": "Rome", "days": 2}')


@pytest.mark.parametrize(
    ("texts", "items"),
    [
        ((AS_JSON,), [ROME]),
        ((AS_JSON, "\n", AS_TAGS), [ROME, ROME]),
        (("Let me ", "look.\n", AS_JSON), [("message", "Let me look."), ROME]),
        ((AS_JSON, "\nNow ", "done"), [ROME, ("message", "Now done")]),
        (("A", AS_JSON, "B"), [("message", "A"), ROME, ("message", "B")]),
        (("Hello",), [("message", "Hello")]),
        ((), [("message", "")]),
    ],
)
def test_items_of_a_streamed_response_are_added_when_they_begin(
    texts: tuple[str, ...], items: list[tuple[str, str]]
) -> None:
    events = streamed(*texts)
    assert items_of(events) == items
    assert [each["sequence_number"] for each in events] == list(range(len(events)))


def test_a_message_that_is_cut_is_incomplete_and_one_before_a_call_is_not() -> None:
    events = streamed("A", AS_JSON, "B", finish_reason="length")
    done = [e["item"]["status"] for e in events if e["type"] == "response.output_item.done"]
    assert done == ["completed", "completed", "incomplete"]
    assert events[-1]["type"] == "response.incomplete"


# As Qwen's families have it, without what is said about the form.
TEMPLATE = (
    "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}{% for m in messages %}{{ m.role }}: "
    "{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }} "
    "{{ c.function.arguments | tojson }}</tool_call>{% endfor %}\n{% endfor %}"
)


def test_a_tool_is_offered_called_and_answered(tmp_path: Path) -> None:
    """By the real client, there and back: what the template shows is what the model reads."""
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    template = ChatTemplate.from_folder(tmp_path)
    shown: list[str] = []

    def answer(request: GenerationRequest) -> str:
        tools = [json.loads(tool) for tool in request.tools]
        shown.append(template.render(request.messages, as_parts=False, tools=tools))
        return "It rains." if "tool: rain" in shown[-1] else f"Let me look.\n{AS_JSON}"

    engine = FakeEngine(SimpleNamespace(batch_invariant=True), answer)
    asked: list[dict[str, Any]] = [{"role": "user", "content": "Rome?"}]
    with (
        serving(engine) as running,
        openai.OpenAI(base_url=f"{running.address}/v1", api_key="none", max_retries=0) as client,
    ):
        create = client.chat.completions.create
        (choice,) = create(model="scenes", messages=asked, tools=[WEATHER]).choices
        assert '"name": "weather"' in shown[-1]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me look.")
        (call,) = choice.message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == CALL
        events = list(create(model="scenes", messages=asked, tools=[WEATHER], stream=True))
        (piece,) = (c for e in events for c in e.choices[0].delta.tool_calls or ())
        assert (piece.index, piece.function.name) == (0, "weather") and piece.id
        assert json.loads(piece.function.arguments) == CALL[1]
        assert events[-1].choices[0].finish_reason == "tool_calls"
        back = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
        asked += [choice.message.model_dump(exclude_none=True), back]
        (choice,) = create(model="scenes", messages=asked, tools=[WEATHER]).choices
        assert '<tool_call>weather {"city": "Rome", "days": 2}</tool_call>' in shown[-1]
        assert (choice.finish_reason, choice.message.content) == ("stop", "It rains.")
        create(model="scenes", messages=asked[:1], tools=[WEATHER], tool_choice="none")
        assert "weather" not in shown[-1]
