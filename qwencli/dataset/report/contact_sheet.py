"""A survey as one self-contained HTML page: no network, opens from file://.

What is read at once stands in the page as HTML. Pictures and captions lie in it as data, of which
the browser makes only the cards in view; thumbnails come last, in pieces, and none is decoded
before it is seen. So a page of 10,000 pictures is there as fast as one of ten.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from qwencli.dataset.report.survey import TOP_OPENINGS, TOP_WORDS, Survey, length_summary
from qwencli.dataset.sinks import put_in_place
from qwencli.html_page import json_element, page_around

ASSETS = Path(__file__).with_name("assets")
CHUNK = 100
_BARS = 40
_REST = "@@REST@@"
# Kinds of findings that stand in red: the picture has no usable caption.
_BAD = ("failed", "missing", "unreadable", "faulty")
_FILTERS = (
    ("all", "All"),
    ("failed", "Failed"),
    ("missing", "No caption"),
    ("unreadable", "Cannot be opened"),
    ("faulty", "Faulty captions"),
    ("near", "Near duplicates"),
    ("repeated", "Same caption"),
    ("contradicting", "Contradictions"),
    ("trigger", "No trigger"),
)


def contact_sheet(
    survey: Survey,
    thumbnails: Sequence[bytes],
    *,
    title: str,
    lead: str,
    folder: Path | None = None,
    beside: Path | None = None,
) -> Iterator[str]:
    """The page, in pieces: it may be larger than is good to hold twice.

    Args:
        thumbnails: WebP of each entry, empty where there is none.
        folder, beside: where the pictures lie, and the folder that the page will: for links.
    """
    found = _findings(survey)
    body = Template(_asset("sheet.html")).substitute(
        histogram=_histogram(list(survey.lengths.values())),
        lengths=_facts(length_summary(list(survey.lengths.values()))),
        vocabulary_lead=escape(
            f"{len(survey.vocabulary):,} words beside the most frequent ones of their language, "
            f"{survey.once:,} of them in one caption only. Behind each: in how many captions."
        ),
        vocabulary="".join(
            f'<button type="button" data-word="{escape(word)}">{escape(word)} '
            f"<small>{count}</small></button>"
            for word, count in survey.vocabulary.most_common(TOP_WORDS)
        ),
        openings="".join(
            f"<li><span>{escape(text)} ...</span><span>{count}</span></li>"
            for text, count in survey.openings.most_common(TOP_OPENINGS)
            if count > 1
        ),
        filters="".join(_filters(survey, found)),
    )
    data = {
        "chunk": CHUNK,
        "bad": sum(1 << n for n, (name, _) in enumerate(_FILTERS) if name in _BAD),
        "filters": found,
        "pictures": list(_pictures(survey, found, folder, beside)),
    }
    page = page_around(
        # The first cards have their pictures before the page is read to its end.
        body + json_element("data", data) + "\n" + _thumbnails(thumbnails, 0),
        brand="qwencli data set",
        title=title,
        header=f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>',
        style=_asset("sheet.css"),
        script=_asset("sheet.js"),
        after=_REST,
    )
    before, after = page.rsplit(_REST, 1)
    yield before
    for start in range(CHUNK, len(thumbnails), CHUNK):
        yield _thumbnails(thumbnails, start)
    yield after


def _thumbnails(thumbnails: Sequence[bytes], start: int) -> str:
    lines = (base64.b64encode(data).decode() for data in thumbnails[start : start + CHUNK])
    text = "\n".join(lines)
    return f'<script type="text/plain" id="thumbnails-{start // CHUNK}">{text}</script>\n'


def _findings(survey: Survey) -> dict[str, list[int]]:
    """Pictures by kind of finding, those that belong together next to each other."""
    contradicting = [n for one, other, _ in survey.contradicting for n in (one, other)]
    return {
        "failed": survey.failed,
        "missing": survey.missing,
        "unreadable": survey.unreadable,
        "faulty": list(survey.faults),
        "near": [n for group in survey.groups for n in group],
        "repeated": [n for group in survey.repeats for n in group],
        "contradicting": list(dict.fromkeys(contradicting)),
        "trigger": survey.trigger.missing if survey.trigger else [],
    }


def _filters(survey: Survey, found: Mapping[str, Sequence[int]]) -> Iterator[str]:
    for name, label in _FILTERS:
        count = len(survey.entries) if name == "all" else len(found[name])
        if name == "trigger" and survey.trigger is not None:
            guess = "" if survey.trigger.named else "?"
            label = f"No “{survey.trigger.word}”{guess}"
        kind = "" if not count or name == "all" else "bad" if name in _BAD else "doubt"
        disabled = "" if count or name == "all" else " disabled"
        yield (
            f'<button type="button" data-filter="{name}" class="{kind}" '
            f'aria-pressed="{str(name == "all").lower()}"{disabled}>'
            f"{escape(label)} <b>{count:,}</b></button>"
        )


def _pictures(
    survey: Survey,
    found: Mapping[str, Sequence[int]],
    folder: Path | None,
    beside: Path | None,
) -> Iterator[dict[str, Any]]:
    # A `..` leads out of the folder that a symbolic link leads to.
    folder, beside = (each and Path(os.path.realpath(each)) for each in (folder, beside))
    notes = _notes(survey)
    kinds = [0] * len(survey.entries)
    for bit, (name, _) in enumerate(_FILTERS):
        for n in found.get(name, ()):
            kinds[n] |= 1 << bit
    for n, entry in enumerate(survey.entries):
        picture: dict[str, Any] = {"path": _visible(entry.key), "caption": entry.caption}
        if n in survey.lengths:
            picture["words"] = survey.lengths[n]
        if n in notes:
            picture |= {"notes": notes[n], "kinds": kinds[n]}
        if entry.unreadable:
            picture["unreadable"] = True
        facts = {**{f"field {k}": v for k, v in entry.others.items()}, **entry.facts}
        if facts:
            picture["facts"] = facts
        link = _link(entry.key, folder, beside)
        if link:
            picture["link"] = link
        yield picture


def _without_path(reason: str | None, key: str) -> str:
    """The reason without the picture's path at its beginning: a card has it, and little room."""
    before, path, rest = (reason or "").replace("\\", "/").partition(key)
    if path and rest[:1] in (":", " ") and before[-1:] in ("", "/"):
        # The path alone has had its backslashes turned.
        return (reason or "")[-len(rest) :].lstrip(": ")
    return reason or ""


