"""Reads a study's folder back: the runs of each arm, and with them every verdict.

Works from the files alone, so that verdicts can be made again anywhere.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from qwencli.bench.storage.campaign_files import RUNS, read_file
from qwencli.bench.storage.columns import HINT, check_table
from qwencli.bench.storage.json_documents import (
    PLAN,
    Rule,
    check_document,
    is_count,
    is_filled_list,
    is_list,
    is_name,
    is_object,
    read_json,
)
from qwencli.bench.storage.row_file import read_table
from qwencli.bench.studies.claim_file import Study, Trial, choose
from qwencli.bench.studies.metrics import value
from qwencli.bench.studies.schedule import Place
from qwencli.bench.studies.study_plan import FORMAT, STUDY, process_folder
from qwencli.bench.studies.study_worker import COLUMNS, FAILED, OBSERVED, SCHEDULE
from qwencli.bench.studies.verdicts import (
    ClaimVerdict,
    Finding,
    Side,
    Verdict,
    conclude,
    judge,
    without_rounds,
)
from qwencli.errors import BenchError

Row = dict[str, str]
# What rows have beside the columns: the round of the run, STRETCH after the rounds.
ROUND, STRETCH = "round", "0"


def _is_round(value: Any) -> bool:
    return value == 0 or is_count(value)


_STUDY_RULES: tuple[Rule, ...] = (
    ("claims", is_filled_list, "a list of claims"),
    ("claims[]", is_name, "a name"),
    ("model", is_name, "a name"),
    ("max_new_tokens", is_count, "a whole number from 1"),
    ("places", is_list, "a list"),
    ("places[]", is_object, "an object"),
    *((f"places[].{key}", is_name, "a name") for key in ("claim", "arm", "process", "condition")),
    ("places[].blocked", lambda value: value is None or isinstance(value, str), "a text or null"),
    ("blocked", is_object, "an object"),
    ("about", is_object, "an object"),
    ("blocked_tests", is_list, "a list"),
    ("blocked_tests[]", is_object, "an object"),
    *((f"blocked_tests[].{key}", is_name, "a name") for key in ("claim", "why")),
    ("blocked_tests[].part", is_count, "a whole number from 1"),
    ("processes", is_list, "a list"),
    ("processes[]", is_object, "an object"),
    ("processes[].name", is_name, "a name"),
    ("processes[].environment", is_object, "an object"),
)
_PLAN_RULES: tuple[Rule, ...] = (
    ("cells", is_filled_list, "a list of cells"),
    ("cells[]", is_object, "an object"),
    *(
        (f"cells[].{axis}", is_name, "a name")
        for axis in ("model", "engine", "quantization", "attention", "cache")
    ),
    ("max_new_tokens", is_count, "a whole number from 1"),
    ("images", is_list, "a list"),
)
_SCHEDULE_RULES: tuple[Rule, ...] = (
    ("rounds", is_list, "a list"),
    ("rounds[]", _is_round, "a whole number from 0"),
)


class Evidence:
    """One study's folder.

    Raises:
        BenchError: it holds no study, or one that another version wrote.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.document: dict[str, Any] = read_json(folder / STUDY)
        if self.document.get("format") != FORMAT:
            raise BenchError(
                f"{folder / STUDY} was written by another version", "run the study again"
            )
        check_document(folder / STUDY, self.document, _STUDY_RULES)
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
        """Names of the processes that have begun, in the order of the plan."""
        names = (process["name"] for process in self.document["processes"])
        return [name for name in names if (process_folder(self.folder, name) / PLAN).exists()]

    def axes(self, process: str) -> dict[str, str]:
        """The modes of a process, by axis."""
        return dict(self._plan(process)["cells"][0])

    def _plan(self, process: str) -> dict[str, Any]:
        path = process_folder(self.folder, process) / PLAN
        plan = read_json(path)
        check_document(path, plan, _PLAN_RULES)
        return plan

    def is_usual(self, process: str) -> bool:
        """Whether it ran the study's own model and work, with no variables set."""
        plan = self._plan(process)
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
        """Measured runs of a process under one condition."""
        return self.conditions(process).get(condition, [])

    def in_rounds(self, process: str, condition: str) -> list[Row]:
        """The same, without the stretches after the rounds."""
        return [row for row in self.runs(process, condition) if row[ROUND] != STRETCH]

    def warm_ups(self, process: str) -> list[Row]:
        """The first run of the process, or of each, where it was resumed."""
        rows = read_file(process_folder(self.folder, process), RUNS)
        return [row for row in rows if row["status"] == "warmup"]

    def _read(self, process: str) -> dict[str, list[Row]]:
        own = process_folder(self.folder, process)
        observed: dict[str, Row] = defaultdict(dict)
        condition_of: dict[str, str] = {}
        table = read_table(own / OBSERVED)
        check_table(table, COLUMNS, len(COLUMNS), ("run", "condition"))
        for row in table.rows:
            condition_of[row["run"]] = row["condition"]
            observed[row["run"]][row["observation"]] = row["value"]
        found: dict[str, list[Row]] = defaultdict(list)
        schedule: dict[str, Any] = {"rounds": []}
        if (own / SCHEDULE).exists():
            schedule = read_json(own / SCHEDULE)
            check_document(own / SCHEDULE, schedule, _SCHEDULE_RULES)
        rounds = schedule["rounds"]
        for row in read_file(own, RUNS):
            if row["status"] not in ("ok", "warmup"):
                self._failures[process, ""] = f"{row['status']}: {row['reason']}"
            seen = observed.get(row["run"], {})
            if row["status"] != "ok" or row["run"] not in condition_of:
                continue
            if not 1 <= int(row["run"]) <= len(rounds):
                raise BenchError(
                    f"{own / SCHEDULE} is broken: rounds has {len(rounds)} runs, {RUNS} a run "
                    f"{row['run']}",
                    HINT,
                )
            condition = condition_of[row["run"]]
            if FAILED in seen:
                self._failures[process, condition] = seen[FAILED]
                continue
            found[condition].append({**row, **seen, ROUND: str(rounds[int(row["run"]) - 1])})
        return found

    def side(self, study: Study, arm: str, metric: str) -> Side:
        """An arm in a metric."""
        place = self.places.get((study.claim, arm))
        if place is None:
            return Side(blocked=f"this study was run before the claim had the arm {arm}")
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
        if side.blocked or against.blocked:
            return side, against
        a, b = (self.places[study.claim, arm] for arm in (test.arm, test.against))
        if a.process != b.process:
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
        """The verdict on every claim of the study, in their order."""
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
