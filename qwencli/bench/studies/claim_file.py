"""Reads the claims: one TOML file each, a controlled experiment with its decision rule.

title = "..."                # the claim, in a sentence
expected = "..."             # what we predicted before the first run
needs = ["cuda"]             # names of `conditions.NEEDS`; without them it cannot run here
about = ["sm_120"]           # likewise; without these it can be seen, but not refuted, here

[hold]                       # equal in all arms; engine, quantization, attention, cache, model,
engine = "transformers"      # load_format, max_new_tokens, images; "" and 0 = the study's own

[arms.name]                  # what varies: a condition (see `conditions`) or any key of [hold]
condition = "no-kv-cache"    # default: plain
environment = {NAME = "1"}   # of the process

[[tests]]                    # all have to hold; the rule is fixed here, before any run
says = "..."                 # what the test shows if it holds
metric = "decode_tok_per_s"  # see `metrics`
statistic = "median"         # or "spread": fastest over slowest run
arm = "name"
against = "plain"            # another arm, or a number
expect = "below"             # above, below, same
by = 1.1                     # above, below: the least factor; same: the most
needs = ["cuda"]             # optional, of this test alone
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwencli.bench.statistics.robust import Statistic
from qwencli.bench.studies.conditions import CONDITIONS, NEEDS, PLAIN
from qwencli.bench.studies.metrics import NAMES
from qwencli.errors import BenchError, UsageError

CLAIMS = Path(__file__).parent / "claims"
ALL = "ALL"
STATISTICS, EXPECTATIONS = ("median", "spread"), ("above", "below", "same")
HELD = {
    "engine": "transformers",
    "quantization": "none",
    "attention": "sdpa",
    "cache": "dynamic",
    "model": "",
    "load_format": "",
    "max_new_tokens": 0,
    "images": 1,
}


@dataclass(frozen=True)
class Arm:
    """One side of an experiment; `held` has every key of HELD."""

    held: Mapping[str, Any]
    condition: str = PLAIN
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """One test of a claim: what is looked at, and the rule that decides."""

    says: str
    metric: str
    arm: str
    against: str | float
    expect: str
    by: float
    statistic: Statistic = "median"
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """One claim; see the module for its fields."""

    claim: str
    title: str
    expected: str
    arms: Mapping[str, Arm]
    tests: tuple[Trial, ...]
    needs: tuple[str, ...] = ()
    about: tuple[str, ...] = ()


def names() -> list[str]:
    return sorted(path.stem for path in CLAIMS.glob("*.toml"))


def choose(said: Iterable[str]) -> list[Study]:
    """The studies of these claims in their order; ALL is each of them.

    Raises:
        UsageError: there is no such claim, or none is named.
    """
    known = names()
    wanted = {name.strip().upper() for text in said for name in text.split(",") if name.strip()}
    for name in sorted(wanted):
        if name != ALL and name not in known:
            raise UsageError(
                f"{name!r} is not a claim", f"give {ALL} or some of {known[0]} to {known[-1]}"
            )
    if not wanted:
        raise UsageError(
            "no claim is named", f"give {ALL}, LIST, or some of {known[0]} to {known[-1]}"
        )
    return [read(CLAIMS / f"{name}.toml") for name in known if ALL in wanted or name in wanted]


def read(path: Path) -> Study:
    """Raises BenchError for a file that is malformed; names the file and the key."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        held = _check_keys(path, "hold", document.get("hold", {}), HELD)
        arms = {
            name: _arm(path, name, table, held) for name, table in document.pop("arms", {}).items()
        }
        tests = tuple(
            Trial(**{**table, "needs": tuple(table.get("needs", ()))})
            for table in document.pop("tests", ())
        )
        document.pop("hold", None)
        for key in ("needs", "about"):
            document[key] = tuple(document.get(key, ()))
        study = Study(path.stem, arms=arms, tests=tests, **document)
    except (OSError, tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise BenchError(f"{path.name}: {error}", "correct the file") from error
    _check(path, study)
    return study


def _arm(path: Path, name: str, table: dict[str, Any], held: Mapping[str, Any]) -> Arm:
    condition = table.pop("condition", PLAIN)
    environment = table.pop("environment", {})
    own = _check_keys(path, f"arms.{name}", table, HELD)
    return Arm({**HELD, **held, **own}, condition, environment)


def _check_keys(
    path: Path, key: str, table: Mapping[str, Any], names: Mapping[str, Any]
) -> Mapping[str, Any]:
    for name in table:
        if name not in names:
            raise BenchError(f"{path.name}: unknown key {key}.{name}", f"known: {', '.join(names)}")
    return table


def _check(path: Path, study: Study) -> None:
    """Names that stand for something else have to exist."""
    needs = (*study.needs, *study.about, *(name for test in study.tests for name in test.needs))
    wrong = [f"needs {name!r}" for name in needs if name not in NEEDS]
    wrong += [
        f"condition {arm.condition!r}"
        for arm in study.arms.values()
        if arm.condition not in CONDITIONS
    ]
    for test in study.tests:
        wrong += [f"metric {test.metric!r}"] * (test.metric not in NAMES)
        wrong += [f"statistic {test.statistic!r}"] * (test.statistic not in STATISTICS)
        wrong += [f"expect {test.expect!r}"] * (test.expect not in EXPECTATIONS)
        wrong += [
            f"arm {name!r}"
            for name in (test.arm, test.against)
            if isinstance(name, str) and name not in study.arms
        ]
        wrong += [f"by {test.by}"] * (test.by < 1)
    if wrong:
        raise BenchError(f"{path.name}: unknown: {', '.join(wrong)}", "correct the file")
