"""`qwencli caption PICTURE...`: answers are printed, not kept (see `caption_folder`)."""

from __future__ import annotations

import functools
import itertools
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from qwencli.answer_report import (
    caption_record,
    failure_record,
    shortfall,
    stats_line,
    unshown,
)
from qwencli.commands.caption_options import CaptionJob, check_samples, overlay_folder
from qwencli.commands.open_media import OPENING_ERRORS, Named, open_named
from qwencli.commands.start_engine import (
    ANSWERING_ERRORS,
    announce_model,
    choose_model,
    memory_figures,
    running_engine,
)
from qwencli.engine.abilities import Abilities
from qwencli.errors import QwenCliError, StoppedError
from qwencli.messages import (
    GenerationRequest,
    ImagePart,
    VisualPart,
    system_messages,
    user_message,
)
from qwencli.output import visible
from qwencli.tracing import trace_answer

if TYPE_CHECKING:
    from qwencli.dataset.caption_processor import CaptionConfig
    from qwencli.dataset.caption_worker import Captioner
    from qwencli.dataset.pipeline import Outcome, Task
    from qwencli.dataset.sources import Slot
    from qwencli.engine.protocol import Engine
    from qwencli.results import GenerationResult

Pictures = tuple[VisualPart, ...]


class ProcessTimes:
    """Where the time of a whole process went, from its start to its first answer."""

    def __init__(self) -> None:
        import psutil

        self._began = self._latest = psutil.Process().create_time()
        self._parts: list[str] = []

    def mark(self, what: str) -> None:
        """The time since the last mark was for this."""
        now = time.time()
        self._parts.append(f"{what} {max(now - self._latest, 0.0):.2f} s")
        self._latest = now

    def line(self) -> str:
        whole = f"{max(self._latest - self._began, 0.0):.2f} s"
        return f"process: {', '.join(self._parts)}; first answer after {whole}"


class _WritesNothing:
    """Keeps captions nowhere: they are printed."""

    def write(self, outcomes: list[Outcome], keep: Callable[[Outcome], None]) -> None:
        for outcome in outcomes:
            keep(outcome)


