"""A study from claims to verdicts: one ordinary campaign of one cell for each process.

study.json             claims, seed, runs and the plan of every process
environment.json       on what
processes/NAME/        a campaign as `bench` writes it, with schedule.json and conditions.csv
verdicts.csv, report.md   made from the rows of the processes, again at every end

Parts of a study that were made on several GPUs or at several times become one by putting what is in
their `processes` together.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from qwencli.bench.measure.telemetry import sampler_command
from qwencli.bench.plan.environment import environment, read_machine_speed
from qwencli.bench.report.campaign_report import build_report
from qwencli.bench.run.campaign import OTHER_WRITER, Campaign, refuse_what_is_there, write_json
from qwencli.bench.run.campaign_progress import show_progress
from qwencli.bench.run.campaign_runner import RunnerOptions, run_campaign
from qwencli.bench.storage import columns
from qwencli.bench.storage.campaign_files import RUNS, read_file
from qwencli.bench.storage.json_documents import ENVIRONMENT, PLAN, read_json
from qwencli.bench.storage.row_file import keep_rows, read_rows
from qwencli.bench.studies.schedule import Process
from qwencli.bench.studies.study_plan import PROCESSES, STUDY, PreparedStudy, process_folder
from qwencli.bench.studies.study_worker import OBSERVED, SCHEDULE
from qwencli.engine.machine.child_process import python_command
from qwencli.errors import BenchError, OutputError
from qwencli.folder_lock import FolderLock
from qwencli.output import Output, counted

INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C


def run_study(
    study: PreparedStudy,
    folder: Path,
    arguments: Sequence[str],
    output: Output,
    *,
    resume: bool,
    command: Sequence[str] = (),
) -> bool:
    """Run every process; rows are on disk as they happen. Returns whether Ctrl-C ended it early.

    Args:
        command: the worker, without the folder it is given; empty = the real one.

    Raises:
        BenchError: the folder is not new, or holds another study, or another process writes to it.
        OutputError: it cannot be written.
    """
    if resume:
        read_json(folder / STUDY)
    else:
        _make_folder(folder)
    lock = FolderLock(folder, BenchError, OTHER_WRITER)
    try:
        _open_folder(study, folder, arguments, resume=resume)
        return _run_processes(study, folder, arguments, output, command)
    finally:
        lock.release()


def _run_processes(
    study: PreparedStudy,
    folder: Path,
    arguments: Sequence[str],
    output: Output,
    command: Sequence[str],
) -> bool:
    command = command or python_command("qwencli.bench.studies.study_worker")
    began = time.monotonic()
    limit = study.request.max_time_s
    try:
        for number, process in enumerate(study.processes, start=1):
            if limit is not None and time.monotonic() - began > limit:
                output.warn(f"--max-time is spent; --resume --out {folder} goes on")
                break
            output.notice(
                f"process {number} of {len(study.processes)}, "
                f"{counted(len(process.runs), 'run')} for {', '.join(process.claims)}"
            )
            _run_process(study, process, folder, arguments, command, output)
    except KeyboardInterrupt:
        return True
    return False


def show_plan(study: PreparedStudy, output: Output) -> None:
    """Print the processes with what each will cost, and the claims that cannot run here.

    Raises:
        BenchError: torch does not load.
    """
    from qwencli.bench.studies.study_plan import planned_study, predicted_s

    with output.status("measuring this machine"):
        speed = read_machine_speed(study.facts.device)
    seconds = {p.name: predicted_s(study, p, speed) for p in study.processes}
    output.show(planned_study(study, seconds))


def run_and_report(
    study: PreparedStudy, folder: Path, arguments: Sequence[str], output: Output, *, resume: bool
) -> int:
    """Run, write verdicts and report, print them; returns the exit code.

    0 = every process that can run here ran to its end; 1 = one did not, or --max-time came first;
    130 = Ctrl-C, with the verdicts of what was finished.
    """
    from qwencli.bench.studies.study_report import build_study_report, terminal_table

    interrupted = run_study(study, folder, arguments, output, resume=resume)
    output.show(terminal_table(build_study_report(folder)))
    output.notice(f"study in {folder}")
    if interrupted:
        output.warn(f"interrupted; go on with --resume --out {folder}")
        return INTERRUPTED
    return 0 if all(_is_done(folder, process) for process in study.processes) else 1


def _is_done(folder: Path, process: Process) -> bool:
    rows = read_file(process_folder(folder, process.name), RUNS)
    skipped = any(row["status"] == "skipped" for row in rows)
    return skipped or sum(row["status"] == "ok" for row in rows) == len(process.runs)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        refuse_what_is_there(folder, PROCESSES, STUDY)
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written: {error.strerror}", "choose another --out"
        ) from error


def _open_folder(
    study: PreparedStudy, folder: Path, arguments: Sequence[str], *, resume: bool
) -> None:
    document = study.document()
    if resume:
        saved = read_json(folder / STUDY)
        for key, value in document.items():
            if saved.get(key) != value:
                raise BenchError(
                    f"{folder} cannot be resumed: it has other {key}",
                    "repeat the options it was started with, or give a new --out",
                )
        return
    _make_folder(folder)  # again: another study was quicker, and is over
    (folder / PROCESSES).mkdir(exist_ok=True)
    about = environment(study.facts, arguments, study.request.seed)
    write_json(folder / ENVIRONMENT, about)
    write_json(folder / STUDY, document)


def _run_process(
    study: PreparedStudy,
    process: Process,
    folder: Path,
    arguments: Sequence[str],
    command: Sequence[str],
    output: Output,
) -> None:
    own = process_folder(folder, process.name)
    facts = study.facts
    about = environment(facts, arguments, study.request.seed)
    options = RunnerOptions(
        command=[*command, str(own)],
        sampler=sampler_command(facts.uuid) if facts.kind == "cuda" else None,
        timeout_s=study.request.timeout_s,
        limits=False,
    )
    there = (own / PLAN).exists()
    if there:
        _drop_unobserved(own)
    with Campaign(own, study.plan(process), about, resume=there) as campaign:
        schedule = {
            "runs": list(process.runs),
            "rounds": list(process.rounds),
            "environment": dict(process.environment),
        }
        write_json(own / SCHEDULE, schedule)
        with show_progress(output) as moved:
            run_campaign(campaign, options, output.notice, moved)
    build_report(own)


def _drop_unobserved(own: Path) -> None:
    """Forget a process's last run where a kill came before what was observed in it was written."""
    observed = {row["run"] for row in read_rows(own / OBSERVED)}
    made = [row["run"] for row in read_file(own, RUNS) if row["status"] == "ok"]
    if made and made[-1] not in observed:
        keep_rows(
            own / RUNS, columns.RUNS, lambda row: (row["status"], row["run"]) != ("ok", made[-1])
        )
