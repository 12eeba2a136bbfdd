"""Whole campaigns over a fake engine in real processes."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from qwencli.bench.plan.environment import environment
from qwencli.bench.plan.stopping import StopRule
from qwencli.bench.report.campaign_report import build_report
from qwencli.bench.run.campaign import Campaign
from qwencli.bench.run.campaign_runner import RunnerOptions, run_campaign
from qwencli.bench.storage import columns
from qwencli.bench.storage.row_file import read_rows, write_rows
from qwencli.errors import BenchError, OutputError

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")


@pytest.fixture
def run(tmp_path, cpu, fake_worker):
    """Run a plan in tmp_path/c; returns cells.csv's rows by model."""

    def go(plan, *, resume=False, timeout_s=60.0, command=None, say=lambda _: None, **how):
        about = environment(cpu, ["bench"], plan.settings.seed)
        options = RunnerOptions(command or fake_worker, None, timeout_s, **how)
        with Campaign(tmp_path / "c", plan, about, resume=resume) as campaign:
            run_campaign(campaign, options, say)
        return {row["model"]: row for row in build_report(tmp_path / "c")}

    return go


def rows(tmp_path, name):
    return read_rows(tmp_path / "c" / name)


def test_a_campaign_of_two_cells(run, tmp_path, make_plan):
    cells = run(make_plan("steady-a", "steady-b", runs=3, tokens=6))
    assert {row["status"] for row in cells.values()} == {"ok"}
    assert all(row["runs"] == 3 for row in cells.values())
    runs = rows(tmp_path, "runs.csv")
    assert tuple(runs[0]) == columns.RUNS
    assert [row["status"] for row in runs[:4]] == ["warmup", "ok", "ok", "ok"]
    assert [row["run"] for row in runs[:4]] == ["0", "1", "2", "3"]
    # What was not measured is empty, what was is not.
    for row in runs:
        assert row["num_new_tokens"] == "6"
        assert (
            row["vision_encode_s"] == row["peak_allocated_bytes"] == row["sm_clock_mhz_mean"] == ""
        )
        assert float(row["process_cpu_percent"]) >= 0.0
        assert row["load_s"] == ("0.25" if row["run"] == "0" else "")
    tokens = rows(tmp_path, "tokens.csv")
    assert tuple(tokens[0]) == columns.TOKENS
    assert len(tokens) == 2 * 4 * 6
    assert tokens[0]["itl_ms"] == tokens[0]["gpu_ms"] == ""
    assert float(tokens[1]["itl_ms"]) == pytest.approx(
        1e3 * (float(tokens[1]["t_s"]) - float(tokens[0]["t_s"])), abs=1e-3
    )
    assert tuple(rows(tmp_path, "cells.csv")[0]) == columns.CELLS
    assert (tmp_path / "c" / "gpu.csv").read_text().strip() == ",".join(columns.GPU)
    about = json.loads((tmp_path / "c" / "environment.json").read_text(encoding="utf-8"))
    assert about["versions"]["torch"] == "2.13.0+cpu"
    assert "steady-a" in (tmp_path / "c" / "report.md").read_text(encoding="utf-8")


def test_several_processes_share_the_runs_of_a_cell(run, tmp_path, make_plan):
    plan = make_plan("steady-a", "steady-b", stop=StopRule(5, 5, processes=2), seed=3)
    cells = run(plan)
    for row in cells.values():
        assert (row["runs"], row["processes"], row["stop_reason"]) == (5, 2, "runs")
    runs = rows(tmp_path, "runs.csv")
    first = [row for row in runs if row["cell_id"] == runs[0]["cell_id"]]
    assert [(row["process"], row["run"]) for row in first] == [
        ("1", "0"), ("1", "1"), ("1", "2"), ("1", "3"), ("2", "0"), ("2", "4"), ("2", "5"),
    ]  # fmt: skip
    # In turns: both cells have had a process before either gets its second.
    assert [row["process"] for row in runs] == ["1"] * 8 + ["2"] * 6


