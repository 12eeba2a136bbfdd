"""The options of `caption` alone, and what they say: what is asked, what answers become, where.

Pure functions of options; only a schema, prompts and words are read from the files that they name.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from qwencli.commands.options import RunOptions, option
from qwencli.config import Existing, SamplingOptions
from qwencli.errors import UsageError

if TYPE_CHECKING:
    from qwencli.dataset.caption_processor import CaptionConfig
    from qwencli.dataset.named_inputs import StdinPart
    from qwencli.output import Output


_set = functools.partial(option, "Folders and lists of pictures")


@dataclass(frozen=True)
class FolderOptions:
    """What a user may say about captioning a set of pictures."""

    recursive: Annotated[
        bool, _set("--recursive", "-r", text="Pictures in folders inside a folder too.")
    ] = False
    glob: Annotated[
        list[str] | None,
        _set(metavar="PATTERN", text="Only pictures whose path matches; repeatable."),
    ] = None
    filelist: Annotated[
        Path | None, _set(metavar="FILE", text="Pictures to caption too, a path a line; - = stdin.")
    ] = None
    existing: Annotated[
        Existing | None,
        _set(
            metavar="MODE",
            text="Captions that are there: skip, overwrite, append or prepend. Default: skip.",
        ),
    ] = None
    caption_extension: Annotated[
        str | None,
        _set(metavar=".EXT", text="Ending of caption files. Default: .txt; with --schema .json."),
    ] = None
    output: Annotated[
        Path | None,
        _set(
            metavar="PATH",
            text="One .jsonl, .csv, .parquet or .json (kohya) for all captions, or a folder for "
            "the caption files. Default: files beside the pictures.",
        ),
    ] = None
    devices: Annotated[
        str | None,
        _set(
            metavar="all|NAMES",
            text="A worker process on each: all NVIDIA GPUs, or such as cuda:0,cuda:1.",
        ),
    ] = None
    ray: Annotated[
        str | None,
        _set(
            metavar="local|ADDRESS",
            text="On a Ray cluster, an engine on each GPU; needs the extra ray.",
        ),
    ] = None
    samples: Annotated[int, _set(metavar="N", min=1, max=100, text="Captions of each picture.")] = 1
    redo: Annotated[
        str | None,
        _set(metavar="CONDITION", text="Make captions again whose records meet this; as in SQL."),
    ] = None
    retry_failed: Annotated[bool, _set("--retry-failed", text="Try again what failed before.")] = (
        False
    )
    dry_run: Annotated[
        bool, _set("--dry-run", text="Show what would be done, and load no model.")
    ] = False

    @property
    def is_used(self) -> bool:
        return self.keeps_captions or self.samples != 1

    @property
    def keeps_captions(self) -> bool:
        """Whether captions of files that are named are kept too: all but --samples asks for it."""
        used = {f.name for f in fields(self) if getattr(self, f.name) != f.default}
        return bool(used - {"samples"})


_shape = functools.partial(option, "Prompts and shape of captions")


@dataclass(frozen=True)
class CaptionOptions:
    """What a user may say about the prompts and the form of captions."""

    prompt_file: Annotated[
        Path | None, _shape(metavar="FILE", text="Prompts with weights; one is drawn a picture.")
    ] = None
    field: Annotated[
        list[str] | None,
        _shape(metavar="NAME=PROMPT", text="Ask this as well; or a preset's name. Repeatable."),
    ] = None
    starts_with: Annotated[
        str | None, _shape(metavar="TEXT", text="What every answer must begin with.")
    ] = None
    prefix: Annotated[
        str | None, _shape(metavar="TEXT", text="Set in front of each caption (trigger words).")
    ] = None
    suffix: Annotated[str | None, _shape(metavar="TEXT", text="Set behind each caption.")] = None
    replace: Annotated[
        list[str] | None,
        _shape(metavar="A=B", text="Write B for the word A; or @FILE of such lines. Repeatable."),
    ] = None
    ban: Annotated[
        list[str] | None,
        _shape(metavar="WORD", text="No caption may say it; or @FILE. Repeatable."),
    ] = None
    max_sentences: Annotated[
        int | None, _shape(metavar="N", min=1, text="Cut captions after N sentences.")
    ] = None
    max_caption_tokens: Annotated[
        int | None,
        _shape(metavar="N", min=1, text="Cut captions at a sentence's end within N tokens."),
    ] = None
    language: Annotated[
        str | None,
        _shape(metavar="CODE", text="Of captions, such as en. Default: that of the prompt."),
    ] = None
    schema: Annotated[
        str | None,
        _shape(
            metavar="FILE",
            text="Hold answers to this JSON schema; or boxes: bbox_2d in pixels, and label.",
        ),
    ] = None
    overlay: Annotated[
        str | None,
        _shape(
            metavar="FOLDER",
            text="Draw the boxes of --schema boxes into PNG files there; none = do not. "
            "Default: .qwencli/overlays beside the captions of a folder.",
        ),
    ] = None
    guards: Annotated[
        str,
        _shape(metavar="NAMES", text="Faults to look for: all, none, loop,refusal or -preamble."),
    ] = "all"
    retries: Annotated[
        int, _shape(metavar="N", min=0, max=20, text="Ask again where an answer has a fault.")
    ] = 2

    @property
    def is_used(self) -> bool:
        return self.first_used is not None

    @property
    def first_used(self) -> str | None:
        used = (f.name for f in fields(self) if getattr(self, f.name) != f.default)
        return next((f"--{name.replace('_', '-')}" for name in used), None)


@dataclass(frozen=True)
class CaptionJob:
    """What every way of captioning needs: what was named, and what answers.

    Args:
        samples: captions of each picture.
        keep_s: see `start_engine.running_engine`.
    """

    inputs: Sequence[str | StdinPart]
    run: RunOptions
    output: Output
    system: str | None
    frames: int | None
    overlay: str | None
    keep_s: float | None
    samples: int = 1


def is_set(inputs: Sequence[str | StdinPart], chosen: FolderOptions, frames: int | None) -> bool:
    """Whether captions are to be kept beside the pictures, and not printed."""
    return (
        not inputs
        or chosen.keeps_captions
        or any(
            isinstance(each, str) and (_is_folder(each, frames) or _is_shard(each))
            for each in inputs
        )
    )


def _is_folder(named: str, frames: int | None) -> bool:
    """Whether this is a folder of pictures; with `--frames` one without videos is one video."""
    if not os.path.isdir(named):
        return False
    from qwencli.dataset.sources import VIDEO_SUFFIXES

    moving = VIDEO_SUFFIXES | {".gif", ".apng", ".webp"}
    try:
        return frames is None or any(
            each.suffix.lower() in moving for each in Path(named).iterdir()
        )
    except OSError:
        return True  # listing it will tell why


def _is_shard(named: str) -> bool:
    from qwencli.dataset.named_inputs import is_shard

    return is_shard(named) and not os.path.isdir(named)


def check_samples(samples: int, sampling: SamplingOptions) -> None:
    """Raises UsageError where all would be the same."""
    if samples > 1 and sampling.do_sample is False:
        raise UsageError("--samples of --greedy are all the same", "give --temperature instead")


def worker_devices(chosen: FolderOptions, run: RunOptions) -> tuple[str, ...]:
    """The devices that --devices names; none where it was not given."""
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


def overlay_folder(
    caption_config: CaptionConfig, overlay: str | None, default: Path | None = None
) -> Path | None:
    if not caption_config.boxes or overlay == "none":
        return None
    if overlay is None:
        return default
    folder = Path(overlay)
    there = next((each for each in (folder, *folder.parents) if each.exists()), folder)
    if there.exists() and not there.is_dir():
        raise UsageError(f"--overlay {overlay}: {there} is a file", "name a folder, or none")
    return folder


def caption_extension(chosen: FolderOptions, caption_config: CaptionConfig) -> str:
    """The ending of caption files."""
    if chosen.caption_extension is not None:
        return chosen.caption_extension
    if caption_config.schema is None:
        return ".txt"
    if caption_config.prompts.needs_hints:
        raise UsageError(
            "the prompt has fields from .json files beside the pictures, where captions of "
            "--schema would go",
            "give captions another ending, such as --caption-extension .caption.json",
        )
    return ".json"


def build_caption_config(
    options: CaptionOptions,
    run: RunOptions,
    prompt: str | None,
    preset: str | None,
    thinking_budget: int | None = None,
) -> CaptionConfig:
    """What is asked, and what becomes of answers.

    Raises:
        UsageError: options that are malformed or exclude each other.
        InputError: a file of prompts or words cannot be used.
    """
    from qwencli.dataset.boxes import BOXES, PROMPT
    from qwencli.dataset.caption_format import CaptionFormat, parse_ban, parse_replace
    from qwencli.dataset.caption_processor import CaptionConfig
    from qwencli.dataset.guards import Guards, parse_guards
    from qwencli.dataset.languages import LANGUAGES
    from qwencli.dataset.prompting import Template, asks_for, prompt_set
    from qwencli.engine.constrained import SchemaCheck
    from qwencli.messages import DEFAULT_PROMPT

    if options.language is not None and options.language.lower() not in LANGUAGES:
        raise UsageError(
            f"--language {options.language!r} is unknown", f"use one of: {', '.join(LANGUAGES)}"
        )
    frames = {
        name: Template(text, f"--{name.replace('_', '-')}")
        for name in ("prefix", "suffix", "starts_with")
        if (text := getattr(options, name)) is not None
    }
    schema = _schema(options, run)
    boxes = options.schema == BOXES
    if options.overlay is not None and not boxes:
        raise UsageError("--overlay draws boxes", "give --schema boxes as well, or leave it out")
    prompts = prompt_set(
        prompt=prompt,
        preset=preset,
        prompt_file=options.prompt_file,
        fields=options.field or (),
        default=PROMPT if boxes else DEFAULT_PROMPT if schema is None else asks_for(schema),
        seed=run.seed,
        frames=list(frames.values()),
    )
    return CaptionConfig(
        prompts,
        CaptionFormat(
            prefix=frames.get("prefix"),
            suffix=frames.get("suffix"),
            replace=parse_replace(options.replace or ()),
            ban=parse_ban(options.ban or ()),
            max_sentences=options.max_sentences,
            max_tokens=options.max_caption_tokens,
        ),
        Guards(
            parse_guards(options.guards),
            options.language and options.language.lower(),
            None if schema is None else SchemaCheck(schema),
        ),
        frames.get("starts_with"),
        options.retries,
        schema,
        boxes,
        thinking_budget,
    )


# Options that would make something else of data, or of which a schema says more.
_OF_PROSE = (
    "starts_with", "prefix", "suffix", "replace", "ban", "max_sentences", "max_caption_tokens",
    "language",
)  # fmt: skip


def _schema(options: CaptionOptions, run: RunOptions) -> str | None:
    """What `--schema` names, read and checked; None where it was not given.

    Raises:
        UsageError: another option does not go with it.
        InputError: it cannot be read, or is no schema that can be kept to.
    """
    from qwencli.dataset import boxes
    from qwencli.dataset.caption_format import file_text
    from qwencli.engine.constrained import MAX_SCHEMA_BYTES, read_schema

    if options.schema is None:
        return None
    used = [name for name in _OF_PROSE if getattr(options, name)]
    used += ["stop"] if run.stop else []
    if used:
        flag = f"--{used[0].replace('_', '-')}"
        raise UsageError(f"{flag} and --schema exclude each other", "say it in the schema")
    if options.schema == boxes.BOXES:
        return read_schema(boxes.schema(), "--schema boxes")
    named = f"--schema {options.schema}"
    text = file_text(named, Path(options.schema), MAX_SCHEMA_BYTES)
    return read_schema(text, named)
