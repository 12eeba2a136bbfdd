"""What the options of `qwencli caption` say about a set: what is asked, what answers become, where.

Pure functions of options; only a schema, prompts and words are read from the files that they name.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwencli.commands.options import RunOptions, SetOptions, ShapeOptions
from qwencli.errors import UsageError

if TYPE_CHECKING:
    from qwencli.dataset.asking import Manner
    from qwencli.dataset.parts import Held


def is_set(inputs: Sequence[str | Held], chosen: SetOptions, frames: int | None) -> bool:
    """Whether captions are to be kept beside the pictures, and not printed."""
    return chosen.is_used or any(
        isinstance(each, str) and (_is_folder(each, frames) or _is_shard(each)) for each in inputs
    )


def _is_folder(named: str, frames: int | None) -> bool:
    """Whether this is a folder of pictures; with `--frames` one without videos is one video."""
    from qwencli.dataset.sources import VIDEO_SUFFIXES

    if not os.path.isdir(named):
        return False
    moving = VIDEO_SUFFIXES | {".gif", ".apng", ".webp"}
    try:
        return frames is None or any(
            each.suffix.lower() in moving for each in Path(named).iterdir()
        )
    except OSError:
        return True  # listing it will tell why


def _is_shard(named: str) -> bool:
    from qwencli.dataset.shards import is_shard

    return is_shard(named) and not os.path.isdir(named)


def worker_devices(chosen: SetOptions, run: RunOptions) -> tuple[str, ...]:
    """Those of --devices; none where it was not given."""
    from qwencli.dataset.devices import named_devices

    if run.is_remote and (chosen.devices or chosen.ray):
        flag = "--devices" if chosen.devices else "--ray"
        raise UsageError(f"{flag} and --endpoint exclude each other", "give one of them")
    if chosen.devices is None:
        return ()
    if chosen.ray is not None:
        raise UsageError("--ray and --devices exclude each other", "give one of them")
    if run.device != "auto":
        raise UsageError("--device and --devices exclude each other", "give one of them")
    return named_devices(chosen.devices)


def overlay_folder(manner: Manner, overlay: str | None, default: Path | None = None) -> Path | None:
    if not manner.boxes or overlay == "none":
        return None
    if overlay is None:
        return default
    folder = Path(overlay)
    there = next((each for each in (folder, *folder.parents) if each.exists()), folder)
    if there.exists() and not there.is_dir():
        raise UsageError(f"--overlay {overlay}: {there} is a file", "name a folder, or none")
    return folder


def caption_extension(chosen: SetOptions, manner: Manner) -> str:
    """The ending of caption files."""
    if chosen.caption_extension is not None:
        return chosen.caption_extension
    if manner.schema is None:
        return ".txt"
    if manner.prompts.needs_hints:
        raise UsageError(
            "the prompt has fields from .json files beside the pictures, where captions of "
            "--schema would go",
            "give captions another ending, such as --caption-extension .caption.json",
        )
    return ".json"


def manner_of(
    shape: ShapeOptions,
    run: RunOptions,
    prompt: str | None,
    preset: str | None,
    thinking_budget: int | None = None,
) -> Manner:
    """What is asked, and what becomes of answers.

    Raises:
        UsageError: options that are malformed or exclude each other.
        InputError: a file of prompts or words cannot be used.
    """
    from qwencli.dataset.asking import Manner
    from qwencli.dataset.boxes import BOXES, PROMPT
    from qwencli.dataset.guards import Guards, parse_guards
    from qwencli.dataset.languages import LANGUAGES
    from qwencli.dataset.prompting import Template, asks_for, prompt_set
    from qwencli.dataset.shape import Shape, parse_ban, parse_replace
    from qwencli.engine.constrained import SchemaCheck
    from qwencli.presets import DEFAULT_PROMPT

    if shape.language is not None and shape.language.lower() not in LANGUAGES:
        raise UsageError(
            f"--language {shape.language!r} is unknown", f"use one of: {', '.join(LANGUAGES)}"
        )
    frames = {
        name: Template(text, f"--{name.replace('_', '-')}")
        for name in ("prefix", "suffix", "starts_with")
        if (text := getattr(shape, name)) is not None
    }
    schema = _schema(shape, run)
    boxes = shape.schema == BOXES
    if shape.overlay is not None and not boxes:
        raise UsageError("--overlay draws boxes", "give --schema boxes as well, or leave it out")
    prompts = prompt_set(
        prompt=prompt,
        preset=preset,
        prompt_file=shape.prompt_file,
        fields=shape.field or (),
        default=PROMPT if boxes else DEFAULT_PROMPT if schema is None else asks_for(schema),
        seed=run.seed,
        frames=list(frames.values()),
    )
    return Manner(
        prompts,
        Shape(
            prefix=frames.get("prefix"),
            suffix=frames.get("suffix"),
            replace=parse_replace(shape.replace or ()),
            ban=parse_ban(shape.ban or ()),
            max_sentences=shape.max_sentences,
            max_tokens=shape.max_caption_tokens,
        ),
        Guards(
            parse_guards(shape.guards),
            shape.language and shape.language.lower(),
            None if schema is None else SchemaCheck(schema),
        ),
        frames.get("starts_with"),
        shape.retries,
        schema,
        boxes,
        thinking_budget,
    )


# Options that would make something else of data, or of which a schema says more.
_OF_PROSE = (
    "starts_with", "prefix", "suffix", "replace", "ban", "max_sentences", "max_caption_tokens",
    "language",
)  # fmt: skip


def _schema(shape: ShapeOptions, run: RunOptions) -> str | None:
    """What `--schema` names, read and checked; None where it was not given.

    Raises:
        UsageError: another option does not go with it.
        InputError: it cannot be read, or is no schema that can be kept to.
    """
    from qwencli.dataset import boxes
    from qwencli.dataset.shape import file_text
    from qwencli.engine.constrained import MAX_SCHEMA_BYTES, read_schema

    if shape.schema is None:
        return None
    used = [name for name in _OF_PROSE if getattr(shape, name)]
    used += ["stop"] if run.stop else []
    if used:
        flag = f"--{used[0].replace('_', '-')}"
        raise UsageError(f"{flag} and --schema exclude each other", "say it in the schema")
    if shape.schema == boxes.BOXES:
        return read_schema(boxes.schema(), "--schema boxes")
    named = f"--schema {shape.schema}"
    text = file_text(named, Path(shape.schema), MAX_SCHEMA_BYTES)
    return read_schema(text, named)