def test_a_cell_repeats_until_it_is_steady_enough(run, tmp_path, make_plan):
    stop = StopRule(3, 6, max_noise=200.0)
    assert run(make_plan("steady", stop=stop))["steady"]["stop_reason"] == "max-noise"
    assert [row["run"] for row in rows(tmp_path, "runs.csv")] == ["0", "1", "2", "3"]


def test_a_cell_that_does_not_get_steady_stops_at_the_most_runs(run, make_plan):
    row = run(make_plan("steady", stop=StopRule(3, 6, max_noise=1e-9, processes=2)))["steady"]
    assert (row["runs"], row["stop_reason"], row["status"]) == (6, "max-runs", "ok")
    assert row["noise_percent"] > 1e-9


def test_a_cell_stops_when_its_time_is_spent(run, make_plan):
    stop = StopRule(3, 500, max_noise=1e-9, max_time_s=0.3)  # the load alone took 0.25 s
    row = run(make_plan("steady", stop=stop))["steady"]
    assert row["stop_reason"] == "max-time"
    assert 3 <= row["runs"] < 100


def test_the_campaign_can_end_with_the_first_cell_that_fails(run, tmp_path, make_plan):
    plan = make_plan("oom", "steady", seed=next(s for s in range(9) if _first(make_plan, s)))
    cells = run(plan, continue_on_error=False)
    assert (cells["oom"]["status"], cells["steady"]["status"]) == ("oom", "unfinished")
    cells = run(plan, resume=True, continue_on_error=False)
    assert (cells["oom"]["status"], cells["steady"]["status"]) == ("oom", "ok")


def _first(make_plan, seed):
    return make_plan("oom", "steady", seed=seed).order()[0].model == "oom"


def test_a_resumed_cell_with_several_processes_makes_no_run_twice(run, tmp_path, make_plan):
    plan = make_plan("steady", stop=StopRule(4, 4, processes=2))
    run(plan)
    runs_csv = tmp_path / "c" / "runs.csv"
    lines = runs_csv.read_bytes().splitlines(keepends=True)
    runs_csv.write_bytes(b"".join(lines[:3]))  # header, warm-up, run 1: killed in the first process
    row = run(plan, resume=True)["steady"]
    assert (row["runs"], row["status"]) == (4, "ok")
    assert [(r["process"], r["run"]) for r in rows(tmp_path, "runs.csv")] == [
        ("1", "0"), ("1", "1"), ("2", "0"), ("2", "2"), ("3", "0"), ("3", "3"), ("3", "4"),
    ]  # fmt: skip


def test_what_is_measured_after_the_runs_is_stored_once(run, tmp_path, make_plan):
    row = run(make_plan("steady", stop=StopRule(4, 4, processes=2)))["steady"]
    (limits,) = rows(tmp_path, "roofline.csv")
    assert (limits["process"], limits["bytes_per_token"]) == ("1", "1000000.0")
    assert row["mbu_percent"] == pytest.approx(row["decode_tok_per_s_median"] / 10)


def test_answers_are_checked_once_a_cell(run, tmp_path, make_plan):
    plan = make_plan("steady", stop=StopRule(2, 2, processes=2))
    settings = dataclasses.replace(plan.settings, quality_samples=2)
    row = run(dataclasses.replace(plan, settings=settings))["steady"]
    assert (row["exact_match_percent"], row["quality_samples"]) == (50.0, 2)
    assert [r["sample"] for r in rows(tmp_path, "quality.csv")] == ["passage-0", "a", "b"]


def test_other_models_are_held_against_a_reference_of_their_own(run, tmp_path, make_plan):
    plan = make_plan("steady-a", "odd", attention=("sdpa", "eager"))
    plan = dataclasses.replace(plan, settings=dataclasses.replace(plan.settings, quality_samples=4))
    said = []
    cells = run(plan, say=said.append)
    assert [line for line in said if line.startswith("reference of")] == [
        "reference of steady-a, for the divergence of its cells",
        "reference of odd, for the divergence of its cells",
    ]
    assert any("no reference of this one" in line for line in said)
    assert {row["model"] for row in rows(tmp_path, "reference.csv")} == {"steady-a"}
    assert (cells["steady-a"]["mean_kl"], cells["odd"]["mean_kl"]) == (0.25, None)
    assert cells["odd"]["status"] == "ok"
    before = (tmp_path / "c" / "reference.csv").read_bytes()
    run(plan, resume=True, command=["this program does not exist"])
    assert (tmp_path / "c" / "reference.csv").read_bytes() == before


