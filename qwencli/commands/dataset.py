"""`qwencli dataset`: look at sets of captioned pictures."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Annotated

import typer

from qwencli.errors import InputError, OutputError, UsageError
from qwencli.output import Output, counted, visible

app = typer.Typer(no_args_is_help=True, help="Look at sets of captioned pictures.")


@app.callback()
def _group() -> None:  # keeps `report` a command of its own name
    """Look at sets of captioned pictures."""


@app.command()
def report(
    context: typer.Context,
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Of the pictures.", readable=False)
    ],
    page: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Default: report.html in the folder."),
    ] = None,
    trigger: Annotated[
        str | None,
        typer.Option(metavar="WORD", help="That every caption should have. Default: a guess."),
    ] = None,
    caption_extension: Annotated[
        str, typer.Option(metavar=".EXT", help="Ending of caption files.")
    ] = ".txt",
    json: Annotated[
        bool, typer.Option("--json", help="What was found, as JSON on stdout; no page.")
    ] = False,
) -> None:
    """Make a contact sheet of a captioned folder: one HTML page that says where to look."""
    from qwencli.dataset.report.contact_sheet import contact_sheet, write_sheet
    from qwencli.dataset.report.picture_inspection import inspect_pictures, thumbnail_side
    from qwencli.dataset.report.set_reader import read_set
    from qwencli.dataset.report.survey import surveyed
    from qwencli.dataset.sources import REPORT

    output = context.ensure_object(Output)
    if page is not None and page.exists() and not _is_page(page):
        raise UsageError(
            f"--output {page} is there and is no HTML page", "name a file that is not there yet"
        )
    with output.status(f"reading {folder}"):
        listing, entries = read_set(folder, caption_extension)
    if not entries:
        raise InputError(f"{folder}: no picture or video there", "name the folder of the pictures")
    with output.status(f"looking at {counted(len(entries), 'picture')}"):
        seen = list(
            inspect_pictures(
                # What was refused already, such as a pipe, would be waited for.
                (None if entry.unreadable else listing.base / entry.key for entry in entries),
                thumbnail_side(len(entries)),
            )
        )
        entries = [
            replace(
                entry,
                picture_hash=each.picture_hash,
                unreadable=entry.unreadable or each.unreadable,
            )
            for entry, each in zip(entries, seen, strict=True)
        ]
        survey = surveyed(entries, trigger)
    if json:
        output.json_line({"folder": str(folder), **survey.as_json()})
    path = page or (None if json else folder / REPORT)
    if path is not None:
        many = counted(len(entries), "picture")
        lead = f"{many} in {visible(str(folder))}, looked at on {date.today()}."
        name = visible(folder.resolve().name or str(folder))
        pieces = contact_sheet(
            survey,
            [each.thumbnail for each in seen],
            title=name,
            lead=lead,
            folder=listing.base,
            beside=path.parent,
        )
        try:
            write_sheet(pieces, path)
        except OSError as error:
            raise OutputError(
                f"{path} cannot be written: {error.strerror or error}",
                "name another place with --output",
            ) from error
        if not json:
            output.answer(str(path))
    summary = survey.summary()
    output.notice(
        ", ".join(
            f"{count} {_NAMES[name].removesuffix('s') if count == 1 else _NAMES[name]}"
            for name, count in _summary_rows(summary)
        )
    )
    if not summary["captioned"]:
        output.notice(
            f"no picture has a caption: qwencli caption {visible(str(folder))} makes them; where "
            f"their files end in other than {caption_extension}, say so with --caption-extension"
        )


def _is_page(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(15).lower().startswith(b"<!doctype html")
    except OSError:
        return False


_NAMES = {
    "pictures": "pictures",
    "captioned": "with a caption",
    "missing": "without",
    "failed": "failed",
    "unreadable": "that cannot be opened",
    "faulty": "with a faulty caption",
    "near_duplicates": "near duplicates",
    "repeated": "with the same caption as another",
    "contradictions": "contradictions",
    "trigger_missing": "without the trigger",
}


def _summary_rows(summary: dict[str, int]) -> list[tuple[str, int]]:
    always = ("pictures", "captioned")
    return [(name, n) for name, n in summary.items() if name in _NAMES and (n or name in always)]
