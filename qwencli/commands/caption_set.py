"""`qwencli caption FOLDER`: translates its options and says what became of a set."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from qwencli.commands.options import RunOptions, SetOptions
from qwencli.commands.reports import caption_record, failure_record
from qwencli.config import Existing
from qwencli.messages import GenerationRequest, VisualPart
from qwencli.output import Sink

if TYPE_CHECKING:
    from qwencli.dataset.caption_set import CaptionSet
    from qwencli.dataset.pipeline import Outcome, Stages
    from qwencli.dataset.sources import Listing


# Options that choose what computes: other captions may come of them.
_COMPUTES = (
    "engine", "quantization", "attention", "cache", "kernels", "kv_dtype", "dtype", "min_pixels",
    "max_pixels", "load_format",
)  # fmt: skip


def is_set(inputs: Sequence[str], chosen: SetOptions) -> bool:
    """Whether captions are to be kept beside the pictures, and not printed."""
    return chosen.is_used or any(os.path.isdir(each) for each in inputs)


def caption_set(
    inputs: Sequence[str],
    chosen: SetOptions,
    run: RunOptions,
    sink: Sink,
    *,
    prompt: str,
    system: str | None,
    frames: int | None,
) -> None:
    """Caption pictures into files beside them; leaves with exit code 1 where one failed."""
    from qwencli.commands.model_choice import announce_model, choose_model
    from qwencli.commands.requests import running_engine
    from qwencli.dataset.caption_set import open_set
    from qwencli.dataset.pipeline import Stopper
    from qwencli.dataset.sinks import Sidecars
    from qwencli.dataset.sources import Selection, list_inputs
    from qwencli.dataset.worklist import Wish

    sampling = run.sampling_options()
    paths = [Path(each) for each in inputs] or [Path()]
    with sink.status("listing pictures"):
        listing = list_inputs(paths, Selection(chosen.recursive, tuple(chosen.glob or ())))
    sidecars = Sidecars(listing.base, chosen.caption_extension)
    wish = Wish(chosen.existing or Existing.SKIP, retry_failed=chosen.retry_failed)
    spec = choose_model(run, sink)
    settings = {
        "model": spec.name,
        "prompt": prompt,
        "system": system,
        "frames": frames,
        "sampling": asdict(sampling),
        "engine": _said(run),
    }
    with open_set(
        listing, listing.base, sidecars, wish, settings, look_only=chosen.dry_run
    ) as whole:
        sink.notice(*_counts(whole, sidecars.extension))
        if chosen.dry_run:
            return
        reporter = _Reporter(whole, sink, run, spec.name)
        whole.refuse(reporter)
        if whole.work.tasks:
            announce_model(spec, run, sink)
            stopper = Stopper(sink.notice)
            with running_engine(run.engine_config(spec), sink) as engine, stopper.watching():
                whole.caption(
                    engine, spec, _stages(listing, prompt, system, sampling, frames), reporter,
                    lambda: stopper.asked,
                )  # fmt: skip
        reporter.finish()


def _stages(
    listing: Listing, prompt: str, system: str | None, sampling: Any, frames: int | None
) -> Stages:
    from qwencli.commands.requests import open_visual, system_messages
    from qwencli.dataset.pipeline import Stages, Task
    from qwencli.dataset.sources import Item
    from qwencli.messages import user_message

    def open_item(item: Item) -> VisualPart:
        return open_visual(listing.path(item), frames)

    def ask(task: Task, visual: VisualPart) -> GenerationRequest:
        messages = (*system_messages(system), user_message(prompt, (visual,)))
        return GenerationRequest(messages, sampling)

    return Stages(open_item, ask)


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

    def __init__(self, whole: CaptionSet, sink: Sink, run: RunOptions, model: str) -> None:
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
