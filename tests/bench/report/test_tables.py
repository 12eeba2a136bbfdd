from __future__ import annotations

import io

import pytest
from rich.console import Console

from qwencli.bench.attribution.whole_cell import over_limits
from qwencli.bench.plan.predict import Prediction, planned_table
from qwencli.bench.report.campaign_report import markdown
from qwencli.bench.report.cell_statistics import cell_rows
from qwencli.bench.report.html.charts import cell_charts, traces_by_cell
from qwencli.bench.report.tables import (
    AS_ORIGIN,
    by_kind,
    cell_summary,
    speed_text,
    terminal_table,
    why_lines,
)
from tests.bench.synthetic_campaign import campaign

CELL = {
    "model": "scenes",
    "engine": "transformers",
    "quantization": "none",
    "attention": "sdpa",
    "cache": "dynamic",
    "load_mode": "keep",
    "kernels": "auto",
    "kv_dtype": "auto",
    "speculate": "off",
    "status": "ok",
    "reason": None,
    "decode_tok_per_s_median": 123.456,
    "run_ratio_max_min": 1.04,
    "ttft_s_median": 0.0441,
    "itl_p50_ms": 8.1,
    "itl_p99_ms": 12.34,
    "peak_allocated_bytes": 8_040_000_000,
    "verdict": "ok",
}
NOTHING = dict.fromkeys(
    ("decode_tok_per_s_median", "run_ratio_max_min", "ttft_s_median", "itl_p50_ms", "itl_p99_ms",
     "peak_allocated_bytes", "verdict")
)  # fmt: skip
SKIPPED = {"status": "skipped", "reason": "flash_attention_2 needs a CUDA device", **NOTHING}
ROWS = [
    {**CELL, "attention": "flash_attention_2", "cache": "static-compile", **SKIPPED},
    {**CELL, "attention": "flash_attention_2", **SKIPPED},
    {**CELL, "cache": "static", "decode_tok_per_s_median": 30.0},
    CELL,
    {**CELL, "attention": "eager", "verdict": "FAIL: text changed between greedy runs"},
    {
        **CELL,
        "attention": "eager",
        "cache": "static",
        **NOTHING,
        "status": "oom",
        "reason": "no memory",
    },
]
ENVIRONMENT = {
    "device": {"device": "cuda:0", "name": "NVIDIA GeForce RTX 5090", "driver": "580.1"},
    "versions": {"torch": "2.11.0", "transformers": "5.17.0"},
    "cpu": {"model": "a CPU"},
    "seed": 3,
}


def render(renderable, width=80):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(renderable)
    return console.file.getvalue()


def test_the_table_fits_80_columns_without_cutting_anything():
    text = render(terminal_table(ROWS))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for said in ("123.5", "1.04", "44 ms", "8.1", "12.3", "8.04 GB", "FAIL", "skipped", "oom"):
        assert said in text
    shared = "model scenes, engine transformers, quantization none, load mode keep"
    assert shared in " ".join(text.split())


def test_every_axis_varying_still_fits():
    other = {
        "model": "qwen2.5-vl-72b-instruct", "engine": "native", "quantization": "4bit",
        "attention": "eager", "cache": "static-compile", "load_mode": "reload",
        "kernels": "torch", "kv_dtype": "int8", "speculate": "auto",
    }  # fmt: skip
    text = render(terminal_table([CELL, {**CELL, **other, "ttft_s_median": 117.85}]))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert "117.8 s" in text


def test_fastest_first_and_nothing_measured_last():
    lines = render(terminal_table(ROWS)).splitlines()
    order = [
        next(i for i, line in enumerate(lines) if word in line)
        for word in ("123.5", "30.0", "skipped")
    ]
    assert order == sorted(order)


def test_reasons_stand_under_the_table_once():
    text = " ".join(render(terminal_table(ROWS)).split())
    assert text.count("flash_attention_2 needs a CUDA device - 2 cells") == 1
    assert "FAIL: text changed between greedy runs - eager dynamic" in text
    assert "oom: no memory - eager static" in text


