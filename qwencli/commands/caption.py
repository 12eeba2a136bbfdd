"""`qwencli caption`: say what is in a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from qwencli.commands.caption_options import CaptionOptions, FolderOptions
from qwencli.commands.options import (
    Frames,
    KeepOptions,
    RunOptions,
    Think,
    ThinkingBudget,
    thoughts,
    with_run_options,
)
from qwencli.commands.profiling import Profile, profiled
from qwencli.errors import UsageError
from qwencli.output import Output
from qwencli.presets import PRESETS, prompt_text


@with_run_options
def caption(
    context: typer.Context,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IMAGE...",
            help="Images, videos, folders, .tar(.gz) or .parquet shards, addresses; - = stdin.",
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="What to ask.")] = None,
    preset: Annotated[str | None, typer.Option(help=f"Ask for: {', '.join(PRESETS)}.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    frames: Frames = None,
    multi_image: Annotated[
        bool, typer.Option("--multi-image", help="All images in one request.")
    ] = False,
    together: Annotated[bool, typer.Option("--together", hidden=True)] = False,
    think: Think = None,
    thinking_budget: ThinkingBudget = None,
    profile: Profile = None,
    *,
    chosen: FolderOptions,
    options: CaptionOptions,
    keep: KeepOptions,
    run: RunOptions,
) -> None:
    """Describe images. The answer alone goes to stdout, everything else to stderr.

    Captions of a folder go to text files beside the pictures.
    """
    sink = context.ensure_object(Output)
    if together:
        sink.notice("--together is now called --multi-image")
        multi_image = True
    if profile is not None and chosen.ray is not None:
        raise UsageError("--ray and --profile exclude each other", "profile one machine")
    with profiled(profile, sink):
        _caption(
            sink, inputs or (), prompt, preset, system, frames, chosen, options, keep, run,
            multi_image=multi_image, think=think, thinking_budget=thinking_budget,
        )  # fmt: skip


def _caption(
    sink: Output,
    inputs: Sequence[str],
    prompt: str | None,
    preset: str | None,
    system: str | None,
    frames: int | None,
    chosen: FolderOptions,
    options: CaptionOptions,
    keep: KeepOptions,
    run: RunOptions,
    *,
    multi_image: bool,
    think: bool | None,
    thinking_budget: int | None,
) -> None:
    # Here and not above: `--help` needs none of it.
    from qwencli.commands.caption_folder import caption_folder
    from qwencli.commands.caption_options import build_caption_config, is_set
    from qwencli.commands.captions import Captions, print_captions
    from qwencli.commands.model_choice import announce_model, choose_model
    from qwencli.commands.requests import running_engine, system_messages
    from qwencli.dataset.named_inputs import named_inputs
    from qwencli.messages import GenerationRequest, VisualPart, user_message

    if not (inputs or chosen.is_used):
        raise UsageError("Missing argument 'IMAGE...'", "name pictures, or a folder of them")
    keep_s = keep.seconds(run)
    named = named_inputs(inputs, chosen.filelist)
    whole_set = is_set(named, chosen, frames)
    sampling = run.sampling_options()
    thinking, thinking_budget = thoughts(think, thinking_budget, sampling)
    if thinking and (whole_set or options.is_used):
        if thinking_budget is None:
            raise UsageError(
                "--think without a bound is for a few pictures in a plain prompt",
                "give --thinking-budget N as well, or leave it out here",
            )
        if options.starts_with is not None:
            raise UsageError("--starts-with and thinking exclude each other", "use one")
    if whole_set:
        if multi_image:
            raise UsageError("--multi-image is for a few pictures", "leave it out for a folder")
        caption_config = build_caption_config(options, run, prompt, preset, thinking_budget)
        caption_folder(
            named,
            chosen,
            run,
            sink,
            caption_config=caption_config,
            system=system,
            frames=frames,
            overlay=options.overlay,
            keep_s=keep_s,
        )
        return
    if multi_image and options.is_used:
        raise UsageError(f"{options.first_used} and --multi-image exclude each other", "use one")
    images = named
    if options.is_used:
        caption_config = build_caption_config(options, run, prompt, preset, thinking_budget)
        print_captions(
            images,
            run,
            sink,
            caption_config=caption_config,
            system=system,
            frames=frames,
            overlay=options.overlay,
            keep_s=keep_s,
        )
        return
    text = prompt_text(prompt, preset)
    spec = choose_model(run, sink)

    def ask(pictures: tuple[VisualPart, ...]) -> GenerationRequest:
        messages = (*system_messages(system), user_message(text, pictures))
        return GenerationRequest(
            messages, sampling, thinking=thinking, thinking_budget=thinking_budget
        )

    work = Captions(
        sink,
        run,
        model=spec.name,
        several=len(images) > 1,
        max_pixels=run.decoded_pixels(keep_s),
    )

    jobs = work.opened([images] if multi_image else [[each] for each in images], frames)
    pictures = next(jobs, None)
    if pictures is not None:
        announce_model(spec, run, sink)
        work.mark("python, options and pictures")
        asked = 1 if multi_image else len(images)
        with (
            work.told_when_stopped(asked),
            running_engine(run.engine_config(spec), sink, keep_s, thinking=thinking) as loaded,
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
                pictures = next(jobs, None)
    work.finish()
    if work.failed:
        raise typer.Exit(1)
