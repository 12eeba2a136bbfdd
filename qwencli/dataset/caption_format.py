"""From a model's answer to the caption that is written: words replaced, cut to length, framed.

Pure text. Whether an answer may be written at all is `guards`' business; what each function leaves
out or cannot do, it says.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qwencli.dataset.hints import is_tag_list
from qwencli.dataset.prompting import Template
from qwencli.errors import InputError, UsageError

TokenCount = Callable[[str], int]

MAX_LIST_BYTES = 4 << 20

_THOUGHT = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL | re.IGNORECASE)
# A sentence ends with its quotes and brackets, before a space or the text's end; in scripts
# without spaces at its sign alone. Paragraphs and items of lists end one too.
_SENTENCE_END = re.compile(
    r"(?:[.!?…]+[\"'”’»)\]*_]*(?=\s|$))|(?:[。！？｡]+[”』」）)\"'’]*)|(?:\n+)", re.UNICODE
)
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'“‘])(?:[A-Z]|Mrs?|Ms|Dr|Prof|St|Sr|Jr|vs|No|Nr|Fig|approx|ca|e\.g|i\.e|z\.B|"
    r"U\.S|Mt|Ave|Vol|p|pp)\.$"
)
_CLAUSE_END = re.compile(r"[,;:，、；：]")
# The scripts that set no spaces between words: there a word needs no boundary to be found.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
)


@dataclass(frozen=True)
class FormattedCaption:
    """An answer as it would be written, without its frame; `cut`: whether its end is left out."""

    text: str
    cut: bool


@dataclass(frozen=True)
class CaptionFormat:
    """What becomes of an answer.

    Args:
        replace: (word, what stands there instead): whole words, any case, all in one pass, so
            that no replacement is replaced again.
        ban: words that no caption may have; out of lists of tags they are taken. Elsewhere
            `banned` finds them.
        max_sentences, max_tokens: cut at the end of a sentence, of tags after a comma.
        count_tokens: how tokens of `max_tokens` are counted; without it words and signs are.
        prefix, suffix: templates, set around each caption; with a space between where words
            would touch.
    """

    prefix: Template | None = None
    suffix: Template | None = None
    replace: Sequence[tuple[str, str]] = ()
    ban: Sequence[str] = ()
    max_sentences: int | None = None
    max_tokens: int | None = None
    count_tokens: TokenCount | None = field(default=None, compare=False)

    def formatted(self, answer: str) -> FormattedCaption:
        """The answer on one line (trainers read a caption file's first), replaced and cut.

        Empty where nothing of it fits.
        """
        text = kept = without_thoughts(answer)
        if self.max_sentences is not None:
            # While lines are still there: a paragraph or an item of a list ends a sentence.
            ends = sentence_ends(text)
            if len(ends) > self.max_sentences:
                kept = text[: ends[self.max_sentences - 1]].rstrip()
        cut, text = kept != text, one_line(kept)
        if self.replace:
            text = _tidy(replaced(text, self.replace))
        if self.ban and is_tag_list(text):
            tags = [tag.strip() for tag in text.split(",")]
            text = ", ".join(tag for tag in tags if tag and not banned(tag, self.ban))
        kept = text if self.max_tokens is None else self._within_tokens(text, self.max_tokens)
        return FormattedCaption(kept, cut or kept != text)

    def _within_tokens(self, text: str, most: int) -> str:
        count = self.count_tokens or count_words
        if count(text) <= most:
            return text
        tags = is_tag_list(text)
        ends = [found.start() for found in _CLAUSE_END.finditer(text)] if tags else []
        ends = ends or sentence_ends(text)
        low, high = 0, len(ends)  # how many of them fit: tokens grow with the text
        while low < high:
            middle = (low + high + 1) // 2
            if count(text[: ends[middle - 1]].rstrip()) <= most:
                low = middle
            else:
                high = middle - 1
        return text[: ends[low - 1]].rstrip() if low else ""

    def with_frame(self, text: str, known: Mapping[str, str]) -> str:
        """With prefix and suffix. `known`: see `prompting.picture_fields`."""
        before = self.prefix.filled(known) if self.prefix else ""
        after = self.suffix.filled(known) if self.suffix else ""
        if before and not before[-1].isspace() and before[-1] not in "([{-_/":
            before += " "
        if after and (after[0].isalnum() or after[0] in "([{<#@“"):
            after = " " + after
        return before + text + after


def without_thoughts(text: str) -> str:
    """An answer without thoughts that the engine has not told apart."""
    return _THOUGHT.sub("\n", text).strip()


def one_line(text: str) -> str:
    """A text with every run of white space as one space."""
    return " ".join(text.split())


def count_words(text: str) -> int:
    """Words and signs, about as many as tokens of English; signs of unspaced scripts are words."""
    return len(words(text))


_WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+(?:['’][^\W{UNSPACED}]+)*|[^\w\s]")


def words(text: str) -> list[str]:
    return _WORD.findall(text)


def sentence_ends(text: str) -> list[int]:
    """Where each sentence ends; the last is the text's own end, whether or not a sign is there."""
    ends: list[int] = []
    for found in _SENTENCE_END.finditer(text):
        before = text[max(0, found.start() - 8) : found.start() + 1]
        if found[0] == "." and _ABBREVIATION.search(before) and found.end() < len(text):
            continue
        if found[0] == "." and re.search(r"(?:^|\s)\d{1,3}\.$", before):
            continue  # the number of an item
        if found[0].isspace() and not text[ends[-1] if ends else 0 : found.start()].strip():
            continue  # lines between sentences
        ends.append(found.end())
    end = len(text.rstrip())
    if end and (not ends or text[ends[-1] :].strip()):
        ends.append(end)
    return ends


def sentences(text: str) -> list[str]:
    starts = [0, *sentence_ends(text)]
    parts = (text[a:b].strip() for a, b in itertools.pairwise(starts))
    return [part for part in parts if part]


def ends_whole(text: str) -> bool:
    """Whether a text ends where a sentence does: its sign, and quotes and brackets behind it."""
    return bool(re.search(r"[.!?…。！？｡][\"'”’»)\]*_”』」）]*\s*$", text))


def whole_words(listed: Sequence[str]) -> re.Pattern[str]:
    """Finds any of the words, whole and in any case; the longest that fits."""
    parts = []
    for word in sorted(set(listed), key=lambda word: (-len(word), word)):
        pattern = r"\s+".join(map(re.escape, word.split()))
        before = "" if not re.match(rf"[^\W{UNSPACED}]", word.strip()) else r"(?<!\w)"
        after = "" if not re.search(rf"[^\W{UNSPACED}]$", word.strip()) else r"(?!\w)"
        parts.append(f"{before}{pattern}{after}")
    return re.compile("|".join(parts), re.IGNORECASE)


def banned(text: str, ban: Sequence[str]) -> str | None:
    """The first banned word in the text, as it stands there."""
    found = whole_words(ban).search(text) if ban else None
    return found[0] if found else None


def replaced(text: str, rules: Sequence[tuple[str, str]]) -> str:
    """The text with each rule's word replaced, exactly as it is given; first rules first."""
    by_word: dict[str, str] = {}
    for word, instead in rules:
        by_word.setdefault(" ".join(word.split()).casefold(), instead)
    pattern = whole_words([word for word, _ in rules])

    def instead_of(found: re.Match[str]) -> str:
        key = " ".join(found[0].split()).casefold()
        return by_word.get(key, found[0])

    return pattern.sub(instead_of, text)


def _tidy(text: str) -> str:
    """What a word taken away leaves: spaces before signs, commas without a tag between."""
    text = re.sub(r"\s+([,.;:!?])", r"\1", " ".join(text.split()))
    text = re.sub(r",(?:\s*,)+", ",", text)
    return re.sub(r"^[,;:]\s*|[,;:]\s*$", "", text).strip()


def parse_replace(given: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """`--replace`: A=B, or @FILE with one a line; `\\=` is an equals sign within A.

    Raises:
        UsageError: no equals sign, or nothing in front of it.
        InputError: the file cannot be read.
    """
    rules = []
    for text in _listed("--replace", given):
        word, sign, instead = re.sub(r"\\=", "\0", text).partition("=")
        word, instead = word.replace("\0", "=").strip(), instead.replace("\0", "=").strip()
        if not sign or not word:
            raise UsageError(f"--replace {text!r} is not A=B", "write the word, =, and the new one")
        rules.append((word, instead))
    return tuple(rules)


def parse_ban(given: Sequence[str]) -> tuple[str, ...]:
    """`--ban`: words or phrases, or @FILE with one a line.

    Raises:
        UsageError: an empty one.
        InputError: the file cannot be read.
    """
    return tuple(_listed("--ban", given))


def _listed(flag: str, given: Sequence[str]) -> list[str]:
    listed = []
    for text in given:
        if text.startswith("@") and len(text) > 1:
            lines = map(str.strip, file_text(f"{flag} {text}", Path(text[1:])).splitlines())
            listed += [line for line in lines if line and not line.startswith("#")]
        elif text.strip():
            listed.append(text.strip())
        else:
            raise UsageError(f"{flag} is empty", "give a word")
    return listed


def file_text(named: str, path: Path, most_bytes: int = MAX_LIST_BYTES) -> str:
    """What a file holds that an option names, as `named` says.

    Raises:
        InputError: it cannot be read, is no UTF-8, or too large.
    """
    try:
        with path.open("rb") as file:
            data = file.read(most_bytes + 1)
        if len(data) > most_bytes:
            raise InputError(f"{named} is too large", f"keep it under {most_bytes >> 20} MiB")
        return data.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise InputError(f"{named} is not UTF-8", "save it as UTF-8") from error
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{named}: {reason}", "name a file that can be read") from error
