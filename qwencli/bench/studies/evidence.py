"""Reads a study's folder back: the runs of each arm, and with them every verdict.

Works from the files alone, so that verdicts can be made again anywhere.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from qwencli.bench.campaign import ENVIRONMENT, RUNS, read_json
from qwencli.bench.rowfile import read_rows
from qwencli.bench.studies.claim_file import Study, choose
from qwencli.bench.studies.metrics import value
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
from qwencli.bench.studies.worker import FAILED, OBSERVED

Row = dict[str, str]


class Evidence:
    """One study's folder.

    Raises:
        BenchError: it holds no study.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.document: dict[str, Any] = read_json(folder / STUDY)
        self.environment: dict[str, Any] = read_json(folder / ENVIRONMENT)
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

    def runs(self, process: str, condition: str) -> list[Row]:
        """Measured runs of a process under a condition, with what the condition observed."""
        if process not in self._runs:
            self._runs[process] = self._read(process)
        return self._runs[process].get(condition, [])

    def _read(self, process: str) -> dict[str, list[Row]]:
        own = process_folder(self.folder, process)
        observed: dict[str, Row] = defaultdict(dict)
        condition_of: dict[str, str] = {}
        for row in read_rows(own / OBSERVED):
            condition_of[row["run"]] = row["condition"]
            observed[row["run"]][row["observation"]] = row["value"]
        found: dict[str, list[Row]] = defaultdict(list)
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
            found[condition].append({**row, **seen})
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
        values = [found for row in rows if (found := value(metric, row)) is not None]
        return Side(values) if values else Side(blocked=f"{metric} is not to be had here")

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
            against: Side | float = (
                self.side(study, test.against, test.metric)
                if isinstance(test.against, str)
                else float(test.against)
            )
            findings.append(judge(test, self.side(study, test.arm, test.metric), against, about))
        return conclude(study, findings, self.document["blocked"].get(study.claim))

    def evidence_of(self, study: Study, arm: str) -> str:
        """The file an arm's figures are in, below the study's folder."""
        own = process_folder(self.folder, self.places[study.claim, arm].process)
        path = own / RUNS
        return path.relative_to(self.folder).as_posix()
