"""`qwencli serve`: what it refuses before it loads anything, and how it begins and ends."""

from __future__ import annotations

import importlib.util
import inspect
import socket

import httpx
import pytest

from qwencli.cli import run
from qwencli.commands import serve as command
from qwencli.server import listen
from qwencli.server.app import ServerSettings


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


def test_it_serves_until_it_is_ended(capsys, monkeypatch) -> None:
    running = listen.run_server
    found = []

    def ended_at_once(server, opened, ready, warn):
        def look() -> None:
            ready()
            found.append(opened.getsockname())
            server.should_exit = True

        running(server, opened, look, warn)

    monkeypatch.setattr(listen, "run_server", ended_at_once)
    assert run(["serve", "--port", "0", "--model", "scenes", "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert f"serving scenes at http://127.0.0.1:{found[0][1]}" in said.err and said.out == ""
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{found[0][1]}/health")


@pytest.mark.parametrize("flag", ["--json", "--stats"])
def test_options_of_answers_are_none_of_a_server(capsys, flag) -> None:
    assert run(["serve", flag]) == 2
    assert "No such option" in capsys.readouterr().err


def test_help_says_the_servers_own_length() -> None:
    option = inspect.signature(command.serve).parameters["max_new_tokens"].annotation
    said = next(each for each in option.__metadata__ if hasattr(each, "help")).help
    assert f"Of serve: {ServerSettings('any').usual_tokens}" in said
