"""Calls in what a model says: both forms, however the stream is cut, and what is no call."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwencli.server.tool_calls import CallSplitter

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
