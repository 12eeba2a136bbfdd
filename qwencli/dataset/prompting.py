"""What each picture of a set is asked.

Every text that goes to a model or frames an answer (`--prompt`, `--prompt-file`, `--field`,
`--starts-with`, `--prefix`, `--suffix`) is a `Template`: `{name}`, `{dir}`, `{tags}`, `{caption}`,
`{hints}` and any key of the picture's JSON file stand for what is known of the picture. Which of
several weighted prompts a picture gets depends on the seed and the picture's relative path alone,
so a resumed run, or one in another order, asks the same.

Knows nothing of models, engines or what becomes of an answer.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwencli.dataset.hints import HINT_FIELDS, NAME, PATH_FIELDS
from qwencli.dataset.sources import CAPTION
from qwencli.errors import InputError, UsageError
from qwencli.messages import PRESETS, check_prompt

MAX_PROMPT_FILE_BYTES = 4 << 20

# `{{word}}` is `{word}` as it stands; a brace with anything but a name behind it opens no field,
# so a prompt may hold JSON.
_FIELD = re.compile(r"\{\{([^\W\d][^\s{}\"']*)\}\}|\{([^\W\d][^\s{}\"']*?)(?:\|([^{}]*))?\}")
_FIELD_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_WEIGHTED_LINE = re.compile(r"(\d+(?:\.\d+)?)\s*:\s+(.*)")


class Template:
    """A text with fields: `{name}`, or `{name|what stands there where nothing is known}`.

    Args:
        source: what the text was given as, for errors: "--prompt", "prompts.json, prompt 3".

    Raises:
        UsageError: `{name!r}`, `{name:5}` or the like, which no field is.
    """

    def __init__(self, text: str, source: str) -> None:
        self.text, self.source = text, source
        uses = [found for found in _FIELD.finditer(text) if found[2]]
        self.fields = frozenset(found[2] for found in uses)
        # Of these the text says nothing for where they are not known.
        self.needed = frozenset(found[2] for found in uses if found[3] is None)
        for field in sorted(self.fields):
            if not NAME.fullmatch(field):
                raise UsageError(
                    f"{source}: {{{field}}} is not a field",
                    f"write {{name}} or another field, or {{{{{field}}}}} for braces as they stand",
                )

    def filled(self, known: Mapping[str, str]) -> str:
        """The text with each field's value; what is put in is not read as a template again."""

        def value(found: re.Match[str]) -> str:
            if found[1]:
                return f"{{{found[1]}}}"
            return known.get(found[2], "") or found[3] or ""

        return _FIELD.sub(value, self.text)


@dataclass(frozen=True)
class Question:
    """One thing that a picture is asked.

    Args:
        field: what the answer is called: "caption", or the name given to `--field`.
        text: what is sent.
        template: as the user wrote it, for telling questions apart and for its language.
    """

    field: str
    text: str
    template: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Weighted:
    template: Template
    weight: float