class CaptionPrinter:
    """Opens pictures, has them answered, and prints the answers.

    A picture that fails costs its own answer only. `begun` counts the pictures opened, `answered`
    those with a caption, `failed` those without.
    """

    def __init__(self, job: CaptionJob, model: str, *, several: bool) -> None:
        run = job.run
        self.output, self.json, self.stats = job.output, run.json, run.stats
        self.model, self.several = model, several
        self._max_pixels = run.decoded_pixels(job.keep_s)
        self.failed = self.begun = self.answered = 0
        self.process = ProcessTimes() if run.stats else None
        self._first_of: dict[str, list[str]] = {}
        # A picture that does not open fails every field and sample of it for one reason.
        self._errors: set[tuple[str, str]] = set()

    def open(self, named: Named, frames: int | None, beside: Pictures = ()) -> VisualPart:
        """Open a picture or video. What a file holds beyond its first picture, `finish` tells."""
        picture = open_named(named, frames, beside, self._max_pixels)
        if isinstance(picture, ImagePart) and picture.first_of is not None:
            self._first_of.setdefault(picture.first_of, []).append(picture.name)
        return picture

    def finish(self) -> None:
        """Tell of files that hold more pictures than the one that was shown."""
        for line in unshown(self._first_of):
            self.output.notice(line)

    @contextmanager
    def counted_when_stopped(self, count: int) -> Iterator[None]:
        """Raises StoppedError where Ctrl-C ends the work on several of `count` pictures."""
        try:
            yield
        except KeyboardInterrupt as error:
            if count == 1:
                raise
            raise StoppedError(
                f"stopped: {self.answered} of {count} pictures have their captions",
                "name the others; captions of a folder are kept, and go on where they ended",
            ) from error

    def opened(self, jobs: Sequence[Sequence[Named]], frames: int | None) -> Iterator[Pictures]:
        """The pictures of each request, opened when it is due; those that fail are left out."""
        for number, job in enumerate(jobs, start=1):
            self.begun = number
            if self.several and sys.stderr.isatty() and not sys.stdout.isatty():
                self.output.notice(f"[{number}/{len(jobs)}] {', '.join(map(str, job))}")
            pictures: Pictures = ()
            for named in job:
                try:
                    pictures += (self.open(named, frames, pictures),)
                except OPENING_ERRORS as error:
                    self._report(error, [str(named)])
            if 0 < len(pictures) < len(job):
                self.output.notice(f"note: {len(pictures)} of {len(job)} images are shown")
            if pictures:
                yield pictures

    def answer(self, engine: Engine, request: GenerationRequest, pictures: Pictures) -> None:
        names = [picture.name for picture in pictures]
        try:
            result = self._stream(engine, request, names)
        except ANSWERING_ERRORS as error:
            self._report(error, names)
            return
        self._print_details(result, names)

    def answer_many(
        self,
        engine: Engine,
        named: Sequence[Named],
        first: GenerationRequest,
        request: Callable[[Named], GenerationRequest],
    ) -> None:
        """Answer about each picture, as many at a time as the engine runs; in their order.

        Args:
            first: about the first of `named`, which is open already.
            request: opens a picture and asks; runs in threads.
        """
        from qwencli.engine.client import generate_many

        others = (functools.partial(request, each) for each in named[1:])
        results = generate_many(engine, itertools.chain([first], others))
        for each, result in zip(named, results, strict=True):
            names = [str(each)]
            if isinstance(result, (*OPENING_ERRORS, *ANSWERING_ERRORS)):
                self._report(result, names)
            elif isinstance(result, QwenCliError):
                raise result
            else:
                if not self.json:
                    self.output.answer(self._prefix(names) + result.text)
                self._print_details(result, names)
        if self.stats:
            self.output.report(f"memory{memory_figures(engine.memory_plan)}")

    def answer_formatted(
        self, captioner: Captioner, tasks: Sequence[Task], told: Callable[[Outcome], None]
    ) -> None:
        """Answer each task; captions are printed in the tasks' order.

        Args:
            told: gets each outcome as it comes, beside what is printed.
        """
        from qwencli.dataset import pipeline

        due = deque(task.slot for task in tasks)
        made: dict[Slot, Outcome] = {}

        def report(outcome: Outcome) -> None:
            told(outcome)
            made[outcome.task.slot] = outcome
            while due and due[0] in made:
                self._print(made.pop(due.popleft()))

        pipeline.write_outcomes(captioner.outcomes(tasks, lambda: False), _WritesNothing(), report)

    def _print(self, outcome: Outcome) -> None:
        from qwencli.dataset.pipeline import Failed
        from qwencli.dataset.sources import CAPTION

        names, field = [outcome.task.item.key], outcome.task.field
        sample = outcome.task.sample
        if isinstance(outcome, Failed):
            said = (names[0], outcome.error.message)
            self._report(outcome.error, names, again=said in self._errors)
            self._errors.add(said)
            return
        self.answered += 1
        trace_answer(names[0], outcome.result)
        if self.json:
            record = caption_record(outcome.result, names, self.model)
            record |= {"caption": outcome.caption} | ({} if field == CAPTION else {"field": field})
            record |= {"sample": sample} if sample else {}
            self.output.json_line(record)
        else:
            asked = "" if field == CAPTION else f"{field}: "
            self.output.answer(self._prefix(names) + asked + outcome.caption)
        if self.stats:
            self.output.report(stats_line(outcome.result))

    def _print_details(self, result: GenerationResult, names: list[str]) -> None:
        """Print an answer's JSON record, notes and statistics; its text was printed before."""
        self.answered += 1
        trace_answer(", ".join(names), result)
        if self.json:
            self.output.json_line(caption_record(result, names, self.model))
        for note in result.notes:
            self.output.notice(f"note: {', '.join(names)}: {note}")
        missing = shortfall(result)
        if missing is not None:
            self.output.notice(f"note: {', '.join(names)}: {missing}")
        if self.stats:
            self.output.report(stats_line(result))
        if self.process is not None and self.answered == 1:
            self.mark("first request")
            self.output.report(self.process.line())

    def mark(self, what: str) -> None:
        """See `ProcessTimes`; nothing without `--stats`."""
        if self.process is not None:
            self.process.mark(what)

    def _stream(
        self, engine: Engine, request: GenerationRequest, names: list[str]
    ) -> GenerationResult:
        if self.json or not sys.stdout.isatty():
            # A reader of a pipe gets whole answers: a failed one must not leave half a line.
            result = engine.generate(request)
            if not self.json:
                self.output.answer(self._prefix(names) + result.text)
            return result
        with self.output.stream() as write:
            write(self._prefix(names))
            for chunk in engine.stream(request):
                write(chunk.text)
                if chunk.result is not None:
                    result = chunk.result
        return result

    def _prefix(self, names: list[str]) -> str:
        return f"{visible(names[0])}: " if self.several and len(names) == 1 else ""

    def _report(self, error: QwenCliError, names: list[str], *, again: bool = False) -> None:
        """Tell of a failure; one that was told `again` is a line of `--json` alone."""
        self.failed += 1
        if not again:
            self.output.error(error, names)
        if self.json:
            self.output.json_line(failure_record(error, names, self.model))


