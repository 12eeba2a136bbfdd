"""`qwencli caption`: say what is in a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwencli.commands.options import Frames, RunOptions, with_run_options
from qwencli.output import Sink
from qwencli.presets import PRESETS, prompt_text


@with_run_options
def caption(
    context: typer.Context,
    images: Annotated[
        list[Path],
        # Typer would refuse all of them for one that cannot be read.
        typer.Argument(metavar="IMAGE...", help="Image or video files.", readable=False),
    ],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="What to ask.")] = None,
    preset: Annotated[str | None, typer.Option(help=f"Ask for: {', '.join(PRESETS)}.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    frames: Frames = None,
    together: Annotated[
        bool, typer.Option("--together", help="All images in one request.")
    ] = False,
    *,
    run: RunOptions,
) -> None:
    """Describe images. The answer alone goes to stdout, everything else to stderr."""
    # Here and not above: `--help` needs none of it.
    from qwencli.commands.captions import BATCH_FROM, Captions
    from qwencli.commands.model_choice import announce_model, choose_model
    from qwencli.commands.requests import running_engine, system_messages
    from qwencli.messages import GenerationRequest, VisualPart, user_message

    sink = context.ensure_object(Sink)
    text = prompt_text(prompt, preset)
    sampling = run.sampling_options()
    spec = choose_model(run, sink)

    def ask(pictures: tuple[VisualPart, ...]) -> GenerationRequest:
        return GenerationRequest((*system_messages(system), user_message(text, pictures)), sampling)

    work = Captions(sink, run, model=spec.name, several=len(images) > 1)

    jobs = work.opened([images] if together else [[path] for path in images], frames)
    pictures = next(jobs, None)
    if pictures is not None:
        announce_model(spec, run, sink)
        with running_engine(run.engine_config(spec), sink) as loaded:
            left = images[work.begun - 1 :]
            if len(left) >= BATCH_FROM and not together:
                work.answer_many(
                    loaded, left, ask(pictures), lambda path: ask((work.open(path, frames),))
                )
                pictures = None
            while pictures is not None:
                work.answer(loaded, ask(pictures), pictures)
                # Large pictures are not held while the next ones are decoded.
                del pictures
                pictures = next(jobs, None)
    work.finish()
    if work.failed:
        raise typer.Exit(1)