def test_cells_that_cannot_run_are_counted_and_no_rows():
    lines = render(terminal_table(ROWS)).splitlines()
    assert [line for line in lines if "flash" in line] == [
        "skipped: flash_attention_2 needs a CUDA device - 2 cells"
    ]
    assert "static-compile" not in render(terminal_table(ROWS))
    assert "flash_attention_2 |" not in markdown(ROWS, ENVIRONMENT)
    # What tells skipped cells apart alone is no column of the others.
    others = [{**CELL, "quantization": mode, **SKIPPED} for mode in ("4bit", "8bit")]
    text = render(terminal_table([CELL, *others]))
    assert "quantization none" in text and "2 cells" in text
    assert "quantization none" in markdown([CELL, *others], ENVIRONMENT)


def test_where_no_cell_can_run_the_reasons_stand_alone():
    assert render(terminal_table(ROWS[:2])).splitlines() == [
        "skipped: flash_attention_2 needs a CUDA device - 2 cells"
    ]
    page = markdown(ROWS[:2], ENVIRONMENT)
    assert "- skipped: flash_attention_2 needs a CUDA device - 2 cells" in page
    assert "\n|" not in page


def test_markdown_has_all_cells_and_says_on_what():
    page = markdown(ROWS, ENVIRONMENT)
    assert "RTX 5090 (cuda:0, driver 580.1), torch 2.11.0" in page
    assert page.count("\n| ") == 2 + sum(row["status"] != "skipped" for row in ROWS)
    assert "| eager | static | - | - | - | - | - | - | oom |" in page
    assert "| sdpa | dynamic | 123.5 | 1.04 | 44 ms | 8.1 | 12.3 | 8.04 GB | ok |" in page


def test_a_plan_shows_order_and_skips(make_plan):
    plan = make_plan("steady", attention=("sdpa", "eager", "flash_attention_2"))
    ran = [cell.cell_id for cell in plan.cells if not cell.skip_reason]
    known, unknown = Prediction(1321.4, 3725.0, 8_100_000_000), Prediction(None, None, None)
    text = render(planned_table(plan.order(), dict(zip(ran, (known, unknown), strict=True))))
    assert "2 of 3 cells" in text
    for said in (" 1321 ", "1 h 02 min", "8.1 GB", "all together about 1 h 02 min", "predicted:"):
        assert said in text
    assert max(map(len, text.splitlines())) <= 80
    assert "skipped: flash_attention_2 needs a CUDA device; --attention sdpa is the" in text
    rows = [line for line in text.splitlines() if "flash2" in line]
    assert [line.startswith("- steady") for line in rows] == [True], "named by its reason alone"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("ok", None, [10.0, 11.0]), "10.5 tok/s (10.0 to 11.0)"),
        (("ok", None, [10.0, 11.0, 12.0]), "10.0 to 12.0 tok/s"),
        (("oom", "no memory", []), "oom: no memory"),
        (("timeout", "not done", [5.0]), "timeout: not done, 5.0 tok/s"),
        (("ok", None, []), "ok"),
    ],
)
def test_progress_lines(arguments, line):
    assert cell_summary(*arguments) == line


def test_a_process_on_a_busy_machine_ends_without_a_figure_to_quote():
    over = over_limits({"waited_percent": 51.2})
    assert cell_summary("ok", None, [35.9, 36.1], over) == (
        "35.9 to 36.1 tok/s, not quotable: 51% of decode waited for a processor"
    )
    assert cell_summary("ok", None, [36.1], over).startswith("36.1 tok/s, not quotable")


def test_an_unstable_cell_shows_what_its_runs_span():
    row = {**CELL, "decode_tok_per_s_min": 33.04, "decode_tok_per_s_max": 41.2}
    assert speed_text(row) == "123.5"
    assert speed_text({**row, "verdict": "unstable: runs differ 1.25x"}) == "33.0-41.2"
    wide = {**row, "decode_tok_per_s_max": 410.0, "verdict": "unstable: speed drifted"}
    assert speed_text(wide) == "33-410"


STEADY = {
    "noise_percent": 0.42,
    "variance_within_run_percent": 80.0,
    "variance_between_runs_percent": 15.0,
    "variance_between_processes_percent": 5.0,
    "warm_up_ratio": 0.21,
    "first_run_ratio": None,
    "level": "step",
    "level_change_percent": -5.04,
    "stop_reason": "max-noise",
    "bytes_per_token": 8.04e9,
    "read_bandwidth_bytes_per_s": 4.36e12,
    "mbu_percent": 58.1,
    "launches_per_token": 443.0,
    "gpu_busy_percent": 91.0,
    "bottleneck": "kernels",
    "exact_match_percent": 95.8,
    "mean_kl": 0.0123,
}