class PromptSet:
    """What every picture of a set is asked: for each field one of its weighted prompts.

    Args:
        fields: prompts by field, in the order they are asked.
        seed: chooses among them, together with the picture's path.
        frames: other templates of the run (`--prefix` ...), whose fields are needed as well.
    """

    def __init__(
        self,
        fields: Mapping[str, Sequence[Weighted]],
        *,
        seed: int = 0,
        frames: Sequence[Template] = (),
    ) -> None:
        self.fields = {name: tuple(prompts) for name, prompts in fields.items()}
        self.seed = seed
        self._templates = [w.template for prompts in self.fields.values() for w in prompts]
        self._templates += frames

    def settings(self) -> Any:
        """What decides over questions: one text, or prompts with weights by field and a seed."""
        if list(self.fields) == [CAPTION] and len(self.fields[CAPTION]) == 1:
            return self.fields[CAPTION][0].template.text
        fields = {
            name: [[prompt.template.text, prompt.weight] for prompt in prompts]
            for name, prompts in self.fields.items()
        }
        return {"fields": fields, "seed": self.seed}

    @property
    def needs_hints(self) -> bool:
        """Whether any template asks for more than the picture's path tells."""
        return any(template.fields - set(PATH_FIELDS) for template in self._templates)

    def check_fields(self, hints: Iterable[Mapping[str, str]]) -> None:
        """Raise UsageError for a field that neither we nor any picture's JSON file has, unless the
        template says what stands in its place, and it is not nearly the name of another.

        Args:
            hints: of the pictures; no more of them are taken than it needs to find every field.
        """
        fixed = (*PATH_FIELDS, *HINT_FIELDS)
        missing = {f: t.source for t in self._templates for f in sorted(t.fields - set(fixed))}
        seen: set[str] = set()
        if missing:
            for known in hints:
                seen |= known.keys()
                for field in known.keys() & missing.keys():
                    del missing[field]
                if not missing:
                    return
        for field, source in missing.items():
            names = list(dict.fromkeys([*fixed, *sorted(seen)]))
            close = difflib.get_close_matches(field, names, 1)
            if not close and not any(field in each.needed for each in self._templates):
                continue
            raise UsageError(
                f"{source}: {{{field}}} is not a field, and no picture's JSON file has it",
                f"did you mean {{{close[0]}}}? "
                if close
                else f"use {', '.join(f'{{{name}}}' for name in names[:12])}, or write "
                f"{{{{{field}}}}} for braces as they stand",
            )

    def questions(self, relative: str, known: Mapping[str, str]) -> tuple[Question, ...]:
        """What the picture at `relative` (to the set's folder) is asked, in order of the fields.

        Args:
            known: see `picture_fields`.
        """
        return tuple(
            Question(field, chosen.filled(known), chosen.text)
            for field, prompts in self.fields.items()
            for chosen in (self._chosen(field, prompts, relative),)
        )

    def _chosen(self, field: str, prompts: Sequence[Weighted], relative: str) -> Template:
        if len(prompts) == 1:
            return prompts[0].template
        mark = seeded_uniform(self.seed, field, relative) * math.fsum(p.weight for p in prompts)
        for prompt in prompts:
            mark -= prompt.weight
            if mark < 0:
                return prompt.template
        return next(p.template for p in reversed(prompts) if p.weight > 0)


def seeded_uniform(seed: int, *names: str) -> float:
    """A number in [0, 1) that depends on nothing but the arguments."""
    text = "\0".join((str(seed), *(name.replace("\\", "/") for name in names)))
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:7], "big") / (1 << 56)


def prompt_set(
    *,
    prompt: str | None = None,
    preset: str | None = None,
    prompt_file: Path | None = None,
    fields: Sequence[str] = (),
    default: str,
    seed: int | None = None,
    frames: Sequence[Template] = (),
) -> PromptSet:
    """From what the user said.

    Args:
        fields: each NAME=PROMPT, or the name of a preset.
        default: asked where nothing else is said.
        seed: None and -1 are as 0: pictures must be asked the same when a run is resumed.

    Raises:
        UsageError: options that exclude each other, an empty prompt, an unknown preset, or a
            field named twice.
        InputError: the prompt file cannot be read or holds something else.
    """
    said = [
        flag
        for flag, value in (
            ("--prompt", prompt),
            ("--preset", preset),
            ("--prompt-file", prompt_file),
        )
        if value is not None
    ]
    if len(said) > 1:
        raise UsageError(f"{said[0]} and {said[1]} exclude each other", "give one of them")
    check_prompt(prompt)
    asked: dict[str, Sequence[Weighted]] = {}
    if prompt is not None:
        asked[CAPTION] = [Weighted(Template(prompt, "--prompt"), 1.0)]
    elif preset is not None:
        if preset not in PRESETS:
            raise UsageError(f"--preset {preset!r} is unknown", f"use one of: {', '.join(PRESETS)}")
        asked[CAPTION] = [Weighted(Template(PRESETS[preset], f"--preset {preset}"), 1.0)]
    elif prompt_file is not None:
        asked |= read_prompt_file(prompt_file)
    for text in fields:
        name, given, question = text.partition("=")
        name = name.strip()
        if not given:
            if name not in PRESETS:
                raise UsageError(
                    f"--field {text!r} is neither NAME=PROMPT nor a preset",
                    f"write NAME=PROMPT, or one of: {', '.join(PRESETS)}",
                )
            question, name = PRESETS[name], name.replace("-", "_")
        if not question.strip():
            raise UsageError(f"--field {name} asks nothing", "write NAME=PROMPT")
        _check_field_name(name, "--field", UsageError)
        if name in asked:
            raise UsageError(f"--field {name} is given twice", "give each field another name")
        asked[name] = [Weighted(Template(question, f"--field {name}"), 1.0)]
    if not asked:
        asked[CAPTION] = [Weighted(Template(default, "the default prompt"), 1.0)]
    return PromptSet(asked, seed=0 if seed in (None, -1) else seed or 0, frames=frames)


