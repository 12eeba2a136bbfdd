"""Which model runs, and the offer to download one."""

from __future__ import annotations

import io
import json

import pytest
import typer

from qwencli.cli import run as run_cli
from qwencli.commands import start_engine
from qwencli.commands.options import RunOptions
from qwencli.config import LoadFormat, ModelSource
from qwencli.engine.machine import host
from qwencli.models.resolve import resolve_model
from qwencli.output import Output


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def at_terminal(monkeypatch, tmp_path):
    """A person before a terminal with a 24 GB GPU, and no model downloaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QWENCLI_MODEL", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr("qwencli.models.hub.find_cached", lambda *a, **k: None)
    monkeypatch.setattr(host, "gpu_free_bytes", lambda: 24_000_000_000)

    def answer(*lines):
        terminal = Terminal()
        monkeypatch.setattr("sys.stdin", Terminal("".join(f"{line}\n" for line in lines)))
        monkeypatch.setattr("sys.stderr", terminal)
        return terminal

    return answer


def test_the_offer_names_model_and_size_and_yes_takes_it(at_terminal, capsys):
    terminal = at_terminal("y")
    spec = start_engine.choose_model(RunOptions(), Output())
    assert spec.source is ModelSource.BUILTIN
    offer = terminal.getvalue()
    assert spec.name in offer
    assert " GB) from the Hugging Face hub now? [y/N]: " in offer
    assert capsys.readouterr().out == "", "stdout carries the answer alone"


@pytest.mark.parametrize(
    ("free_gb", "on_gpu", "name"),
    [(12, True, "qwen3-vl-4b"), (12, False, "scenes"), (24, False, "qwen3-vl-4b")],
)
def test_on_a_cpu_a_default_has_to_fit_in_float32(
    at_terminal, monkeypatch, tmp_path, free_gb, on_gpu, name
):
    at_terminal()
    found = resolve_model("qwen3-vl-4b")
    assert found.hub_config is not None
    (tmp_path / "config.json").write_text(json.dumps(dict(found.hub_config)), encoding="utf-8")
    monkeypatch.setattr(
        "qwencli.models.hub.find_cached",
        lambda repo_id, **_: tmp_path if repo_id == found.repo_id else None,
    )
    free = free_gb * 10**9
    monkeypatch.setattr(host, "gpu_free_bytes", lambda: free if on_gpu else None)
    monkeypatch.setattr(host, "host_memory", lambda: host.HostMemory(2 * free, free))
    assert start_engine.choose_model(RunOptions(json=True), Output(quiet=True)).name == name


@pytest.mark.parametrize("lines", [[""], ["n"], ["no"], ["maybe", "n"]])
def test_a_no_keeps_the_bundled_model(at_terminal, lines):
    terminal = at_terminal(*lines)
    spec = start_engine.choose_model(RunOptions(), Output())
    assert spec.source is ModelSource.BUNDLED
    assert terminal.getvalue().count("[y/N]") == len(lines), "what is neither is asked again"


@pytest.mark.parametrize(
    ("options", "quiet"),
    [
        (RunOptions(offline=True), False),
        (RunOptions(device="cpu"), False),
        (RunOptions(load_format=LoadFormat.DUMMY), False),
        (RunOptions(model="scenes"), False),
        (RunOptions(), True),
    ],
)
def test_nobody_is_asked_where_an_offer_makes_no_sense(at_terminal, options, quiet):
    terminal = at_terminal("y")
    spec = start_engine.choose_model(options, Output(quiet=quiet))
    assert spec.source is ModelSource.BUNDLED
    assert not terminal.getvalue()


def test_a_pipe_is_never_asked(at_terminal, monkeypatch):
    terminal = at_terminal("y")
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    assert start_engine.choose_model(RunOptions(), Output()).source is ModelSource.BUNDLED
    assert not terminal.getvalue()


def test_the_environment_names_the_model(monkeypatch, checkpoint, capsys):
    monkeypatch.setenv("QWENCLI_MODEL", str(checkpoint("qwen3")))
    assert run_cli(["chat", "Describe", "--max-new-tokens", "2", "--device", "cpu"]) == 0
    assert "scenes" not in capsys.readouterr().err


def test_the_bundled_model_says_what_it_is(monkeypatch, capsys):
    monkeypatch.setenv("QWENCLI_MODEL", "scenes")
    arguments = ["chat", "Hello", "--max-new-tokens", "2", "--device", "cpu"]
    assert run_cli(arguments) == 0
    assert "knows drawn scenes only" in capsys.readouterr().err
    assert run_cli([*arguments, "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_end_of_input_at_the_offer_ends_the_command(at_terminal):
    at_terminal()
    with pytest.raises(typer.Abort):
        start_engine.choose_model(RunOptions(), Output())