def test_a_process_that_breaks_after_its_runs_costs_none_of_them(run, tmp_path, make_plan):
    row = run(make_plan("late", runs=3))["late"]
    assert (row["status"], row["runs"], row["verdict"] is None) == ("ok", 3, False)
    assert row["mbu_percent"] is None


def with_quality(plan, samples=2):
    settings = dataclasses.replace(plan.settings, quality_samples=samples)
    return dataclasses.replace(plan, settings=settings)


@posix
def test_what_a_killed_worker_did_not_measure_after_its_runs_is_resumed(
    run, tmp_path, make_plan, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    plan = with_quality(make_plan("slain", runs=3))
    said = []
    row = run(plan, say=said.append)["slain"]
    assert any("after its runs: killed" in line for line in said)
    assert (row["status"], row["runs"], row["mbu_percent"]) == ("ok", 3, None)
    before = (tmp_path / "c" / "runs.csv").read_bytes()
    row = run(plan, resume=True)["slain"]
    assert row["mbu_percent"] is not None
    assert (row["exact_match_percent"], row["mean_kl"]) == (50.0, 0.25)
    assert (tmp_path / "c" / "runs.csv").read_bytes() == before  # and no run was made
    said.clear()
    run(plan, resume=True, say=said.append, command=["this program does not exist"])
    assert all("already there" in line for line in said)


@pytest.mark.parametrize("name", ["roofline", "quality"])
def test_a_stop_after_the_last_run_loses_nothing_for_good(run, tmp_path, make_plan, name):
    plan = with_quality(make_plan("steady-a", "steady-b", stop=StopRule(4, 4, processes=2)))
    run(plan)
    whole = {file: rows(tmp_path, f"{file}.csv") for file in ("runs", "roofline", "quality")}
    path = tmp_path / "c" / f"{name}.csv"
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    run(plan, resume=True)
    again = {file: rows(tmp_path, f"{file}.csv") for file in whole}
    assert again["runs"] == whole["runs"]
    assert all(len(again[file]) == len(whole[file]) for file in whole)


def test_probes_that_were_cut_off_are_measured_again(run, tmp_path, make_plan):
    plan = make_plan("steady")
    run(plan)
    probes, roofline = tmp_path / "c" / "probes.csv", tmp_path / "c" / "roofline.csv"
    roofline.write_bytes(roofline.read_bytes().splitlines(keepends=True)[0])
    with probes.open("a", encoding="utf-8") as file:
        file.write(f"{plan.cells[0].cell_id},1,on,0,5.1,5.0\n")
    run(plan, resume=True)
    assert rows(tmp_path, "probes.csv") == []  # too few tokens for any
    assert len(rows(tmp_path, "roofline.csv")) == 1


def test_what_breaks_after_the_runs_is_tried_once_and_told(run, tmp_path, make_plan):
    plan = with_quality(make_plan("late"))
    run(plan)
    (limits,) = rows(tmp_path, "roofline.csv")
    assert "exit code 1: ZeroDivisionError" in limits["reason"]
    run(plan, resume=True, command=["this program does not exist"])


def test_what_the_worker_prints_goes_to_its_log(run, tmp_path, make_plan):
    plan = make_plan("steady")
    run(plan)
    log = tmp_path / "c" / "logs" / f"{plan.cells[0].cell_id}.log"
    assert "fake engine loads" in log.read_text(encoding="utf-8")


def test_reload_loads_before_every_run(run, tmp_path, make_plan):
    plan = make_plan("steady", load_mode=("reload",))
    run(plan)
    log = (tmp_path / "c" / "logs" / f"{plan.cells[0].cell_id}.log").read_text(encoding="utf-8")
    assert log.count("fake engine loads") == 3
    assert [row["load_s"] for row in rows(tmp_path, "runs.csv")] == ["0.25"] * 3


@pytest.mark.parametrize(
    ("model", "status", "reason"),
    [
        ("oom", "oom", "the GPU has no memory left (use --quantization 4bit)"),
        ("unsupported", "skipped", "this mode cannot run here (use sdpa instead)"),
        ("broken", "crashed", "exit code 1: ZeroDivisionError: a bug in the engine"),
    ],
)
def test_a_cell_that_fails_is_a_row_and_stops_nothing(
    run, tmp_path, make_plan, model, status, reason
):
    cells = run(make_plan(model, "steady"))
    assert (cells[model]["status"], cells[model]["reason"]) == (status, reason)
    assert cells[model]["verdict"] is None
    assert cells["steady"]["status"] == "ok"


def test_a_model_that_no_mode_can_load_is_found_once(run, tmp_path, make_plan):
    said = []
    plan = make_plan("foreign", "steady", attention=("sdpa", "eager"))
    run(plan, say=said.append)
    ended = [row for row in rows(tmp_path, "runs.csv") if row["status"] == "failed"]
    of_model = {cell.cell_id for cell in plan.cells if cell.model == "foreign"}
    assert len(of_model) == len(ended) == 2
    assert {row["cell_id"] for row in ended} == of_model
    assert len({row["reason"] for row in ended}) == 1
    logs = [path for path in (tmp_path / "c" / "logs").iterdir() if path.stem in of_model]
    assert len(logs) == 1
    assert sum("the same for 1 other cell of foreign" in line for line in said) == 1


@posix
def test_a_killed_worker_keeps_its_finished_runs(run, tmp_path, make_plan):
    cells = run(make_plan("killed", "steady", runs=4))
    assert cells["killed"]["status"] == "killed"
    assert "SIGKILL" in cells["killed"]["reason"]
    assert cells["killed"]["runs"] == 1
    lost = [row for row in rows(tmp_path, "runs.csv") if row["status"] == "killed"]
    assert [row["run"] for row in lost] == ["2"]
    assert cells["steady"]["runs"] == 4


@posix
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT", "SIGSEGV"])
def test_who_ended_a_worker(run, make_plan, name):
    script = f"import os, signal; os.kill(os.getpid(), signal.{name})"
    cell = run(make_plan("x"), command=[sys.executable, "-c", script])["x"]
    assert cell["status"] == ("crashed" if name == "SIGSEGV" else "killed")
    assert name in cell["reason"]


@posix
def test_a_worker_whose_library_crashes_says_in_what_line(run, make_plan):
    script = (
        "import ctypes, faulthandler; faulthandler.enable()\n"
        "def forward(): ctypes.string_at(0)\n"
        "forward()"
    )
    cell = run(make_plan("x"), command=[sys.executable, "-c", script])["x"]
    assert cell["status"] == "crashed"
    assert re.search(r"died of SIGSEGV: File .* in string_at", cell["reason"]), cell["reason"]


def test_a_worker_that_hangs_is_ended(run, make_plan):
    start = time.monotonic()
    cells = run(make_plan("hang", runs=4), timeout_s=2.5)
    assert time.monotonic() - start < 26
    assert cells["hang"]["status"] == "timeout"
    assert cells["hang"]["reason"].startswith("not done after 2.5 s")
    assert cells["hang"]["runs"] == 1


def test_a_worker_that_speaks_another_language(run, make_plan):
    cells = run(make_plan("x"), command=[sys.executable, "-c", "print('hello')"])
    assert cells["x"]["status"] == "crashed"
    assert "no JSON" in cells["x"]["reason"]


def test_verdicts(run, make_plan):
    cells = run(make_plan("changing", "fallback", attention=("sdpa",)))
    assert cells["changing"]["verdict"] == "FAIL: text changed between greedy runs"
    assert cells["fallback"]["verdict"] == "FAIL: attention eager ran, not sdpa"


def test_cells_that_cannot_run_are_rows_without_a_process(run, tmp_path, make_plan):
    plan = make_plan("steady", attention=("flash_attention_2",))
    cells = run(plan, command=["this program does not exist"])
    assert cells["steady"]["status"] == "skipped"
    said = "flash_attention_2 needs a CUDA device; --attention sdpa is the nearest"
    assert cells["steady"]["reason"] == said
    assert [row["run"] for row in rows(tmp_path, "runs.csv")] == [""]


def test_the_order_is_shuffled_by_the_seed(make_plan):
    models = [f"m{number}" for number in range(12)]
    orders = [[c.model for c in make_plan(*models, seed=seed).order()] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(models) != orders[0]


def test_a_folder_with_a_campaign_is_refused_without_resume(run, make_plan):
    run(make_plan("steady"))
    with pytest.raises(BenchError, match="not empty") as caught:
        run(make_plan("steady"))
    assert "--resume" in caught.value.hint


def test_resume_needs_a_campaign(run, make_plan):
    with pytest.raises(BenchError, match="holds no campaign"):
        run(make_plan("steady"), resume=True)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"runs": 3}, "runs 2, not 3"),
        ({"seed": 5}, "seed 1, not 5"),
        ({"cache": ("static",)}, "1 gone, 1 new"),
    ],
)
def test_resume_refuses_another_plan(run, make_plan, other, said):
    run(make_plan("steady"))
    with pytest.raises(BenchError, match=said):
        run(make_plan("steady", **other), resume=True)