def test_details_fit_80_columns_and_leave_out_what_nobody_has():
    text = render(terminal_table([{**CELL, **STEADY}, {**CELL, "cache": "static", **STEADY}]))
    assert max(map(len, text.splitlines())) <= 80
    for said in ("±", "0.4 %", "80 %", "0.21x", "-5.0", "max-noise", "8,040"):
        assert said in text
    for said in ("58 %", "443", "kernels", "96 %", "0.012"):
        assert said in text
    assert "How" not in render(terminal_table([CELL]))
    only = render(terminal_table([{**CELL, "noise_percent": 1.0}]))
    assert "stopped by" not in only


def test_details_in_markdown():
    text = markdown([{**CELL, **STEADY}], ENVIRONMENT)
    assert "## How steady" in text
    assert (
        f"| {CELL['model']} | 8,040 | 4360 | 58 % | 443 | 91 % | kernels | 96 % | 0.012 |" in text
    )
    assert "##" not in markdown([CELL], ENVIRONMENT).replace("# Benchmark", "")


def test_what_slowed_several_cells_alike_is_said_once():
    slow = {**CELL, "run_ratio_max_min": 1.4, "gpu_busy_percent": 20.0}
    slow |= {"main_thread_cpu_percent_min": 99.9, "verdict": "unstable: runs differ 1.40x"}
    rows = [slow, {**slow, "cache": "static"}, {**CELL, "attention": "eager"}]
    (line,) = why_lines(rows)
    assert line.startswith("2 cells: runs differ because the core that launches")
    assert why_lines(rows[1:])[0].startswith("sdpa static: runs differ")


def test_what_differs_in_percentages_alone_is_said_once_with_what_they_span():
    said = [
        ("not quotable: 33% of decode waited for a processor", "native"),
        ("unstable: runs differ 1.39x", "native"),
        ("not quotable: 68% of decode waited for a processor", "transformers"),
        ("unstable: runs differ 1.40x", "transformers"),
        ("1 gap took 9.5% of decode: 100% of it", "native"),
        ("1 gap took 10.0% of decode: 100% of it", "transformers"),
    ]
    assert by_kind(said) == [
        (
            "not quotable: 33 to 68% of decode waited for a processor",
            ["native", "transformers"],
        ),
        ("unstable: runs differ 1.39x", ["native"]),
        ("unstable: runs differ 1.40x", ["transformers"]),
        ("1 gap took 9.5 to 10.0% of decode: 100% of it", ["native", "transformers"]),
    ]


def test_the_origin_s_columns_stand_where_its_matrix_ran():
    made = campaign(2, 3, 12)
    assert not AS_ORIGIN.shown(made.rows)
    plan = {**made.plan, "as_origin": True}
    for run in made.runs:
        run["e2e_s"], run["preprocess_s"] = "4.5", "0.5"
    rows = cell_rows(plan, made.runs, made.tokens)
    shown = {column.head: column.show(rows[0]) for column in AS_ORIGIN.shown(rows)}
    assert (shown["runs"], shown["s"], shown["tokens"]) == ("3.0-3.0", "4.00", "12")
    assert shown["max/min"] == "1.00"
    assert shown["origin"] == "16.8"  # of unquantized weights with sdpa, kept loaded
    assert {"stall s", "ms"} <= shown.keys()
    assert "As the origin counted" in markdown(rows, ENVIRONMENT)
    (takes, *_) = traces_by_cell(made.runs, made.tokens, made.gpu).values()
    run = cell_charts(takes, 100, 100, as_origin=True)["runs"][0]
    assert (run["generate_s"], run["generate_tok_per_s"]) == (4.0, 3.0)
    assert cell_charts(takes, 100, 100)["runs"][0]["generate_s"] is None


def test_the_origin_s_speed_is_not_beside_a_model_that_is_loaded_anew():
    rows = [{"quantization": "none", "attention": "sdpa", "load_mode": "reload",
             "generate_s_median": 1.0}]  # fmt: skip
    assert next(c for c in AS_ORIGIN.columns if c.head == "origin").show(rows[0]) == "-"