def answer_pictures(
    job: CaptionJob,
    text: str,
    *,
    multi_image: bool,
    thinking: bool,
    thinking_budget: int | None,
) -> None:
    """Print what a plain prompt is answered about each picture, or about all of them together;
    exit code 1 where one failed."""
    images, run, output, frames = job.inputs, job.run, job.output, job.frames
    sampling, spec = run.sampling_options(), choose_model(run, output)

    def ask(pictures: Pictures) -> GenerationRequest:
        messages = (*system_messages(job.system), user_message(text, pictures))
        return GenerationRequest(
            messages, sampling, thinking=thinking, thinking_budget=thinking_budget
        )

    work = CaptionPrinter(job, spec.name, several=len(images) > 1)
    groups = work.opened([images] if multi_image else [[each] for each in images], frames)
    pictures = next(groups, None)
    if pictures is not None:
        wanted = Abilities(pictures=True, thoughts=thinking)
        announce_model(spec, run, output, wanted)
        work.mark("python, options and pictures")
        asked = 1 if multi_image else len(images)
        with (
            work.counted_when_stopped(asked),
            running_engine(run.engine_config(spec), output, job.keep_s, wanted) as loaded,
        ):
            work.mark("torch and the model")
            left = images[work.begun - 1 :]
            if len(left) >= loaded.batch_from and not multi_image:
                work.answer_many(
                    loaded, left, ask(pictures), lambda each: ask((work.open(each, frames),))
                )
                pictures = None
            while pictures is not None:
                work.answer(loaded, ask(pictures), pictures)
                # Large pictures are not held while the next ones are decoded.
                del pictures
                pictures = next(groups, None)
    work.finish()
    if work.failed:
        raise typer.Exit(1)


def print_captions(job: CaptionJob, config: CaptionConfig) -> None:
    """Print captions in the form that `config` wants; exit code 1 where one failed."""
    from qwencli.dataset.boxes import Overlays
    from qwencli.dataset.caption_processor import CaptionProcessor
    from qwencli.dataset.caption_worker import LocalCaptioner
    from qwencli.dataset.pipeline import Task
    from qwencli.dataset.sources import Item, Listing

    run, output, frames = job.run, job.output, job.frames
    sampling = run.sampling_options()
    check_samples(job.samples, sampling)
    named = {str(each): each for each in job.inputs}
    listing = Listing(Path(), [Item(name) for name in named])
    fields = config.prompts.fields
    spec = choose_model(run, output)
    work = CaptionPrinter(job, spec.name, several=len(named) > 1)
    processor = CaptionProcessor(
        config,
        listing,
        sampling,
        lambda item: work.open(named[item.key], frames),
        system=system_messages(job.system),
    )
    processor.check_fields(listing.items)
    tasks = [
        Task(item, name, sample)
        for item in listing.items
        for name in fields
        for sample in range(job.samples)
    ]
    announce_model(spec, run, output, config.wanted)
    overlays = Overlays(
        overlay_folder(config, job.overlay),
        lambda item: open_named(named[item.key], frames),
        output.error,
    )
    with (
        work.counted_when_stopped(len(tasks)),
        running_engine(run.engine_config(spec), output, job.keep_s, config.wanted) as engine,
        overlays,
    ):
        work.answer_formatted(LocalCaptioner(engine, processor), tasks, overlays.add)
    work.finish()
    if work.failed or overlays.num_failed:
        raise typer.Exit(1)
