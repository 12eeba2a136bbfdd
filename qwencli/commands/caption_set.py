"""`qwencli caption FOLDER`: translates its options and says what became of a set."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from qwencli.commands.options import RunOptions, SetOptions, ShapeOptions
from qwencli.commands.reports import caption_record, failure_record
from qwencli.config import Existing
from qwencli.errors import InputError, UsageError
from qwencli.output import Output

if TYPE_CHECKING:
    from qwencli.dataset.asking import Asking, Manner
    from qwencli.dataset.caption_set import CaptionSet
    from qwencli.dataset.parts import Held
    from qwencli.dataset.pipeline import Outcome
    from qwencli.dataset.sinks import Sink as CaptionSink
    from qwencli.dataset.sources import Listing


# Pictures whose questions a dry run shows.
SHOWN_QUESTIONS = 3
# Options that choose what computes: other captions may come of them.
_COMPUTES = (
    "engine", "quantization", "attention", "cache", "kernels", "kv_dtype", "dtype", "min_pixels",
    "max_pixels", "load_format",
)  # fmt: skip


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
    from qwencli.dataset.parts import SHARD_SUFFIXES

    return Path(named).suffix.lower() in SHARD_SUFFIXES and not os.path.isdir(named)


def caption_set(
    inputs: Sequence[str | Held],
    chosen: SetOptions,
    run: RunOptions,
    sink: Output,
    *,
    manner: Manner,
    system: str | None,
    frames: int | None,
) -> None:
    """Caption pictures into files beside them; leaves with exit code 1 where one failed."""
    from qwencli.commands.model_choice import announce_model, choose_model
    from qwencli.commands.requests import running_engine, system_messages
    from qwencli.dataset.asking import Asking
    from qwencli.dataset.caption_set import open_set
    from qwencli.dataset.pipeline import Stopper
    from qwencli.dataset.sources import Selection, list_inputs
    from qwencli.dataset.worklist import Wish

    sampling = run.sampling_options()
    if chosen.samples > 1 and sampling.do_sample is False:
        raise UsageError("--samples of --greedy are all the same", "give --temperature instead")
    with sink.status("listing pictures"):
        listing = list_inputs(
            inputs or ["."], Selection(chosen.recursive, tuple(chosen.glob or ()))
        )
    place = _place(listing, chosen)
    wish = Wish(
        chosen.existing or Existing.SKIP,
        fields=tuple(manner.prompts.fields),
        samples=chosen.samples,
        retry_failed=chosen.retry_failed,
    )
    asking = Asking(
        manner,
        listing,
        sampling,
        lambda item: listing.open(item, frames),
        system=system_messages(system),
        caption_extension=chosen.caption_extension,
    )
    asking.check_fields()
    spec = choose_model(run, sink)
    settings = {
        "model": spec.name,
        **manner.settings(),
        "system": system,
        "frames": frames,
        "sampling": asdict(sampling),
        "engine": _said(run),
    }
    with open_set(
        listing,
        place.root,
        place.sink,
        wish,
        settings,
        manifest_name=place.manifest,
        redo=chosen.redo,
        look_only=chosen.dry_run,
    ) as whole:
        sink.notice(*_counts(whole, place.suffix))
        if chosen.dry_run:
            sink.notice(*_first_questions(whole, asking))
            return
        reporter = _Reporter(whole, sink, run, spec.name)
        if whole.work.tasks or whole.work.refused:
            whole.begin(reporter)
            if whole.work.tasks:
                announce_model(spec, run, sink)
                stopper = Stopper(sink.notice)
                with running_engine(run.engine_config(spec), sink) as engine, stopper.watching():
                    whole.caption(engine, spec, asking.stages(), reporter, lambda: stopper.asked)
            whole.end()
        reporter.finish()


@dataclass(frozen=True)
class _Place:
    """Where captions go.

    Args:
        root: the folder of the manifest and of failures.jsonl.
        suffix: of the files that captions are written to.
    """

    root: Path
    sink: CaptionSink
    manifest: str
    suffix: str


def _place(listing: Listing, chosen: SetOptions) -> _Place:
    from qwencli.dataset.caption_set import MANIFEST
    from qwencli.dataset.sinks import Sidecars
    from qwencli.dataset.tables import Table

    output = chosen.output
    if output is None or os.path.isdir(output) or not output.suffix:
        if output is None and any(item.part for item in listing.items):
            raise UsageError(
                "captions of archives, tables and addresses have no place of their own",
                "name one with --output, such as --output captions.jsonl or --output captions",
            )
        sidecars = Sidecars(output or listing.base, chosen.caption_extension)
        ending = sidecars.extension
        name = MANIFEST if ending == ".txt" else f"{ending[1:]}.sqlite"
        return _Place(sidecars.root, sidecars, name, ending)
    to_base = os.path.relpath(listing.base, output.parent).replace(os.sep, "/")
    above = "" if to_base == "." else f"{to_base}/"
    table = Table(output, lambda key: above + key)
    return _Place(output.parent, table, f"{output.name}.sqlite", output.suffix.lower())


def manner_of(
    shape: ShapeOptions, run: RunOptions, prompt: str | None, preset: str | None
) -> Manner:
    """What is asked, and what becomes of answers.

    Raises:
        UsageError: options that are malformed or exclude each other.
        InputError: a file of prompts or words cannot be used.
    """
    from qwencli.dataset.asking import Manner
    from qwencli.dataset.guards import Guards, parse_guards
    from qwencli.dataset.languages import LANGUAGES
    from qwencli.dataset.prompting import Template, prompt_set
    from qwencli.dataset.shape import Shape, parse_ban, parse_replace
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
    prompts = prompt_set(
        prompt=prompt,
        preset=preset,
        prompt_file=shape.prompt_file,
        fields=shape.field or (),
        default=DEFAULT_PROMPT,
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
        Guards(parse_guards(shape.guards), shape.language and shape.language.lower()),
        frames.get("starts_with"),
        shape.retries,
    )


def _first_questions(whole: CaptionSet, asking: Asking) -> list[str]:
    """What the first pictures would be asked."""
    lines = []
    for item in list(dict.fromkeys(task.item for task in whole.work.tasks))[:SHOWN_QUESTIONS]:
        try:
            lines += [
                f"{item.key}: {question.field}: {question.text}"
                for question in asking.questions(item)
            ]
        except InputError as error:
            lines.append(f"{item.key}: {error.message}")
    return lines


def _said(run: RunOptions) -> dict[str, str]:
    """The options that choose what computes, as far as they were given."""
    return {name: str(value) for name in _COMPUTES if (value := getattr(run, name)) is not None}


def _counts(whole: CaptionSet, extension: str) -> list[str]:
    """What was found, before a model is loaded."""
    listing, work = whole.listing, whole.work
    parts = [f"{len(work.tasks)} to caption"]
    parts += [f"{work.num_existing} with a caption"] if work.num_existing else []
    parts += [f"{len(work.refused)} that cannot be captioned"] if work.refused else []
    failed = len(work.failed_before)
    parts += [f"{failed} that failed before (--retry-failed tries again)"] if failed else []
    lines = [f"{listing.base}: {len(listing.items)} pictures and videos: {', '.join(parts)}"]
    others = Counter(listing.others)
    others.pop(extension, None)
    left_out = [
        f"{number} {what}"
        for number, what in (
            (listing.hidden, "hidden"),
            (sum(others.values()), f"of other kinds ({_kinds(others)})"),
            (listing.seen, "that were seen already"),
        )
        if number
    ]
    if left_out:
        lines.append(f"left out: {', '.join(left_out)}")
    if whole.settled:
        lines.append(f"{whole.settled} captions of a run that was killed are in their files now")
    if work.num_changed:
        lines.append(f"note: {work.num_changed} pictures have changed since their captions")
    return lines


def _kinds(suffixes: Counter[str]) -> str:
    return ", ".join(suffix or "without an ending" for suffix, _ in suffixes.most_common(5))


class _Reporter:
    """Tells of each outcome and, at the end, of all."""

    def __init__(self, whole: CaptionSet, sink: Output, run: RunOptions, model: str) -> None:
        self._whole, self._sink, self._json, self._model = whole, sink, run.json, model

    def __call__(self, outcome: Outcome) -> None:
        from qwencli.dataset.pipeline import Captioned

        task = outcome.task
        names = [str(self._whole.listing.path(task.item))]
        if isinstance(outcome, Captioned):
            record = caption_record(outcome.result, names, self._model)
            record["caption"] = outcome.caption
        else:
            self._sink.error(outcome.error)
            record = failure_record(outcome.error, names, self._model)
        if self._json:
            event = "caption" if isinstance(outcome, Captioned) else "failure"
            self._sink.json_line({"event": event, **record})

    def finish(self) -> None:
        """Raises typer.Exit where not all is well."""
        whole, totals = self._whole, self._whole.totals
        failures = whole.write_failures()
        speed = totals.captioned / totals.seconds if totals.seconds else 0.0
        line = f"{totals.captioned} captioned, {totals.failed} failed"
        if totals.captioned:
            line += f" in {totals.seconds:.1f} s ({speed:.1f} captions/s)"
        self._sink.notice(line)
        if failures is not None:
            self._sink.notice(f"what failed, and why: {failures}")
        if totals.stopped:
            self._sink.notice("stopped; the same command goes on where this one ended")
            raise typer.Exit(130)
        if totals.failed or whole.work.failed_before:
            raise typer.Exit(1)
