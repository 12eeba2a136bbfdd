"""`qwencli caption`: say what is in a picture."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwencli.commands.model_choice import announce_model, choose_model
from qwencli.commands.options import RunOptions, with_run_options
from qwencli.commands.reports import caption_record, stats_line
from qwencli.commands.requests import (
    open_picture,
    running_engine,
    system_messages,
)
from qwencli.errors import InputError, OutOfMemoryError, QwenCliError
from qwencli.messages import GenerationRequest, ImagePart, user_message
from qwencli.output import Sink
from qwencli.presets import PRESETS, prompt_text

if TYPE_CHECKING:
    from qwencli.engine.base import Engine
    from qwencli.results import GenerationResult

Pictures = tuple[ImagePart, ...]


@with_run_options
def caption(
    context: typer.Context,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="What to ask.")] = None,
    preset: Annotated[str | None, typer.Option(help=f"Ask for: {', '.join(PRESETS)}.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    together: Annotated[
        bool, typer.Option("--together", help="All images in one request.")
    ] = False,
    *,
    run: RunOptions,
) -> None:
    """Describe images. The answer alone goes to stdout, everything else to stderr."""
    sink = context.ensure_object(Sink)
    text = prompt_text(prompt, preset)
    sampling = run.sampling_options()
    spec = choose_model(run, sink)
    work = _Captions(sink, run, model=spec.name, several=len(images) > 1)
    jobs = work.opened([images] if together else [[path] for path in images])
    first = next(jobs, None)
    if first is not None:
        announce_model(spec, run, sink)
        with running_engine(run.engine_config(spec), sink) as loaded:
            for pictures in itertools.chain([first], jobs):
                messages = (*system_messages(system), user_message(text, pictures))
                work.answer(loaded, GenerationRequest(messages, sampling), pictures)
    if work.failed:
        raise typer.Exit(1)


class _Captions:
    """Works through the pictures; one that fails costs its own answer only."""

    def __init__(self, sink: Sink, run: RunOptions, *, model: str, several: bool) -> None:
        self.sink, self.json, self.stats = sink, run.json, run.stats
        self.model, self.several = model, several
        self.failed = 0

    def opened(self, jobs: Sequence[Sequence[Path]]) -> Iterator[Pictures]:
        for number, paths in enumerate(jobs, start=1):
            if self.several and sys.stderr.isatty() and not sys.stdout.isatty():
                self.sink.notice(f"[{number}/{len(jobs)}] {', '.join(str(path) for path in paths)}")
            try:
                yield tuple(open_picture(path) for path in paths)
            except InputError as error:
                self._report(error)

    def answer(self, engine: Engine, request: GenerationRequest, pictures: Pictures) -> None:
        names = [picture.name for picture in pictures]
        try:
            result = self._stream(engine, request, names)
        except (InputError, OutOfMemoryError) as error:
            self._report(error)
            return
        if self.json:
            self.sink.json_line(caption_record(result, names, self.model))
        if self.stats:
            self.sink.notice(stats_line(result))

    def _stream(
        self, engine: Engine, request: GenerationRequest, names: list[str]
    ) -> GenerationResult:
        if self.json or not sys.stdout.isatty():
            # A reader of a pipe gets whole answers: a failed one must not leave half a line.
            result = engine.generate(request)
            if not self.json:
                self.sink.answer(self._prefix(names) + result.text)
            return result
        prefix = self._prefix(names)
        for chunk in engine.stream(request):
            self.sink.answer(prefix + chunk.text, end="")
            prefix = ""
            if chunk.result is not None:
                result = chunk.result
        self.sink.answer("")
        return result

    def _prefix(self, names: list[str]) -> str:
        return f"{names[0]}: " if self.several and len(names) == 1 else ""

    def _report(self, error: QwenCliError) -> None:
        self.failed += 1
        self.sink.error(error)
