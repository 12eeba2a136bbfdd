"""`qwencli chat`: a conversation at the terminal, or one question on the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qwencli.commands.options import Frames, RunOptions, with_run_options
from qwencli.messages import VisualPart
from qwencli.output import Output


@with_run_options
def chat(
    context: typer.Context,
    prompt: Annotated[
        str | None, typer.Argument(help="Answer this once and leave; none = converse.")
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", "-i", help="Attach a picture or video.", readable=False),
    ] = None,
    frames: Frames = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    *,
    run: RunOptions,
) -> None:
    """Talk about pictures, or about anything with a text model. /help lists the commands."""
    # Here and not above: `--help` needs none of it.
    from qwencli.commands.conversation import Conversation
    from qwencli.commands.model_choice import announce_model, choose_model
    from qwencli.commands.reports import failure_record
    from qwencli.commands.requests import OPENING_ERRORS, open_visual, running_engine

    sink = context.ensure_object(Output)
    sampling = run.sampling_options()
    spec = choose_model(run, sink)
    pictures: list[VisualPart] = []
    failed = False
    for path in image or []:
        try:
            pictures.append(open_visual(path, frames, pictures))
        except OPENING_ERRORS as error:
            failed = True
            sink.error(error)
            if run.json:
                sink.json_line(failure_record(error, [str(path)], spec.name))
    if failed and prompt is not None and not pictures:
        # An answer about a picture that the model never saw would be invented.
        raise typer.Exit(1)
    announce_model(spec, run, sink)
    with running_engine(run.engine_config(spec), sink) as loaded:
        talk = Conversation(
            loaded,
            sampling,
            sink,
            system=system,
            json=run.json,
            stats=run.stats,
            model=spec.name,
            frames=frames,
        )
        talk.attach(*pictures)
        if prompt is not None:
            talk.ask(prompt)
        else:
            failed = bool(talk.converse(sys.stdin)) or failed
            # A person saw the error and went on; a script has only the exit code.
            failed = failed and not sys.stdin.isatty()
    if failed:
        raise typer.Exit(1)
