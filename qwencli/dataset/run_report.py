"""What a run over a set tells its user: the plan, each outcome, how far it is, and what came of it.

For people it goes to stderr, with `--json` each event is a line on stdout as well.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from qwencli.answer_report import caption_record, failure_record, stats_line
from qwencli.dataset.caption_processor import CaptionProcessor
from qwencli.dataset.caption_set import CaptionSet
from qwencli.dataset.pipeline import Captioned, Outcome
from qwencli.dataset.progress import Progress, duration, keep_rate, kept_rate
from qwencli.errors import InputError, OutputError, QwenCliError, StoppedError
from qwencli.output import Output, counted
from qwencli.tracing import trace_answer

# Pictures whose questions a dry run shows.
SHOWN_QUESTIONS = 3
# Failures that are listed where their file cannot be written.
MOST_LISTED = 100


class RunReport:
    """Tells what is to be done, of each outcome, and at the end of all.

    Args:
        model: the name that records carry.
        computes: the model, device and modes by which the speed of earlier runs is found.
        json: each event is a line on stdout too.
        stats: so is what each answer took, on stderr.
    """

    def __init__(
        self,
        whole: CaptionSet,
        output: Output,
        model: str,
        computes: Mapping[str, str],
        *,
        json: bool = False,
        stats: bool = False,
    ) -> None:
        self._whole, self._output, self._model, self._computes = whole, output, model, computes
        self._json, self._stats = json, stats
        # What was done otherwise than asked for, by kind: as it was said first, and of what.
        self._notes: dict[str, tuple[str, list[str]]] = {}
        # A picture that does not open fails every field and sample of it for one reason.
        self._errors: set[tuple[str, str]] = set()
        self._told = self._looks_only = self._unwritten = False
        self.device = ""
        self.progress = Progress(
            len(whole.work.tasks),
            output,
            lambda snapshot: self._event("progress", asdict(snapshot)),
        )

    def begin(self, suffix: str, *, dry_run: bool) -> None:
        work, listing = self._whole.work, self._whole.listing
        self._looks_only = dry_run
        self._output.notice(*_counts(self._whole, suffix))
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
            self._output.notice(f"estimate: {rate.estimate(count)}")
        elif dry_run and count:
            self._output.notice(
                "estimate: none yet; this machine has not captioned a set with this model and modes"
            )
        for failed in work.refused if dry_run else ():
            self._output.error(failed.error)

    def add(self, outcome: Outcome) -> None:
        if isinstance(outcome, Captioned):
            trace_answer(outcome.task.item.key, outcome.result)
        if isinstance(outcome, Captioned) and self._stats:
            self._output.report(f"{outcome.task.item.key}: {stats_line(outcome.result)}")
        if isinstance(outcome, Captioned):
            for note in outcome.result.notes:
                kind = re.sub(r"\d+", "", note)
                self._notes.setdefault(kind, (note, []))[1].append(outcome.task.item.key)
        else:
            key = outcome.task.item.key
            if (key, outcome.error.message) not in self._errors:
                self._errors.add((key, outcome.error.message))
                self._output.error(outcome.error, [key])
        if self._json:
            self._tell(outcome)
        if self.device:  # what was refused before is no work
            self.progress.add(outcome)

    def _tell(self, outcome: Outcome) -> None:
        task = outcome.task
        names = [str(self._whole.listing.path(task.item))]
        about = {"path": task.item.key, "field": task.field, "sample": task.sample}
        if isinstance(outcome, Captioned):
            record = caption_record(outcome.result, names, self._model)
            self._event("caption", {**record, "caption": outcome.caption, **about})
        else:
            self._event("failure", {**failure_record(outcome.error, names, self._model), **about})

    def finish(self) -> bool:
        """Tell what came of it; whether all is well.

        Raises:
            StoppedError: the user ended it.
        """
        whole, totals = self._whole, self._whole.totals
        keep_rate(self._computes, totals.captioned, totals.seconds, self.device)
        speed = totals.captioned / totals.seconds if totals.seconds else 0.0
        tokens = totals.num_new_tokens / totals.seconds if totals.seconds else 0.0
        gpu = self.progress.gpu.mean
        line = f"{totals.captioned} captioned, {totals.failed} failed"
        if totals.captioned:
            line += f" in {duration(totals.seconds)} ({speed:.1f} captions/s, {tokens:.0f} tok/s"
            line += f", GPU busy {gpu:.0f}%)" if gpu is not None else ")"
        self._output.notice(line)
        before = len(whole.work.failed_before)
        if before and not totals.failed:
            failed = counted(
                before, "caption that failed before is", "captions that failed before are"
            )
            self._output.report(f"exit code 1: {failed} not tried again (--retry-failed does)")
        for note, names in self._notes.values():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            self._output.notice(f"note: {names[0]}{more}: {note}")
        failures = self._tell_failures()
        about = {**asdict(totals), "captions_per_s": speed, "tok_per_s": tokens}
        about |= {"gpu_percent": gpu, "failures": failures and str(failures)}
        self._event("end", about)
        if totals.stopped:
            raise self._stopped()
        return not (totals.failed or before or self._unwritten)

    def _tell_failures(self) -> Path | None:
        """Write failures.jsonl and say where it is; where it cannot be written, list them here."""
        if self._told or self._looks_only:
            return None
        self._told = True
        try:
            path = self._whole.write_failures()
        except OutputError as error:
            self._unwritten = True
            self._output.error(error)
            rows = self._whole.manifest.failures()
            for row in rows[:MOST_LISTED]:
                self._output.report(f"failed: {row['path']} ({row['field']}): {row['reason']}")
            if len(rows) > MOST_LISTED:
                self._output.report(f"and {len(rows) - MOST_LISTED} more that failed")
            return None
        if path is not None:
            whole = self._whole
            if whole.totals.failed or whole.work.failed_before:
                self._output.notice(f"what failed, and why: {path} (--retry-failed tries again)")
            else:  # of other folders that share it, or of another output
                self._output.notice(f"what failed in other runs, and why: {path}")
        return path

    @contextmanager
    def telling(self) -> Iterator[Self]:
        """Tells of failures however the run ends.

        Raises:
            StoppedError: for a Ctrl-C that no `Stopper` sees, as while the model loads.
        """
        try:
            yield self
        except KeyboardInterrupt as error:
            self._tell_failures()
            raise self._stopped() from error
        except QwenCliError:
            self._tell_failures()
            raise

    def _stopped(self) -> StoppedError:
        captioned, count = self._whole.totals.captioned, len(self._whole.work.tasks)
        return StoppedError(
            f"stopped: {captioned} of {count} captioned",
            "the same command goes on where this one ended",
        )

    def show_questions(self, processor: CaptionProcessor) -> None:
        """What the first pictures would be asked."""
        tasks = self._whole.work.tasks
        for item in list(dict.fromkeys(task.item for task in tasks))[:SHOWN_QUESTIONS]:
            try:
                for question in processor.questions(item):
                    self._output.notice(f"{item.key}: {question.field}: {question.text}")
            except InputError as error:
                self._output.notice(f"{item.key}: {error.message}")

    def _event(self, name: str, about: dict[str, Any]) -> None:
        if self._json:
            self._output.json_line({"event": name, **about})


def _counts(whole: CaptionSet, extension: str) -> list[str]:
    """What was found, before a model is loaded."""
    listing, work = whole.listing, whole.work
    parts = [f"{len(work.tasks)} to caption"]
    parts += [f"{work.num_existing} with a caption"] if work.num_existing else []
    parts += [f"{len(work.refused)} that cannot be captioned"] if work.refused else []
    failed = len(work.failed_before)
    parts += [f"{failed} that failed before (--retry-failed tries again)"] if failed else []
    found = counted(len(listing.items), "picture or video", "pictures and videos")
    lines = [f"{listing.named or listing.base}: {found}: {', '.join(parts)}"]
    others = Counter(listing.others)
    others.pop(extension, None)
    left_out = [
        f"{number} {what}"
        for number, what in (
            (listing.hidden, "hidden"),
            (listing.unmatched, "that no --glob matches"),
            (sum(others.values()), f"of other kinds ({_kinds(others)})"),
            (listing.seen, "that were seen already"),
        )
        if number
    ]
    if left_out:
        lines.append(f"left out: {', '.join(left_out)}")
    if whole.recovered:
        lines.append(
            "1 caption of a run that was killed is in its file now"
            if whole.recovered == 1
            else f"{whole.recovered} captions of a run that was killed are in their files now"
        )
    if work.num_added:
        have = "1 of them has" if work.num_added == 1 else f"{work.num_added} of them have"
        lines.append(
            f"note: {have} the answer to this same request already, and --existing "
            f"{whole.options.existing} does not add it twice (that to another --prompt is added; "
            "--existing overwrite asks again)"
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
