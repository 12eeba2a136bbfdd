"""Where the captions of two pictures that look alike cannot both be true.

Of English captions: another number or another colour of the same thing, and a thing that one
caption says is not there. What a word belongs to is guessed from its place, without grammar, so a
finding is a reason to look and no verdict; and what is said in other words is not found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_NUMBERS = {
    "a": "1", "an": "1", "one": "1", "single": "1", "two": "2", "pair": "2", "three": "3",
    "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
    "eleven": "11", "twelve": "12",
}  # fmt: skip
_COLOURS = {
    "black", "white", "red", "green", "blue", "yellow", "orange", "purple", "violet", "pink",
    "brown", "grey", "gray", "golden", "gold", "silver", "beige", "turquoise", "teal", "cyan",
    "magenta", "maroon", "navy", "tan", "crimson", "scarlet", "blonde", "blond",
}  # fmt: skip
_SAME_COLOUR = {"gray": "grey", "gold": "golden", "blond": "blonde", "violet": "purple"}
_NO = {"no", "without", "lacks", "lacking", "absent", "neither"}
# What ends the words that a number, a colour or a "no" belongs to.
_STOP = {
    "and", "or", "of", "in", "on", "at", "with", "to", "from", "by", "for", "is", "are", "was",
    "were", "the", "that", "which", "who", "has", "have", "under", "over", "behind", "near", "as",
    "above", "below", "into", "onto", "while", "but", "against", "between", "beside", "front", "it",
    "its", "his", "her", "their", "be", "being", "there", "this", "these", "those", "other", "left",
    "right", "side", "top", "bottom", "middle", "background", "foreground", "center", "centre",
}  # fmt: skip
_VAGUE = {
    "few", "lot", "couple", "group", "number", "bit", "small", "large", "big", "little", "long",
    "short", "tall", "young", "old", "dark", "light", "bright", "visible", "different", "view",
    "image", "picture", "photo", "photograph", "close", "more", "way", "shot", "scene", "time",
}  # fmt: skip
_TOKEN = re.compile(r"[a-z]+(?:'[a-z]+)?|\d+|[.,;:!?()]")
_REACH = 4


@dataclass(frozen=True)
class CaptionClaims:
    """What a caption says of things: their numbers, their colours, which are there or not."""

    numbers: Mapping[str, frozenset[str]]
    colours: Mapping[str, frozenset[str]]
    absent: frozenset[str]
    present: frozenset[str]


@dataclass(frozen=True)
class Contradiction:
    """Args: about: number, colour or presence. thing: of what; first, second: what each says."""

    about: str
    thing: str
    first: str
    second: str


def claims_of(caption: str) -> CaptionClaims:
    tokens = _TOKEN.findall(caption.lower())
    numbers: dict[str, set[str]] = {}
    colours: dict[str, set[str]] = {}
    absent: set[str] = set()
    present: set[str] = set()
    negated = 0  # how many more words a "no" reaches
    for place, token in enumerate(tokens):
        if token in _NO:
            negated = _REACH
            absent.update(_things(tokens, place))
        elif token in _STOP or not token[0].isalpha():
            negated = 0
        elif negated:
            negated -= 1
        elif token not in _NUMBERS and token not in _COLOURS and token not in _VAGUE:
            present.add(_singular(token))
        if token in _NUMBERS or token.isdigit():
            for thing in _things(tokens, place):
                numbers.setdefault(thing, set()).add(_NUMBERS.get(token, token))
        elif token in _COLOURS:
            for thing in _things(tokens, place):
                colours.setdefault(thing, set()).add(_SAME_COLOUR.get(token, token))
    return CaptionClaims(
        _frozen(numbers), _frozen(colours), frozenset(absent - present), frozenset(present)
    )


def contradictions(first: CaptionClaims, second: CaptionClaims) -> Iterator[Contradiction]:
    """Of each kind and thing one."""
    for about, one, other in (
        ("number", first.numbers, second.numbers),
        ("colour", first.colours, second.colours),
    ):
        seen: set[tuple[frozenset[str], frozenset[str]]] = set()
        # In the order of the text: of several words the first is the thing.
        for thing in filter(other.__contains__, one):
            values = one[thing], other[thing]
            if not values[0] & values[1] and values not in seen:
                seen.add(values)
                yield Contradiction(about, thing, *(", ".join(sorted(v)) for v in values))
    for thing in sorted(first.absent & second.present):
        yield Contradiction("presence", thing, f"no {thing}", thing)
    for thing in sorted(second.absent & first.present):
        yield Contradiction("presence", thing, thing, f"no {thing}")


def _things(tokens: list[str], place: int) -> Iterator[str]:
    """The words that what stands at `place` may belong to."""
    for token in tokens[place + 1 : place + 1 + _REACH]:
        if token in _STOP or token in _NO or not token[0].isalpha():
            return
        if token in _NUMBERS:
            return
        if token not in _COLOURS and token not in _VAGUE:
            yield _singular(token)


def _singular(word: str) -> str:
    irregular = {"men": "man", "women": "woman", "people": "person", "children": "child"}
    if word in irregular:
        return irregular[word]
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "xes", "sses")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


def _frozen(values: Mapping[str, set[str]]) -> dict[str, frozenset[str]]:
    return {key: frozenset(value) for key, value in values.items()}
