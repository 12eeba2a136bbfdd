"""Answers held to a JSON schema while they are generated (constrained decoding).

A schema becomes a grammar, and a grammar says after each token which tokens may follow: a mask over
the vocabulary, a bit a token. Masks are made on the host by llguidance (decision 0023) and applied
on the device before the sampler chooses. One matcher belongs to one answer.

Objects have their keys in the schema's order, and no spaces but one behind each comma and colon:
between values nothing is left to choose, and what no answer can do without is part of the prompt.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qwencli.engine.machine.child_process import python_command
from qwencli.engine.machine.packages import require
from qwencli.errors import CaptionError, InputError

if TYPE_CHECKING:
    import torch

    from qwencli.engine.frontend.tokenizer import Tokenizer

# Largest schema: reading one takes time, and one of this size has thousands of rules.
MAX_SCHEMA_BYTES = 1 << 20
# The library follows references on its stack and weighs patterns that must hold together by trying
# them out. What has more than this is read in a process of its own first, with this much stack.
_PLAIN_CHARS, _PLAIN_REFERENCES, _PLAIN_PATTERNS = 1 << 14, 48, 8
_TRIED_S, _TRIED_STACK_BYTES = 5.0, 2 << 20
# Schemas of one engine that are kept compiled.
_KEPT = 32
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

# Keywords that are kept to, and those that say nothing about what is valid.
_KEPT_TO = """
    type enum const allOf anyOf oneOf $ref properties required additionalProperties
    patternProperties minProperties maxProperties items prefixItems additionalItems minItems
    maxItems minimum maximum exclusiveMinimum exclusiveMaximum multipleOf minLength maxLength
    pattern format nullable
"""
_SAYING = """
    $schema $id $anchor $comment $defs definitions title description default examples example
    deprecated readOnly writeOnly discriminator contentMediaType contentEncoding
