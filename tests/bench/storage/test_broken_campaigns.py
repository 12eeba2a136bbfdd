"""A campaign that is broken in any file ends report, compare and explain in one clean line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import shutil

import pytest
from rich.console import Console

from qwencli.bench.compare.comparison import compare
from qwencli.bench.compare.comparison_tables import comparison_document, comparison_table
from qwencli.bench.compare.sides import read_side
from qwencli.bench.inject.confusion import rebuilt, summary
from qwencli.bench.report.campaign_report import build_report
from qwencli.bench.report.explain import explain_campaign, explained_text
from qwencli.bench.report.tables import terminal_table
from qwencli.bench.storage import columns
from qwencli.bench.storage.campaign_files import read_file
from qwencli.errors import BenchError, QwenCliError
from tests.bench.broken_campaigns import mutate, write_campaign

# As the sink of the commands has it.
CONSOLE = Console(width=80, file=io.StringIO(), markup=False, emoji=False, highlight=False)


def report(folder, whole):
    CONSOLE.print(terminal_table(build_report(folder)))
    if found := rebuilt(folder):
        summary(found)


def compare_with_itself(folder, whole):
    side, refused = read_side(folder), None
    try:
        found = compare(side, whole)
    except BenchError as error:
        refused, found = error, compare(side, whole, force=True)
    CONSOLE.print(comparison_table(found))
    json.dumps(comparison_document(found))
    if refused is not None:
        raise refused


def explain(folder, whole):
    CONSOLE.print(explained_text(explain_campaign(folder)))


COMMANDS = (report, compare_with_itself, explain)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = write_campaign(tmp_path_factory.mktemp("campaigns") / "whole")
    build_report(folder)
    return folder


def broken(made, tmp_path, seed):
    """A copy of the campaign that is broken in one to three places, and what was done."""
    folder, chance = tmp_path / "c", random.Random(seed)
    shutil.copytree(made, folder)
    files = sorted(path for path in folder.iterdir() if path.suffix in (".csv", ".json"))
    done = [mutate(path, chance) for path in chance.sample(files, chance.choice((1, 1, 1, 3)))]
    return folder, done


@pytest.fixture(scope="module")
def whole(made):
    """The campaign that is not broken, which each of the others is compared with."""
    return read_side(made)


def try_seed(made, whole, tmp_path, seed):
    folder, done = broken(made, tmp_path, seed)
    for command in COMMANDS:
        try:
            command(folder, whole)
        except QwenCliError as error:
            assert "\n" not in error.message
            assert error.hint
            assert len(error.message) < 600
        except Exception as error:
            raise AssertionError(f"{seed} {done} {command.__name__}: {error!r}") from error
    shutil.rmtree(folder)


@pytest.mark.parametrize("part", range(4))
def test_no_broken_campaign_is_a_fault(made, whole, tmp_path, part):
    for seed in range(part * 30, part * 30 + 30):
        try_seed(made, whole, tmp_path, seed)


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("runs.csv", "\nC0,1,ok", "\nC0,1,fine", "line 3, column status: 'fine' is not one of ok"),
        ("runs.csv", "\nC0,1,ok", "\nC0,one,ok", "line 3, column run: 'one' is not a whole number"),
        ("runs.csv", "\nC0,2,ok", "\nC0,1,ok", "column run: is a second run 1 of cell C0"),
        ("runs.csv", "\nC0,2,ok", "\nC7,2,ok", "line 4, column cell_id: 'C7' is not a cell of"),
        ("runs.csv", ",decode_s,", ",", f"fields, not {len(columns.RUNS) - 1}"),
        (
            "runs.csv",
            ",{speed},",
            ",0.0,",
            "column decode_tok_per_s: '0.0' is not a number above",
        ),
        ("tokens.csv", "C0,1,3,7", "C0,1,4,7", "column token_index: 4 does not follow"),
        ("host.csv", ",decode,", ",decode,-", "column span_ms: '-500.0' is not a number from 0"),
        ("gpu.csv", "sm_clock_mhz,", "clock,", "line 1 has no column sm_clock_mhz"),
        ("quality.csv", ",1,b,", ",yes,b,", "column exact: 'yes' is not a whole number"),
        ("probes.csv", ",on,", ",up,", "line 3, column sampler: 'up' is not one of on, off"),
        (
            "probes.csv",
            ",5.1,5.0",
            ",5.1,0",
            "column itl_probe_off_ms: '0' is not a number above 0",
        ),
        ("truth.csv", "2,gc,", "2,magic,", "column cause: 'magic' is not one of none"),
        ("plan.json", '"runs": 6', '"runs": "6"', 'runs: "6" is not a whole number'),
        ("plan.json", '"runs": 6', f'"runs": {10**400}', "is not a whole number from 1"),
        ("plan.json", '"cells"', '"cell"', "it has no cells"),
        ("plan.json", '"quantization"', '"bits"', "it has no cells[0].quantization"),
        ("environment.json", '"torch"', '"tensors"', "it has no versions.torch"),
        ("environment.json", '"seed": 3', '"seed": NaN', "NaN is not JSON"),
    ],
)
def test_what_is_broken_is_named(made, tmp_path, file, old, new, said):
    folder = tmp_path / "c"
    shutil.copytree(made, folder)
    speed = read_file(folder, "runs.csv")[1]["decode_tok_per_s"]
    for path in folder.glob("*.*"):  # short names, that lines can be written down
        text = path.read_text(encoding="utf-8")
        for number in range(3):
            text = text.replace(f"cell-{number}", f"C{number}")
        if path.name == file:
            old = old.format(speed=speed) if "{speed}" in old else old
            assert old in text
            text = text.replace(old, new, 1)
        path.write_text(text, encoding="utf-8")
    with pytest.raises(BenchError) as caught:
        report(folder, None)
    assert str(folder / file) in caught.value.message
    assert said in caught.value.message
    assert caught.value.hint


def test_an_axis_of_a_newer_version_is_passed_over(made, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(made, folder)
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    plan["cells"] = [{**cell, "sharding": "none"} for cell in plan["cells"]]
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    assert len(build_report(folder)) == 3


def test_a_small_file_that_unpacks_to_very_much_is_refused(made, tmp_path, monkeypatch):
    folder = tmp_path / "c"
    shutil.copytree(made, folder)
    content = (folder / "tokens.csv").read_bytes()
    (folder / "tokens.csv").unlink()
    with gzip.open(folder / "tokens.csv.gz", "wb") as file:
        file.write(content)
    monkeypatch.setattr("qwencli.bench.storage.row_file.MOST_UNPACKED_BYTES", len(content))
    rows = read_file(folder, "tokens.csv")
    assert rows == read_file(made, "tokens.csv")
    with gzip.open(folder / "tokens.csv.gz", "ab") as file:
        file.write(bytes(10))
    with pytest.raises(BenchError, match=r"tokens\.csv\.gz holds more than"):
        read_file(folder, "tokens.csv")


def test_a_prefill_below_zero_is_joined_with_the_vision_tower_s_time(made, tmp_path):
    """Earlier versions took the tower's runs of all steps off the first step's time."""
    folder = tmp_path / "c"
    shutil.copytree(made, folder)

    def write(vision, prefill):
        with (made / "runs.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        rows[0] |= {"vision_encode_s": vision, "prefill_s": prefill}
        with (folder / "runs.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        return read_file(folder, "runs.csv")[0]

    row = write("1.062244263", "-0.894426529")
    assert (row["vision_encode_s"], row["prefill_s"]) == ("", "0.167817734")
    for vision, prefill in (("", "-0.1"), ("0.1", "-0.2")):
        with pytest.raises(BenchError, match=r"column prefill_s: -0"):
            write(vision, prefill)
