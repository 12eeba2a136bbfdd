"""The command runs to its end, with neighbours in turns."""

from __future__ import annotations

import sys
from contextlib import contextmanager

import pytest

from benchmarks import neighbours
from qwencli.bench.inject import contention


@pytest.mark.parametrize(
    ("kind", "program"), [("copying", contention.COPYING), ("computing", contention.COMPUTING)]
)
def test_turns_beside_a_command_whose_exit_code_counts(monkeypatch, kind, program):
    turns = []

    @contextmanager
    def made_up(what):
        turns.append(what)
        yield
        turns.append("ended")

    wait = "import time; time.sleep(1.0); raise SystemExit(3)"
    monkeypatch.setattr(contention, "neighbours", made_up)
    arguments = ["--kind", kind, "--seconds", "0.2", "--", sys.executable, "-c", wait]
    monkeypatch.setattr(sys, "argv", ["neighbours", *arguments])
    assert neighbours.main() == 3
    assert turns[:2] == [program, "ended"]
    assert turns.count(program) == turns.count("ended")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seconds", "0", "--", "true"], "--seconds: give more than 0"),
        (["--", "no-such-program"], "no-such-program cannot be run: No such file or directory"),
    ],
)
def test_bad_input_gets_one_line(monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(sys, "argv", ["neighbours", "--kind", "copying", *arguments])
    with pytest.raises(SystemExit) as ended:
        neighbours.main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
