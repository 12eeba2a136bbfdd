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
from qwencli.messages import PRESETS, prompt_text
from qwencli.output import Output


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
    output = context.ensure_object(Output)
    if together:
        output.notice("--together is now called --multi-image")
        multi_image = True
    if profile is not None and chosen.ray is not None:
        raise UsageError("--ray and --profile exclude each other", "profile one machine")
    with profiled(profile, output):
        _caption(
            output, inputs or (), prompt, preset, system, frames, chosen, options, keep, run,
            multi_image=multi_image, think=think, thinking_budget=thinking_budget,
        )  # fmt: skip


def _caption(
    output: Output,
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
    from qwencli.commands.caption_options import CaptionJob, build_caption_config, is_set
    from qwencli.commands.caption_pictures import answer_pictures, print_captions
    from qwencli.dataset.named_inputs import named_inputs

    if not (inputs or chosen.is_used):
        raise UsageError("Missing argument 'IMAGE...'", "name pictures, or a folder of them")
    keep_s = keep.seconds(run)
    named = named_inputs(inputs, chosen.filelist)
    whole_set = is_set(named, chosen, frames)
    thinking, budget = thoughts(think, thinking_budget, run.sampling_options())
    template = None
    if prompt is not None and "{" in prompt:
        from qwencli.dataset.prompting import Template

        template = Template(prompt, "--prompt")
    has_fields = template is not None and bool(template.fields)
    is_formatted = options.is_used or chosen.samples > 1 or has_fields
    if thinking and (whole_set or is_formatted):
        if budget is None:
            raise UsageError(
                "--think without a bound is for a few pictures in a plain prompt",
                "give --thinking-budget N as well, or leave it out here",
            )
        if options.starts_with is not None:
            raise UsageError("--starts-with and thinking exclude each other", "use one")
    if whole_set and multi_image:
        raise UsageError("--multi-image is for a few pictures", "leave it out for a folder")
    if multi_image and is_formatted:
        if has_fields:
            raise UsageError(
                "--prompt has a field, and --multi-image has no one picture to fill it",
                "leave the field out, or write {{name}} for braces as they stand",
            )
        first = options.first_used or "--samples"
        raise UsageError(f"{first} and --multi-image exclude each other", "use one")
    job = CaptionJob(named, run, output, system, frames, options.overlay, keep_s, chosen.samples)
    if whole_set or is_formatted:
        config = build_caption_config(options, run, prompt, preset, budget)
        if whole_set:
            from qwencli.commands.caption_folder import caption_folder

            caption_folder(job, config, chosen)
        else:
            print_captions(job, config)
    else:
        text = prompt_text(prompt, preset)
        text = text if template is None else template.filled({})
        answer_pictures(
            job, text, multi_image=multi_image, thinking=thinking, thinking_budget=budget
        )
