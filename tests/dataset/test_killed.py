"""A run that is stopped, killed, or beside another: nothing lost, doubled or half-written."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.dataset.conftest import captions

PROGRAM = Path(__file__).with_name("fake_engine.py")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals")


def start(*arguments, step_s=0.0, own_group=False, **environment):
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), *map(str, arguments), "--seed", "1"],
        env={**os.environ, "FAKE_STEP_S": str(step_s), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0 if own_group else None,
    )


def wait_for(pattern: str, folder: Path, count: int = 1) -> None:
    end = time.monotonic() + 60
    while len(list(folder.glob(pattern))) < count:
        assert time.monotonic() < end, "nothing is captioned"
        time.sleep(0.005)


def done_of(folder: Path, name: str = "manifest.sqlite") -> dict[str, str]:
    path = folder / ".qwencli" / name
    if not path.exists():
        return {}
    database = sqlite3.connect(path)
    try:
        return dict(
            database.execute(
                "SELECT key, coalesce(written, caption) FROM captions WHERE status = 'done'"
            )
        )
    except sqlite3.OperationalError:  # killed before there was a table
        return {}
    finally:
        database.close()


@pytest.mark.parametrize("mode", ["skip", "append"])
def test_killed_at_any_moment(pictures, mode, finish):
    names = [f"{number}.png" for number in range(120)]
    undisturbed, folder = pictures(*names, folder="whole"), pictures(*names)
    for each in (undisturbed, folder):
        for name in names[::3] if mode == "append" else ():
            (each / name).with_suffix(".txt").write_text("mine\n", encoding="utf-8")
    finish(undisturbed, "--existing", mode)
    rng = random.Random(mode)
    killed = 0
    for _ in range(4):
        process = start(folder, "--existing", mode, step_s=0.02)
        with process:
            wait_for(".qwencli/manifest.sqlite-wal", folder)
            time.sleep(rng.uniform(0, 0.4))
            process.kill()
        killed += process.returncode == -signal.SIGKILL
        for key, text in done_of(folder).items():
            path = (folder / key).with_suffix(".txt")
            assert path.read_text(encoding="utf-8") == text + "\n"
        assert all(text.endswith("\n") for text in captions(folder).values())
    assert killed
    finish(folder, "--existing", mode)
    assert captions(folder) == captions(undisturbed)
    assert not list(folder.rglob("*.partial"))


def test_what_others_are_writing_stays(pictures, tmp_path, finish):
    """Only what killed runs left is removed, wherever captions go."""
    folder, out = pictures("a.png", "sub/b.png"), tmp_path / "out"
    gone, living = (
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(2)
    )
    with gone:
        gone.kill()
    kept = [f".qwencli-{living.pid}-0.partial"]
    for root in (folder, out):
        (root / "sub").mkdir(parents=True, exist_ok=True)
        for number in (gone.pid, os.getpid(), living.pid):
            (root / "sub" / f".qwencli-{number}-0.partial").touch()
    with living:
        finish(folder, "-r", "--output", out)
        assert [path.name for path in out.rglob("*.partial")] == kept
        assert len(list(folder.rglob("*.partial"))) == 3  # of runs that write beside the pictures
        finish(folder, "-r")
        assert [path.name for path in folder.rglob("*.partial")] == kept


def test_a_table_of_a_killed_run_is_made_whole(pictures, finish):
    folder = pictures(*(f"{number}.png" for number in range(60)))
    table = folder / "captions.jsonl"
    process = start(folder, "--output", table, step_s=0.02)
    with process:
        wait_for(".qwencli/captions.jsonl.sqlite-wal", folder)
        time.sleep(0.5)
        process.kill()
    finish(folder, "--output", table)
    rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()]
    assert sorted(row["file_name"] for row in rows) == sorted(p.name for p in folder.glob("*.png"))
    assert len(done_of(folder, "captions.jsonl.sqlite")) == 60


def test_a_disk_that_fills_up_is_one_line_and_the_same_command_goes_on(pictures, tmp_path, finish):
    """The system itself refuses to write more than so much into a file."""
    import resource

    if not hasattr(resource, "prlimit"):
        pytest.skip("Linux has a limit for another process")
    folder, out = pictures(*(f"{number}.png" for number in range(150))), tmp_path / "out"
    process = start(folder, "--output", out, "--quiet", step_s=0.002)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (120_000, resource.RLIM_INFINITY))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    [line] = err.splitlines()
    assert line.startswith("error: ") and "cannot be written" in line and "free space" in line
    written = captions(out)
    assert 0 < len(written) < 150 and all(text.endswith(".\n") for text in written.values())
    assert not list(out.rglob("*.partial"))
    finish(folder, "--output", out)
    assert len(captions(out)) == 150 and captions(out).items() >= written.items()


def test_ctrl_c_finishes_what_runs_and_says_how_to_go_on(pictures, finish):
    folder = pictures(*(f"{number}.png" for number in range(200)))
    process = start(folder, step_s=0.03)
    wait_for("*.txt", folder)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Ctrl-C again leaves at once" in err and "the same command goes on" in err
    written = captions(folder)
    assert 0 < len(written) < 200
    assert len(done_of(folder)) == len(written)
    finish(folder)
    assert len(captions(folder)) == 200 and captions(folder).items() >= written.items()


def test_a_second_ctrl_c_leaves_at_once(pictures):
    folder = pictures(*(f"{number}.png" for number in range(40)))
    # What runs takes two more steps, which is longer than the test waits.
    process = start(folder, step_s=2.5)
    wait_for("*.txt", folder)
    process.send_signal(signal.SIGINT)
    while "stopping" not in (line := process.stderr.readline()):
        assert line, "it has ended"
    before = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert time.monotonic() - before < 3.5
    assert err.endswith("left; what is done is kept, and the same command goes on\n")


def test_the_second_of_two_runs_leaves(pictures, finish):
    folder = pictures(*(f"{number}.png" for number in range(60)))
    first = start(folder, step_s=1.5)
    with first:
        wait_for("*.txt", folder)
        second = start(folder)
        _, err = second.communicate(timeout=60)
        assert second.returncode == 1
        assert f"is being written by process {first.pid}" in err
        first.kill()
    finish(folder)  # the lock of a killed run holds nobody up
    assert len(captions(folder)) == 60


def test_overwriting_goes_on_where_it_was_stopped(pictures, caption, engine):
    folder = pictures(*(f"{number}.png" for number in range(60)))
    for path in folder.glob("*.png"):
        path.with_suffix(".txt").write_text("old\n", encoding="utf-8")
    process = start(folder, "--existing", "overwrite", step_s=0.05)
    with process:
        while len(done_of(folder)) < 5:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
    done = len(done_of(folder))
    assert 0 < done < 60
    assert caption(folder, "--existing", "overwrite", "--seed", "1") == 0
    assert engine.answered == 60 - done
    assert "old\n" not in captions(folder).values()
    assert caption(folder, "--existing", "overwrite", "--seed", "1") == 0
    assert engine.answered == 120 - done
