from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.whole_campaign import STEPS, Step, WholeCampaign, cores_of, read_steps
from qwencli.bench.plan import prepare
from qwencli.bench.plan.predict import MachineSpeed
from qwencli.bench.run import bench_run
from qwencli.cli import run
from tests.bench.conftest import CPU

SAYS = (
    'python -c \'import os, pathlib, sys; sys.stdout.write(os.environ["CUDA_VISIBLE_DEVICES"]);'
    ' pathlib.Path(sys.argv[1]).write_text("made"); sys.exit(int(sys.argv[2]))\' {out}/made'
)


def test_every_step_runs_once_on_one_gpu(tmp_path, capsys):
    steps = [Step(name, 1, f"{SAYS} 0") for name in ("a", "b", "c")]
    assert WholeCampaign(steps, tmp_path, gpus=2).run() == 0
    assert all((tmp_path / step.name / "made").read_text() == "made" for step in steps)
    logs = {(tmp_path / f"{step.name}.log").read_text() for step in steps}
    assert logs <= {"0", "1"}
    assert WholeCampaign(steps, tmp_path, gpus=2).run() == 0
    assert {(tmp_path / f"{step.name}.log").read_text() for step in steps} == logs
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_step_that_fails_is_told_and_the_others_run(tmp_path, capsys):
    steps = [
        Step("bad", 2, f"{SAYS} 3"),
        Step("cells", 1, f"{SAYS} 1"),
        Step("good", 1, f"{SAYS} 0"),
    ]
    assert WholeCampaign(steps, tmp_path, gpus=1).run() == 2
    out = capsys.readouterr().out
    assert "bad: exit code 3" in out and "good: exit code 0" in out
    # What broke off is run again; a campaign with a cell that broke is not.
    assert not (tmp_path / "bad.ended").exists()
    assert (tmp_path / "cells.ended").exists()


def test_a_campaign_goes_on_in_its_folder(tmp_path):
    step = Step("modes", 1, "qwencli bench --out {out}")
    first = step.arguments(tmp_path)
    assert first == [sys.executable, "-m", "qwencli", "bench", "--out", str(tmp_path / "modes")]
    (tmp_path / "modes").mkdir()
    assert step.arguments(tmp_path) == first
    (tmp_path / "modes" / "plan.json").touch()
    assert step.arguments(tmp_path) == [*first, "--resume"]


def test_the_longest_step_is_first_and_names_are_checked():
    steps = read_steps(STEPS, ())
    minutes = [step.minutes for step in steps]
    assert minutes == sorted(minutes, reverse=True)
    assert [step.name for step in read_steps(STEPS, ["engines"])] == ["engines"]
    with pytest.raises(SystemExit, match="no step nothing: modes"):
        read_steps(STEPS, ["nothing"])


@pytest.mark.parametrize(
    "step", [step for step in read_steps(STEPS, ()) if "bench --" in step.command]
)
def test_the_campaigns_are_ones_that_bench_would_run(step, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare, "read_device_facts", lambda device: CPU)
    monkeypatch.setattr(bench_run, "read_machine_speed", lambda _: MachineSpeed(1e10, 1e5, 2.0))
    python, option, program, *arguments = step.arguments(tmp_path)
    assert (python, option, program) == (sys.executable, "-m", "qwencli")
    assert run([*arguments, "--dry-run", "--device", "cpu"]) == 0, capsys.readouterr().err
    assert "cells" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal to a group of programs")
def test_ctrl_c_reaches_the_step_and_no_other_begins(tmp_path):
    waits = "python -c 'import time; print(1, flush=True); time.sleep(60)'"
    steps = "".join(
        f"[[steps]]\nname = '{name}'\nminutes = {minutes}\ncommand = \"{waits}\"\n"
        for name, minutes in (("long", 2), ("short", 1))
    )
    (tmp_path / "steps.toml").write_text(steps)
    command = [sys.executable, "-m", "benchmarks.whole_campaign", "--gpus", "1"]
    command += ["--steps", str(tmp_path / "steps.toml"), "--out", str(tmp_path / "out")]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(command, cwd=root, start_new_session=True)
    try:
        log, end = tmp_path / "out" / "long.log", time.monotonic() + 120
        while not (log.exists() and log.read_text()):
            assert time.monotonic() < end
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(120) == 130
    finally:
        process.kill()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["long", "long.log"]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores cannot be chosen here")
def test_gpus_share_the_cores_out():
    cores = os.sched_getaffinity(0)
    shares = [cores_of(gpu, 2) for gpu in range(2)]
    assert all(share <= cores for share in shares)
    assert len(cores) < 2 or not shares[0] & shares[1]