def test_resume_refuses_another_environment(tmp_path, run, make_plan, cpu):
    plan = make_plan("steady")
    run(plan)
    other = environment(dataclasses.replace(cpu, torch_version="2.15.0"), ["bench"], 1)
    with pytest.raises(BenchError, match="versions changed"):
        Campaign(tmp_path / "c", plan, other, resume=True)


def test_resume_on_the_same_gpu(tmp_path, make_plan, gpu):
    plan = make_plan("steady")
    about = environment(gpu, ["bench"], 1)
    with Campaign(tmp_path / "c", plan, about, resume=False):
        pass
    assert Campaign(tmp_path / "c", plan, about, resume=True).next_turn(plan.cells[0]) == 1


def test_the_environment_names_no_one(monkeypatch, tmp_path, gpu):
    monkeypatch.setattr(Path, "home", lambda: Path("/home/someone"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/home/someone/cache")
    about = json.dumps(environment(gpu, ["bench", "--model", "/home/someone/m"], 1))
    assert "someone" not in about
    assert "GPU-1" not in about
    assert "~/m" in about


def test_resume_skips_what_is_over(run, tmp_path, make_plan):
    run(make_plan("steady", "oom"))
    before = (tmp_path / "c" / "runs.csv").read_bytes()
    run(make_plan("steady", "oom"), resume=True, command=["this program does not exist"])
    assert (tmp_path / "c" / "runs.csv").read_bytes() == before


def test_resume_after_a_kill_goes_on_with_the_run_that_was_lost(run, tmp_path, make_plan):
    plan = make_plan("steady", runs=4)
    run(plan)
    runs_csv = tmp_path / "c" / "runs.csv"
    content = runs_csv.read_bytes().split(b"\n")
    # Header, warm-up and run 1 whole, run 2 torn; the tokens of runs 2 to 4 belong to no run now.
    runs_csv.write_bytes(b"\n".join([*content[:3], content[3][:40]]))
    with (tmp_path / "c" / "tokens.csv").open("ab") as tokens:
        tokens.write(b"steady,9,0,1")
    cells = run(plan, resume=True)
    assert cells["steady"]["status"] == "ok"
    assert [row["run"] for row in rows(tmp_path, "runs.csv")] == ["0", "1", "0", "2", "3", "4"]
    counted = [
        (row["run"], row["token_index"])
        for row in rows(tmp_path, "tokens.csv")
        if row["run"] != "0"
    ]
    assert len(counted) == len(set(counted)) == 4 * 5


def test_a_second_warm_up_that_a_kill_cut_off_is_dropped(run, tmp_path, make_plan, cpu):
    plan = make_plan("steady", runs=4)
    run(plan)
    cell = plan.cells[0].cell_id
    files = {name: tmp_path / "c" / f"{name}.csv" for name in ("runs", "tokens", "host", "gpu")}
    lines = files["runs"].read_bytes().splitlines(keepends=True)
    files["runs"].write_bytes(b"".join(lines[:2]))  # killed after the first warm-up
    # A second process warmed up, and the campaign was killed before that was written down.
    for name in ("tokens", "host"):
        first = [row for row in rows(tmp_path, f"{name}.csv") if row["run"] == "0"]
        again = [{**row, "t_s": f"{float(row['t_s']) + 60:.9f}"} for row in first]
        known = columns.TOKENS if name == "tokens" else columns.HOST
        write_rows(files[name], known, [*first, *again])
    sample = {"cell_id": cell, "run": "0", "gpu_index": "0"}
    last = float(rows(tmp_path, "tokens.csv")[0]["t_s"])
    both = [{**sample, "t_s": last - 0.001}, {**sample, "t_s": last + 59.9}]
    write_rows(files["gpu"], columns.GPU, both)
    about = environment(cpu, ["bench"], 1)
    campaign = Campaign(tmp_path / "c", plan, about, resume=True)
    with campaign:
        assert [row["token_index"] for row in rows(tmp_path, "tokens.csv")] == list("01234")
        times = [float(row["t_s"]) for row in rows(tmp_path, "host.csv")]
        assert times
        assert max(times) < last + 30
        assert len(rows(tmp_path, "gpu.csv")) == 1
    assert campaign.repaired
    run(plan, resume=True)
    warm = [row for row in rows(tmp_path, "tokens.csv") if row["run"] == "0"]
    assert len(warm) == 2 * 5


@posix
def test_a_worker_that_was_killed_within_its_runs_gets_another_try(run, tmp_path, make_plan):
    plan = make_plan("killed", "steady", "oom", runs=2)
    assert run(plan)["killed"]["status"] == "killed"
    runs_csv = tmp_path / "c" / "runs.csv"
    lost = [row["run"] for row in rows(tmp_path, "runs.csv") if row["status"] == "killed"]
    assert lost == ["2"]
    cells = run(plan, resume=True)  # a run is left, before the one that this engine dies in
    assert (cells["killed"]["status"], cells["killed"]["runs"]) == ("ok", 2)
    assert cells["killed"]["reason"] is None
    assert (cells["oom"]["status"], cells["steady"]["runs"]) == ("oom", 2)
    before = runs_csv.read_bytes()
    run(plan, resume=True, command=["this program does not exist"])
    assert runs_csv.read_bytes() == before


@pytest.mark.parametrize("written", range(6))
def test_a_kill_before_there_is_a_plan_leaves_a_folder_as_good_as_new(
    run, tmp_path, make_plan, cpu, written
):
    folder, plan = tmp_path / "c", make_plan("steady")
    about = environment(cpu, ["bench"], plan.settings.seed)
    steps = [
        lambda: folder.mkdir(),
        lambda: (folder / "writer.lock").touch(),
        lambda: (folder / "logs").mkdir(),
        lambda: (folder / "environment.json.new").write_text('{"a', encoding="utf-8"),
        lambda: (folder / "environment.json").write_text(json.dumps(about), encoding="utf-8"),
        lambda: (folder / "plan.json.new").touch(),
    ]
    for step in steps[: written + 1]:
        step()
    with pytest.raises(BenchError, match="holds no campaign"):
        run(plan, resume=True)
    assert run(plan)["steady"]["runs"] == 2
    assert not list(folder.glob("*.new"))


@pytest.mark.parametrize("name", ["environment.json", "logs/mine.txt", "plan.json", "runs.csv"])
def test_a_folder_with_files_of_others_is_not_new(run, tmp_path, make_plan, name):
    path = tmp_path / "c" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(BenchError, match="is not empty"):
        run(make_plan("steady"))
    assert path.read_text(encoding="utf-8") == "mine"


def test_one_process_at_a_time_writes_to_a_campaign(run, tmp_path, make_plan, cpu):
    plan = make_plan("steady")
    about = environment(cpu, ["bench"], 1)
    with Campaign(tmp_path / "c", plan, about, resume=False):
        with pytest.raises(BenchError, match=f"is being written by process {os.getpid()}, since"):
            Campaign(tmp_path / "c", plan, about, resume=True)
        with pytest.raises(BenchError, match="not empty"):
            Campaign(tmp_path / "c", plan, about, resume=False)
    assert not (tmp_path / "c" / "writer.lock").exists()
    assert run(plan, resume=True)["steady"]["runs"] == 2


def test_what_a_killed_writer_leaves_refuses_nobody(run, tmp_path, make_plan):
    script = f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parents[3])!r})
        from pathlib import Path
        from qwencli.errors import BenchError
        from qwencli.folder_lock import FolderLock
        lock = FolderLock(Path({str(tmp_path / "c")!r}), BenchError, "")
        print("held", flush=True)
        time.sleep(60)
    """
    plan = make_plan("steady")
    run(plan)
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BenchError, match=f"by process {holder.pid}, since"):
            run(plan, resume=True)
        holder.kill()
    assert (tmp_path / "c" / "writer.lock").exists()
    run(plan, resume=True)
    assert not (tmp_path / "c" / "writer.lock").exists()


@posix
def test_a_folder_that_is_deleted_ends_the_campaign_at_once(tmp_path, make_plan, cpu, fake_worker):
    plan = make_plan("steady", "steady-b", "steady-c", runs=3)
    about = environment(cpu, ["bench"], 1)
    said = []

    def say(line):
        said.append(line)
        if len(said) == 2:  # the first cell has ended
            shutil.rmtree(tmp_path / "c")

    with (
        pytest.raises(OutputError, match=r"is gone|cannot be written"),
        Campaign(tmp_path / "c", plan, about, resume=False) as campaign,
    ):
        run_campaign(campaign, RunnerOptions(fake_worker, None, 60.0), say)
    assert len(said) == 3


@posix
@pytest.mark.parametrize("what", ["deleted", "moved"])
def test_a_folder_that_goes_within_a_process_is_noticed_with_its_next_run(
    tmp_path, make_plan, cpu, fake_worker, monkeypatch, what
):
    plan = make_plan("steady", runs=40)
    about = environment(cpu, ["bench"], 1)
    folder, noted = tmp_path / "c", []
    with (
        pytest.raises(OutputError, match=r"runs.csv|tokens.csv") as caught,
        Campaign(folder, plan, about, resume=False) as campaign,
    ):
        note = campaign._note

        def going(row):
            noted.append(row)
            if len(noted) == 2:
                shutil.rmtree(folder) if what == "deleted" else folder.rename(tmp_path / "d")
            return note(row)

        monkeypatch.setattr(campaign, "_note", going)
        run_campaign(campaign, RunnerOptions(fake_worker, None, 60.0), lambda line: None)
    assert "is gone" in caught.value.message
    assert len(noted) == 2


def test_an_unwritable_place_is_named(run, tmp_path, make_plan):
    (tmp_path / "c").write_text("a file", encoding="utf-8")
    with pytest.raises(OutputError, match="cannot be written"):
        run(make_plan("steady"))


def test_a_full_disk_ends_the_worker_and_keeps_finished_runs(
    tmp_path, cpu, fake_worker, make_plan, monkeypatch
):
    plan = make_plan("steady", runs=4)
    with Campaign(tmp_path / "c", plan, environment(cpu, [], 1), resume=False) as campaign:
        write = campaign._runs._write

        def full(data):
            if data.startswith(b"steady") and data.split(b",")[1] == b"3":
                raise OutputError("no room")
            write(data)

        monkeypatch.setattr(campaign._runs, "_write", full)
        with pytest.raises(OutputError, match="no room"):
            run_campaign(campaign, RunnerOptions(fake_worker, None, 60.0), lambda line: None)
    assert [row["run"] for row in rows(tmp_path, "runs.csv")] == ["0", "1", "2"]


SESSION = """
    import sys
    sys.path[:0] = [{root!r}, {here!r}]
    import conftest
    from pathlib import Path
    from qwencli.bench.run.bench_run import RunSettings, run_bench
    from qwencli.output import Output
    plan = conftest.make_plan.__wrapped__()("steady", "hang", runs=4, seed={seed})
    sys.exit(run_bench(plan, conftest.CPU, Path("c"), ["bench"], Output(), RunSettings(False, 90.0),
                     command=conftest.FAKE_WORKER))