"""
_KNOWN = frozenset((_KEPT_TO + _SAYING).split())
# Keyword -> what it holds: one schema, a list of them, or one by name.
_ONE = ("items", "additionalProperties", "additionalItems")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")


def _library() -> Any:
    return require("llguidance", "--schema", "pip install 'qwencli[schema]'")


def read_schema(text: str, named: str) -> str:
    """A schema as the engine takes it: JSON text, checked. Needs no model.

    Args:
        named: what errors call it.

    Raises:
        InputError: not JSON, no schema, a keyword that cannot be kept to, or nothing can meet it.
        MissingDependencyError: llguidance is not installed, or is too old.
    """
    if len(text) > MAX_SCHEMA_BYTES:
        raise InputError(f"{named} is larger than {MAX_SCHEMA_BYTES >> 20} MiB", "shorten it")
    try:
        schema = json.loads(text, parse_constant=_no_number)
        written = json.dumps(schema)
        if not _is_plain(written):
            _library()
            return _checked_apart(schema, named)
        return _checked(schema, named)
    except RecursionError as error:
        raise InputError(f"{named} is nested too deeply", "flatten it") from error
    except ValueError as error:
        raise InputError(f"{named} is not JSON: {error}", "correct it there") from error


def _is_plain(written: str) -> bool:
    """Whether reading a schema takes little, whatever it says."""
    patterns = written.count('"pattern') + written.count('"format"')
    return (
        len(written) <= _PLAIN_CHARS
        and written.count('"$ref"') <= _PLAIN_REFERENCES
        and patterns <= _PLAIN_PATTERNS
    )


def _checked_apart(schema: Any, named: str) -> str:
    """`_checked`, in a process that may crash or be ended."""
    too_much = InputError(
        f"{named}: it takes too long to read, or refers from part to part too often",
        "simplify it: fewer properties, references, and patterns under one allOf",
    )
    try:
        child = subprocess.run(
            python_command("qwencli.engine.constrained"),
            input=json.dumps([schema, named]),
            capture_output=True,
            encoding="utf-8",
            timeout=_TRIED_S,
        )
    except subprocess.TimeoutExpired as error:
        raise too_much from error
    if child.returncode != 0 or not child.stdout:
        raise too_much
    wrong = json.loads(child.stdout)
    if wrong is not None:
        raise InputError(*wrong)
    return json.dumps(schema)


def _checked(schema: Any, named: str) -> str:
    if not isinstance(schema, dict):
        raise InputError(
            f"{named} is not a JSON schema: it holds {_kind(schema)}",
            'give an object, such as {"type": "object", "properties": {...}}',
        )
    for place, keyword in _unknown(schema, "#"):
        raise InputError(
            f"{named}: the keyword {keyword!r} at {place} is not supported",
            "leave it out; docs/tasks/caption-a-folder.md lists what can be said",
        )
    written = json.dumps(schema)
    wrong = _wrong_with(written)
    if wrong is None and not _has_end(schema):
        wrong = f"{_UNMET}: it holds itself without an end"
    if wrong is not None:
        raise InputError(f"{named}: {_explained(schema, wrong)}", "correct the schema")
    return written


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _unknown(schema: Any, place: str) -> Iterator[tuple[str, str]]:
    """Keywords that would not be kept to, and where they stand."""
    waiting = [(schema, place)]
    while waiting:
        schema, place = waiting.pop(0)
        if not isinstance(schema, dict):
            continue
        for keyword, value in schema.items():
            own = keyword.startswith("x-") and keyword != "x-guidance"
            if keyword not in _KNOWN and not own:
                yield place, keyword
            if keyword in _ONE:
                waiting.append((value, f"{place}/{keyword}"))
            if keyword in _LISTS and isinstance(value, list):
                waiting += [(each, f"{place}/{keyword}/{n}") for n, each in enumerate(value)]
            if keyword in _NAMED and isinstance(value, dict):
                waiting += [(each, f"{place}/{keyword}/{name}") for name, each in value.items()]


def _grammar(written: str) -> str:
    grammar: str = _library().LLMatcher.grammar_from_json_schema(written, overrides=_LAYOUT)
    return grammar


def _wrong_with(written: str) -> str | None:
    """The library's reason why a schema cannot be used."""
    library = _library()
    try:
        grammar = _grammar(written)
    except ValueError as error:
        return str(error)
    failed, said = library.LLMatcher.validate_grammar_with_warnings(grammar, _bytes_tokenizer())
    if not failed:
        # Some faults show when an answer begins.
        matcher = library.LLMatcher(_bytes_tokenizer(), grammar, log_level=0)
        failed, said = matcher.is_error(), [matcher.get_error()]
    if not failed:
        return None
    lines = [line.strip() for line in str(said[0]).splitlines() if line.strip()]
    return lines[-1] if lines[0].startswith("regex parse error") else lines[0]


_UNMET = "Unsatisfiable schema"


def _explained(schema: Mapping[str, Any], wrong: str) -> str:
    """The reason, as near to its cause as a part that is wrong by itself."""
    place, part = "#", schema
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    inside: Mapping[str, Any] | None = part
    while inside is not None:
        inside = None
        for name, each in _parts(part):
            found = _wrong_with(json.dumps({**shared, **each}))
            if found is not None and (found == wrong or found.startswith(_UNMET)):
                place, part, inside, wrong = f"{place}/{name}", each, each, found
                break
    reason = wrong.removeprefix("error: ").replace(_UNMET, "nothing can meet it")
    return reason if place == "#" else f"at {place}: {reason}"


def _has_end(schema: Mapping[str, Any]) -> bool:
    """Whether some answer of finite length meets it: what holds itself must not have to."""
    ending: set[str] = set()

    def ends(part: Any) -> bool:
        if not isinstance(part, dict):
            return True
        if isinstance(part.get("$ref"), str) and part["$ref"] not in ending:
            return False
        properties, items = part.get("properties", {}), part.get("items")
        needed = [properties.get(name) for name in part.get("required", ())]
        least = part.get("minItems", 0)
        needed += part.get("prefixItems", ())[:least]
        needed += [items] if least > len(part.get("prefixItems", ())) else []
        choices = [part[key] for key in ("anyOf", "oneOf") if key in part]
        return all(map(ends, [*needed, *part.get("allOf", ())])) and all(
            any(map(ends, choice)) for choice in choices
        )

    targets = _references(schema)
    while more := {ref for ref, to in targets.items() if ref not in ending and ends(to)}:
        ending |= more
    return ends(schema)


