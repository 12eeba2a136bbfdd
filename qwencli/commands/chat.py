"""`qwencli chat`: a conversation at the terminal, or one question on the command line."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from qwencli.commands.options import (
    Frames,
    KeepOptions,
    RunOptions,
    Think,
    ThinkingBudget,
    thoughts,
    with_run_options,
)
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
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the conversation that was kept last.")
    ] = False,
    *,
    keep: KeepOptions,
    think: Think = None,
    thinking_budget: ThinkingBudget = None,
    run: RunOptions,
) -> None:
    """Talk about pictures, or about anything with a text model. /help lists the commands."""
    # Here and not above: `--help` needs none of it.
    from qwencli.answer_report import failure_record
    from qwencli.commands.answer_display import TerminalDisplay
    from qwencli.commands.chat_session import ChatSession
    from qwencli.commands.chat_terminal import (
        TerminalLines,
        UndrawnLines,
        can_draw,
        history_file,
        quiet_keys,
    )
    from qwencli.commands.open_media import OPENING_ERRORS, open_visual
    from qwencli.commands.saved_chat import chats_folder, latest_chat, new_chat_path, read_chat
    from qwencli.commands.start_engine import announce_model, choose_model, running_engine
    from qwencli.engine.abilities import Abilities

    output = context.ensure_object(Output)
    sampling = run.sampling_options()
    thinking, thinking_budget = thoughts(think, thinking_budget, sampling)
    keep_s = keep.seconds(run)
    typed = prompt is None and sys.stdin.isatty()
    kept = latest_chat(chats_folder()) if resume else None
    if kept and run.model is None and not run.endpoint:
        run = replace(run, model=read_chat(kept).model)
    spec = choose_model(run, output)
    pictures: list[VisualPart] = []
    failed = False
    for path in image or []:
        try:
            pictures.append(open_visual(path, frames, pictures))
        except OPENING_ERRORS as error:
            failed = True
            output.error(error)
            if run.json:
                output.json_line(failure_record(error, [str(path)], spec.name))
    if failed and prompt is not None and not pictures:
        # An answer about a picture that the model never saw would be invented.
        raise typer.Exit(1)
    wanted = Abilities(pictures=bool(pictures), thoughts=thinking)
    announce_model(spec, run, output, wanted)
    drawn = sys.stdin.isatty() and sys.stdout.isatty() and not run.json and can_draw()
    with (
        quiet_keys() if can_draw() else nullcontext(),
        running_engine(run.engine_config(spec), output, keep_s, wanted) as loaded,
    ):
        talk = ChatSession(
            loaded,
            sampling,
            output,
            system=system,
            json=run.json,
            stats=run.stats,
            model=spec.name,
            frames=frames,
            thinking=thinking,
            thinking_budget=thinking_budget,
            display=TerminalDisplay(output, loaded.max_seq_len) if drawn else None,
            keep=new_chat_path(chats_folder()) if typed else None,
        )
        if kept:
            talk.resume(kept)
        talk.attach(*pictures)
        if prompt is not None:
            talk.say(prompt)
        elif typed:
            # A person saw what failed and went on.
            drawing = TerminalLines(output, lambda: talk.footer, history_file())
            talk.converse(drawing if can_draw() else UndrawnLines(output))
            failed = False
            if talk.kept:
                output.notice(f"kept: {talk.kept} (qwencli chat --resume goes on)")
        else:
            failed = bool(talk.converse(sys.stdin)) or failed
    if failed:
        raise typer.Exit(1)
