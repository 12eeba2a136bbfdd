"""A model's chat template: from a conversation to the text the model was trained on.

Templates are programs that come with a model, so they run in a sandbox with bounds
(`bounded_jinja`), set up as the reference sets jinja2's up. This module knows nothing of tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser

from qwencli.engine.frontend.bounded_jinja import BoundedEnvironment
from qwencli.errors import InputError, ModelFileError
from qwencli.messages import Message, TextPart, VideoPart
from qwencli.models.config_values import read_json_object

IMAGE_PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO_PLACEHOLDER = "<|vision_start|><|video_pad|><|vision_end|>"

# Qwen's ChatML, for models that come without a template. Content is a string or a list of parts.
_CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}"
    "{%- else %}{%- for part in message.content %}"
    "{%- if part.type == 'image' %}{{- '" + IMAGE_PLACEHOLDER + "' }}"
    "{%- elif part.type == 'video' %}{{- '" + VIDEO_PLACEHOLDER + "' }}"
    "{%- else %}{{- part.text }}{%- endif %}"
    "{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# What in a template may say something else the next time.
_CHANGING = re.compile(r"strftime_now|random|lipsum|cycler|joiner")
# Conversations whose text is kept, and how long they may be.
_RECENT_CHATS, _RECENT_CHARS = 16, 4000
MOST_INDENT = 16
MOST_SAID_CHARS = 300
_NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
# What a template's own expressions raise when they meet a value they were not written for.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)


class _Refusal(jinja2.TemplateError):
    """The template itself called `raise_exception`."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks an answer for training; here its body is simply rendered."""

    tags: ClassVar[set[str]] = {"generation"}  # type: ignore[misc]

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> NoReturn:
    raise _Refusal(message)


def _tojson(value: Any, indent: int | None = None, **options: Any) -> str:
    # jinja2's own filter escapes <, > and & for HTML.
    if indent is not None and not 0 <= indent <= MOST_INDENT:
        raise ValueError(f"tojson with indent={indent}")
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _environment() -> BoundedEnvironment:
    environment = BoundedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.add_filter("tojson", _tojson)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


@dataclass(frozen=True)
class ChatTemplate:
    """One compiled template.

    Args:
        source: the file it came from, for errors.
        named_tokens: `eos_token` and the like, which some templates write out.
        takes_tools: whether it has a place for functions.
        names_switch: whether it looks at the switch of thoughts, whatever it does with it.
        repeats: whether it says the same of the same conversation whenever it is asked.
    """

    environment: BoundedEnvironment
    template: jinja2.Template
    source: str
    named_tokens: Mapping[str, str]
    takes_tools: bool = False
    names_switch: bool = False
    repeats: bool = False
    # Of conversations just rendered: a folder of pictures is asked about in the same words.
    _recent: dict[tuple[bool, str], str] = field(default_factory=dict)

    @classmethod
    def from_folder(cls, folder: Path) -> ChatTemplate:
        """chat_template.jinja, else chat_template.json, else tokenizer_config.json, else ChatML.

        Raises:
            ModelFileError: the file is broken or the template is no valid jinja2.
        """
        config_path = folder / "tokenizer_config.json"
        config = read_json_object(config_path) if config_path.is_file() else {}
        named = {key: text for key in _NAMED_TOKENS if (text := _spelling(config.get(key)))}
        text, source = _find(folder, config)
        environment = _environment()
        try:
            compiled = environment.compiled(text)
            repeats = not _CHANGING.search(text)
            return cls(
                environment,
                compiled,
                source,
                named,
                takes_tools="tools" in text,
                names_switch="enable_thinking" in text,
                repeats=repeats,
            )
        except jinja2.TemplateSyntaxError as error:
            raise _broken(source, f"line {error.lineno}: {error.message}") from error
        except _TEMPLATE_ERRORS as error:
            raise _broken(source, str(error) or type(error).__name__) from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        as_parts: bool,
        thinking: bool = False,
        tools: Sequence[Any] = (),
        protect: Callable[[str], str] = str,
    ) -> str:
        """The conversation as text, up to where the assistant's next answer begins.

        Args:
            as_parts: content as a list of parts, which vision-language templates want; else as a
                string, which is all that text-only templates know.
            thinking: let a model that can think before it answers do so.
            tools: JSON objects of functions that it may call.
            protect: applied to each text from outside (see `tokenizer.ContentGuard`).

        Raises:
            InputError: the template refuses this conversation.
            ModelFileError: the template fails on it.
        """
        chat = [_turn(message, as_parts, protect) for message in messages]
        shown = [_protected(tool, protect) for tool in tools]
        said = str((chat, shown) if shown else chat)
        key = thinking, said
        if key in self._recent:
            return self._recent[key]
        rendered = self._render(chat, shown or None, len(said), thinking)
        if self.repeats and len(said) <= _RECENT_CHARS:
            if len(self._recent) >= _RECENT_CHATS:
                self._recent.clear()
            self._recent[key] = rendered
        return rendered

    def _render(
        self, chat: list[dict[str, Any]], tools: list[Any] | None, chars: int, thinking: bool
    ) -> str:
        try:
            return self.environment.render(
                self.template,
                chars,
                messages=chat,
                tools=tools,
                documents=None,
                add_generation_prompt=True,
                enable_thinking=thinking,
                **self.named_tokens,
            )
        except _Refusal as error:
            raise InputError(
                f"the model's chat template refuses this conversation: {_line(error.message)}",
                "change the order or the roles of the messages",
            ) from error
        except _TEMPLATE_ERRORS as error:
            raise _broken(self.source, str(error) or type(error).__name__) from error


