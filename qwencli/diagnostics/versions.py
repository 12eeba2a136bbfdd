"""Version numbers, and conditions on them."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping

Numbers = tuple[int, ...]

_COMPARE: Mapping[str, Callable[[Numbers, Numbers], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}


def numbers(version: str) -> Numbers:
    """The leading numbers: "2.9.1+cu128" -> (2, 9, 1), "2.8.3.post1" -> (2, 8, 3, 1)."""
    found = re.match(r"\d+(?:\.(?:post)?\d+)*", version)
    return tuple(int(part) for part in re.findall(r"\d+", found.group())) if found else ()


def meets(version: str, condition: str) -> bool:
    """Whether a version meets all parts of a condition such as ">=2.9,<2.10".

    Raises:
        ValueError: the condition has no such form.
    """
    return all(_meets(numbers(version), part.strip()) for part in condition.split(","))


def _meets(version: Numbers, part: str) -> bool:
    sign = next((sign for sign in _COMPARE if part.startswith(sign)), None)
    if sign is None:
        raise ValueError(f"{part!r} is no condition")
    wanted = numbers(part.removeprefix(sign))
    if sign == "==":
        return version[: len(wanted)] == wanted
    return _COMPARE[sign](version, wanted)


def cudnn_text(version: int) -> str:
    """torch's number as people write it: 91501 -> "9.15.1"."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"
