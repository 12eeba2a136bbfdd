"""A campaign's folder: created, added to run by run, resumed, and read back.

    plan.json         what it does; a resumed campaign must be given the same
    environment.json  on what
    runs.csv, tokens.csv, gpu.csv, host.csv   raw rows, on disk as they happen
    roofline.csv, quality.csv       what was measured after a cell's runs, likewise
    reference.csv                   what the answers of models are compared with, likewise
    logs/CELL.log     what each worker printed
    probes.csv        what measuring costs (`qwencli.bench.measure.probe_overhead`)
    cells.csv, causes.csv, report.md, report.html
                      made from the rows above, again whenever the campaign ends

A run counts once its row is in runs.csv: its tokens are written before it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from qwencli.bench.attribution.whole_cell import machine_of
from qwencli.bench.measure.telemetry import Sample, run_columns
from qwencli.bench.plan import stopping
from qwencli.bench.plan.campaign_plan import Plan, check_same
from qwencli.bench.plan.matrix import BenchCell
from qwencli.bench.plan.stopping import Progress
from qwencli.bench.storage import columns
from qwencli.bench.storage.campaign_files import (
    GENERATED,
    GPU,
    HOST,
    PROBES,
    REFERENCE,
    RUNS,
    TOKENS,
    StoredCampaign,
)
from qwencli.bench.storage.json_documents import ENVIRONMENT, PLAN, read_environment
from qwencli.bench.storage.row_file import RowFile, keep_rows, replace_file
from qwencli.errors import BenchError, OutputError
from qwencli.folder_lock import LOCK, FolderLock

# The files whose rows belong to a run and count only once that run's row is written.
_OF_RUNS = ((TOKENS, columns.TOKENS), (GPU, columns.GPU), (HOST, columns.HOST))
WARM_UP = "0"
# A process needs longer than that from its start to its warm-up.
_APART_S = 0.5
LOGS = "logs"
OTHER_WRITER = "wait for it to end, or stop it; --resume goes on then"
# Measured once a cell, after its runs: name of the file -> its columns.
CHECKS = {"roofline": columns.ROOFLINE, "quality": columns.QUALITY}


class Campaign:
    """An open campaign; a context manager.

    Args:
        resume: go on in a folder that has one. Without it the folder must be new or empty.

    Raises:
        BenchError: the folder holds a campaign (or anything else) and `resume` is off; it holds
            none and `resume` is on; its plan or environment differs.
        BenchError: another process writes to it; says which.
        OutputError: it cannot be written.
    """

    def __init__(
        self, folder: Path, plan: Plan, environment: Mapping[str, Any], *, resume: bool
    ) -> None:
        self.folder = folder
        self.plan = plan
        self.machine = machine_of(environment)
        self.repaired = 0
        document = plan.document()
        if not resume:
            self._make_folder()
        elif not (folder / PLAN).exists():
            raise BenchError(
                f"{folder} holds no campaign", "check the folder, or leave out --resume"
            )
        self._lock = FolderLock(folder, BenchError, OTHER_WRITER)
        try:
            self._open(document, environment, resume=resume)
        except BaseException:
            self._lock.release()
            raise

    def _open(
        self, document: Mapping[str, Any], environment: Mapping[str, Any], *, resume: bool
    ) -> None:
        if resume:
            self._check_resumable(document, environment)
        else:
            self._create(document, environment)
        self._progress: dict[str, Progress] = {}
        self._ended: set[str] = set()
        self._tried_references: set[str] = set()
        self._read_back()

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            refuse_what_is_there(self.folder, LOGS, PLAN)
        except OSError as error:
            raise _cannot_write(self.folder, error) from error

    def _create(self, document: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        folder = self.folder
        try:
            refuse_what_is_there(folder, LOGS, PLAN)  # another campaign was quicker, and is over
            (folder / LOGS).mkdir(exist_ok=True)
        except OSError as error:
            raise _cannot_write(folder, error) from error
        write_json(folder / ENVIRONMENT, environment)
        write_json(folder / PLAN, document)

    def _check_resumable(self, document: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        stored = StoredCampaign(self.folder)
        check_same(stored.plan, document, self.folder)
        saved = stored.environment
        environment = json.loads(json.dumps(environment))  # tuples become lists, as in the file
        # The command line may differ (--resume); what the figures depend on may not.
        for key in ("versions", "device", "os", "cpu"):
            if saved.get(key) != environment[key]:
                raise BenchError(
                    f"{self.folder} cannot be resumed: its {key} changed", "give a new --out"
                )

    def _read_back(self) -> None:
        stored = StoredCampaign(self.folder)
        stored.rows(RUNS)  # checked, before any of it is believed
        # A worker that was ended from outside says nothing of its cell: another try may not be.
        keep_rows(self.folder / RUNS, columns.RUNS, lambda row: row["status"] != "killed")
        runs = stored.rows(RUNS)
        for row in runs:
            self._note(row)
        # Rows of a run that a kill kept from being finished would be counted twice.
        finished = _Finished(runs)
        for name, names in _OF_RUNS:
            stored.rows(name)  # checked, before any of it is believed
            wanted = finished.token if name == TOKENS else finished.sample
            self.repaired += keep_rows(self.folder / name, names, wanted)

        self._references = {row["model"] for row in stored.rows(REFERENCE)}
        self._checked = {
            (row["cell_id"], name) for name in CHECKS for row in stored.rows(f"{name}.csv")
        }
        # Limits are measured after the probes' A/B: without them that was cut off.
        self.repaired += keep_rows(
            self.folder / PROBES,
            columns.PROBES,
            lambda row: (row["cell_id"], "roofline") in self._checked,
        )

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.callback(self._lock.release)
            self._runs = stack.enter_context(RowFile(self.folder / RUNS, columns.RUNS))
            self._tokens, self._gpu, self._host = (
                stack.enter_context(RowFile(self.folder / name, names)) for name, names in _OF_RUNS
            )
            self._probes = stack.enter_context(RowFile(self.folder / PROBES, columns.PROBES))
            self._checks = {
                name: stack.enter_context(RowFile(beside_path(self.folder, name), names))
                for name, names in CHECKS.items()
            }
            self._reference = stack.enter_context(
                RowFile(self.folder / REFERENCE, columns.REFERENCE)
            )
            self._files = stack.pop_all()
        of_runs = (self._runs, self._tokens, self._gpu, self._host)
        files = (*of_runs, self._probes, self._reference, *self._checks.values())
        self.repaired += sum(file.repaired_lines for file in files)
        return self

    def __exit__(self, *exc: object) -> None:
        self._files.close()

    def log_path(self, cell: BenchCell) -> Path:
        return self.folder / LOGS / f"{cell.cell_id}.log"

    def progress(self, cell: BenchCell) -> Progress:
        """What the cell has so far."""
        return self._progress.get(cell.cell_id, Progress())

    def next_turn(self, cell: BenchCell) -> int | None:
        """Number of the first process that the cell still needs; None when it is over."""
        if cell.cell_id in self._ended:
            return None
        return stopping.next_turn(self.plan.settings.stop, self.progress(cell))

    def _note(self, row: Mapping[str, Any]) -> Progress:
        cell_id = row["cell_id"]
        if row["status"] not in GENERATED:  # over, even though runs are missing
            self._ended.add(cell_id)
        progress = self._progress.get(cell_id, Progress()).plus(row)
        self._progress[cell_id] = progress
        return progress

    def add_run(
        self,
        cell: BenchCell,
        message: Mapping[str, Any],
        before: Sample | None,
        within: Sequence[Sample],
    ) -> None:
        """Store a worker's "run" message with the sensor samples of its time."""
        key = {"cell_id": cell.cell_id, "run": message["row"]["run"]}
        self._tokens.append({**key, **token} for token in message["tokens"])
        self._gpu.append({**key, **sample} for sample in within)
        self._host.append({**key, **row} for row in message["host"])
        row = {**key, **message["row"], **run_columns(before, within)}
        # Noted first for the number of its process; a row that cannot be written ends the campaign.
        process = len(self._note(row).process_runs)
        self._runs.append([{**row, "process": process}])

    def add_checks(self, cell: BenchCell, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Store what a worker measured after the cell's runs."""
        process = len(self.progress(cell).process_runs)
        key = {"cell_id": cell.cell_id, "process": process}
        self._checks[name].append({**key, **row} for row in rows)
        self._checked.add((cell.cell_id, name))

    def add_reference(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Store the reference of model `name`, as a whole or not at all."""
        self._reference.append(rows)
        self._references.add(name)

    def reference_tried(self, name: str) -> None:
        """Note that no further try will give the reference of model `name`, if it is not there."""
        self._tried_references.add(name)

    def was_reference_tried(self, name: str) -> bool:
        return name in self._tried_references

    def reference(self, name: str) -> Path | None:
        """The file with the reference of model `name`, where there is one."""
        return self.folder / REFERENCE if name in self._references else None

    def has_checks(self, cell: BenchCell, name: str) -> bool:
        return (cell.cell_id, name) in self._checked

    def missing_checks(self, cell: BenchCell, *, limits: bool) -> list[str]:
        """Which of `CHECKS` were asked for and are not there, of a cell whose runs did not fail.

        Args:
            limits: whether the machine's limits, and what probes cost, were asked for.
        """
        if cell.cell_id in self._ended or cell.skip_reason:
            return []
        asked = {"roofline": limits, "quality": self.plan.wants_quality(cell.model)}
        return [name for name in CHECKS if asked[name] and not self.has_checks(cell, name)]

    def cut_off(self, *, limits: bool) -> list[BenchCell]:
        """Cells with all their runs that lack something of what was to be measured after them."""
        return [
            cell
            for cell in self.plan.cells
            if self.next_turn(cell) is None and self.missing_checks(cell, limits=limits)
        ]

    def turn_made(self, cell: BenchCell, turn: int) -> bool:
        """Whether the cell has all runs of its first `turn` processes."""
        rule = self.plan.settings.stop
        return stopping.turn_over(rule, turn, self.progress(cell)) is not None

    def add_probes(
        self, cell: BenchCell, rows: Sequence[Mapping[str, Any]], *, sampled: bool
    ) -> None:
        """Store what the probes cost this cell; `sampled`: there is a sampler to switch."""
        unsampled = {} if sampled else {"sampler": None}
        self._probes.append({"cell_id": cell.cell_id, **row, **unsampled} for row in rows)

    def add_end(self, cell: BenchCell, status: str, reason: str | None, run: int | None) -> None:
        """Store why a cell is over early; `run` is the one that it cost, if any."""
        row = {"cell_id": cell.cell_id, "run": run, "status": status, "reason": reason}
        self._note(row)
        self._runs.append([row])


class _Finished:
    """Tells the rows of finished runs from those of a run that a kill kept from being finished.

    Every process of a cell warms up as run 0: of the warm-ups in tokens.csv (each begins with token
    0) as many are finished as runs.csv has. Rows of other files are told apart by the times of
    those, so tokens are to be asked about first, in their order.
    """

    def __init__(self, runs: Sequence[Mapping[str, str]]) -> None:
        self._runs = {(row["cell_id"], row["run"]) for row in runs}
        self._ttft_s: dict[str, list[float]] = defaultdict(list)
        for row in runs:
            if row["status"] == "warmup":
                self._ttft_s[row["cell_id"]].append(float(row["ttft_s"] or 0.0))
        self._spans: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self._cut_off: set[str] = set()

    def token(self, row: Mapping[str, str]) -> bool:
        cell_id, run = row["cell_id"], row["run"]
        if (cell_id, run) not in self._runs:
            return False
        if run != WARM_UP:
            return True
        spans, ttft_s, at = self._spans[cell_id], self._ttft_s[cell_id], float(row["t_s"])
        if row["token_index"] == "0":
            if len(spans) == len(ttft_s):
                self._cut_off.add(cell_id)
            else:
                spans.append((at - ttft_s[len(spans)], at))
        if cell_id in self._cut_off:
            return False
        if spans:
            spans[-1] = (spans[-1][0], at)
        return True

    def sample(self, row: Mapping[str, str]) -> bool:
        """Whether a row of gpu.csv or host.csv belongs to a run that counts."""
        cell_id, run, at = row["cell_id"], row["run"], float(row["t_s"])
        if run != WARM_UP or cell_id not in self._cut_off:
            return (cell_id, run) in self._runs
        spans = self._spans[cell_id]
        return any(start - _APART_S < at < end + _APART_S for start, end in spans)


def refuse_what_is_there(folder: Path, within: str, document: str) -> None:
    """Raise BenchError unless the folder is as good as new.

    It is where one was killed before it had written its document: measured is nothing yet.

    Args:
        within: the name of a folder that is made before, and still empty.
    """
    begun = (LOCK, within, ENVIRONMENT, f"{ENVIRONMENT}.new", f"{document}.new")
    for path in folder.iterdir():
        ours = path.name in begun and not (path.is_dir() and any(path.iterdir()))
        if not ours or (path.name == ENVIRONMENT and not _is_environment(folder)):
            raise BenchError(
                f"{folder} is not empty", "add --resume to go on with it, or give a new --out"
            )


def _is_environment(folder: Path) -> bool:
    try:
        read_environment(folder)
    except BenchError:
        return False
    return True


def _cannot_write(folder: Path, error: OSError) -> OutputError:
    return OutputError(f"{folder} cannot be written: {error.strerror}", "choose another --out")


def beside_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.csv"


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    replace_file(path, (text + "\n").encode())
