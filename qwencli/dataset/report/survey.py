"""What a set's captions are like as a whole, and where somebody should look."""

from __future__ import annotations

import itertools
import json
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwencli.dataset.caption_format import CaptionFormat, banned, words
from qwencli.dataset.guards import Answer, Fault, FaultKind, Guards
from qwencli.dataset.languages import LANGUAGES
from qwencli.dataset.report.contradictions import Contradiction, claims_of, contradictions
from qwencli.dataset.report.near_duplicates import group_alike

# Faults that a text shows by itself, whoever wrote it.
_GUARDS = Guards(
    frozenset(
        {
            FaultKind.EMPTY,
            FaultKind.THINKING,
            FaultKind.REFUSAL,
            FaultKind.LOOP,
            FaultKind.PREAMBLE,
            FaultKind.CLOSING,
        }
    )
)
TOP_WORDS, TOP_OPENINGS, _OPENING_WORDS = 200, 20, 4
# In a group of many pictures each is compared with the next few.
_COMPARED = 4
# A beginning that so many captions share is taken for the trigger, where none is named.
_TRIGGER_PERCENT, _TRIGGER_MIN = 60, 5


@dataclass(frozen=True)
class Entry:
    """One picture of a set and what is known of its caption.

    Args:
        caption: as it would be read by a trainer; None where there is none.
        failure: why there is none, from the run that tried.
        others: answers to other questions by field.
        facts: where the caption came from: model, seed, finish reason ...
        unreadable: why the picture itself cannot be opened.
    """

    key: str
    caption: str | None = None
    failure: str | None = None
    others: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    picture_hash: tuple[bytes, bytes] | None = None
    unreadable: str | None = None


@dataclass(frozen=True)
class Trigger:
    """The word that every caption should have; `named`: by the user, else it is a guess."""

    word: str
    named: bool
    missing: list[int]


@dataclass(frozen=True)
class Survey:
    """What was found; pictures are named by their index in `entries`."""

    entries: Sequence[Entry]
    lengths: Mapping[int, int]
    faults: Mapping[int, Fault]
    groups: Sequence[Sequence[int]]
    repeats: Sequence[Sequence[int]]
    contradicting: Sequence[tuple[int, int, Contradiction]]
    trigger: Trigger | None
    vocabulary: Counter[str]
    once: int
    openings: Counter[str]

    @property
    def missing(self) -> list[int]:
        return [n for n, e in enumerate(self.entries) if e.caption is None and e.failure is None]

    @property
    def failed(self) -> list[int]:
        return [n for n, e in enumerate(self.entries) if e.failure is not None]

    @property
    def unreadable(self) -> list[int]:
        return [n for n, entry in enumerate(self.entries) if entry.unreadable is not None]

    def summary(self) -> dict[str, int]:
        return {
            "pictures": len(self.entries),
            "captioned": len(self.lengths),
            "missing": len(self.missing),
            "failed": len(self.failed),
            "unreadable": len(self.unreadable),
            "faulty": len(self.faults),
            "near_duplicates": sum(map(len, self.groups)),
            "near_duplicate_groups": len(self.groups),
            "repeated": sum(map(len, self.repeats)),
            "contradictions": len(self.contradicting),
            "trigger_missing": len(self.trigger.missing) if self.trigger else 0,
        }

    def as_json(self) -> dict[str, Any]:
        """For programs: pictures by their path, findings by kind."""
        name = [entry.key for entry in self.entries]
        return {
            "summary": self.summary(),
            "words": length_summary(list(self.lengths.values())),
            "vocabulary": {
                "words": len(self.vocabulary),
                "once": self.once,
                "top": [
                    {"word": w, "captions": n} for w, n in self.vocabulary.most_common(TOP_WORDS)
                ],
            },
            "openings": [
                {"text": text, "captions": n} for text, n in self.openings.most_common(TOP_OPENINGS)
            ],
            "failed": [{"path": name[n], "reason": self.entries[n].failure} for n in self.failed],
            "missing": [name[n] for n in self.missing],
            "unreadable": [
                {"path": name[n], "reason": self.entries[n].unreadable} for n in self.unreadable
            ],
            "faulty": [
                {"path": name[n], "fault": fault.kind, "evidence": fault.evidence}
                for n, fault in self.faults.items()
            ],
            "near_duplicates": [[name[n] for n in group] for group in self.groups],
            "repeated": [
                {"caption": self.entries[group[0]].caption, "paths": [name[n] for n in group]}
                for group in self.repeats
            ],
            "contradictions": [
                {
                    "paths": [name[one], name[other]],
                    "about": found.about,
                    "thing": found.thing,
                    "says": [found.first, found.second],
                }
                for one, other, found in self.contradicting
            ],
            "trigger": None
            if self.trigger is None
            else {
                "word": self.trigger.word,
                "named": self.trigger.named,
                "missing": [name[n] for n in self.trigger.missing],
            },
            "captions": [
                {
                    "path": entry.key,
                    "caption": entry.caption,
                    "words": self.lengths.get(n),
                    **({"fields": dict(entry.others)} if entry.others else {}),
                    **({"facts": dict(entry.facts)} if entry.facts else {}),
                }
                for n, entry in enumerate(self.entries)
            ],
        }