"""


def start_session(tmp_path, make_plan):
    """A campaign in a process of its own that gets stuck in the second run of its last cell."""
    seed = next(
        s for s in range(99) if make_plan("steady", "hang", seed=s).order()[-1].model == "hang"
    )
    here = Path(__file__).parents[1]
    script = textwrap.dedent(SESSION.format(root=str(here.parents[1]), here=str(here), seed=seed))
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, encoding="utf-8",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 180
    while len(rows(tmp_path, "runs.csv")) < 7:  # 5 of steady, 2 of hang
        assert time.monotonic() < deadline, process.communicate(timeout=1)
        time.sleep(0.1)
    return process


def worker_pids(parent):
    """Children of `parent`, by /proc where there is one."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(status.parent.name))
    return found


def gone(pid):
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (ProcessLookupError, FileNotFoundError):
        return True


@posix
def test_ctrl_c_ends_the_worker_and_leaves_tables(tmp_path, make_plan):
    process = start_session(tmp_path, make_plan)
    workers = worker_pids(process.pid)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "interrupted; go on with --resume --out c" in err
    assert "Traceback" not in err
    cells = {row["model"]: row for row in rows(tmp_path, "cells.csv")}
    assert cells["steady"]["status"] == "ok"
    assert (cells["hang"]["status"], cells["hang"]["runs"]) == ("unfinished", "1")
    assert "unfinished" in out
    assert all(gone(pid) for pid in workers)


