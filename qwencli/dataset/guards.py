"""Which answers are no captions, and by what they were found out.

Each guard looks for one fault and shows its evidence. A faulty answer is asked again with other
settings (`retries`); what is still faulty after the last attempt is a failure and is never
written. The guards know words, not pictures: a fluent caption of something else passes all of them.

Their limits stand with what they look for: `chatter` (refusals, introductions) and `languages`.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from qwencli.dataset.caption_format import (
    CaptionFormat,
    banned,
    ends_whole,
    sentences,
    without_thoughts,
    words,
)
from qwencli.dataset.chatter import find_closing, find_preamble, find_refusal
from qwencli.dataset.hints import is_tag_list
from qwencli.dataset.languages import first_words, language_wanted, last_words, wrong_language
from qwencli.errors import UsageError
from qwencli.results import FinishReason


class FaultKind(StrEnum):
    EMPTY = "empty"
    THINKING = "thinking"
    REFUSAL = "refusal"
    LOOP = "loop"
    PREAMBLE = "preamble"
    CLOSING = "closing"
    LANGUAGE = "language"
    TRUNCATED = "truncated"
    TOO_LONG = "too-long"
    BANNED = "banned"
    SCHEMA = "schema"


# Of what is quoted of the end of an answer.
_END_CHARACTERS = 80


@dataclass(frozen=True)
class Fault:
    """What is wrong with an answer; `evidence` quotes it, in at most 120 characters."""

    kind: FaultKind
    evidence: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.evidence}" if self.evidence else str(self.kind)


@dataclass(frozen=True)
class Answer:
    """What a model said, as guards see it.

    Args:
        text: with the beginning that was forced on it.
        prompt: the template it was asked with, which tells the language wanted.
        starts_with: that beginning: what the user wrote is no fault of the model.
    """

    text: str
    finish_reason: FinishReason = "stop"
    prompt: str = ""
    starts_with: str = ""


@dataclass(frozen=True)
class Guards:
    """The guards of a run.

    Args:
        kinds: the faults that are looked for.
        language: an ISO 639-1 code that captions must be in; None = the prompt's.
        invalid: for captions held to a schema: what is wrong with a text, or None. Such answers
            are data: guards of prose do not look at them.
    """

    kinds: frozenset[FaultKind] = frozenset(FaultKind)
    language: str | None = None
    invalid: Callable[[str], str | None] | None = None

    def caption(self, answer: Answer, caption_format: CaptionFormat) -> str | Fault:
        """The caption to write, without its frame, or why there is none."""
        if self.invalid is not None:
            return self._data(answer, self.invalid)
        fault = self._first(answer, _OF_ANSWERS)
        if fault is not None:
            return fault
        formatted = caption_format.formatted(answer.text)
        if not formatted.text:
            if formatted.cut:
                most = (
                    caption_format.max_tokens
                    if caption_format.max_tokens is not None
                    else caption_format.max_sentences
                )
                return Fault(
                    FaultKind.TOO_LONG, f"nothing whole fits {most}: {_quoted(answer.text)}"
                )
            return Fault(FaultKind.EMPTY, "nothing is left of it")
        if FaultKind.TRUNCATED in self.kinds and not formatted.cut:
            fault = _truncated(answer, formatted.text)
            if fault is not None:
                return fault
        word = banned(formatted.text, caption_format.ban)
        if word is not None:
            return Fault(FaultKind.BANNED, f"{word!r} in {_quoted(_around(formatted.text, word))}")
        return formatted.text

    def _data(self, answer: Answer, invalid: Callable[[str], str | None]) -> str | Fault:
        text = without_thoughts(answer.text)
        reason = invalid(text)
        if not text:
            return Fault(FaultKind.EMPTY, "")
        # A number may go on behind its last digit.
        cut = answer.finish_reason == "length" and text[-1].isdigit()
        if reason is None and not cut:
            return text
        if answer.finish_reason == "length":
            return Fault(FaultKind.TRUNCATED, _end_of(text))
        return Fault(FaultKind.SCHEMA, _quoted(reason or ""))

    def _first(self, answer: Answer, guards: Mapping[FaultKind, Guard]) -> Fault | None:
        for kind, guard in guards.items():
            # An empty caption is none, whatever is looked for.
            if kind in self.kinds or kind is FaultKind.EMPTY:
                evidence = guard(answer, self)
                if evidence is not None:
                    return Fault(kind, evidence)
        return None


Guard = Callable[[Answer, Guards], str | None]


def parse_guards(text: str) -> frozenset[FaultKind]:
    """A value of `--guards`: all, none, or names by commas; with - in front, all but these.

    Raises UsageError for a name that is none.
    """
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    if names in (["all"], ["none"]):
        return frozenset(FaultKind if names == ["all"] else ())
    without = bool(names) and all(name.startswith("-") for name in names)
    known = {str(kind): kind for kind in FaultKind}
    chosen = set()
    for name in names:
        name = name.removeprefix("-") if without else name
        if name not in known:
            raise UsageError(
                f"--guards: {name!r} is not a guard", f"use all, none, or of: {', '.join(known)}"
            )
        chosen.add(known[name])
    if not names:
        raise UsageError("--guards is empty", "use all or none")
    return frozenset(set(FaultKind) - chosen if without else chosen)


def _empty(answer: Answer, guards: Guards) -> str | None:
    own = without_thoughts(answer.text).removeprefix(answer.starts_with.strip())
    return None if any(char.isalnum() for char in own) else _quoted(answer.text)


def _thinking(answer: Answer, guards: Guards) -> str | None:
    found = re.search(r"</?think(?:ing)?>", without_thoughts(answer.text), re.IGNORECASE)
    return _quoted(answer.text[found.start() :]) if found else None


# ---- loops ----

# Repetitions in a row that no description has, by how many words repeat: five trees may be named
# one after the other, a clause three times is stuck.
_MOST_IN_A_ROW = {1: 6, 2: 5, 3: 4}
_LONGEST_REPEATED = 12


def _loop(answer: Answer, guards: Guards) -> str | None:
    text = without_thoughts(answer.text)
    said = words(text.casefold())
    # What was still going on when it was cut off needs less to be told.
    stuck = answer.finish_reason == "length"
    return (
        _endless_sign(text)
        or _in_a_row(said)
        or _same_sentences(text, 2 if stuck else 3)
        or _same_tags(text)
        or _mostly_repeated(said, 30 if stuck else 50)
    )


def _endless_sign(text: str) -> str | None:
    """One or a few characters over and over at the end: `!!!!!!`, `hahahahaha`."""
    tail = "".join(text[-240:].split())
    if len(set(tail[-24:])) > 12:
        return None
    for length in range(1, 13):
        unit, times = tail[-length:], max(6, -(-24 // length))
        if len(tail) >= length * times and tail.endswith(unit * times):
            return f"{unit!r} {times} times or more"
    return None


def _in_a_row(said: Sequence[str]) -> str | None:
    for length in range(1, min(_LONGEST_REPEATED, len(said) // 3) + 1):
        most = _MOST_IN_A_ROW.get(length, 3)
        # Where each word is the one `length` words before it; a run of those is a repetition.
        same = bytes(map(operator.eq, itertools.islice(said, length, None), said))
        run = b"\1" * (length * (most - 1))
        place = same.find(run)
        while place >= 0:
            unit = said[place : place + length]
            if any(word[0].isalnum() for word in unit):
                return f"{' '.join(unit)!r:.80} {most} times in a row"
            place = same.find(run, place + 1)
    return None


def _same_sentences(text: str, most: int) -> str | None:
    plain = [" ".join(sentence.casefold().split()).rstrip(".!") for sentence in sentences(text)]
    plain = [sentence for sentence in plain if sentence.count(" ") >= 4]
    counts = Counter(plain)
    twice = [first for first, second in itertools.pairwise(plain) if first == second]
    sentence, times = max(counts.items(), key=lambda item: item[1], default=("", 0))
    if times >= most:
        return f"{sentence!r:.80} {times} times"
    return f"{twice[0]!r:.80} twice in a row" if twice else None


def _same_tags(text: str) -> str | None:
    tags = [tag.strip().casefold() for tag in text.split(",")]
    if len(tags) < 12 or not is_tag_list(text):
        return None
    counts = Counter(tags)
    if 2 * len(counts) > len(tags):
        return None
    tag, times = counts.most_common(1)[0]
    return f"{len(tags)} tags, {len(counts)} different: {tag!r:.40} {times} times"


def _mostly_repeated(said: Sequence[str], most_percent: int) -> str | None:
    """Most of a long text was said before in it, four words at a time."""
    grams = [tuple(said[place : place + 4]) for place in range(len(said) - 3)]
    if len(grams) < 40:
        return None
    share = 100 * (len(grams) - len(set(grams))) / len(grams)
    if share <= most_percent:
        return None
    often = Counter(grams).most_common(1)[0][0]
    return f"{share:.0f}% of it repeats: {' '.join(often)!r:.60}"


# ---- what models say around a caption ----


def _refusal(answer: Answer, guards: Guards) -> str | None:
    # A beginning that was forced on it does not keep a model from refusing behind it.
    text = without_thoughts(answer.text)
    return _evidence(
        find_refusal(text) or find_refusal(text.removeprefix(answer.starts_with.strip())), text
    )


def _preamble(answer: Answer, guards: Guards) -> str | None:
    if answer.starts_with.strip():
        return None
    text = without_thoughts(answer.text)
    return _evidence(find_preamble(text), text)


def _closing(answer: Answer, guards: Guards) -> str | None:
    said = sentences(without_thoughts(answer.text)[-400:])
    return _quoted(said[-1]) if len(said) > 1 and find_closing(said[-1]) else None


def _evidence(found: str | None, text: str) -> str | None:
    """What was found, with what comes behind it where it says little by itself."""
    return None if found is None else _quoted(found if len(found) > 24 else text)


def _language(answer: Answer, guards: Guards) -> str | None:
    wanted = guards.language or language_wanted(answer.prompt)
    if wanted is None:
        return None
    return wrong_language(without_thoughts(answer.text), wanted, tags=is_tag_list(answer.text))


def _truncated(answer: Answer, text: str) -> Fault | None:
    # The limit may fall where a sentence ends; a list of tags shows nowhere that it is whole.
    if answer.finish_reason != "length" or (ends_whole(text) and not is_tag_list(text)):
        return None
    return Fault(FaultKind.TRUNCATED, _end_of(text))


def _end_of(text: str) -> str:
    """The last words of a text, in one line."""
    return last_words(" ".join(text.split()), _END_CHARACTERS)


# In this order: what comes first explains what comes after it.
_OF_ANSWERS: Mapping[FaultKind, Guard] = {
    FaultKind.LOOP: _loop,
    FaultKind.EMPTY: _empty,
    FaultKind.THINKING: _thinking,
    FaultKind.REFUSAL: _refusal,
    FaultKind.LANGUAGE: _language,
    FaultKind.PREAMBLE: _preamble,
    FaultKind.CLOSING: _closing,
}


def _quoted(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 120 else line[:117] + "..."


def _around(text: str, word: str) -> str:
    place = text.find(word)
    end = place + len(word)
    return f"{last_words(text[:place], 40)}{text[place:end]}{first_words(text[end:], 40)}"
