"""Calls of functions in what a model says, as Qwen's families write them.

<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>        Qwen3, Qwen3-VL
<tool_call><function=weather><parameter=city>Rome</parameter></function></tool_call>     Qwen3.5
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

BEGIN, END = "<tool_call>", "</tool_call>"
_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*?)(?:</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(
    r"<parameter=([^>\n]+)>\n?(.*?)\n?(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL
)


@dataclass(frozen=True)
class Call:
    """One call.

    Args:
        arguments: a JSON object, as text.
    """

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")


class CallSplitter:
    """Tells calls from the text around them, whatever pieces both come in.

    Args:
        tools: the functions that may be called, as OpenAI's API has them.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self._functions = {tool["function"]["name"]: tool["function"] for tool in tools}
        self._held, self._gap = "", ""
        self._inside = self._called = self._is_behind_call = False

    def push(self, text: str) -> tuple[str, list[Call]]:
        """(text, calls) that are decided now."""
        if not self._functions:
            return text, []
        self._held += text
        said, calls = "", []
        while True:
            tag = END if self._inside else BEGIN
            before, found, after = self._held.partition(tag)
            if not found:
                break
            if self._inside:
                call = self._parsed(before)
                if call is None:
                    said += self._said(f"{self._gap}{BEGIN}{before}{END}")
                else:
                    calls.append(call)
                    self._called = self._is_behind_call = True
            else:
                # Empty lines in front of a call belong to it, where it is one.
                text = before.rstrip()
                said, self._gap = said + self._said(text), before[len(text) :]
            self._held, self._inside = after, not self._inside
        if not self._inside:
            cut = len(self._held) - _overlap(self._held, BEGIN)
            cut = len(self._held[:cut].rstrip())
            said += self._said(self._held[:cut])
            self._held = self._held[cut:]
        return said, calls

    def take(self, text: str, *, is_last: bool) -> tuple[str, list[Call]]:
        """`push`, and `finish` behind the last text."""
        said, calls = self.push(text)
        if is_last:
            rest, more = self.finish()
            said, calls = said + rest, calls + more
        return said, calls

    def finish(self) -> tuple[str, list[Call]]:
        """What was held back when the text ends; a call that is not complete is text."""
        held, self._held = self._held, ""
        if not self._inside:
            return self._said(held.rstrip() if self._called else held), []
        call = self._parsed(held)
        return (self._said(f"{self._gap}{BEGIN}{held}"), []) if call is None else ("", [call])

    def _said(self, text: str) -> str:
        """Text outside of calls, without empty lines between a call and what is said next."""
        text = text.lstrip() if self._is_behind_call else text
        self._is_behind_call = self._is_behind_call and not text
        return text

    def _parsed(self, text: str) -> Call | None:
        try:
            value = json.loads(text)
            name, arguments = value["name"], value.get("arguments", {})
            if isinstance(arguments, str):
                arguments = json.loads(arguments)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            found = _FUNCTION.search(text)
            if found is None:
                return None
            name = found[1].strip()
            arguments = self._typed(name, dict(_PARAMETER.findall(found[2])))
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return None
        return Call(name, json.dumps(arguments, ensure_ascii=False))

    def _typed(self, name: str, texts: Mapping[str, str]) -> dict[str, Any]:
        """Values of parameters that are no texts by the function's own schema."""
        parameters = self._functions.get(name, {}).get("parameters") or {}
        properties = parameters.get("properties")
        properties = properties if isinstance(properties, dict) else {}
        found: dict[str, Any] = {}
        for key, text in texts.items():
            key, schema = key.strip(), properties.get(key.strip())
            found[key] = text
            if isinstance(schema, dict) and schema.get("type") != "string":
                try:
                    found[key] = json.loads(text)
                except (ValueError, RecursionError):
                    found[key] = text
        return found


def _overlap(text: str, tag: str) -> int:
    """How many characters at the end of `text` may be the beginning of `tag`."""
    return next(
        (n for n in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:n])), 0
    )