@posix
def test_a_killed_campaign_takes_its_worker_along_and_keeps_its_rows(tmp_path, make_plan):
    process = start_session(tmp_path, make_plan)
    workers = worker_pids(process.pid)
    process.kill()
    process.communicate(timeout=120)
    deadline = time.monotonic() + 120
    while not all(gone(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert [row["status"] for row in rows(tmp_path, "runs.csv")].count("ok") == 5


@posix
def test_kills_at_any_moment_lose_no_finished_run(tmp_path, make_plan):
    """The campaign is killed again and again, each time a moment later, and resumed."""
    here = Path(__file__).parents[1]
    plan = """
    import sys
    sys.path[:0] = [{root!r}, {here!r}]
    import conftest
    from pathlib import Path
    from qwencli.bench.run.bench_run import RunSettings, run_bench
    from qwencli.bench.plan.stopping import StopRule
    from qwencli.output import Output
    plan = conftest.make_plan.__wrapped__()("steady", tokens=20, stop=StopRule(24, 24, processes=2))
    resume = Path("c", "plan.json").exists()
    sys.exit(run_bench(plan, conftest.CPU, Path("c"), ["bench"], Output(),
                       RunSettings(resume, 90.0), command=conftest.FAKE_WORKER))
"""
    script = textwrap.dedent(plan.format(root=str(here.parents[1]), here=str(here)))
    done: list[list[str]] = []
    for kill in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", script], cwd=tmp_path,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8",
        )  # fmt: skip
        deadline = time.monotonic() + 180
        while (
            kill < 3
            and process.poll() is None
            and len(finished(tmp_path)) <= len(done[-1] if done else [])
        ):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        if kill < 3:
            time.sleep(0.03 * kill)
            process.kill()
        _, err = process.communicate(timeout=180)
        runs = finished(tmp_path)
        assert runs[: len(done[-1]) if done else 0] == (done[-1] if done else []), err
        done.append(runs)
    assert done[-1] == [str(number) for number in range(1, 25)], err
    (cell,) = rows(tmp_path, "cells.csv")
    assert (cell["status"], cell["runs"]) == ("ok", "24")
    tokens = [(r["run"], r["token_index"]) for r in rows(tmp_path, "tokens.csv") if r["run"] != "0"]
    assert len(tokens) == len(set(tokens)) == 24 * 20


def finished(tmp_path):
    return [row["run"] for row in rows(tmp_path, "runs.csv") if row["status"] == "ok"]