def read_prompt_file(path: Path) -> dict[str, list[Weighted]]:
    """Prompts by field.

    A text file has a prompt a line, with `3: ` in front for one that is three times as likely;
    blank lines and lines from `#` on are skipped. A JSON file is a list of prompts, each a string
    or `{"prompt": "...", "weight": 3}`, or an object with such a list, or one prompt, for each
    field.

    Raises:
        InputError: it cannot be read, or holds something else; names the place.
    """
    try:
        if path.stat().st_size > MAX_PROMPT_FILE_BYTES:
            raise InputError(f"{path} is too large for a prompt file", "give a file of prompts")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(
            f"--prompt-file {path}: {error.strerror or error}", "give a file of prompts"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"--prompt-file {path} is not UTF-8", "save it as UTF-8") from error
    if path.suffix.lower() == ".json" or (text.lstrip()[:1] in ("[", "{") and _is_json(text)):
        found = _json_prompts(text, path)
    else:
        found = {CAPTION: _text_prompts(text, path)}
    for name, prompts in found.items():
        if not prompts or not any(prompt.weight > 0 for prompt in prompts):
            raise InputError(
                f"--prompt-file {path}: no prompt for {name!r} that can be drawn",
                "write at least one with a weight above 0",
            )
    return found


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _text_prompts(text: str, path: Path) -> list[Weighted]:
    prompts = []
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        found = _WEIGHTED_LINE.fullmatch(line)
        weight, prompt = (found[1], found[2]) if found else ("1", line)
        prompts.append(_weighted(prompt, float(weight), f"{path}, line {number}"))
    return prompts


def _json_prompts(text: str, path: Path) -> dict[str, list[Weighted]]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"--prompt-file {path} is not JSON: {error}", "correct it") from error
    fields = value if isinstance(value, dict) and "prompt" not in value else {CAPTION: value}
    found = {}
    for name, prompts in fields.items():
        _check_field_name(name, f"--prompt-file {path}", InputError)
        listed = prompts if isinstance(prompts, list) else [prompts]
        found[name] = [
            _json_prompt(
                prompt, f"{path}, {name} {number}" if len(listed) > 1 else f"{path}, {name}"
            )
            for number, prompt in enumerate(listed, start=1)
        ]
    return found


def _json_prompt(value: Any, where: str) -> Weighted:
    prompt, weight = value, 1.0
    if isinstance(value, dict):
        prompt, weight = value.get("prompt"), value.get("weight", 1.0)
        unknown = sorted(value.keys() - {"prompt", "weight"})
        if unknown:
            raise InputError(f"{where}: {unknown[0]!r} is unknown", "give prompt and weight")
    if not isinstance(prompt, str):
        raise InputError(
            f"{where} is not a prompt", 'write a string, or {"prompt": "...", "weight": 1}'
        )
    if type(weight) not in (int, float):
        raise InputError(f"{where}: weight is {weight!r:.40}", "write a number from 0 on")
    return _weighted(prompt, weight, where)


def _weighted(prompt: str, weight: float, where: str) -> Weighted:
    if not prompt.strip():
        raise InputError(f"{where} is empty", "write a prompt")
    if not (math.isfinite(weight) and 0 <= weight <= 1e9):
        raise InputError(f"{where}: weight is {weight!r:.40}", "write a number from 0 to 1e9")
    return Weighted(Template(prompt, where), float(weight))


def _check_field_name(name: str, source: str, error: type[InputError] | type[UsageError]) -> None:
    if not _FIELD_NAME.fullmatch(name):
        raise error(
            f"{source}: {name!r} is not a name for a field",
            "use letters, digits and _, from a letter on",
        )


def asks_for(schema: str) -> str:
    """What is asked where answers are held to a schema and no prompt was given; a template."""
    names = json.loads(schema).get("properties", {})
    fields = ", ".join(names).replace("{", "{{").replace("}", "}}")
    return (
        f"Describe this image as JSON with {fields}." if fields else "Describe this image as JSON."
    )
