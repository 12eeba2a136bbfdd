"""The table of known-bad combinations (`known_bad.toml`) and which of its rows apply here.

A row holds conditions on version numbers.
"""

from __future__ import annotations

import datetime
import operator
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from qwencli.diagnostics.finding import Confidence
from qwencli.diagnostics.machine import Machine

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
        raise ValueError(f"{part!r} is not a condition")
    wanted = numbers(part.removeprefix(sign))
    if sign == "==":
        return version[: len(wanted)] == wanted
    return _COMPARE[sign](version, wanted)


def cudnn_text(version: int) -> str:
    """torch's number as people write it: 91501 -> "9.15.1"."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


@dataclass(frozen=True)
class KnownBad:
    """One row; `when` is what must hold, by the names of `FACTS`, and `variables`."""

    id: str
    what: str
    fix: str
    confidence: Confidence
    noted: datetime.date
    sources: tuple[str, ...]
    when: Mapping[str, Any]


@cache
def known_bad() -> tuple[KnownBad, ...]:
    text = (files("qwencli.diagnostics") / "known_bad.toml").read_text(encoding="utf-8")
    return tuple(
        KnownBad(
            **{
                **row,
                "confidence": Confidence(row["confidence"]),
                "sources": tuple(row["sources"]),
            }
        )
        for row in tomllib.loads(text)["row"]
    )


def present(row: KnownBad, machine: Machine) -> bool:
    """Whether everything that the row names holds; what is unknown here does not hold."""
    return all(
        _variables_hold(wanted, machine.variables)
        if name == "variables"
        else _holds(FACTS[name](machine), wanted)
        for name, wanted in row.when.items()
    )


def _holds(version: str | None, condition: str) -> bool:
    return version is not None and meets(version, condition)


def _variables_hold(wanted: Mapping[str, str], variables: Mapping[str, str]) -> bool:
    return all(part in variables.get(name, "") for name, part in wanted.items())


def _capability(machine: Machine) -> str | None:
    device = machine.cuda_device
    return "{}.{}".format(*device.capability) if device else None


def _cudnn(machine: Machine) -> str | None:
    version = machine.torch.cudnn_version
    return None if version is None else cudnn_text(version)


def _package(*names: str) -> Callable[[Machine], str | None]:
    def version(machine: Machine) -> str | None:
        return next((found for name in names if (found := machine.version(name))), None)

    return version


# What a row may ask about -> its version here, None where there is none.
FACTS: Mapping[str, Callable[[Machine], str | None]] = {
    "torch": lambda machine: machine.torch.version,
    "cudnn": _cudnn,
    "capability": _capability,
    "driver": lambda machine: machine.driver.version if machine.driver else None,
    "kv_heads": lambda machine: str(machine.work.kv_heads),
    "transformers": _package("transformers"),
    "bitsandbytes": _package("bitsandbytes"),
    "flash-attn": _package("flash-attn"),
    "triton": _package("triton", "triton-windows"),
}
