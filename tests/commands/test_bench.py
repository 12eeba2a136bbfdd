from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from qwencli.bench.plan import prepare
from qwencli.bench.plan.predict import MachineSpeed
from qwencli.bench.plan.stopping import RepetitionOptions
from qwencli.bench.run import bench_run as session
from qwencli.bench.run import worker_process
from qwencli.commands import bench as command
from qwencli.config import DType, LoadFormat, ModelSource, ModelSpec
from qwencli.engine.machine.device import DeviceFacts
from qwencli.errors import (
    BenchError,
    DownloadError,
    InputError,
    ModelFileError,
    QwenCliError,
    UsageError,
)
from qwencli.models import resolve

CPU = DeviceFacts(
    "cpu", None, None, None, None, "2.13.0+cpu", None, "0.50",
    "flash_attention_2 needs a CUDA device", None,
)  # fmt: skip
FAKE_WORKER = [sys.executable, str(Path(__file__).parents[1] / "bench" / "fake_engine.py")]

ONE_CELL = ("--engine", "native", "--cache", "static", "--attention", "sdpa", "--runs", "1")

app = typer.Typer()
app.add_typer(command.app, name="bench")


@app.command()
def other() -> None:
    """A second command, as the real program has."""


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A CPU box with a text-only model called "steady" and any other name; no torch needed."""
    spec = functools.partial(ModelSpec, source=ModelSource.LOCAL, hub_config={})
    monkeypatch.setattr(resolve, "resolve_model", lambda name, **_: spec(name or "steady"))
    check = resolve.check_model
    monkeypatch.setattr(
        resolve, "check_model", lambda spec, *rest: check(spec, *rest) if spec.path else {}
    )
    monkeypatch.setattr(prepare, "read_device_facts", lambda device: CPU)
    monkeypatch.setattr(session, "read_machine_speed", lambda _: MachineSpeed(1e10, 1e5, 2.0))
    monkeypatch.setattr(session, "worker_command", lambda: FAKE_WORKER)
    if sys.platform != "win32":
        from tests.bench.forked_workers import INSTEAD_OF_SUBPROCESS

        monkeypatch.setattr(worker_process, "subprocess", INSTEAD_OF_SUBPROCESS)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def asked(monkeypatch):
    """The request that the options were read into; nothing is prepared."""
    seen = []

    def stop(request):
        seen.append(request)
        raise BenchError("enough")

    monkeypatch.setattr(prepare, "prepare", stop)

    def ask(*arguments):
        result = CliRunner().invoke(app, ["bench", *arguments])
        assert isinstance(result.exception, BenchError), result.output
        return seen[-1]

    return ask


def fails(*arguments):
    """The error of a command that must not get as far as running anything."""
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert isinstance(result.exception, QwenCliError), result.output
    return result.exception


@pytest.mark.parametrize(
    ("arguments", "matrix", "runs"),
    [
        ([], "default", None),
        (["--matrix"], "default", None),
        (["--matrix", "quick", "--runs", "2"], "quick", 2),
        (["--matrix", "--runs", "2"], "default", 2),
        (["--runs", "2", "--matrix"], "default", 2),
        (["--matrix=full"], "full", None),
        (["--matrix", "my.toml"], "my.toml", None),
    ],
)
def test_matrix_may_stand_without_a_value(asked, arguments, matrix, runs):
    request = asked(*arguments)
    assert (request.matrix, request.repetition) == (matrix, RepetitionOptions(runs))


def test_every_option_reaches_the_request(asked):
    request = asked(
        "--model", "a,b", "--engine", "transformers", "--quantization", "4bit",
        "--attention", "sdpa", "--cache", "static", "--load-mode", "reload",
        "--max-new-tokens", "7", "--prompt", "hi",
        "--image", "x.png", "--image", "y.png", "--seed", "5", "--load-format", "dummy",
        "--device", "cuda:1", "--dtype", "float16", "--exclude", "cache=static",
        "--max-noise", "2", "--min-runs", "4", "--max-runs", "8", "--max-time", "9",
        "--processes", "3",
    )  # fmt: skip
    assert request.axes == {
        "model": "a,b", "engine": "transformers", "quantization": "4bit", "attention": "sdpa",
        "cache": "static", "load_mode": "reload", "kernels": None,
        "kv_dtype": None, "speculate": None,
    }  # fmt: skip
    assert request.images == ("x.png", "y.png")
    assert request.repetition == RepetitionOptions(None, 2.0, 4, 8, 9.0, 3)
    assert request.exclude == ("cache=static",)
    assert (request.max_new_tokens, request.prompt, request.seed) == (7, "hi", 5)
    assert (request.device, request.dtype, request.load_format) == (
        "cuda:1", DType.FLOAT16, LoadFormat.DUMMY,
    )  # fmt: skip


def test_a_campaign_from_command_line_to_table(tmp_path):
    arguments = ["bench", "--attention", "sdpa,eager,flash_attention_2", "--cache", "dynamic",
                 "--engine", "transformers", "--quantization", "none", "--runs", "1",
                 "--max-new-tokens", "4", "--out", "c"]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "flash_attention_2 needs a CUDA device" in result.stdout
    assert "campaign in c" in result.stderr
    assert "[2/2]" in result.stderr
    again = CliRunner().invoke(app, [*arguments, "--resume"])
    assert again.exit_code == 0, again.output
    assert again.stderr.count("already there") == 2
    (tmp_path / "c" / "cells.csv").unlink()
    rebuilt = CliRunner().invoke(app, ["bench", "report", "c"])
    assert rebuilt.exit_code == 0
    assert (tmp_path / "c" / "cells.csv").is_file()
    assert rebuilt.stdout == result.stdout
    # As a campaign of an earlier version has its columns.
    runs = tmp_path / "c" / "runs.csv"
    runs.write_text(runs.read_text().replace("cpu_loop_us", "core_loop_us"))
    old = CliRunner().invoke(app, ["bench", "report", "c"])
    assert old.exit_code == 0
    assert old.stdout == result.stdout
    assert old.stderr.count("core_loop_us (cpu_loop_us)") == 1


def test_the_flag_that_was_called_plant_still_works(monkeypatch):
    seen = []
    monkeypatch.setattr(session, "run_bench", lambda *given: seen.append(given[-1]) or 0)
    for arguments in (["--plant", "3"], ["--inject-slowdown", "3"]):
        result = CliRunner().invoke(app, ["bench", *arguments])
        assert result.stderr.count("--plant is now called --inject-slowdown") == (
            arguments[0] == "--plant"
        )
    assert [settings.slowdown_percent for settings in seen] == [3.0, 3.0]
    assert "--plant" not in CliRunner().invoke(app, ["bench", "--help"]).stdout


def test_the_default_folder_is_named_by_the_time():
    result = CliRunner().invoke(app, ["bench", *ONE_CELL])
    assert result.exit_code == 0, result.output
    (folder,) = Path("campaigns").iterdir()
    assert folder.name.endswith("Z")


def test_a_cell_that_breaks_makes_the_exit_code_1():
    result = CliRunner().invoke(app, ["bench", *ONE_CELL, "--model", "steady,oom", "--out", "c"])
    assert result.exit_code == 1
    assert "use --quantization 4bit" in " ".join(result.stdout.split())


def test_nothing_that_can_run_makes_the_exit_code_1():
    result = CliRunner().invoke(app, ["bench", "--cache", "static-graph", "--out", "c"])
    assert result.exit_code == 1
    assert "CUDA graphs need a CUDA device" in " ".join(result.stdout.split())


@pytest.fixture
def llama(tmp_path, monkeypatch):
    """The name of a model that no engine knows; all others are known."""
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    known = resolve.resolve_model
    monkeypatch.setattr(
        resolve,
        "resolve_model",
        lambda name, **_: (
            ModelSpec(name, ModelSource.LOCAL, path=folder) if name == "llama" else known(name)
        ),
    )
    return "llama"


@pytest.fixture
def begun(monkeypatch, tmp_path):
    """Begins a campaign in "c" as from a shell; gives what resumes it."""

    def begin(*arguments):
        command_line = ["bench", *arguments, "--out", "c"]
        monkeypatch.setattr(sys, "argv", ["qwencli", *command_line])
        result = CliRunner().invoke(app, command_line)
        assert result.exit_code == 0, result.output
        return lambda *more: CliRunner().invoke(app, ["bench", "--resume", "--out", "c", *more])

    return begin


def test_resume_takes_what_is_not_given_from_the_campaign(begun, request):
    begun(
        "--matrix", "quick", *ONE_CELL, "--exclude", "cache=static",
        "--exclude", "attention=eager", "--prompt", "-7 hi", "--no-limits", "--no-quality",
        "--seed", "3",
    )  # fmt: skip
    asked = request.getfixturevalue("asked")
    same = asked("--resume", "--out", "c")
    assert (same.matrix, same.seed, same.quality_samples) == ("quick", 3, 0)
    assert same.axes["engine"] == "native"
    assert same.repetition == RepetitionOptions(1)
    assert (same.prompt, same.exclude) == ("-7 hi", ("cache=static", "attention=eager"))
    changed = asked("--resume", "--out", "c", "--runs", "9", "--exclude", "cache=static-compile")
    assert changed.repetition == RepetitionOptions(9), "what is given wins"
    assert changed.exclude == ("cache=static-compile",)


def test_resume_goes_on_and_refuses_what_is_given_and_differs(begun):
    resume = begun("--matrix", "quick", *ONE_CELL)
    again = resume()
    assert again.exit_code == 0, again.output
    assert "already there" in again.stderr
    assert resume("--matrix", "quick", "--runs", "1").exit_code == 0
    error = resume("--runs", "9").exception
    assert isinstance(error, BenchError) and "it has runs 1, not 9" in error.message
    error = resume("--matrix", "full").exception
    assert isinstance(error, BenchError) and "cannot be resumed" in error.message


def test_resume_of_what_holds_no_campaign_says_so(tmp_path):
    assert "c holds no campaign" in fails("--resume", "--out", "c", *ONE_CELL).message


def test_a_model_that_no_engine_knows_is_found_before_anything_is_measured(llama):
    for more in ([], ["--dry-run"], ["--resume", "--out", "c"]):
        error = fails("--model", llama, *more)
        assert type(error) is ModelFileError
        assert "model_type 'llama' is not supported" in error.message
    assert error.hint
    assert [path.name for path in Path.cwd().iterdir()] == ["llama"]


def test_beside_models_that_can_run_it_costs_its_cells_alone(llama):
    arguments = ["--matrix", "quick", "--runs", "1", "--max-new-tokens", "4", "--out", "c"]
    result = CliRunner().invoke(app, ["bench", "--model", f"steady,{llama}", *arguments])
    assert result.exit_code == 0, result.output
    assert result.stderr.count("llama") == 0  # no process was begun for it
    said = " ".join(result.stdout.split())
    assert said.count("model_type 'llama' is not supported") == 1
    assert "6 cells" in said


def test_a_model_that_cannot_be_downloaded_is_found_once(monkeypatch):
    def fail(spec):
        raise DownloadError(f"{spec.repo_id} is not to be had", "check the network")

    monkeypatch.setattr(resolve, "locate", fail)
    monkeypatch.setattr(
        resolve,
        "resolve_model",
        lambda name, **_: ModelSpec("far", ModelSource.HUB, repo_id="nobody/nothing"),
    )
    error = fails("--matrix", "quick", "--out", "c")
    assert "nobody/nothing is not to be had" in error.message
    assert not Path("c").exists()


def test_dry_run_writes_nothing():
    result = CliRunner().invoke(app, ["bench", "--matrix", "--dry-run"])
    assert result.exit_code == 0
    assert "33 of 84 cells" in result.stdout
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        (["--attention", "fast"], UsageError, "no value 'fast'"),
        (["--matrix", "fast"], UsageError, "no built-in named 'fast'"),
        (["--resume"], UsageError, "--resume needs --out"),
        (["--max-new-tokens", "0"], UsageError, "--max-new-tokens 0 is out of range"),
        (["--prompt", " "], UsageError, "--prompt is empty"),
        (["--image", "gone.png"], InputError, "gone.png: no such file"),
        (["--prompt-file", "gone.txt"], InputError, "gone.txt: cannot be read"),
        (["--prompt", "a", "--preset", "tags"], UsageError, "--prompt and --preset exclude"),
        (["--exclude", "cache"], UsageError, "--exclude has 'cache'"),
        (["--exclude", "engine=native,engine=transformers"], BenchError, "no cell left"),
        (["--max-runs", "9"], UsageError, "--max-runs goes with --max-noise"),
        (["--runs", "9", "--max-noise", "1"], UsageError, "exclude each other"),
        (["--processes", "9"], UsageError, "runs cannot be spread over them"),
        (["--cooldown", "long"], UsageError, "--cooldown 'long' is not a pause"),
        (["--cooldown", "nan"], UsageError, "--cooldown 'nan' is not a pause"),
        (["report", "gone"], BenchError, "holds no campaign"),
    ],
)
def test_bad_input_is_one_typed_error(arguments, kind, said):
    error = fails(*arguments)
    assert type(error) is kind
    assert said in error.message
    assert error.hint


ONE_CELL = ("--runs", "1", "--engine", "native", "--quantization", "none", "--attention", "sdpa",
            "--cache", "dynamic")  # fmt: skip


@pytest.mark.parametrize(("seconds", "said"), [(280.0, False), (320.0, True)])
def test_one_cell_that_takes_long_is_said_to_before_it_starts(monkeypatch, seconds, said):
    monkeypatch.setattr(session, "predicted_seconds", lambda plan, speed, limits: {"a": seconds})
    result = CliRunner().invoke(app, ["bench", "--out", "c", *ONE_CELL])
    assert result.exit_code == 0
    before = result.stderr.partition("[1/")[0]
    assert ("about 5 min 20 s for 1 cell; less with --matrix quick" in before) == said


def test_what_ends_soon_anywhere_is_not_predicted(monkeypatch):
    monkeypatch.setattr(session, "read_machine_speed", lambda device: pytest.fail("measured"))
    assert CliRunner().invoke(app, ["bench", "--out", "c", *ONE_CELL]).exit_code == 0
