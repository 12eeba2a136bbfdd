"""The boundary between the program and a person: start-up, errors, exit codes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qwencli import __version__, cli
from qwencli.errors import DeviceError, UsageError

HEAVY = ("torch", "transformers", "pandas", "numpy", "PIL", "rich.markdown", "huggingface_hub")


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["caption", "--help"]])
def test_help_and_version_import_nothing_heavy(arguments):
    done = python(
        "import sys\n"
        "from qwencli.cli import run\n"
        f"code = run({arguments!r})\n"
        f"loaded = [name for name in {HEAVY[:4]!r} if name in sys.modules]\n"
        "print('LOADED', loaded, code)"
    )
    assert done.stdout.splitlines()[-1] == "LOADED [] 0", done.stderr


def test_the_command_line_works_without_torch():
    """Poisoned: any import of torch fails."""
    done = python(
        "import sys; sys.modules['torch'] = None\n"
        "from qwencli.cli import run\n"
        "sys.exit(run(['models', '--json']))"
    )
    assert done.returncode == 0, done.stderr


def test_version(capsys):
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"qwencli {__version__}\n"


def test_no_arguments_show_the_help(capsys):
    assert cli.run([]) == 0
    assert "caption" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["caption"], "Missing argument"),
        (["caption", "a.png", "--quantization", "3bit"], "'3bit' is not one of"),
        (["caption", "a.png", "--top-k", "many"], "Invalid value for '--top-k'"),
        (["caption", "a.png", "--top-p", "3"], "--top-p 3.0 is out of range"),
        (["caption", "a.png", "--temperature", "nan"], "--temperature nan is out of range"),
        (["caption", "a.png", "--max-new-tokens", "0"], "--max-new-tokens 0 is out of range"),
        (["caption", "a.png", "--greedy", "--temperature", "1"], "exclude each other"),
        (["caption", "a.png", "--prompt", "x", "--preset", "tags"], "exclude each other"),
        (["caption", "a.png", "--preset", "poem"], "--preset 'poem' is unknown"),
        (["caption", "a.png", "--max-pixels", "0"], "--max-pixels 0 is out of range"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, part, capsys):
    assert cli.run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert part in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def raising(error):
    def app(*args, **kwargs):
        raise error

    return app


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("wrong", "do this"), 2, "error: wrong (do this)\n"),
        (DeviceError("no GPU"), 1, "error: no GPU\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            ZeroDivisionError("division\nby zero"),
            1,
            "error: ZeroDivisionError: division (this is a fault of qwencli; run again with "
            "--debug and report the traceback)\n",
        ),
    ],
)
def test_errors_become_one_line(monkeypatch, capsys, error, code, line):
    monkeypatch.setattr(cli, "app", raising(error))
    assert cli.run(["caption"]) == code
    assert capsys.readouterr().err == line


def test_ctrl_c_is_one_line_and_exit_code_130():
    done = python(
        "import sys\n"
        "from qwencli import cli\n"
        "from qwencli.commands import model_choice\n"
        "def interrupted(*arguments): raise KeyboardInterrupt\n"
        "model_choice.choose_model = interrupted\n"
        "sys.exit(cli.run(['caption', 'a.png']))"
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.strip() == "interrupted"


def test_debug_lets_the_traceback_through(monkeypatch):
    monkeypatch.setattr(cli, "app", raising(DeviceError("no GPU")))
    with pytest.raises(DeviceError):
        cli.run(["caption", "--debug"])


def test_a_closed_pipe_is_no_traceback():
    done = subprocess.run(
        f"{sys.executable} -m qwencli models --json | head -c 1",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "{" or done.stdout == "["
    assert done.stderr == ""
