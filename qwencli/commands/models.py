"""`qwencli models`: what can be run, where it is and what it needs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwencli.output import Output, visible

if TYPE_CHECKING:
    from rich.table import Table

    from qwencli.models.listing import ModelRow

_MODES = ("4bit", "8bit", "fp8", "full")
# Columns that the whole table takes, and that the size does beside what is asked for most.
_WIDE, _WITH_SIZE = 76, 48


def models(
    context: typer.Context,
    models_file: Annotated[
        Path | None,
        typer.Option("--models-file", help="A custom_models.json that wins over the others."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """List the models, what memory they need, and what fits here."""
    from qwencli.commands.start_engine import free_bytes_on
    from qwencli.models.listing import list_models
    from qwencli.models.memory import CPU_VALUE_BYTES, GPU_VALUE_BYTES
    from qwencli.models.resolve import SearchPaths

    output, search_paths = context.ensure_object(Output), SearchPaths()
    custom = search_paths.custom_models(models_file)
    for warning in custom.warnings:
        output.warn(warning)
    free_bytes, on_gpu = free_bytes_on("auto")
    value_bytes = GPU_VALUE_BYTES if on_gpu else CPU_VALUE_BYTES
    rows = list_models(custom, search_paths, free_bytes, value_bytes)
    if as_json:
        for row in rows:
            output.json_line(asdict(row))
        return
    output.show(_table(rows, _legend(rows, free_bytes, on_gpu), output.columns))


def _legend(rows: list[ModelRow], free_bytes: int, on_gpu: bool) -> str:
    stated = any(row.vram_stated for row in rows)
    estimated = "* as stated in custom_models.json, otherwise estimated" if stated else "estimated"
    of = "VRAM that is free" if on_gpu else "memory that is free"
    full = "full: not quantized" + ("" if on_gpu else ", float32 on a CPU")
    return (
        f"GB for the weights, 4096 tokens and a one-megapixel image; {full}; "
        f"{estimated}. Fits: the largest mode within the "
        f"{free_bytes / 1e9:.1f} GB of {of} here."
    )


def _table(rows: list[ModelRow], legend: str, columns: int) -> Table:
    from rich.table import Table
    from rich.text import Text

    # With lines between columns the longest built-in name would not fit in 80 of a terminal.
    table = Table(
        box=None, padding=(0, 1, 0, 0), pad_edge=False, caption=legend, caption_justify="left"
    )
    table.add_column("Model", overflow="fold")
    wide, with_size = columns >= _WIDE, columns >= _WITH_SIZE
    modes = _MODES if wide else _MODES[:1]
    if wide:
        table.add_column("Kind", no_wrap=True)
    for heading in ("Size", *modes, "Fits") if with_size else (*modes, "Fits"):
        table.add_column(heading, justify="right", no_wrap=True)
    if wide:
        table.add_column("Where", overflow="fold")
    for row in rows:
        size = "?" if row.size_bytes is None else _size(row.size_bytes)
        fits = row.fits[-1] if row.fits else "no" if row.vram_gb else "?"
        figures = (*((size,) if with_size else ()), *(_vram(row, mode) for mode in modes), fits)
        kept = f", {_size(row.kept_bytes)} of quantized weights kept" if row.kept_bytes else ""
        name = row.name + (" (default)" if row.default else "")
        cells = (name, row.kind, *figures, _where(row) + kept) if wide else (name, *figures)
        # Text, not str: names and paths may hold what rich reads as markup.
        table.add_row(
            *(Text(visible(cell)) for cell in cells), style=None if row.downloaded else "dim"
        )
    return table


def _size(size_bytes: int) -> str:
    if size_bytes < 1e9:
        return f"{size_bytes / 1e6:.0f} MB"
    return f"{size_bytes / 1e9:.{1 if size_bytes < 1e11 else 0}f} GB"


def _vram(row: ModelRow, mode: str) -> str:
    if mode not in row.vram_gb:
        return "?"
    figure = row.vram_gb[mode]
    return f"{figure:.{1 if figure < 100 else 0}f}" + ("*" if mode in row.vram_stated else "")


def _where(row: ModelRow) -> str:
    if row.problem is not None:
        return row.problem
    if row.path is None:
        return "to download"
    return {"bundled": "in package", "built-in": "hub cache", "downloaded": "hub cache"}.get(
        row.kind, row.path
    )
