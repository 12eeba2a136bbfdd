"""Reads a study's folder back: the runs of each arm, and with them every verdict.

Works from the files alone, so that verdicts can be made again anywhere.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from qwencli.bench.campaign import ENVIRONMENT, PLAN, RUNS, read_json
from qwencli.bench.rowfile import read_rows
from qwencli.bench.studies.blocks import without_rounds
from qwencli.bench.studies.claim_file import Study, Trial, choose
from qwencli.bench.studies.metrics import value
from qwencli.bench.studies.prepared import FORMAT
from qwencli.bench.studies.schedule import Place
from qwencli.bench.studies.session import STUDY, process_folder
from qwencli.bench.studies.verdicts import (
    ClaimVerdict,
    Finding,
    Side,
    Verdict,
    conclude,
    judge,
)
from qwencli.bench.studies.worker import FAILED, OBSERVED, SCHEDULE
from qwencli.errors import BenchError

Row = dict[str, str]
# What rows have beside the columns: the round of the run, STRETCH after the rounds.
ROUND, STRETCH = "round", "0"


class Evidence:
    """One study's folder.

    Raises:
        BenchError: it holds no study, or one that another version wrote.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.document: dict[str, Any] = read_json(folder / STUDY)
        self.environment: dict[str, Any] = read_json(folder / ENVIRONMENT)
        if self.document.get("format") != FORMAT:
            raise BenchError(
                f"{folder / STUDY} was written by another version", "run the study again"
            )
        self.studies = choose(self.document["claims"])
        self.places = {
            (row["claim"], row["arm"]): Place(row["process"], row["condition"], row["blocked"])
            for row in self.document["places"]
        }
        self._blocked_tests = {
            (row["claim"], row["part"]): row["why"] for row in self.document["blocked_tests"]
        }
        self._runs: dict[str, dict[str, list[Row]]] = {}
        self._failures: dict[tuple[str, str], str] = {}

    def processes(self) -> list[str]:
        """Those that have begun, in the order of the plan."""
        names = (process["name"] for process in self.document["processes"])
        return [name for name in names if (process_folder(self.folder, name) / PLAN).exists()]

    def axes(self, process: str) -> dict[str, str]:
        """The modes of a process, by axis."""
        plan = read_json(process_folder(self.folder, process) / PLAN)
        return dict(plan["cells"][0])

    def is_usual(self, process: str) -> bool:
        """Whether it ran the study's own model and work, with no variables set."""
        plan = read_json(process_folder(self.folder, process) / PLAN)
        planned = next(p for p in self.document["processes"] if p["name"] == process)
        return (
            plan["cells"][0]["model"] == self.document["model"]
            and plan["max_new_tokens"] == self.document["max_new_tokens"]
            and len(plan["images"]) == 1
            and not planned["environment"]
        )

    def conditions(self, process: str) -> dict[str, list[Row]]:
        """Measured runs of a process by condition, with what the conditions observed."""
        if process not in self._runs:
            self._runs[process] = self._read(process)
        return self._runs[process]

    def runs(self, process: str, condition: str) -> list[Row]:
        """Those under one condition."""
        return self.conditions(process).get(condition, [])

    def in_rounds(self, process: str, condition: str) -> list[Row]:
        """Those under one condition, without the stretches after the rounds."""
        return [row for row in self.runs(process, condition) if row[ROUND] != STRETCH]

    def warm_ups(self, process: str) -> list[Row]:
        """The first run of the process, or of each, where it was resumed."""
        rows = read_rows(process_folder(self.folder, process) / RUNS)
        return [row for row in rows if row["status"] == "warmup"]

    def _read(self, process: str) -> dict[str, list[Row]]:
        own = process_folder(self.folder, process)
        observed: dict[str, Row] = defaultdict(dict)
        condition_of: dict[str, str] = {}
        for row in read_rows(own / OBSERVED):
            condition_of[row["run"]] = row["condition"]
            observed[row["run"]][row["observation"]] = row["value"]
        found: dict[str, list[Row]] = defaultdict(list)
        rounds = read_json(own / SCHEDULE)["rounds"] if (own / SCHEDULE).exists() else []
        for row in read_rows(own / RUNS):
            if row["status"] not in ("ok", "warmup"):
                self._failures[process, ""] = f"{row['status']}: {row['reason']}"
            seen = observed.get(row["run"], {})
            if row["status"] != "ok" or row["run"] not in condition_of:
                continue
            condition = condition_of[row["run"]]
            if FAILED in seen:
                self._failures[process, condition] = seen[FAILED]
                continue
            found[condition].append({**row, **seen, ROUND: str(rounds[int(row["run"]) - 1])})
        return found

    def side(self, study: Study, arm: str, metric: str) -> Side:
        """An arm in a metric."""
        place = self.places[study.claim, arm]
        if place.blocked:
            return Side(blocked=place.blocked)
        rows = self.runs(place.process, place.condition)
        if not rows:
            why = self._failures.get((place.process, place.condition))
            why = why or self._failures.get((place.process, "")) or "not measured"
            return Side(blocked=why)
        return Side([found for row in rows if (found := value(metric, row)) is not None])

    def pair(self, study: Study, test: Trial) -> tuple[Side, Side | float]:
        """Both sides of a test, as they are to be compared."""
        side = self.side(study, test.arm, test.metric)
        if not isinstance(test.against, str):
            return side, float(test.against)
        against = self.side(study, test.against, test.metric)
        a, b = (self.places[study.claim, arm] for arm in (test.arm, test.against))
        if side.blocked or against.blocked or a.process != b.process:
            return side, against
        adjusted = test.statistic == "median"
        values = self.alike(a.process, a.condition, b.condition, test.metric, adjusted=adjusted)
        return Side(values[0]), Side(values[1])

    def alike(
        self, process: str, condition: str, base: str, metric: str, *, adjusted: bool = True
    ) -> tuple[list[float], list[float]]:
        """Values of two conditions of one process in its rounds; in the stretches after them where
        the first is made in a stretch.

        Args:
            adjusted: take out of each round what all of its conditions share (see `blocks`).
        """
        rows = self.conditions(process)
        if all(row[ROUND] == STRETCH for row in rows.get(condition, [])):
            kept = [[r for r in rows.get(n, []) if r[ROUND] == STRETCH] for n in (condition, base)]
            both = [[value(metric, row) for row in side] for side in kept]
            first, second = ([found for found in side if found is not None] for side in both)
            return first, second
        table = {
            name: {
                int(row[ROUND]): found
                for row in rows_of
                if row[ROUND] != STRETCH and (found := value(metric, row)) is not None
            }
            for name, rows_of in rows.items()
        }
        if adjusted:
            table = without_rounds(table)
        return list(table.get(condition, {}).values()), list(table.get(base, {}).values())

    def verdicts(self) -> list[ClaimVerdict]:
        """Of every claim of the study, in their order."""
        return [self._verdict(study) for study in self.studies]

    def _verdict(self, study: Study) -> ClaimVerdict:
        about = self.document["about"].get(study.claim)
        findings = []
        for part, test in enumerate(study.tests, start=1):
            if why := self._blocked_tests.get((study.claim, part)):
                findings.append(Finding(test, Verdict.CANNOT_RUN, why))
                continue
            side, against = self.pair(study, test)
            findings.append(judge(test, side, against, about))
        return conclude(study, findings, self.document["blocked"].get(study.claim))

    def evidence_of(self, study: Study, arm: str) -> str:
        """The file an arm's figures are in, below the study's folder."""
        own = process_folder(self.folder, self.places[study.claim, arm].process)
        path = own / RUNS
        return path.relative_to(self.folder).as_posix()
