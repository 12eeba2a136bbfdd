"""What a check says, and what a check is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwencli.diagnostics.machine import Machine


class Status(StrEnum):
    PASS = "pass"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


class Confidence(StrEnum):
    """How sure a finding is: read off this machine, inferred from what was read, or reported by
    others for machines like it."""

    HIGH = "high"
    MEDIUM = "medium"
    LOW = "low"


class Level(IntEnum):
    """How much work a check may do: QUICK none on the device, DEFAULT seconds of it, DEEP a short
    run of the real engine."""

    QUICK = 0
    DEFAULT = 1
    DEEP = 2


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Args:
        what: the conclusion, one line.
        evidence: the figures it rests on; a line each where there are several things.
        fix: what to do about it, likewise; empty when there is nothing to do.
    """

    status: Status
    what: str
    evidence: str = ""
    fix: str = ""
    confidence: Confidence = Confidence.HIGH


@dataclass(frozen=True)
class Check:
    """One entry of the table; `run` reads the machine and never changes it. The first sentence of
    its docstring says why it is looked at."""

    id: str
    group: str
    level: Level
    run: Callable[[Machine], Finding]

    @property
    def why(self) -> str:
        return " ".join((self.run.__doc__ or "").split("\n\n")[0].split())


def passed(what: str, evidence: str = "") -> Finding:
    return Finding(Status.PASS, what, evidence)


def warned(
    what: str, evidence: str = "", fix: str = "", confidence: Confidence = Confidence.HIGH
) -> Finding:
    return Finding(Status.WARN, what, evidence, fix, confidence)


def failed(
    what: str, evidence: str = "", fix: str = "", confidence: Confidence = Confidence.HIGH
) -> Finding:
    return Finding(Status.FAIL, what, evidence, fix, confidence)


def skipped(reason: str) -> Finding:
    return Finding(Status.SKIP, reason)
