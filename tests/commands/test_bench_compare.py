from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from qwencli.commands import bench as command
from qwencli.config import Attention, Cache
from qwencli.errors import BenchError, QwenCliError, UsageError
from tests.bench.comparing import cell, write_campaign

STEADY = [100.0, 100.1, 99.9, 100.0, 100.05]
SDPA, EAGER = cell(), cell(attention=Attention.EAGER)
FLASH, STATIC = cell(attention=Attention.FLASH), cell(cache=Cache.STATIC_COMPILE)

app = typer.Typer()
app.add_typer(command.app, name="bench")


@app.command()
def other() -> None:
    """A second command, as the real program has."""


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Campaigns a, again (like a), slow (one cell 3 % slower), lost, and unlike (other prompt)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    both = {SDPA: STEADY, EAGER: STEADY}
    write_campaign(tmp_path / "a", both)
    write_campaign(tmp_path / "again", both)
    write_campaign(tmp_path / "slow", {**both, EAGER: [v * 0.97 for v in STEADY]})
    write_campaign(tmp_path / "lost", {**both, EAGER: "oom"})
    write_campaign(tmp_path / "unlike", both, plan={"prompt": "Why?"})


def run(*arguments):
    return CliRunner().invoke(app, ["bench", "compare", *arguments])


def answer(*arguments):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_json_has_every_cell_with_its_interval():
    found = answer("a", "slow")
    assert found["counts"] == {"SAME": 1, "FASTER": 0, "SLOWER": 1, "AMBIGUOUS": 0}
    assert (found["threshold_percent"], found["confidence"]) == (1.0, 0.9)
    same, slow = found["cells"]
    assert (same["attention"], same["verdict"]) == ("sdpa", "SAME")
    assert (slow["attention"], slow["verdict"]) == ("eager", "SLOWER")
    assert slow["ratio"] == pytest.approx(0.97)
    assert slow["ratio_low"] <= slow["ratio"] <= slow["ratio_high"]
    assert slow["change_low"] < slow["ratio_low"] < slow["ratio_high"] < slow["change_high"]
    assert (slow["a_processes"], found["change_confidence"]) == (1, 0.99)
    assert (slow["a_runs"], slow["b_decode_tok_per_s_median"]) == (5, pytest.approx(97.0))


def test_the_answer_does_not_depend_on_when_it_is_asked():
    assert answer("a", "slow") == answer("a", "slow")


@pytest.mark.parametrize(
    ("b", "arguments", "code"),
    [
        ("again", ["--fail-on", "slower"], 0),
        ("slow", [], 0),
        ("slow", ["--fail-on", "slower"], 1),
        ("slow", ["--fail-on", "slower", "--threshold", "5"], 0),
        ("slow", ["--fail-on", "slower", "--json"], 1),
        ("lost", ["--fail-on", "slower"], 1),
    ],
)
def test_exit_codes(b, arguments, code):
    assert run("a", b, *arguments).exit_code == code


def test_a_faster_campaign_does_not_fail():
    assert run("slow", "a", "--fail-on", "slower").exit_code == 0


def test_the_table_fits_80_columns_and_says_what_it_left_out(tmp_path):
    cells = {SDPA: STEADY, FLASH: [v * 9 for v in STEADY], STATIC: STEADY, EAGER: STEADY}
    write_campaign(tmp_path / "many", cells)
    write_campaign(
        tmp_path / "more",
        {SDPA: STEADY, FLASH: [50.0, 700.0, 900.0, 1200.0, 9000.0], STATIC: "oom",
         cell(cache=Cache.STATIC): STEADY},
        environment={"versions": {"torch": "2.13.0", "transformers": "5.17.0"}},
    )  # fmt: skip
    text = run("many", "more").stdout
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    said = " ".join(text.split())
    for words in (
        "sdpa 100.0 100.0 +0.0%",
        "AMBIGUOUS: the interval crosses an edge",
        "2 with one process a side",
        "1 SAME, 0 FASTER, 0 SLOWER, 1 AMBIGUOUS; within 1.0% counts as SAME",
        "changed: torch 2.11.0 -> 2.13.0",
        "no figure in B: oom: no memory - sdpa static-compile",
        "only in A - eager dynamic",
        "only in B - sdpa static",
    ):
        assert words in said


def test_two_campaigns_without_a_common_figure_have_no_table(tmp_path):
    write_campaign(tmp_path / "none", {SDPA: "oom", EAGER: "oom"})
    result = run("none", "a")
    assert result.exit_code == 0
    assert "no cell has figures on both sides" in result.stdout
    assert "no figure in A: oom: no memory - 2 cells" in " ".join(result.stdout.split())


def test_force_compares_what_is_not_alike_and_says_so():
    said = " ".join(run("a", "unlike", "--force").stdout.split())
    assert "compared by force: prompt: Describe this image. against Why?" in said
    assert answer("a", "unlike", "--force")["forced"] == [
        "prompt: Describe this image. against Why?"
    ]


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        (["a", "unlike"], BenchError, "a and unlike are not alike: prompt"),
        (["a", "gone"], BenchError, "gone holds no campaign"),
        (["a", "again", "--threshold", "0"], UsageError, "--threshold 0 is not above zero"),
    ],
)
def test_bad_input_is_one_typed_error(arguments, kind, said):
    error = run(*arguments).exception
    assert isinstance(error, QwenCliError)
    assert type(error) is kind
    assert said in error.message
    assert error.hint