def _turn(message: Message, as_parts: bool, protect: Callable[[str], str]) -> dict[str, Any]:
    turn: dict[str, Any] = {
        "role": message.role,
        "content": _content(message, as_parts, protect),
    }
    if message.tool_calls:
        # Some templates write arguments out one by one.
        turn["tool_calls"] = [
            {
                "type": "function",
                "function": {
                    "name": protect(call.name),
                    "arguments": _protected(json.loads(call.arguments), protect),
                },
            }
            for call in message.tool_calls
        ]
    return turn


def _protected(value: Any, protect: Callable[[str], str]) -> Any:
    """A JSON value with `protect` applied to every text in it, names of keys included."""
    if isinstance(value, str):
        return protect(value)
    if isinstance(value, list):
        return [_protected(each, protect) for each in value]
    if isinstance(value, dict):
        return {protect(key): _protected(each, protect) for key, each in value.items()}
    return value


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a JSON value, names of keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from texts_in(each)
    elif isinstance(value, dict):
        for key, each in value.items():
            yield key
            yield from texts_in(each)


def _content(
    message: Message, as_parts: bool, protect: Callable[[str], str]
) -> str | list[dict[str, str]]:
    if as_parts:
        return [
            {"type": "text", "text": protect(part.text)}
            if isinstance(part, TextPart)
            else {"type": "video" if isinstance(part, VideoPart) else "image"}
            for part in message.parts
        ]
    texts = [part.text for part in message.parts if isinstance(part, TextPart)]
    assert len(texts) == len(message.parts), "a text model gets no pictures"
    return protect("".join(texts))


def _find(folder: Path, config: Mapping[str, Any]) -> tuple[str, str]:
    """Text of the template and the name of the file it is from."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            # utf-8-sig: a byte order mark would become a part of every prompt.
            return path.read_text(encoding="utf-8-sig"), str(path)
        except (OSError, ValueError) as error:
            raise _broken(str(path), str(error)) from error
    path = folder / "chat_template.json"
    if path.is_file():
        return _text(read_json_object(path).get("chat_template"), str(path)), str(path)
    if config.get("chat_template") is not None:
        source = str(folder / "tokenizer_config.json")
        return _text(config["chat_template"], source), source
    return _CHATML, "the built-in chat template"


def _text(value: object, source: str) -> str:
    """The template itself, or the one called "default" of a list of named ones."""
    if isinstance(value, list):
        by_name = {
            entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)
        }
        value = by_name.get("default")
    if not isinstance(value, str):
        raise _broken(source, 'chat_template is neither a text nor a list with a "default"')
    return value


def _spelling(token: object) -> str | None:
    """tokenizer_config.json has a token as its text, or as an object with `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _broken(source: str, reason: str) -> ModelFileError:
    return ModelFileError(
        f"{source}: broken chat template ({_line(reason)})", "download the model's files again"
    )


def _line(text: object) -> str:
    """The first line of what a template or a library says, not longer than a reader takes."""
    return str(text).strip().partition("\n")[0][:MOST_SAID_CHARS]
