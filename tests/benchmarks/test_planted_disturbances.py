"""What the script makes of campaigns that it did not have to wait for."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    path = ROOT / "benchmarks" / "planted_disturbances.py"
    spec = importlib.util.spec_from_file_location("planted_disturbances", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_it_counts_what_is_called_ok_and_what_is_named(script):
    def cell(kind, verdict, *causes, waited=0.0):
        return script.Disturbed(kind, "c", "ok", verdict, waited, None, list(causes))

    found = script._summary(
        [
            cell("quiet", "ok", waited=1.5),
            cell("quiet", "not quotable: 9% of decode waited", "preemption", waited=9.0),
            cell("all_cores", "not quotable: 60%", "preemption"),
            cell("gpu", "not quotable: 60%", "throttle"),
            cell("gpu", "ok"),
        ]
    )
    assert (found["disturbed"], found["called_ok"]) == (3, 1)
    assert found["named_right_percent"] == pytest.approx(33.3)
    assert (found["quiet_refused"], found["quiet_waited_percent_at_most"]) == (1, 9.0)


@pytest.mark.parametrize(
    ("campaign", "cells"),
    [("2026-11-28-h200x2-engines", 4), ("2026-11-25-h100-plain-operators/again", 1)],
)
def test_a_power_limit_is_simulated_in_half_of_the_cells_of_a_campaign(
    script, tmp_path, campaign, cells
):
    found = script._held_back(ROOT / "results" / campaign, tmp_path / "copy")
    assert len(found) == cells
    assert not any(cell.quotable for cell in found)
    assert all(cell.named for cell in found)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_what_a_campaign_started_is_stopped_and_goes_on(script):
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while 1: pass'])"
    with subprocess.Popen([sys.executable, "-c", code]) as campaign:
        try:
            with script.stopped(campaign):
                end, seen = time.monotonic() + 20, set()
                while time.monotonic() < end and psutil.STATUS_STOPPED not in seen:
                    seen |= {child.status() for child in psutil.Process(campaign.pid).children()}
            assert psutil.STATUS_STOPPED in seen
            (child,) = psutil.Process(campaign.pid).children()
            assert child.status() != psutil.STATUS_STOPPED
        finally:
            for process in (*psutil.Process(campaign.pid).children(), campaign):
                process.kill()
