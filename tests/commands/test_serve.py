"""`qwencli serve`: what it refuses before it loads anything, and how it begins and ends."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

import qwencli
from qwencli.cli import run
from qwencli.commands import serve as command
from qwencli.server.settings import ServerSettings


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--host", "0.0.0.0"], "there is no key"),
        (["--host", "::"], "there is no key"),
        (["--api-key", ""], "--api-key is empty"),
        (["--api-key", "k\u00e9y"], "no header can carry"),
        (["--api-key", "a\nb"], "no header can carry"),
        (["--api-key", " key"], "blanks around it"),
        (["--host", "no.such.host.invalid", "--api-key", "k"], "cannot listen"),
        (["--temperature", "9"], "out of range"),
    ],
)
def test_what_is_refused(capsys, monkeypatch, arguments, told) -> None:
    monkeypatch.delenv("QWENCLI_API_KEY", raising=False)
    assert run(["serve", "--port", "0", "--model", "scenes", *arguments]) == 2
    said = capsys.readouterr()
    assert told in said.err and said.out == "" and said.err.count("\n") == 1


def test_a_port_that_is_taken(capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert run(["serve", "--port", port, "--model", "scenes"]) == 2
    assert "choose another --port" in capsys.readouterr().err


def test_without_the_extra_it_names_it(capsys, monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name)
    )
    assert run(["serve"]) == 1
    assert "pip install 'qwencli[serve]'" in capsys.readouterr().err


def begun(
    *arguments: str, started_as: tuple[str, ...] = ("-m", "qwencli")
) -> tuple[subprocess.Popen[str], str]:
    """`qwencli serve` of the bundled model, and its address."""
    command = [sys.executable, *started_as, "serve", "--model", "scenes", "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if found := re.search(r"serving scenes at (http://\S+)", line):
            return process, found[1]
    raise AssertionError(f"it ended before it served: {said}")


def processes_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    own = psutil.Process(process.pid)
    return [own, *own.children(recursive=True)]


STREAM = {
    "messages": [{"role": "user", "content": "Describe the scene."}],
    "max_tokens": 900,
    "ignore_eos": True,
    "stream": True,
}


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(
    ("number", "whole_group"),
    [(signal.SIGINT, True), (signal.SIGINT, False), (signal.SIGTERM, False)],
)
def test_it_serves_until_it_is_ended(number, whole_group) -> None:
    """Ctrl-C goes to all processes of a terminal, others to one; who waits is told either way."""
    process, address = begun()
    there = processes_of(process)
    with (
        httpx.Client(base_url=address, timeout=30) as client,
        client.stream("POST", "/v1/chat/completions", json=STREAM) as answer,
    ):
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        (os.killpg if whole_group else os.kill)(process.pid, number)
        said = list(lines)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "[DONE]" not in said[-2:] and "has stopped" in "".join(said[-2:])
    assert out == "" and "Traceback" not in err
    assert not psutil.wait_procs(there, timeout=10)[1]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/health")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_files_of_the_working_folder_shadow_no_module(tmp_path, monkeypatch) -> None:
    for name in ("random", "socket", "typing", "multiprocessing", "pickle", "uvicorn", "numpy"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('the wrong {name}')")
    starts = tmp_path / "bin" / "qwencli"  # as the installed script is: its folder is on the path
    starts.parent.mkdir()
    starts.write_text("from qwencli.cli import main\n\nif __name__ == '__main__':\n    main()\n")
    here = str(Path(qwencli.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", here)
    monkeypatch.chdir(tmp_path)
    process, address = begun(started_as=(str(starts),))
    assert httpx.get(f"{address}/health").status_code == 200
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0 and "the wrong" not in out + err


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_neither_process_outlives_the_other() -> None:
    process, address = begun()
    there = processes_of(process)
    assert httpx.get(f"{address}/health").status_code == 200
    process.kill()
    process.communicate(timeout=30)
    assert not psutil.wait_procs(there, timeout=15)[1]

    process, address = begun()
    there = processes_of(process)
    speaks = next(
        each
        for each in there[1:]
        if any(
            port.laddr.port == int(address.rpartition(":")[2]) for port in each.net_connections()
        )
    )
    speaks.kill()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "the process that speaks HTTP has ended with -9" in err and "Traceback" not in err
    assert not psutil.wait_procs(there, timeout=15)[1]


@pytest.mark.parametrize("flag", ["--json", "--stats"])
def test_options_of_answers_are_none_of_a_server(capsys, flag) -> None:
    assert run(["serve", flag]) == 2
    assert "No such option" in capsys.readouterr().err


def test_help_says_the_servers_own_length() -> None:
    option = inspect.signature(command.serve).parameters["max_new_tokens"].annotation
    said = next(each for each in option.__metadata__ if hasattr(each, "help")).help
    assert f"Of serve: {ServerSettings('any').usual_tokens}" in said
