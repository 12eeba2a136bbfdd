"""`qwencli caption FOLDER`: translates its options and says what became of a set."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from qwencli.commands.options import RunOptions, SetOptions, ShapeOptions
from qwencli.commands.profiling import trace_answer
from qwencli.commands.reports import caption_record, failure_record
from qwencli.config import Existing
from qwencli.errors import InputError, StoppedError, UsageError
from qwencli.output import Output, counted, stats_line

if TYPE_CHECKING:
    from qwencli.config import EngineConfig
    from qwencli.dataset.asking import Asking, Manner
    from qwencli.dataset.caption_set import CaptionSet
    from qwencli.dataset.parts import Held
    from qwencli.dataset.pipeline import Outcome
    from qwencli.dataset.worker import Captioner


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
    from qwencli.dataset.parts import is_shard

    return is_shard(named) and not os.path.isdir(named)


def caption_set(
    inputs: Sequence[str | Held],
    chosen: SetOptions,
    run: RunOptions,
    sink: Output,
    *,
    manner: Manner,
    system: str | None,
    frames: int | None,
    overlay: str | None = None,
    keep_s: float = 0.0,
) -> None:
    """Caption pictures into files beside them; leaves with exit code 1 where one failed."""
    from qwencli.commands.model_choice import announce_model, choose_model
    from qwencli.commands.requests import system_messages
    from qwencli.dataset.asking import Asking
    from qwencli.dataset.boxes import Overlays
    from qwencli.dataset.caption_set import open_set, place_of
    from qwencli.dataset.manifest import STATE_FOLDER
    from qwencli.dataset.pipeline import Stopper
    from qwencli.dataset.sources import Listing, Selection, list_inputs
    from qwencli.dataset.worklist import Wish

    sampling = run.sampling_options()
    if manner.schema is not None and chosen.existing in (Existing.APPEND, Existing.PREPEND):
        raise UsageError(
            f"--existing {chosen.existing} and --schema exclude each other",
            "use --existing overwrite, or --samples for several answers",
        )
    if chosen.samples > 1 and sampling.do_sample is False:
        raise UsageError("--samples of --greedy are all the same", "give --temperature instead")
    devices = _devices(chosen, run)
    with sink.status("listing pictures"):
        listing = list_inputs(
            inputs or ["."], Selection(chosen.recursive, tuple(chosen.glob or ()))
        )
    if not (listing.items or listing.refused):
        named = ", ".join(str(each) for each in inputs) or "this folder"
        raise InputError(
            f"{named}: no picture or video there",
            "--recursive looks into its folders too" if not chosen.recursive else "check the path",
        )
    extension = _extension(chosen, manner)
    place = place_of(listing, chosen.output, extension)
    wish = Wish(
        chosen.existing or Existing.SKIP,
        fields=tuple(manner.prompts.fields),
        samples=chosen.samples,
        retry_failed=chosen.retry_failed,
    )
    # The items stay here: what asks goes to other processes.
    where = Listing(listing.base)
    asking = Asking(
        manner,
        where,
        sampling,
        functools.partial(where.open, frames=frames, max_pixels=run.decoded_pixels(keep_s)),
        system=system_messages(system),
        caption_extension=extension,
    )
    asking.check_fields(listing.items)
    folder = _overlay_folder(manner, overlay, place.root / STATE_FOLDER / "overlays")
    overlays = Overlays(folder, functools.partial(where.open, frames=frames), sink.error)

    def tell(outcome: Outcome) -> None:
        reporter.add(outcome)
        overlays.add(outcome)

    spec = choose_model(run, sink)
    settings = {
        "model": spec.name,
        **manner.settings(),
        "system": system,
        "frames": frames,
        "sampling": asdict(sampling),
        "engine": _said(run),
    }
    with (
        open_set(
            listing,
            place.root,
            place.sink,
            wish,
            settings,
            manifest_name=place.manifest,
            redo=chosen.redo,
            look_only=chosen.dry_run,
        ) as whole,
        _told_when_stopped(whole),
    ):
        device = ",".join(devices) or (f"ray {chosen.ray}" if chosen.ray else run.device)
        computes = {"model": spec.name, "device": device, **_said(run)}
        if manner.schema is not None:
            # What has to keep to one takes another time.
            computes["schema"] = hashlib.sha256(manner.schema.encode()).hexdigest()[:16]
        reporter = _Reporter(whole, sink, run, spec.name, computes)
        reporter.begin(place.suffix, dry_run=chosen.dry_run)
        if chosen.dry_run:
            sink.notice(*_first_questions(whole, asking))
            return
        if whole.work.tasks or whole.work.refused:
            whole.begin(reporter.add)
            if whole.work.tasks:
                announce_model(spec, run, sink)
                stopper = Stopper(sink.notice)
                config, count = run.engine_config(spec), len(whole.work.tasks)
                with (
                    _captioner(
                        config, asking, count, devices, chosen.ray, sink, keep_s
                    ) as captioner,
                    stopper.watching(),
                    overlays,
                ):
                    reporter.device = device if devices else captioner.facts.get("device") or device
                    with reporter.progress.shown(reporter.device):
                        whole.caption(captioner, tell, lambda: stopper.asked)
            whole.end()
        if overlays.count:
            sink.notice(f"pictures with their boxes: {folder}")
        reporter.finish()
        if overlays.num_failed:
            raise typer.Exit(1)


@contextmanager
def _captioner(
    config: EngineConfig,
    asking: Asking,
    count: int,
    devices: Sequence[str],
    ray: str | None,
    sink: Output,
    keep_s: float,
) -> Iterator[Captioner]:
    """What makes `count` captions: workers of a cluster, or on devices, or an engine right here."""
    from qwencli.commands.requests import fetch_model, running_engine
    from qwencli.dataset.devices import DeviceWorkers
    from qwencli.dataset.ray_cluster import RayWorkers
    from qwencli.dataset.worker import Alone, Orders

    if not devices and ray is None:
        with running_engine(config, sink, keep_s) as engine:
            yield Alone(engine, asking)
        return
    fetch_model(config)
    orders = Orders(config, asking, -(-count // max(1, len(devices))))
    workers: DeviceWorkers | RayWorkers
    if ray is not None:
        workers, where = RayWorkers(orders, ray, sink.warn), f"Ray ({ray})"
    else:
        workers, where = DeviceWorkers(orders, devices, sink.warn), ", ".join(devices)
    with ExitStack() as stack:
        with sink.status(f"loading {config.model.name} on {where}"):
            stack.enter_context(workers)
        yield workers


def print_captions(
    images: Sequence[str | Held],
    run: RunOptions,
    sink: Output,
    *,
    manner: Manner,
    system: str | None,
    frames: int | None,
    overlay: str | None = None,
    keep_s: float = 0.0,
) -> None:
    """Print captions in the form that `manner` wants; exit code 1 where one failed."""
    from qwencli.commands.captions import Captions
    from qwencli.commands.model_choice import announce_model, choose_model
    from qwencli.commands.requests import open_named, running_engine, system_messages
    from qwencli.dataset.asking import Asking
    from qwencli.dataset.boxes import Overlays
    from qwencli.dataset.pipeline import Task
    from qwencli.dataset.sources import Item, Listing
    from qwencli.dataset.worker import Alone

    named = {str(each): each for each in images}
    listing = Listing(Path(), [Item(name) for name in named])
    fields = manner.prompts.fields
    spec = choose_model(run, sink)
    work = Captions(
        sink,
        run,
        model=spec.name,
        several=len(listing.items) > 1,
        max_pixels=run.decoded_pixels(keep_s),
    )
    asking = Asking(
        manner,
        listing,
        run.sampling_options(),
        lambda item: work.open(named[item.key], frames),
        system=system_messages(system),
    )
    asking.check_fields(listing.items)
    tasks = [Task(item, name) for item in listing.items for name in fields]
    announce_model(spec, run, sink)
    overlays = Overlays(
        _overlay_folder(manner, overlay),
        lambda item: open_named(named[item.key], frames),
        sink.error,
    )
    with (
        work.told_when_stopped(len(tasks)),
        running_engine(run.engine_config(spec), sink, keep_s) as engine,
        overlays,
    ):
        work.answer_shaped(Alone(engine, asking), tasks, overlays.add)
    work.finish()
    if work.failed or overlays.num_failed:
        raise typer.Exit(1)


def _devices(chosen: SetOptions, run: RunOptions) -> tuple[str, ...]:
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


def _overlay_folder(
    manner: Manner, overlay: str | None, default: Path | None = None
) -> Path | None:
    if not manner.boxes or overlay == "none":
        return None
    if overlay is None:
        return default
    folder = Path(overlay)
    there = next((each for each in (folder, *folder.parents) if each.exists()), folder)
    if there.exists() and not there.is_dir():
        raise UsageError(f"--overlay {overlay}: {there} is a file", "name a folder, or none")
    return folder


def _extension(chosen: SetOptions, manner: Manner) -> str:
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
    found = counted(len(listing.items), "picture or video", "pictures and videos")
    lines = [f"{listing.base}: {found}: {', '.join(parts)}"]
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
        lines.append(
            "1 caption of a run that was killed is in its file now"
            if whole.settled == 1
            else f"{whole.settled} captions of a run that was killed are in their files now"
        )
    if work.num_changed:
        lines.append(
            "note: 1 picture has changed since its caption"
            if work.num_changed == 1
            else f"note: {work.num_changed} pictures have changed since their captions"
        )
    return lines


def _kinds(suffixes: Counter[str]) -> str:
    return ", ".join(suffix or "without an ending" for suffix, _ in suffixes.most_common(5))


def _stopped(whole: CaptionSet) -> StoppedError:
    captioned, count = whole.totals.captioned, len(whole.work.tasks)
    return StoppedError(
        f"stopped: {captioned} of {count} captioned",
        "the same command goes on where this one ended",
    )


@contextmanager
def _told_when_stopped(whole: CaptionSet) -> Iterator[None]:
    """Ctrl-C before or after what a `Stopper` watches, such as while the model loads."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise _stopped(whole) from error


