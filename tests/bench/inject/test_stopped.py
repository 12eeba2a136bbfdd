"""Whoever is killed while a fault is on, nothing stays stopped and nothing stays at all."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="reads states of processes from /proc"
)
ROOT = Path(__file__).parents[3]


def state(pid):
    """One letter: T = stopped, Z = gone but not waited for; None = gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


def children(pid):
    """All processes that `pid` has started, and theirs."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(file.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            found += [int(file.parent.name), *children(int(file.parent.name))]
    return found


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def start(script):
    script = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" + textwrap.dedent(script)
    return subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


HOG = """
    from qwencli.bench.inject.faults import HogOnTheSameCore
    hog = HogOnTheSameCore("cpu")
    for word in ("went", "halted"):
        print(word, flush=True)
        sys.stdin.readline()
        hog.go() if word == "went" else hog.halt()
    print("over", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
@pytest.mark.parametrize("words", [0, 1, 2])
def test_no_hog_outlives_a_killed_worker(name, words):
    with start(HOG) as worker:
        for _ in range(words):
            worker.stdout.readline()
            worker.stdin.write("\n")
            worker.stdin.flush()
        worker.stdout.readline()
        hogs = children(worker.pid)
        assert hogs
        worker.send_signal(getattr(signal, name))
        worker.wait()
        until(lambda: all(state(pid) in (None, "Z") for pid in hogs))


PAUSED = """
    from qwencli.bench.inject.pauser import Pauser
    pauser = Pauser()
    print(pauser._process.pid, flush=True)
    sys.stdin.readline()
    pauser.pause(float(sys.stdin.readline()))
    while True:
        pass
"""


@pytest.fixture
def paused():
    """A worker that its pauser has stopped for long, the pauser, and the pauser's guard."""
    with start(PAUSED) as worker:
        pauser = int(worker.stdout.readline())
        until(lambda: children(pauser))
        worker.stdin.write("\n30\n")
        worker.stdin.flush()
        until(lambda: state(worker.pid) == "T")
        yield worker, pauser, children(pauser)
        worker.kill()


def test_a_killed_pauser_leaves_its_worker_going(paused):
    worker, pauser, guards = paused
    subprocess.run(["kill", "-KILL", str(pauser)], check=True)
    until(lambda: state(worker.pid) == "R")
    until(lambda: all(state(pid) in (None, "Z") for pid in guards))


def test_a_worker_whose_pauser_was_killed_is_told():
    script = PAUSED.replace(
        "while True:\n        pass",
        """try:
        pauser.pauses()
    except Exception as error:
        print(repr(error), flush=True)
    pauser.pause(1.0)
    pauser.close()""",
    )
    with start(script) as worker:
        pauser = int(worker.stdout.readline())
        until(lambda: children(pauser))
        subprocess.run(["kill", "-KILL", str(pauser)], check=True)
        worker.stdin.write("\n0.05\n")
        worker.stdin.flush()
        assert "the process that pauses this one was killed" in worker.stdout.readline()
        assert worker.wait() == 0


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP"])
def test_a_pauser_finishes_its_pause(paused, name):
    worker, pauser, _ = paused
    subprocess.run(["kill", f"-{name}", str(pauser)], check=True)
    time.sleep(0.2)
    assert state(pauser) in ("S", "R")
    worker.kill()
    worker.wait()


def test_a_pause_ends_and_so_does_the_pauser():
    script = PAUSED.replace("while True:\n        pass", "print(pauser.pauses(), flush=True)")
    with start(script + "    pauser.close()\n") as worker:
        pauser = int(worker.stdout.readline())
        worker.stdin.write("\n0.05\n")
        worker.stdin.flush()
        ((begun, ended),) = eval(worker.stdout.readline())
        assert 0.05 <= ended - begun < 5
        worker.wait()
        assert state(pauser) is None
