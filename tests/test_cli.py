"""The boundary between the program and a person: start-up, errors, exit codes."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys

import pytest
import typer

from qwencli import __version__, cli
from qwencli.commands.chat_settings import with_setting
from qwencli.config import SamplingOptions
from qwencli.engine.resolve import device_without_torch
from qwencli.errors import DeviceError, UsageError
from qwencli.models.builtin import bundled_folder
from qwencli.typed_values import parse_max_pixels, parse_seq_len

HEAVY = (
    "torch",
    "transformers",
    "pandas",
    "scipy",
    "numpy",
    "PIL",
    "rich.markdown",
    "huggingface_hub",
)


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["caption", "--help"]])
def test_help_and_version_import_nothing_heavy(arguments):
    unasked = () if arguments[0] == "--help" else ("qwencli.commands.bench", "qwencli.bench")
    done = python(
        "import sys\n"
        "from qwencli.cli import run\n"
        f"code = run({arguments!r})\n"
        f"loaded = [name for name in {(*HEAVY[:5], *unasked)!r} if name in sys.modules]\n"
        "print('LOADED', loaded, code)"
    )
    assert done.stdout.splitlines()[-1] == "LOADED [] 0", done.stderr


@pytest.mark.parametrize("arguments", [["--version"], ["caption", "missing.png"]])
def test_python_looks_for_no_garbage_at_its_end(arguments) -> None:
    done = python(
        "import atexit, gc, sys\n"
        "atexit.register(lambda: print('AT EXIT', gc.get_freeze_count() > 1000))\n"
        f"sys.argv[1:] = {arguments!r}\n"
        "from qwencli.cli import main\nmain()"
    )
    assert done.stdout.splitlines()[-1] == "AT EXIT True", done.stderr
    assert (done.returncode == 0) == (arguments == ["--version"])


def test_a_picture_is_opened_without_the_metadata_of_packages() -> None:
    done = python(
        "import sys\n"
        "import qwencli.engine.frontend.videos, qwencli.models.hub\n"
        "print([n for n in ('importlib.metadata', 'importlib.resources') if n in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr


def _all_commands(command, path=()):
    yield path
    for name in command.list_commands(None) if hasattr(command, "list_commands") else ():
        yield from _all_commands(command.get_command(None, name), (*path, name))


def test_no_line_of_any_help_is_cut_at_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    paths = list(_all_commands(typer.main.get_command(cli.app)))
    assert {(), ("caption",), ("bench", "compare"), ("dataset", "report")} <= set(paths)
    for path in paths:
        assert cli.run([*path, "--help"]) == 0
        for line in capsys.readouterr().out.splitlines():
            assert "…" not in line and not re.search(r"[a-z]\.\.\.$", line.rstrip("│ ")), line
            assert len(line.rstrip()) <= 80


# What may be written for a value, plainly or not.
WRITTEN = (
    "4", "-1", "007", " 5", "1e3", "0x10", "1_000", "٣", "nan", "inf", "0.5", ".5", "5.", "+2",
    "4bit", "4BIT", "auto", "true", "no", "", "-", "a b", "é", "99999999999999999999", "769",
)  # fmt: skip


@pytest.mark.parametrize("name", ["caption", "chat", "serve"])
def test_values_are_read_as_typer_reads_them(name):
    """Plain ones without pydantic, which would take longer than a caption of a kept model. Numbers
    are ours to read, see below."""
    command = typer.main.get_group(cli.app).get_command(None, name)
    context = command.context_class(command)

    def outcome(read, value):
        try:
            got = read(context, value)
        except Exception as error:  # noqa: BLE001 - compared
            return type(error), str(error)
        return type(got), repr(got)

    for parameter in command.get_params(context):
        theirs = functools.partial(type(parameter).process_value, parameter)
        if parameter.callback is not None or parameter.type_descriptor.annotation in (int, float):
            continue
        several = parameter.multiple or parameter.nargs == -1
        values = [[text] for text in WRITTEN] + [("a", "b"), ()] if several else list(WRITTEN)
        for value in (*values, None, parameter.get_default(context)):
            wanted = outcome(theirs, value)
            assert outcome(parameter.process_value, value) == wanted, (parameter.name, value)


@pytest.mark.parametrize(
    ("text", "whole", "number"),
    [
        ("5", 5, 5.0), (" 5 ", 5, 5.0), ("+5", 5, 5.0), ("-1", -1, -1.0), ("007", 7, 7.0),
        ("5.0", None, 5.0), (".5", None, 0.5), ("1e3", None, 1000.0), ("1e-3", None, 0.001),
        ("1_000", None, None), ("٥", None, None), ("0x10", None, None), ("nan", None, None),
        ("inf", None, None), ("", None, None), ("-", None, None), ("5 5", None, None),
        ("many", None, None),
    ],
)  # fmt: skip
def test_numbers_are_read_alike_in_commands_and_in_a_chat(text, whole, number):
    """By one reader, and what is wrong is said in our words."""
    group = typer.main.get_group(cli.app)
    for command, name, wanted in (
        ("serve", "port", whole),
        ("caption", "max_new_tokens", whole),
        ("caption", "temperature", number),
    ):
        made = group.get_command(None, command)
        context = made.context_class(made)
        parameter = next(each for each in made.get_params(context) if each.name == name)
        flag = "--" + name.replace("_", "-")
        if wanted is None or (name == "port" and wanted < 0):
            with pytest.raises(UsageError, match=f"^{flag} (is a |-1 is out of range)"):
                parameter.process_value(context, text)
        else:
            assert parameter.process_value(context, text) == wanted
    for name, wanted in (("seed", whole), ("repetition_penalty", number)):
        if wanted is None:
            with pytest.raises(UsageError, match=f"^{name} is a "):
                with_setting(SamplingOptions(), name, text)
        elif name == "seed" or 1 <= wanted <= 2:
            assert getattr(with_setting(SamplingOptions(), name, text), name) == wanted
    for read in (parse_max_pixels, parse_seq_len):
        if whole is None or whole < 0:
            with pytest.raises(UsageError, match="is not a "):
                read(text)
        else:
            assert read(text) == whole


@pytest.mark.parametrize("command", ["caption", "chat", "serve"])
def test_the_number_that_is_advised_is_one_that_the_option_takes(command):
    """`--samples 1000` was advised, of at most 100."""
    made = typer.main.get_group(cli.app).get_command(None, command)
    context, tried = made.context_class(made), 0
    for parameter in made.get_params(context):
        if parameter.type_descriptor.annotation in (int, float) and not parameter.callback:
            with pytest.raises(UsageError) as raised:
                parameter.process_value(context, "many")
            flag, advised = raised.value.hint.split()
            assert flag in parameter.opts
            assert parameter.process_value(context, advised) == float(advised)
            tried += 1
    assert tried


def test_the_command_line_works_without_torch():
    """Poisoned: any import of torch fails."""
    done = python(
        "import sys; sys.modules['torch'] = None\n"
        "from qwencli.cli import run\n"
        "sys.exit(run(['models', '--json']))"
    )
    assert done.returncode == 0, done.stderr


REFUSED_EARLY = {
    "caption PIC --engine transformers --cache static-graph": "static-graph needs the native",
    "caption PIC --batch-invariant --cache dynamic": "--batch-invariant runs over pages",
    "caption PIC --device cpu --cache static-graph": "CUDA graphs need a CUDA device",
    "caption PIC --device cpu --kernels triton": "triton kernels need an NVIDIA GPU",
    "caption PIC --device cpu --attention flash_attention_2": "needs a CUDA GPU",
    "caption PIC --device gpu": "--device 'gpu' is not a device",
    "caption PIC --model nosuch": "no model is called 'nosuch'",
    "caption PIC --model FOLDER": "no weights",
    "caption PIC --max-seq-len 999999999": "was made for",
    "caption PIC --model qwen3.5-4b --load-format dummy --cache dynamic": "gated delta nets",
    "serve --port 0 --device gpu": "--device 'gpu' is not a device",
    "warm --device cpu": "there are no kernels to compile",
    "warm --device gpu": "--device 'gpu' is not a device",
    "bench --model scenes --device gpu": "--device 'gpu' is not a device",
}


def test_what_can_be_told_without_torch_is_told_before_torch_is_imported(tmp_path):
    folder = tmp_path / "no-weights"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        (folder / name).write_bytes((bundled_folder() / name).read_bytes())
    commands = [
        [{"PIC": "examples/scene.png", "FOLDER": str(folder)}.get(word, word) for word in c.split()]
        for c in REFUSED_EARLY
    ]
    code = (
        "import sys\nfrom qwencli.cli import run\n"
        f"for command in {commands!r}:\n"
        "    run([*command, '--quiet'])\n"
        "    print('torch' in sys.modules, file=sys.stderr)"
    )
    environment = os.environ | {"QWENCLI_MODEL": "scenes"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )
    lines = done.stderr.splitlines()
    for (command, said), line, imported in zip(
        REFUSED_EARLY.items(), lines[::2], lines[1::2], strict=True
    ):
        assert line.startswith("error: ") and said in line, (command, line)
        assert line.endswith(")"), f"{command}: says nothing of what to do"
        assert imported == "False", command


@pytest.mark.parametrize(
    ("version", "device", "known"),
    [
        ("2.9.0+cpu", "auto", "cpu"),
        ("2.9.0+cu128", "auto", None),
        ("2.9.0", "cuda:1", None),
        ("2.9.0", "cpu", "cpu"),
        (None, "auto", None),
    ],
)
def test_the_device_that_is_known_without_torch(monkeypatch, version, device, known):
    monkeypatch.setattr("qwencli.engine.machine.packages.package_version", lambda name: version)
    assert device_without_torch(device) == known


def test_a_build_without_cuda_refuses_it_without_being_imported(monkeypatch):
    monkeypatch.setattr("qwencli.engine.machine.packages.package_version", lambda name: "2.9.0+cpu")
    with pytest.raises(DeviceError, match="CPU-only"):
        device_without_torch("cuda")


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
        (
            ["caption", "a.png", "--engine", "vllm"],
            "of 'native', 'transformers', 'remote' (see --help)",
        ),
        (
            ["caption", "a.png", "--top-k", "many"],
            "--top-k is a whole number, not many",
        ),
        (["caption", "a.png", "--top-p", "3"], "--top-p 3.0 is out of range"),
        (["caption", "a.png", "--temperature", "nan"], "--temperature is a number, not nan"),
        (["caption", "a.png", "--max-new-tokens", "0"], "--max-new-tokens 0 is out of range"),
        (["caption", "a.png", "--greedy", "--temperature", "1"], "exclude each other"),
        (["caption", "a.png", "--prompt", "x", "--preset", "tags"], "exclude each other"),
        (["caption", "a.png", "--preset", "poem"], "--preset 'poem' is unknown"),
        (["caption", "a.png", "--max-pixels", "0"], "--max-pixels 0 is out of range"),
        (["bench", "--runs", "0"], "--runs 0 is out of range (give a value from 1 on)"),
        (["bench", "--max-noise", "x"], "--max-noise is a number, not x"),
        (["bench", "study", "C01", "--runs", "x"], "--runs is a whole number, not x"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, part, capsys):
    assert cli.run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert part in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_a_group_named_alone_shows_its_help_and_no_error(capsys):
    assert cli.run(["dataset"]) == 2
    out, err = capsys.readouterr()
    assert "report" in out
    assert "error" not in err


def test_a_misspelt_command_is_told_the_nearest_one(capsys):
    assert cli.run(["captoin"]) == 2
    assert "Did you mean 'caption'?" in capsys.readouterr().err


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
        "from qwencli.commands import start_engine\n"
        "def interrupted(*arguments): raise KeyboardInterrupt\n"
        "start_engine.choose_model = interrupted\n"
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


COMMANDS = ("--version", "--help", "caption --help", "bench --help", "models", "diagnose --quick")


def started(command, redirected, tmp_path):
    """One command line in a shell, its streams redirected; what still arrives is in files."""
    out, err = tmp_path / "out", tmp_path / "err"
    line = f"{sys.executable} -m qwencli {command} {redirected}"
    with out.open("w") as stdout, err.open("w") as stderr:
        done = subprocess.run(
            line, shell=True, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, check=False
        )
    return done.returncode, out.read_text(), err.read_text()


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell redirects")
@pytest.mark.parametrize("command", COMMANDS)
def test_an_answer_that_cannot_be_written_is_one_line(command, tmp_path):
    for redirected in (">&-", ">/dev/full" if sys.platform == "linux" else ">&-"):
        code, out, err = started(command, redirected, tmp_path)
        assert (code, out) == (1, "")
        assert err.startswith("error: cannot write")
        assert err.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell redirects")
@pytest.mark.parametrize("redirected", ["<&-", "2>&-", "<&- 2>&-", "2>/dev/full"])
def test_the_answer_comes_without_the_other_streams(redirected, tmp_path):
    if "full" in redirected and sys.platform != "linux":
        pytest.skip("no /dev/full")
    code, out, err = started("models --json", redirected, tmp_path)
    assert (code, err) == (0, "")
    assert out.startswith("{")
    assert started("caption nowhere.png", redirected, tmp_path)[0] == 1


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell redirects")
def test_nothing_is_left_to_say_with_all_streams_closed(tmp_path):
    assert started("models", "<&- >&- 2>&-", tmp_path) == (1, "", "")


def test_an_encoding_that_lacks_a_character_is_no_error():
    done = subprocess.run(
        [sys.executable, "-m", "qwencli", "caption", "\N{ROCKET}.png"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
        check=False,
    )
    assert done.returncode == 1
    assert rb"\U0001f680.png" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("qwencli ca", ["caption"]),
        ("qwencli caption --quantization ", ["none", "8bit", "4bit", "fp8"]),
        ("qwencli chat --engine ", ["native", "transformers", "remote"]),
    ],
)
def test_the_shell_completes_commands_and_modes(typed, offered):
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split(" ")) - 1)}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; sys.argv[0] = 'qwencli'; from qwencli.cli import main; main()",
        ],
        env={**os.environ, **words, "_QWENCLI_COMPLETE": "complete_bash"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == offered


def test_an_interruption_while_modules_are_imported_is_no_traceback() -> None:
    code = (
        "import builtins; kept = builtins.__import__\n"
        "def stopped(name, *more):\n"
        "    if name == 'typer': raise KeyboardInterrupt\n"
        "    return kept(name, *more)\n"
        "builtins.__import__ = stopped\n"
        "from qwencli.__main__ import main; main()"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


def _paths_asked_for():
    """Every option and argument of a path, with the words in front of it on a command line."""
    from qwencli.cli import COMMANDS, _load_command

    def of(command, words):
        for parameter in command.params:
            if "Path" in repr(getattr(parameter.type_descriptor, "annotation", None)):
                flag = parameter.opts[0]
                yield [*words, *([flag] if flag.startswith("-") else []), ""]
        for name, part in getattr(command, "commands", {}).items():
            yield from of(part, [*words, name])

    return [each for name in COMMANDS for each in of(_load_command(name), [name])]


@pytest.mark.parametrize(
    "words",
    [
        *_paths_asked_for(),
        *(["caption", flag, ""] for flag in ("--model", "--schema", "--overlay")),
    ],
    ids=" ".join,
)
def test_an_empty_path_is_not_the_current_folder(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.run(words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "is empty (check the variable" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("prompt", ["", " \n"])
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_an_empty_prompt_is_one_line(capsys, tmp_path, prompt, more):
    (tmp_path / "a.png").touch()
    assert cli.run(["caption", str(tmp_path / "a.png"), "--prompt", prompt, *more]) == 2
    assert "--prompt is empty" in capsys.readouterr().err


def test_the_command_has_one_name_however_it_was_started(capsys):
    """What completes commands is written for it: `python -m qwencli` would complete python."""
    assert cli.run(["ps", "--help"]) == 0
    assert "Usage: qwencli ps" in capsys.readouterr().out
