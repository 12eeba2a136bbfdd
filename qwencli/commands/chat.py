"""`qwencli chat`: a conversation at the terminal, or one question on the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qwencli.commands.options import Frames, RunOptions, with_run_options
from qwencli.output import Sink


@with_run_options
def chat(
    context: typer.Context,
    prompt: Annotated[
        str | None, typer.Argument(help="Answer this once and leave; none = converse.")
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", "-i", help="Attach a picture or video."),
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
    from qwencli.commands.requests import open_visual, running_engine

    sink = context.ensure_object(Sink)
    sampling = run.sampling_options()
    spec = choose_model(run, sink)
    pictures = [open_visual(path, frames) for path in image or []]
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
        elif talk.converse(sys.stdin) and not sys.stdin.isatty():
            # A person saw the error and went on; a script has only the exit code.
            raise typer.Exit(1)