class _Reporter:
    """Tells what is to be done, of each outcome, and at the end of all."""

    def __init__(
        self, whole: CaptionSet, sink: Output, run: RunOptions, model: str, computes: dict[str, str]
    ) -> None:
        from qwencli.dataset.progress import Progress

        self._whole, self._sink, self._json, self._model = whole, sink, run.json, model
        self._stats, self._computes = run.stats, computes
        # What was done otherwise than asked for, by kind: as it was said first, and of what.
        self._notes: dict[str, tuple[str, list[str]]] = {}
        self.device = ""
        self.progress = Progress(
            len(whole.work.tasks), sink, lambda standing: self._event("progress", asdict(standing))
        )

    def begin(self, suffix: str, *, dry_run: bool) -> None:
        from qwencli.dataset.progress import kept_rate

        work, listing = self._whole.work, self._whole.listing
        self._sink.notice(*_counts(self._whole, suffix))
        count = len(work.tasks)
        rate = kept_rate(self._computes)
        about = {
            "pictures": len(listing.items),
            "to_caption": count,
            "with_caption": work.num_existing,
            "failed_before": len(work.failed_before),
            "refused": len(work.refused),
            "estimate_s": count / rate.captions_per_s if rate else None,
            "estimate_from": asdict(rate) if rate else None,
        }
        self._event("plan" if dry_run else "start", about)
        if rate is not None and count:
            self._sink.notice(f"estimate: {rate.estimate(count)}")
        elif dry_run and count:
            self._sink.notice(
                "estimate: none yet; this machine has not captioned a set with this model and modes"
            )
        for failed in work.refused if dry_run else ():
            self._sink.error(failed.error)

    def add(self, outcome: Outcome) -> None:
        from qwencli.dataset.pipeline import Captioned

        if isinstance(outcome, Captioned):
            trace_answer(outcome.task.item.key, outcome.result)
        if isinstance(outcome, Captioned) and self._stats:
            self._sink.report(f"{outcome.task.item.key}: {stats_line(outcome.result)}")
        if isinstance(outcome, Captioned):
            for note in outcome.result.notes:
                kind = re.sub(r"\d+", "", note)
                self._notes.setdefault(kind, (note, []))[1].append(outcome.task.item.key)
        else:
            self._sink.error(outcome.error)
        if self._json:
            self._tell(outcome)
        if self.device:  # what was refused before is no work
            self.progress.add(outcome)

    def _tell(self, outcome: Outcome) -> None:
        from qwencli.dataset.pipeline import Captioned

        task = outcome.task
        names = [str(self._whole.listing.path(task.item))]
        about = {"path": task.item.key, "field": task.field, "sample": task.sample}
        if isinstance(outcome, Captioned):
            record = caption_record(outcome.result, names, self._model)
            self._event("caption", {**record, "caption": outcome.caption, **about})
        else:
            self._event("failure", {**failure_record(outcome.error, names, self._model), **about})

    def finish(self) -> None:
        """Raises typer.Exit where not all is well."""
        from qwencli.dataset.progress import duration, keep_rate

        whole, totals = self._whole, self._whole.totals
        failures = whole.write_failures()
        keep_rate(self._computes, totals.captioned, totals.seconds, self.device)
        speed = totals.captioned / totals.seconds if totals.seconds else 0.0
        tokens = totals.num_new_tokens / totals.seconds if totals.seconds else 0.0
        gpu = self.progress.gpu.mean
        line = f"{totals.captioned} captioned, {totals.failed} failed"
        if totals.captioned:
            line += f" in {duration(totals.seconds)} ({speed:.1f} captions/s, {tokens:.0f} tok/s"
            line += f", GPU busy {gpu:.0f}%)" if gpu is not None else ")"
        self._sink.notice(line)
        for note, names in self._notes.values():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            self._sink.notice(f"note: {names[0]}{more}: {note}")
        if failures is not None:
            self._sink.notice(f"what failed, and why: {failures} (--retry-failed tries again)")
        about = {**asdict(totals), "captions_per_s": speed, "tok_per_s": tokens}
        about |= {"gpu_percent": gpu, "failures": failures and str(failures)}
        self._event("end", about)
        if totals.stopped:
            raise _stopped(whole)
        if totals.failed or whole.work.failed_before:
            raise typer.Exit(1)

    def _event(self, name: str, about: dict[str, Any]) -> None:
        if self._json:
            self._sink.json_line({"event": name, **about})
