"""One set being captioned: its work, its manifest, its sink and what became of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwencli.dataset import pipeline
from qwencli.dataset.manifest import Manifest, job_hash
from qwencli.dataset.pipeline import Captioned, Outcome
from qwencli.dataset.set_folder import OutputPlace, open_manifest, partials, write_failures
from qwencli.dataset.sinks import CaptionWriter, Sink, is_left_behind, recover
from qwencli.dataset.sources import Listing
from qwencli.dataset.worklist import Worklist, WorklistOptions, plan_work

if TYPE_CHECKING:
    from qwencli.dataset.caption_worker import Captioner


@dataclass
class Totals:
    """What a run gave."""

    captioned: int = 0
    failed: int = 0
    num_new_tokens: int = 0
    seconds: float = 0.0
    stopped: bool = False


@dataclass
class CaptionSet:
    """A set whose work is known.

    Args:
        recovered: captions of a killed run that were brought to their files.
    """

    listing: Listing
    sink: Sink
    options: WorklistOptions
    work: Worklist
    manifest: Manifest
    settings: Mapping[str, Any]
    recovered: int = 0
    totals: Totals = field(default_factory=Totals)

    def begin(self, report: Callable[[Outcome], None]) -> None:
        """Begin a run, or go on with one; what cannot be captioned at all is kept."""
        self.manifest.begin(job_hash(self.settings), self.settings, self.work.going_on)
        self.manifest.mark_done((), refused=self.work.refused)
        for failed in self.work.refused:
            self._count(failed)
            report(failed)

    def caption(
        self,
        captioner: Captioner,
        report: Callable[[Outcome], None],
        stopping: Callable[[], bool],
    ) -> None:
        """Do the work; `totals` says what came of it. What was done stays done, however this ends.

        Raises:
            QwenCliError: what makes captions, or the disk, cannot go on.
        """
        manifest, known = self.manifest, dict(captioner.facts)
        if known:
            manifest.loaded(known)
        writer = CaptionWriter(manifest, self.sink, self.options.existing, self.options.redo)
        done_before = self.totals.captioned + self.totals.failed
        started_s = time.perf_counter()

        def count(made: Outcome) -> None:
            if captioner.facts != known:  # of workers some are ready later
                known.update(captioner.facts)
                manifest.loaded(known)
            self._count(made)
            report(made)

        try:
            pipeline.write_outcomes(captioner.outcomes(self.work.tasks, stopping), writer, count)
            done = self.totals.captioned + self.totals.failed - done_before
            self.totals.stopped = stopping() and done < len(self.work.tasks)
        finally:
            self.totals.seconds = time.perf_counter() - started_s
            self.manifest.mark_done(self.sink.flush(at_once=True))

    def end(self) -> None:
        """Note that the run is through, or that it was stopped."""
        self.manifest.end("stopped" if self.totals.stopped else "complete")

    def write_failures(self) -> Path | None:
        """Bring `failures.jsonl` up to date; its path, where there is something in it.

        Raises:
            OutputError: it cannot be written.
        """
        self.manifest.forget(self.work.mended)
        self.manifest.forget_gone({item.key for item in self.listing.items})
        return write_failures(self.manifest.folder, self.manifest)

    def _count(self, outcome: Outcome) -> None:
        if isinstance(outcome, Captioned):
            self.totals.captioned += 1
            self.totals.num_new_tokens += outcome.result.num_new_tokens
        else:
            self.totals.failed += 1


@contextmanager
def open_set(
    listing: Listing,
    place: OutputPlace,
    options: WorklistOptions,
    settings: Mapping[str, Any],
    *,
    redo: str | None = None,
    look_only: bool = False,
) -> Iterator[CaptionSet]:
    """A set with its manifest (see `set_folder`); closed at the end.

    Args:
        redo: see `Manifest.matching`.
        look_only: change nothing.

    Raises:
        DatasetError, OutputError: the manifest is another run's, damaged or not writable.
    """
    sink, recovered = place.sink, 0
    with closing(sink), open_manifest(listing, place, look_only=look_only) as manifest:
        if not look_only:
            for partial in partials(listing, place):
                with suppress(OSError):
                    if is_left_behind(partial):
                        partial.unlink()
            slots = [each.slot for each in manifest.unfinished_writes()]
            sink.existing((sink.name(slot), slot) for slot in slots)
            recovered = recover(manifest, sink)
        if redo is not None:
            options = replace(options, redo=frozenset(manifest.matching(redo)))
        work = plan_work(listing, options, sink, manifest, job_hash(settings))
        yield CaptionSet(listing, sink, options, work, manifest, settings, recovered)
