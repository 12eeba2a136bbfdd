"""One set being captioned: its work, its manifest, its sink and what became of it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwencli.dataset import pipeline
from qwencli.dataset.caption_tables import Table
from qwencli.dataset.manifest import STATE_FOLDER, Manifest, job_hash
from qwencli.dataset.pipeline import Captioned, Outcome
from qwencli.dataset.sinks import CaptionWriter, Sidecars, Sink, recover, write_whole
from qwencli.dataset.sources import PARTIAL_PREFIX, PARTIAL_SUFFIX, Listing
from qwencli.dataset.worklist import Worklist, WorklistOptions, plan_work
from qwencli.errors import DatasetError, OutputError, UsageError
from qwencli.folder_lock import FolderLock

if TYPE_CHECKING:
    from qwencli.dataset.caption_worker import Captioner

FAILURES, MANIFEST = "failures.jsonl", "manifest.sqlite"
_HELD = "wait for it to end, or stop it; the same command goes on then"


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
        root: the folder that captions go to.
        manifest: None for a look that changes nothing, where there is none yet.
        recovered: captions of a killed run that were brought to their files.
    """

    listing: Listing
    root: Path
    sink: Sink
    options: WorklistOptions
    work: Worklist
    manifest: Manifest | None
    settings: Mapping[str, Any]
    recovered: int = 0
    totals: Totals = field(default_factory=Totals)

    def begin(self, report: Callable[[Outcome], None]) -> None:
        """Begin a run, or go on with one; what cannot be captioned at all is kept."""
        assert self.manifest is not None, "a set that is captioned has a manifest"
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
        assert self.manifest is not None, "a set that is captioned has a manifest"
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
        assert self.manifest is not None, "a set that is captioned has a manifest"
        self.manifest.end("stopped" if self.totals.stopped else "complete")

    def write_failures(self) -> Path | None:
        """Bring `failures.jsonl` up to date; its path, where there is something in it.

        Raises:
            OutputError: it cannot be written.
        """
        assert self.manifest is not None, "a set that is captioned has a manifest"
        path = self.root / FAILURES
        lines = [json.dumps(row) for row in self.manifest.failures()]
        try:
            if lines:
                write_whole(path, ("\n".join(lines) + "\n").encode())
                return path
            path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(
                f"{path} cannot be written: {error.strerror}", "free space, or mend its permissions"
            ) from error
        return None

    def _count(self, outcome: Outcome) -> None:
        if isinstance(outcome, Captioned):
            self.totals.captioned += 1
            self.totals.num_new_tokens += outcome.result.num_new_tokens
        else:
            self.totals.failed += 1


@dataclass(frozen=True)
class OutputPlace:
    """Where captions go.

    Args:
        root: the folder of the manifest and of failures.jsonl.
        suffix: of the files that captions are written to.
    """

    root: Path
    sink: Sink
    manifest: str
    suffix: str


def folder_below(root: Path, folder: Path) -> str:
    """The path of a folder from `root` on, with a slash behind it; empty where it is that one."""
    try:
        path = os.path.relpath(folder, root)
    except ValueError:  # on another drive
        path = os.path.abspath(folder)
    return "" if path == os.curdir else path.replace(os.sep, "/") + "/"


def output_place(listing: Listing, output: Path | None, extension: str) -> OutputPlace:
    """Where captions go: to `output`, a table or a folder, or beside the pictures.

    Raises:
        UsageError: the pictures have no place beside them.
    """
    if output is None or os.path.isdir(output) or not output.suffix:
        if output is None and any(item.part for item in listing.items):
            raise UsageError(
                "captions of archives, tables and addresses have no place of their own",
                "name one with --output, such as --output captions.jsonl or --output captions",
            )
        sidecars = Sidecars(output or listing.base, extension)
        ending = sidecars.extension
        name = MANIFEST if ending == ".txt" else f"{ending[1:]}.sqlite"
        return OutputPlace(sidecars.root, sidecars, name, ending)
    above = folder_below(output.parent, listing.base)
    table = Table(output, lambda key: above + key)
    return OutputPlace(output.parent, table, f"{output.name}.sqlite", output.suffix.lower())


@contextmanager
def open_set(
    listing: Listing,
    root: Path,
    sink: Sink,
    options: WorklistOptions,
    settings: Mapping[str, Any],
    *,
    manifest_name: str = MANIFEST,
    redo: str | None = None,
    look_only: bool = False,
) -> Iterator[CaptionSet]:
    """A set with its manifest, which lies in `root`; closed at the end.

    Args:
        redo: see `Manifest.matching`.
        look_only: change nothing.

    Raises:
        DatasetError, OutputError: the manifest is another run's, damaged or not writable.
    """
    state = root / STATE_FOLDER
    path = state / manifest_name
    manifest = lock = None
    recovered = 0
    if not look_only:
        try:
            state.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{root} cannot be written: {error.strerror}",
                "change its permissions, or name a folder for the captions with --output",
            ) from error
        lock = FolderLock(state, DatasetError, _HELD, "--output")
        for partial in (*listing.partial, *root.glob(f"{PARTIAL_PREFIX}*{PARTIAL_SUFFIX}")):
            with suppress(OSError):
                partial.unlink()
    try:
        if not look_only or path.exists():
            manifest = Manifest(path, folder_below(root, listing.base))
        if manifest is not None and not look_only:
            slots = [each.slot for each in manifest.unfinished_writes()]
            sink.existing((sink.name(slot), slot) for slot in slots)
            recovered = recover(manifest, sink)
        if redo is not None:
            options = replace(options, redo=frozenset(manifest.matching(redo) if manifest else ()))
        work = plan_work(listing, options, sink, manifest, job_hash(settings))
        yield CaptionSet(listing, root, sink, options, work, manifest, settings, recovered)
    finally:
        sink.close()
        if manifest is not None:
            manifest.close()
        if lock is not None:
            lock.release()
