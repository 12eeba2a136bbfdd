"""Whole studies over an engine without a model, in real processes."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import pytest

from qwencli.bench.storage.row_file import read_rows, write_rows
from qwencli.bench.studies import study_run as session
from qwencli.bench.studies.claim_file import choose
from qwencli.bench.studies.study_evidence import Evidence
from qwencli.bench.studies.study_plan import StudyRequest, prepare_study, process_folder
from qwencli.bench.studies.study_report import COLUMNS, build_study_report, share, terminal_table
from qwencli.bench.studies.study_run import run_study
from qwencli.bench.studies.verdicts import Verdict
from qwencli.config import DType, LoadFormat
from qwencli.errors import BenchError, OutputError
from qwencli.folder_lock import FolderLock
from qwencli.output import Output

WORKER = [sys.executable, str(Path(__file__).with_name("studied_engine.py"))]
CLAIMS = ("C04", "C06", "C09", "C12")


@pytest.fixture
def prepare(cpu):
    def make(claims=CLAIMS, **changes):
        asked = {
            "model": "scenes", "load_format": LoadFormat.AUTO, "device": "cpu",
            "dtype": DType.AUTO, "runs": 3, "max_new_tokens": 8, "seed": 0, **changes,
        }  # fmt: skip
        return prepare_study(choose(claims), StudyRequest(**asked), cpu)

    return make


def go(study, folder, resume=False):
    return run_study(study, folder, ["bench"], Output(), resume=resume, command=WORKER)


def test_a_study_from_claims_to_verdicts(prepare, tmp_path):
    folder = tmp_path / "s"
    assert go(prepare(), folder) is False
    found = {claim.study.claim: claim for claim in build_study_report(folder)}
    assert list(found) == list(CLAIMS)
    # The fake engine sleeps between its tokens: another Python thread makes it wait for its turn.
    assert found["C09"].findings[0].n == found["C09"].findings[0].n_against == 3
    assert found["C06"].verdict is not Verdict.CANNOT_RUN
    assert found["C12"].verdict is Verdict.CANNOT_RUN
    assert "GPU" in found["C12"].reason
    # A condition that fails costs its own runs, and says why.
    assert found["C04"].verdict is Verdict.CANNOT_RUN
    assert found["C04"].reason == "this engine knows no gradients"
    rows = read_rows(folder / "verdicts.csv")
    assert tuple(rows[0]) == COLUMNS
    assert [row["claim"] for row in rows if row["part"] == "0"] == list(CLAIMS)
    evidence = {row["evidence"] for row in rows if row["effect"]}
    assert evidence
    assert all((folder / path).is_file() for path in evidence)
    assert "C09" in (folder / "report.md").read_text(encoding="utf-8")
    assert terminal_table(list(found.values())) is not None


def test_runs_are_made_under_what_the_schedule_says(prepare, tmp_path):
    folder = tmp_path / "s"
    study = prepare(("C06", "C09"))
    go(study, folder)
    evidence = Evidence(folder)
    for process in study.layout.processes:
        made = evidence.conditions(process.name)
        assert {name: len(rows) for name, rows in made.items()} == {
            name: process.runs.count(name) for name in process.runs
        }
        # The model was loaded for its runs, and for no other.
        assert all(row["load_s"] for row in made["reload"])
        assert not any(row["load_s"] for row in made["plain"])
        assert all(int(row["load_peak_growth_bytes"]) >= 0 for row in made["reload"])


def test_a_study_goes_on_where_it_stopped(prepare, tmp_path, monkeypatch):
    folder = tmp_path / "s"
    study = prepare(("C06",))
    real, calls = session.run_campaign, []

    def interrupted(campaign, options, *more):
        calls.append(campaign.folder.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(campaign, options, *more)

    monkeypatch.setattr(session, "run_campaign", interrupted)
    assert go(study, folder) is True
    build_study_report(folder)  # of what there is
    first = process_folder(folder, calls[0]) / "runs.csv"
    before = first.read_bytes()
    monkeypatch.setattr(session, "run_campaign", real)
    assert go(study, folder, resume=True) is False
    assert first.read_bytes() == before
    assert build_study_report(folder)[0].verdict is not Verdict.CANNOT_RUN


@pytest.mark.parametrize("written", range(4))
def test_a_kill_before_there_is_a_study_leaves_a_folder_as_good_as_new(prepare, tmp_path, written):
    folder, study = tmp_path / "s", prepare(("C12",))
    steps = [
        lambda: folder.mkdir(),
        lambda: (folder / "writer.lock").touch(),
        lambda: (folder / "processes").mkdir(),
        lambda: (folder / "study.json.new").touch(),
    ]
    for step in steps[: written + 1]:
        step()
    with pytest.raises(BenchError, match="holds no campaign"):
        go(study, folder, resume=True)
    assert go(study, folder) is False
    assert not [path for path in folder.iterdir() if path.suffix in (".new", ".lock")]


def test_a_study_whose_process_was_killed_at_its_beginning_goes_on(prepare, tmp_path):
    folder, study = tmp_path / "s", prepare(("C06",), max_time_s=1e-9)
    go(study, folder)
    (process_folder(folder, study.processes[0].name) / "logs").mkdir(parents=True)
    study = prepare(("C06",))
    assert go(study, folder, resume=True) is False
    assert build_study_report(folder)[0].verdict is not Verdict.CANNOT_RUN


def test_a_run_that_was_killed_before_it_was_observed_is_made_again(prepare, tmp_path):
    folder, study = tmp_path / "s", prepare(("C06",))
    go(study, folder)
    process = study.processes[-1]
    conditions = process_folder(folder, process.name) / "conditions.csv"
    kept = [row for row in read_rows(conditions) if row["run"] != str(len(process.runs))]
    write_rows(conditions, ("run", "condition", "observation", "value"), kept)
    assert go(study, folder, resume=True) is False
    made = Evidence(folder).conditions(process.name)
    assert {name: len(rows) for name, rows in made.items()} == {
        name: process.runs.count(name) for name in process.runs
    }


def test_one_process_at_a_time_writes_to_a_study(prepare, tmp_path):
    folder, study = tmp_path / "s", prepare(("C12",))
    go(study, folder)
    lock = FolderLock(folder, BenchError, "")
    with pytest.raises(BenchError, match="is being written by process"):
        go(study, folder, resume=True)
    lock.release()
    assert go(study, folder, resume=True) is False


def test_no_process_begins_after_max_time(prepare, tmp_path):
    folder = tmp_path / "s"
    go(prepare(("C06",), max_time_s=1e-9), folder)
    claim = build_study_report(folder)[0]
    assert (claim.verdict, claim.reason) == (Verdict.CANNOT_RUN, "not measured")


def test_parts_put_together_are_the_whole(prepare, tmp_path):
    whole = prepare(("C06", "C09"))
    parts = [prepare(("C06", "C09"), part=part, parts=2) for part in (1, 2)]
    for number, part in enumerate(parts):
        folder = tmp_path / str(number)
        go(part, folder)
        assert Evidence(folder).processes() == [process.name for process in part.processes]
        assert len(part.processes) == 1
    (other,) = parts[1].processes
    process_folder(tmp_path / "1", other.name).rename(process_folder(tmp_path / "0", other.name))
    evidence = Evidence(tmp_path / "0")
    assert evidence.processes() == [process.name for process in whole.layout.processes]
    assert all(evidence.runs(process, "python-thread") for process in evidence.processes())


def test_a_folder_that_is_taken_or_another_study_is_refused(prepare, tmp_path):
    folder = tmp_path / "s"
    study = prepare(("C12",))
    go(study, folder)
    with pytest.raises(BenchError, match="not empty"):
        go(study, folder)
    with pytest.raises(BenchError, match="other seed"):
        go(prepare(("C12",), seed=1), folder, resume=True)
    with pytest.raises(BenchError, match="no campaign"):
        go(study, tmp_path / "none", resume=True)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        go(study, tmp_path / "file" / "s")


def test_another_versions_study_is_not_read(prepare, tmp_path):
    folder = tmp_path / "s"
    go(prepare(("C12",)), folder)
    path = folder / "study.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 0}))
    with pytest.raises(BenchError, match="another version"):
        build_study_report(folder)


def test_the_archive_holds_rows_and_reports_redacted(prepare, tmp_path):
    folder = tmp_path / "s"
    go(prepare(("C09",)), folder)
    build_study_report(folder)
    archive = share(folder, lambda text: text.replace("C09", "<claim>"))
    with zipfile.ZipFile(archive) as packed:
        names = packed.namelist()
        assert "s/verdicts.csv" in names
        assert sum(name.endswith("/runs.csv") for name in names) == 2
        assert not any(name.endswith((".log", ".html")) for name in names)
        assert b"C09" not in b"".join(packed.read(name) for name in names)