def _notes(survey: Survey) -> dict[int, list[str]]:
    """What is to be said of each picture, the gravest first."""
    notes: dict[int, list[str]] = {}

    def say(n: int, text: str) -> None:
        notes.setdefault(n, []).append(text)

    for n in survey.failed:
        say(n, f"Failed: {_without_path(survey.entries[n].failure, survey.entries[n].key)}")
    for n in survey.unreadable:
        reason = _without_path(survey.entries[n].unreadable, survey.entries[n].key)
        say(n, f"Cannot be opened: {reason}")
    for n in survey.missing:
        say(n, "No caption")
    for n, fault in survey.faults.items():
        say(n, f"Faulty: {fault}")
    for one, other, what in survey.contradicting:
        names = survey.entries[one].key, survey.entries[other].key
        say(
            one,
            f"Contradicts {names[1]}: {what.about} of {what.thing}: {what.first} / {what.second}",
        )
        say(
            other,
            f"Contradicts {names[0]}: {what.about} of {what.thing}: {what.second} / {what.first}",
        )
    for group in survey.repeats:
        for n in group:
            say(n, f"Same caption as {len(group) - 1} more")
    for number, group in enumerate(survey.groups, start=1):
        for n in group:
            say(n, f"Near duplicates, group {number} of {len(group)}")
    for n in survey.trigger.missing if survey.trigger and survey.trigger.named else ():
        assert survey.trigger is not None, "it was just asked"
        say(n, f"Does not say “{survey.trigger.word}”")
    return notes


def _histogram(lengths: Sequence[int]) -> str:
    """Captions by their number of words, as an SVG."""
    if not lengths:
        return '<p class="lead">No captions.</p>'
    most = max(lengths)
    width = max(1, -(-(most + 1) // _BARS))
    counts = [0] * (most // width + 1)
    for length in lengths:
        counts[length // width] += 1
    highest, bars = max(counts), []
    step = 600 / len(counts)
    for place, count in enumerate(counts):
        height = 110 * count / highest
        low, high = place * width, place * width + width - 1
        label = f"{low} to {high} words" if width > 1 else f"{low} words"
        bars.append(
            f'<rect x="{place * step:.1f}" y="{115 - height:.1f}" width="{max(1.0, step - 1):.1f}" '
            f'height="{height:.1f}"><title>{label}: {count:,} captions</title></rect>'
        )
    marks = "".join(
        f'<text x="{x}" y="136" text-anchor="{anchor}">{number}</text>'
        for x, anchor, number in ((0, "start", 0), (300, "middle", most // 2), (600, "end", most))
    )
    return (
        '<svg class="histogram" viewBox="0 0 600 140" role="img" '
        f'aria-label="Captions by their number of words">{"".join(bars)}{marks}</svg>'
    )


def _facts(values: Mapping[str, float | None]) -> str:
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{'' if value is None else f'{value:g}'}</dd></div>"
        for name, value in values.items()
    )
    return f'<dl class="facts">{items}</dl>'


def _link(key: str, folder: Path | None, beside: Path | None) -> str | None:
    """The way from the page to the picture; None where there is none."""
    if folder is None or beside is None:
        return None
    try:
        relative = os.path.relpath(folder / key, beside).replace(os.sep, "/")
        return quote(os.fsencode(relative))
    except ValueError:  # another drive of Windows
        return None


def _visible(name: str) -> str:
    return name.encode("utf-8", "replace").decode()


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def write_sheet(pieces: Iterable[str], path: Path) -> None:
    """Raises OSError; `path` is whole or as it was, and its folder is made."""
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("w", encoding="utf-8", errors="replace", newline="\n") as file:
            file.writelines(pieces)
        put_in_place(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