def surveyed(entries: Sequence[Entry], trigger: str | None = None) -> Survey:
    """Look at a whole set.

    Args:
        trigger: the word that every caption should have; None = the beginning that most share.
    """
    captions = {n: prose(e.caption) for n, e in enumerate(entries) if e.caption is not None}
    said_words = {n: words(caption) for n, caption in captions.items()}
    spoken = {n: [w for w in said if w[0].isalnum()] for n, said in said_words.items()}
    groups = group_alike([entry.picture_hash for entry in entries])
    counts: Counter[str] = Counter()
    frequent = frozenset[str]().union(*(language.frequent for language in LANGUAGES.values()))
    for said_here in spoken.values():
        counts.update({word.casefold() for word in said_here})
    judged = ((n, _fault(caption)) for n, caption in captions.items())
    return Survey(
        entries=entries,
        lengths={n: len(said_here) for n, said_here in spoken.items()},
        faults={n: fault for n, fault in judged if fault is not None},
        groups=groups,
        repeats=_repeats(captions),
        contradicting=list(_contradicting(captions, groups)),
        trigger=_trigger(captions, trigger),
        vocabulary=Counter({word: n for word, n in counts.items() if word not in frequent}),
        once=sum(n == 1 for word, n in counts.items() if word not in frequent),
        openings=Counter(
            " ".join(said_here[:_OPENING_WORDS]).casefold()
            for said_here in spoken.values()
            if len(said_here) > _OPENING_WORDS
        ),
    )


def prose(caption: str) -> str:
    """What a caption says in words: of one that is JSON the texts in it, without the keys."""
    if not caption.startswith(("{", "[")):
        return caption
    try:
        said_in_it = "\n".join(_texts(json.loads(caption)))
    except (ValueError, RecursionError):
        return caption
    return said_in_it or caption


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)


def length_summary(lengths: Sequence[int]) -> dict[str, float | None]:
    """Words of captions: least, median, mean, 95th percentile, most; None of none."""
    if not lengths:
        return dict.fromkeys(("min", "median", "mean", "p95", "max"))
    ordered = sorted(lengths)
    return {
        "min": ordered[0],
        "median": statistics.median(ordered),
        "mean": round(statistics.fmean(ordered), 1),
        "p95": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
        "max": ordered[-1],
    }


def _fault(caption: str) -> Fault | None:
    found = _GUARDS.caption(Answer(caption), CaptionFormat())
    return found if isinstance(found, Fault) else None


def _repeats(captions: Mapping[int, str]) -> list[list[int]]:
    """Pictures of one and the same caption, whatever its signs and capitals; most first."""
    by_text: dict[str, list[int]] = {}
    for n, caption in captions.items():
        text = " ".join(word.casefold() for word in words(caption) if word[0].isalnum())
        if text:
            by_text.setdefault(text, []).append(n)
    return sorted((same for same in by_text.values() if len(same) > 1), key=lambda s: (-len(s), s))


def _contradicting(
    captions: Mapping[int, str], groups: Iterable[Sequence[int]]
) -> Iterator[tuple[int, int, Contradiction]]:
    for group in groups:
        known = [(n, claims_of(captions[n])) for n in group if n in captions]
        for place, (one, first) in enumerate(known):
            for other, second in itertools.islice(known, place + 1, place + 1 + _COMPARED):
                for found in contradictions(first, second):
                    yield one, other, found


def _trigger(captions: Mapping[int, str], named: str | None) -> Trigger | None:
    if named is not None:
        missing = [n for n, caption in captions.items() if not banned(caption, [named])]
        return Trigger(named, True, missing)
    if len(captions) < _TRIGGER_MIN:
        return None
    # Trainers set it in front, with a comma behind it.
    starts = Counter(
        start for caption in captions.values() for start in _first_tag(caption) if start
    )
    if not starts:
        return None
    word, times = starts.most_common(1)[0]
    if 100 * times < _TRIGGER_PERCENT * len(captions):
        return None
    return Trigger(word, False, [n for n, text in captions.items() if not banned(text, [word])])


def _first_tag(caption: str) -> Iterator[str]:
    found = re.match(r"\s*([^,.;:\n]{1,40}),\s", caption)
    if found and len(found[1].split()) <= 3:
        yield found[1].strip().casefold()