def _references(schema: Mapping[str, Any]) -> dict[str, Any]:
    """What each reference of a schema points at; `_wrong_with` has seen that all do."""
    found: dict[str, Any] = {}
    waiting: list[Any] = [schema]
    while waiting:
        part = waiting.pop()
        waiting += part.values() if isinstance(part, dict) else part if type(part) is list else ()
        ref = part.get("$ref") if isinstance(part, dict) else None
        if isinstance(ref, str) and ref not in found:
            found[ref] = _pointed_at(schema, ref)
    return found


def _pointed_at(schema: Mapping[str, Any], ref: str) -> Any:
    """The part at a pointer such as `#/$defs/tree`; nothing in particular for other references."""
    if ref != "#" and not ref.startswith("#/"):
        return {}
    to: Any = schema
    for step in ref.split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(to, list):
            to = dict(enumerate(to)).get(int(name) if name.isdecimal() else -1)
        else:
            to = to.get(name) if isinstance(to, dict) else None
    return to


def _parts(schema: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for keyword, value in schema.items():
        held: Iterator[tuple[str, Any]] = iter(())
        if keyword in _NAMED and isinstance(value, dict):
            held = ((f"{keyword}/{name}", each) for name, each in value.items())
        elif keyword in _LISTS and isinstance(value, list):
            held = ((f"{keyword}/{number}", each) for number, each in enumerate(value))
        elif keyword in _ONE:
            held = iter([(keyword, value)])
        yield from ((name, each) for name, each in held if isinstance(each, dict))


@functools.cache
def _bytes_tokenizer() -> Any:
    """A vocabulary of single bytes: texts are checked with it."""
    return _library().LLTokenizer("byte")


_JSON_TEXT = re.compile(r'"(?:[^"\\]|\\.)*"(:?)')


def _as_grammars_have_it(text: re.Match[str]) -> str:
    """A JSON string with U+007F written as an escape, as grammars want it; names stay."""
    return text[0] if text[1] else text[0].replace("\x7f", "\\u007f")


class SchemaCheck:
    """Says what is wrong with a text that should meet a schema; None where nothing is.

    Args:
        schema: as `read_schema` gives it.
    """

    def __init__(self, schema: str) -> None:
        self._grammar = _grammar(schema)

    def __call__(self, text: str) -> str | None:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            return f"not JSON: {error}"
        # In the layout that answers have, whatever that of this text is.
        matcher = _library().LLMatcher(_bytes_tokenizer(), self._grammar, log_level=0)
        written = _JSON_TEXT.sub(_as_grammars_have_it, json.dumps(value, ensure_ascii=False))
        data = written.encode("utf-8", "surrogatepass")
        taken = matcher.try_consume_tokens(list(data))
        if taken < len(data):
            near = data[max(0, taken - 40) : taken + 20].decode(errors="replace")
            return f"against the schema at {near!r}"
        return None if matcher.is_accepting() else "it ends before the schema is met"


class TokenMatcher:
    """Where one answer stands in its schema.

    Once the answer is complete only a stop token may follow; behind one, anything may.
    """

    def __init__(self, matcher: Any, stop_ids: Sequence[int]) -> None:
        self._matcher, self._stop_ids = matcher, frozenset(stop_ids)
        self._ended = False

    def copy(self) -> TokenMatcher:
        """Another one that stands where this one does."""
        other = TokenMatcher(self._matcher.deep_copy(), ())
        other._stop_ids, other._ended = self._stop_ids, self._ended
        return other

    def accept(self, token_id: int) -> None:
        """Go on behind a token that was allowed.

        Raises:
            CaptionError: the schema asks for more than can be followed.
        """
        if self._ended:
            return
        self._ended = token_id in self._stop_ids
        if not self._ended:
            self._matcher.consume_token(token_id)
        # One that is lost allows stop tokens alone.
        if self._matcher.is_error():
            reason = str(self._matcher.get_error()).strip().splitlines() or ["no reason given"]
            raise CaptionError(
                f"the answer cannot be held to the schema any further: {reason[0]}",
                "simplify the schema, or shorten its limits",
            )

    def forced(self) -> list[int]:
        """Tokens that can only be these, accepted by this call."""
        tokens: list[int] = self._matcher.compute_ff_tokens()
        # At the end of an answer the stop token is forced as well.
        tokens = [token for token in tokens if token not in self._stop_ids]
        for token in tokens:
            self.accept(token)
        return tokens


def fill_masks(matchers: Sequence[tuple[TokenMatcher, int]], masks: torch.Tensor) -> None:
    """Set what each matcher allows next in its row of `masks`, on many cores at once.

    Args:
        masks: int32 [R, ceil(V/32)] on the host, contiguous; other rows stay as they are.
    """
    width = masks.shape[1] * masks.element_size()
    going = []
    for matcher, row in matchers:
        if matcher._ended:
            ctypes.memset(masks.data_ptr() + row * width, 0xFF, width)
        else:
            going.append((matcher._matcher, row))
    if len(going) == 1:
        ((only, row),) = going
        only.unsafe_compute_mask_ptr(masks.data_ptr() + row * width, width)
    elif going:
        _executor().unsafe_compute_mask_ptr(going, masks.data_ptr(), width, len(masks))


@functools.cache
def _executor() -> Any:
    return _library().LLExecutor()


class Grammars:
    """The schemas that one model answers to; safe to use from several threads.

    Args:
        vocab_size: V, rows of the output head. stop_ids: what ends an answer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Sequence[int]) -> None:
        self._source, self._vocab_size = tokenizer, vocab_size
        self._stop_ids = tuple(id_ for id_ in stop_ids if id_ < vocab_size)
        self._tokenizer: Any = None
        self._compiled: dict[str, Any] = {}
        self._lock = threading.Lock()

    def matcher(self, schema: str) -> TokenMatcher:
        """A matcher for an answer that begins now.

        Raises:
            InputError: no token of this model can begin one.
            MissingDependencyError: llguidance is not installed, or is too old.
        """
        with self._lock:
            if schema not in self._compiled:
                if len(self._compiled) >= _KEPT:
                    del self._compiled[next(iter(self._compiled))]
                self._compiled[schema] = self._compile(schema)
            compiled = self._compiled[schema]
        return TokenMatcher(compiled.deep_copy(), self._stop_ids)

    def _compile(self, schema: str) -> Any:
        library = _library()
        if self._tokenizer is None:
            self._tokenizer = library.LLTokenizer(
                self._source.to_json(),
                n_vocab=self._vocab_size,
                eos_token=list(self._stop_ids),
                slices=library.LLTokenizer.json_slices(),
            )
        compiled = library.LLMatcher(self._tokenizer, _grammar(schema), log_level=0)
        if compiled.is_error():
            raise InputError(f"--schema: {compiled.get_error():.200}", "correct the schema")
        return compiled


def main() -> None:
    """Read a schema from stdin, and what errors call it; say what is wrong with it, or null."""
    schema, named = json.load(sys.stdin)
    if sys.platform != "win32":
        # Whoever started this may be gone by then.
        signal.alarm(math.ceil(_TRIED_S) + 1)
    wrong: list[str | None] | None = None

    def check() -> None:
        nonlocal wrong
        try:
            _checked(schema, named)
        except InputError as error:
            wrong = [error.message, error.hint]
        except RecursionError:
            wrong = [f"{named} is nested too deeply", "flatten it"]

    threading.stack_size(_TRIED_STACK_BYTES)
    thread = threading.Thread(target=check)
    thread.start()
    thread.join()
    json.dump(wrong, sys.stdout)


if __name__ == "__main__":
    main()
