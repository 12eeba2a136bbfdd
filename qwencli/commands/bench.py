"""`qwencli bench`: measure speed over a matrix of modes."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from qwencli.commands.bench_compare import compare
from qwencli.commands.bench_inject import inject
from qwencli.commands.bench_study import study
from qwencli.commands.options import Device, Dtype, Format, Images
from qwencli.commands.profiling import Profile, profiled
from qwencli.config import DType, EngineName, LoadFormat
from qwencli.errors import BenchError, UsageError
from qwencli.output import Output
from qwencli.typed_values import parse_seq_len

DEFAULT_MATRIX = "default"


def name_bare_matrix(arguments: list[str]) -> list[str]:
    """Give a `--matrix` that has no value the default one, so that it may stand alone."""
    named: list[str] = []
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue="--"):
        named.append(argument)
        if argument == "--matrix" and following.startswith("-"):
            named.append(DEFAULT_MATRIX)
    return named


# What a resumed campaign does not take from the command that began it.
_OF_ONE_CALL = ("out", "resume", "dry_run", "profile", "api_key")


class _BenchGroup(TyperGroup):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        args = name_bare_matrix(args)
        given, rest, _ = self.make_parser(ctx).parse_args(list(args))
        if given.get("resume") and "out" in given and not rest:
            args = [*self._as_begun(ctx, Path(given["out"]), given), *args]
        return super().parse_args(ctx, args)

    def _as_begun(self, ctx: Any, folder: Path, given: Mapping[str, Any]) -> Iterator[str]:
        """The options that the campaign in `folder` was begun with, but those that are given now.

        Nothing where the folder holds no campaign of `bench` itself.
        """
        from qwencli.bench.storage.json_documents import read_environment

        try:
            command = read_environment(folder).get("command_line", [])
        except BenchError:  # said when the campaign is opened
            return
        if "bench" not in command:
            return
        begun = name_bare_matrix(command[command.index("bench") + 1 :])
        values, rest, _ = self.make_parser(ctx).parse_args(begun)
        if rest:  # of a subcommand
            return
        options = {option.name: option for option in self.get_params(ctx)}
        for name, value in values.items():
            if name in given or name in _OF_ONE_CALL:
                continue
            option = options[name]
            if isinstance(value, bool):
                yield (option.opts if value else option.secondary_opts)[0]
                continue
            for text in value if isinstance(value, list) else [value]:
                # The file has "~" for the home folder.
                text = str(Path(text).expanduser()) if text.startswith("~/") else text
                yield f"{option.opts[0]}={text}"


app = typer.Typer(cls=_BenchGroup, invoke_without_command=True, no_args_is_help=False)
app.command()(study)

_cells = functools.partial(typer.Option, rich_help_panel="Cells")
_repeat = functools.partial(typer.Option, rich_help_panel="How often")
_work = functools.partial(typer.Option, rich_help_panel="Work of each run")
_course = functools.partial(typer.Option, rich_help_panel="Course")
_checks = functools.partial(typer.Option, rich_help_panel="After the runs")
Axis = Annotated[str | None, _cells(metavar="LIST", help="Comma list; replaces the matrix's.")]


@app.callback()
def bench(
    context: typer.Context,
    matrix: Annotated[
        str,
        _cells(metavar="[NAME|FILE]", help="default, quick, full, origin, or a TOML file."),
    ] = DEFAULT_MATRIX,
    model: Axis = None,
    engine: Axis = None,
    quantization: Axis = None,
    attention: Axis = None,
    cache: Axis = None,
    load_mode: Axis = None,
    kernels: Axis = None,
    kv_dtype: Axis = None,
    speculate: Axis = None,
    exclude: Annotated[
        list[str] | None,
        _cells(metavar="AXIS=VALUE,...", help="Drop the cells that match; repeatable."),
    ] = None,
    runs: Annotated[
        int | None, _repeat(metavar="N", min=1, help="Measured runs of each cell.")
    ] = None,
    max_noise: Annotated[
        float | None,
        _repeat(metavar="PERCENT", help="Repeat until the median is known this well."),
    ] = None,
    min_runs: Annotated[int | None, _repeat(metavar="N", min=1, help="With --max-noise.")] = None,
    max_runs: Annotated[int | None, _repeat(metavar="N", min=1, help="With --max-noise.")] = None,
    max_time: Annotated[
        float | None,
        _repeat(metavar="SECONDS", min=1.0, help="Of one cell; with --max-noise."),
    ] = None,
    processes: Annotated[
        int | None,
        _repeat(metavar="N", min=1, max=100, help="Spread each cell's runs over so many."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, _work(help="Tokens of each run; the end token is ignored.")
    ] = None,
    prompt: Annotated[str | None, _work(help="What every run is asked.")] = None,
    preset: Annotated[str | None, _work(help="A prompt by its name.")] = None,
    prompt_file: Annotated[Path | None, _work(help="A prompt from a text file.")] = None,
    image: Images = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Default: campaigns/<UTC time>.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the one in --out, as it was begun.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the cells, run nothing.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the order of the cells.")] = 0,
    load_format: Format = LoadFormat.AUTO,
    device: Device = "auto",
    dtype: Dtype = DType.AUTO,
    max_seq_len: Annotated[
        str | None,
        typer.Option(metavar="N|auto", help="Most tokens of a request; auto: what fits."),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Of the CPU, where it computes. Default: as many as pay."
        ),
    ] = None,
    endpoint: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="A server, for --engine remote; repeatable."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="For those servers. Default: $QWENCLI_API_KEY."),
    ] = None,
    quality: Annotated[
        bool, _checks(help="After the timed runs, check whether the answers are right.")
    ] = True,
    quality_samples: Annotated[
        int, _checks(metavar="N", min=1, max=96, help="Answers of each cell to check.")
    ] = 24,
    limits: Annotated[
        bool, _checks(help="After them, measure this machine's limits and what probes cost.")
    ] = True,
    inject_slowdown: Annotated[
        float | None,
        _course(
            metavar="PERCENT", min=0.0, help="Make tokens so much slower on purpose, for compare."
        ),
    ] = None,
    plant: Annotated[float | None, typer.Option("--plant", min=0.0, hidden=True)] = None,
    timeout: Annotated[
        float, _course(metavar="SECONDS", min=1.0, help="Of one process, loading included.")
    ] = 1800.0,
    cooldown: Annotated[
        str,
        _course(metavar="SECONDS", help="Pause before each process; settle: until cool."),
    ] = "0",
    no_continue_on_error: Annotated[
        bool,
        _course(
            "--no-continue-on-error",
            help="End with the first cell that fails. Default: it is a row, and the others run.",
        ),
    ] = False,
    # The default, which scripts may name.
    continue_on_error: Annotated[bool, typer.Option("--continue-on-error", hidden=True)] = False,
    profile: Profile = None,
) -> None:
    """Measure speed over quantization x attention x cache.

    Each cell runs in fresh processes. Rows are on disk as they happen
    (cells.csv, runs.csv, tokens.csv, gpu.csv).
    """
    if context.invoked_subcommand:
        return
    if resume and out is None:
        raise UsageError("--resume needs --out DIR", "name the campaign's folder")
    from qwencli.bench.plan.matrix_file import read_prompt
    from qwencli.bench.plan.prepare import BenchRequest, prepare
    from qwencli.bench.plan.stopping import RepetitionOptions
    from qwencli.bench.run.bench_run import RunSettings, run_bench, show_cells
    from qwencli.bench.run.cooldown import read_cooldown

    if api_key is not None:
        os.environ["QWENCLI_API_KEY"] = api_key  # where processes of our own find it too
    if endpoint and engine is None:
        engine = EngineName.REMOTE
    axes = {
        "model": model,
        "engine": engine,
        "quantization": quantization,
        "attention": attention,
        "cache": cache,
        "load_mode": load_mode,
        "kernels": kernels,
        "kv_dtype": kv_dtype,
        "speculate": speculate,
    }
    request = BenchRequest(
        matrix=matrix,
        axes=axes,
        exclude=tuple(exclude or ()),
        repetition=RepetitionOptions(runs, max_noise, min_runs, max_runs, max_time, processes),
        max_new_tokens=max_new_tokens,
        prompt=read_prompt(prompt=prompt, preset=preset, prompt_file=prompt_file),
        images=tuple(image or ()),
        seed=seed,
        device=device,
        dtype=dtype,
        load_format=load_format,
        max_seq_len=None if max_seq_len is None else parse_seq_len(max_seq_len),
        quality_samples=quality_samples if quality else 0,
        threads=threads,
        endpoints=tuple(endpoint or ()),
    )
    output = context.ensure_object(Output)
    if plant is not None:
        output.notice("--plant is now called --inject-slowdown")
        inject_slowdown = plant
    settings = RunSettings(
        resume=resume,
        timeout_s=timeout,
        cooldown=read_cooldown(cooldown),
        continue_on_error=continue_on_error or not no_continue_on_error,
        limits=limits,
        slowdown_percent=inject_slowdown,
    )
    with profiled(profile, output):
        with output.status("reading the matrix and this machine"):
            plan, facts = prepare(request)
        if dry_run:
            show_cells(plan, output, limits=limits)
            return
        folder = out or Path("campaigns") / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
        code = run_bench(plan, facts, folder, sys.argv[1:], output, settings)
    raise typer.Exit(code)


@app.command()
def report(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Of a campaign or a study.")],
) -> None:
    """Rebuild the tables and reports of a campaign or a study from its raw rows; print the table.

    Writes cells.csv, causes.csv, report.md and report.html, and the confusion matrix of an injected
    campaign; verdicts.csv and report.md of a study.
    """
    from qwencli.bench.storage.campaign_files import renamed_columns
    from qwencli.bench.studies.study_plan import STUDY

    output = context.ensure_object(Output)
    if notice := renamed_columns(folder):
        output.notice(notice)
    if (folder / STUDY).exists():
        from qwencli.bench.studies import study_report

        verdicts = study_report.build_study_report(folder)
        output.show(study_report.terminal_table(verdicts))
        return
    from qwencli.bench.inject.confusion import rebuilt, summary
    from qwencli.bench.report.campaign_report import build_report
    from qwencli.bench.report.tables import terminal_table

    rows = build_report(folder)
    output.show(terminal_table(rows))
    if found := rebuilt(folder):
        for line in summary(found):
            output.show(line)


app.command()(compare)
app.command()(inject)
