"""Every sentence about a campaign: said where its figures are, and only there."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from qwencli.bench.attribution.summary import why
from qwencli.bench.report import machine_rules
from qwencli.bench.report.cell_statistics import CellRows
from qwencli.bench.report.explain import explain_campaign
from qwencli.bench.report.explain_rules import CELL_RULES
from qwencli.bench.report.machine_rules import tokens_with_clocks
from qwencli.bench.report.steadiness import steadiness
from qwencli.bench.storage import columns
from qwencli.bench.storage.row_file import write_rows

RESULTS = Path(__file__).parents[3] / "results"


def run(number, **values):
    row = dict.fromkeys(columns.RUNS, "")
    row |= {"cell_id": "c", "run": str(number), "status": "ok" if number else "warmup"}
    row |= {"decode_tok_per_s": "100.0", "e2e_s": "2.0", "ttft_s": "0.05"}
    return row | {name: str(value) for name, value in values.items()}


def cell(runs, tokens=(), gpu=(), **axes):
    steady = steadiness(runs, tokens)
    return CellRows({"cell_id": "c", **axes}, runs, tokens, gpu, steady[0] if steady else None)


def said(data):
    return [f"{what} ({figure})" for rule in CELL_RULES for what, figure in rule(data)]


def eight(**values):
    return [run(number, **values) for number in range(9)]


def test_a_steady_cell_gets_its_speed_alone():
    assert said(cell(eight())) == ["decodes 100.0 tok/s (median of 8 runs, 100.0 to 100.0 tok/s)"]


@pytest.mark.parametrize(
    ("runs", "sentence"),
    [
        ([*eight()[:4], run(4, decode_tok_per_s=50)], "identical runs differ 2.00x"),
        ([run(0, decode_tok_per_s=20), *eight()[1:]], "the warm-up is slower than the later runs"),
        ([run(0, decode_tok_per_s=400), *eight()[1:]], "the later runs are slower than the"),
        ([run(n, decode_tok_per_s=100 if n < 7 else 60 + n / 100) for n in range(13)],
         "the speed changes for good before measured run 7 (0.60 times the speed before"),
        ([run(n, decode_tok_per_s=100 + 3 * n) for n in range(13)], "the speed rises from run"),
        (eight(ttft_s=1.0, vision_encode_s=0.8, prefill_s=0.1),
         "the wait for the first token is 50% of the request, most of it vision_encode"),
        (eight(sm_clock_mhz_mean=2000, sm_clock_mhz_min=900), "the GPU's clock falls while it"),
        ([run(n, sm_clock_mhz_mean=1980, decode_tok_per_s=100 if n % 2 else 50) for n in range(9)],
         "the GPU's clock does not explain why runs differ"),
        ([run(n, sm_clock_mhz_mean=1000 + 100 * n, decode_tok_per_s=50 + 5 * n) for n in range(9)],
         "faster runs had the higher clock (correlation 1.00 over 8 runs)"),
        ([run(n, pointer_chase_us=200 + 40 * n, cpu_loop_us=4 + n % 2, decode_tok_per_s=100 - 5 * n)
          for n in range(9)],
         "slow runs came while others used the caches and memory that cores share (a fixed walk "
         "through memory took 500 us after the slowest quarter of the runs, 260 after the"),
        ([run(n, cpu_loop_us=4 + n, decode_tok_per_s=400 / (4 + n)) for n in range(9)],
         "slow runs came while the core they ran on was slower (a fixed loop took 11.5 us after "),
        (eight(throttle_reasons="hw_thermal|idle", temperature_c_max=88),
         "the driver held the clock back: hw_thermal (in 8 of 8 runs, up to 88 C)"),
        (eight(involuntary_switches=1000), "other programs take the processor away"),
        (eight(gc_pause_ms=150), "Python's garbage collection interrupts runs (150 ms, 7.5%"),
        (eight(num_alloc_retries=2), "GPU memory ran out and was collected"),
        (eight(fragmentation_percent=40), "GPU memory is fragmented (40%"),
        (eight(load_s=4.5), "every run loads the model anew (4.5 s, 4.5 to 4.5)"),
        (eight(itl_p50_ms=10, itl_p99_ms=40, stall_count=0), "one token in a hundred takes far"),
    ],
)  # fmt: skip
def test_a_sentence_for_each_finding(runs, sentence):
    assert any(line.startswith(sentence) for line in said(cell(runs))), said(cell(runs))


def test_a_host_that_was_as_fast_or_whose_runs_differ_otherwise_gets_no_sentence():
    alike = [run(n, pointer_chase_us=200 + n, decode_tok_per_s=100 - 5 * n) for n in range(9)]
    apart = [run(n, pointer_chase_us=200 + 40 * n, decode_tok_per_s=50 + 50 * (n % 2))
             for n in range(9)]  # fmt: skip
    few = [run(n, pointer_chase_us=200 + 90 * n, decode_tok_per_s=100 - 9 * n) for n in range(5)]
    for runs in (alike, apart, few):
        assert not any("slow runs came" in line for line in said(cell(runs)))


SHARED = "slow runs came while others used the caches and memory that cores share"


def test_neighbours_that_used_the_memory_are_named_from_the_rows_alone():
    """Recorded beside one process that copied memory, or computed, in turns of 5 s."""
    recorded = RESULTS / "2026-11-28-cpu-neighbours"
    beside = explain_campaign(recorded / "copying")
    assert [found.cell for found in beside if found.what == SHARED] == ["native", "transformers"]
    for name in ("quiet", "computing"):
        others = explain_campaign(recorded / name)
        assert not any("slow runs came" in found.what for found in others)
        assert not any("a fixed walk" in found.figure for found in others)


def test_stalls_name_their_token():
    tokens = [
        {"cell_id": "c", "run": "1", "token_index": str(n), "itl_ms": "" if not n else "10.0"}
        for n in range(20)
    ]
    tokens[2]["itl_ms"] = "470.0"
    lines = said(cell([run(0), run(1, stall_count=1), run(2, stall_count=0)], tokens))
    assert (
        "1 token stalls in 1 of 2 runs (2 times the run's median or more, and far beyond its "
        "noise) (worst 470.0 ms, 47.0 times the median, token 2 of run 1)"
    ) in lines


def clocked(itl_of, runs=4, tokens=60):
    """Rows of a cell whose clock falls to half in the middle of each run, sampled every 50 ms."""
    made, sampled = [], []
    for number in range(runs + 1):
        t_s = 100.0 * number
        for n in range(tokens):
            low = (n + 5 * number) % tokens >= tokens // 2
            itl_ms = itl_of(n, low, number)
            t_s += itl_ms / 1e3
            row = {"cell_id": "c", "run": str(number), "t_s": repr(t_s), "token_index": str(n)}
            made.append(row | {"itl_ms": repr(itl_ms) if n else ""})
            for index, power, mhz in (("0", 20, 300), ("1", 400, 1000 if low else 2000)):
                row = {"cell_id": "c", "run": str(number), "t_s": repr(t_s), "gpu_index": index}
                sampled.append(row | {"power_w": str(power), "sm_clock_mhz": str(mhz)})
    rows = [{**row, "utilization_percent": ""} for row in sampled]
    return cell([run(number) for number in range(runs + 1)], made, rows)


LOW_CLOCK = "tokens take longer while the GPU's clock is lower"


def test_slow_tokens_and_a_low_clock_go_together():
    data = clocked(lambda n, low, number: (10.0 + n / 10) * (1.5 if low else 1.0))
    (line,) = [line for line in said(data) if line.startswith(LOW_CLOCK)]
    assert line.endswith(f"over {4 * 59} tokens, 1000 to 2000 MHz)")
    joined = tokens_with_clocks(data)
    assert set(joined["run"]) == {"1", "2", "3", "4"}
    assert set(joined["sm_clock_mhz"]) == {1000.0, 2000.0}


@pytest.mark.parametrize(
    "data",
    [
        clocked(lambda n, low, number: 10.0 + n),  # longer with the context alone
        clocked(lambda n, low, number: 10.0 + (7 * n + 3 * number) % 5),
        clocked(lambda n, low, number: 10.0 * (1.5 if low else 1.0), runs=1, tokens=40),  # few
        cell(eight()),
    ],
)
def test_tokens_that_do_not_follow_the_clock_get_no_sentence(data):
    assert not any(line.startswith(LOW_CLOCK) for line in said(data))


def test_where_clock_or_tokens_stand_still_nothing_is_joined(monkeypatch):
    data = clocked(lambda n, low, number: 10.0)
    still = [{**row, "sm_clock_mhz": "1980"} for row in data.gpu]
    alike = [{**row, "itl_p50_ms": "10.0", "itl_p99_ms": "10.1"} for row in data.runs]
    monkeypatch.setattr(machine_rules, "tokens_with_clocks", None)
    assert said(dataclasses.replace(data, gpu=still))
    assert said(dataclasses.replace(data, runs=alike))


def test_what_the_roofline_says():
    bound = said(cell(eight(), bottleneck="host", gpu_busy_percent="31.5", mbu_percent="6.0"))
    assert "bound by: host (GPU busy 32%, bandwidth used 6%)" in bound


def test_causes_come_with_their_dearest_case():
    def cause(name, lost, **values):
        row = {"scope": "gap", "cause": name, "lost_ms": str(lost), "run": "1", "token_index": "7"}
        return row | {"evidence": "because of it", "confidence": "0.9"} | values

    data = cell(eight())
    rows = [cause("gc", 12), cause("clock", 300, scope="decode", token_index=""), cause("gc", 40)]
    lines = said(dataclasses.replace(data, causes=rows))
    assert (
        "2 late tokens because Python collected garbage (52 ms lost; the worst 40 in run 1, token "
        "7: because of it; confidence 0.9)"
    ) in lines
    assert any(line.startswith("1 slow answer because the GPU ran at a lower") for line in lines)


def test_who_waits_for_whom():
    def gpu(percent):
        return [
            {"run": "1", "utilization_percent": percent},
            {"run": "0", "utilization_percent": "1"},
        ]

    bound = said(cell(eight(main_thread_cpu_percent=99), gpu=gpu("25")))
    assert any(line.startswith("bound by one CPU core") for line in bound)
    busy = said(cell(eight(main_thread_cpu_percent=40), gpu=gpu("97")))
    assert "the GPU is the one that works (GPU busy 97%, main thread 40% of a core)" in busy
    assert len(said(cell(eight(main_thread_cpu_percent=99), gpu=gpu("")))) == 1
    # What was measured counts for more than what the driver says, which of short requests is old.
    spinning = eight(main_thread_cpu_percent=100)
    measured = said(cell(spinning, gpu=gpu("25"), gpu_busy_percent="99"))
    assert not any("one CPU core" in line for line in measured)
    short = said(cell(eight(main_thread_cpu_percent=100, e2e_s=0.1), gpu=gpu("25")))
    assert not any("one CPU core" in line for line in short)


def test_runs_that_differ_with_the_processor():
    """Where the host never waits, and the GPU does, nothing else is left."""

    def row(thread="99.8", busy="20.0", ratio="1.4"):
        return {
            "main_thread_cpu_percent_min": thread, "gpu_busy_percent": busy,
            "run_ratio_max_min": ratio,
        }  # fmt: skip

    sentence = "runs differ because the core that launches takes longer for the same work in some"
    figures = "main thread at least 100% of a core in each, GPU busy 20% of the time"
    assert f"{sentence} ({figures})" in said(cell(eight(), **row()))
    (short,) = why(row())
    assert short.startswith(sentence)
    for other in (row(thread="60"), row(busy="99"), row(ratio="1.02"), row(thread=None), {}):
        assert why(other) == []


@pytest.mark.parametrize("name", ["2026-11-28-h200x2-engines", "2026-11-28-cpu-neighbours/quiet"])
def test_committed_campaigns_are_explained(name):
    found = explain_campaign(RESULTS / name)
    assert found[0].cell is None
    assert all(finding.what and finding.figure for finding in found)


def test_the_effect_of_an_axis(tmp_path):
    def row(quantization, cache, speed):
        empty = dict.fromkeys(columns.CELLS)
        return empty | {
            "cell_id": f"{quantization}-{cache}", "model": "m", "engine": "native",
            "quantization": quantization, "attention": "sdpa", "cache": cache, "load_mode": "keep",
            "status": "ok", "decode_tok_per_s_median": speed,
        }  # fmt: skip

    rows = [row("none", "dynamic", 20.0), row("none", "static", 20.2),
            row("4bit", "dynamic", 10.0), row("4bit", "static", 12.0)]  # fmt: skip
    write_rows(tmp_path / "cells.csv", columns.CELLS, rows)
    lines = [f"{f.what} ({f.figure})" for f in explain_campaign(tmp_path)]
    assert lines == [
        "the fastest cell (none static) decodes 2.0 times as fast as the slowest (4bit dynamic) "
        "(20.2 and 10.0 tok/s)",
        "quantization: 4bit takes 1.83 times as long a token as none (ratio of tok/s 0.55, 0.50 to "
        "0.59 over 2 pairs of cells)",
        "cache: static is 1.10 times as fast as dynamic (ratio of tok/s 1.10, 1.01 to 1.20 over 2 "
        "pairs of cells)",
    ]


def test_a_busy_machine_comes_before_what_it_did_to_the_figures(tmp_path):
    lines = said(cell(eight(), waited_percent="51.0"))
    assert lines[:2] == [
        "decodes 100.0 to 100.0 tok/s on a machine that was busy (8 runs)",
        "51% of decode waited for a processor, so its figure may not be quoted (51.0%, the limit "
        "is 5%)",
    ]
    rows = [
        dict.fromkeys(columns.CELLS)
        | {"cell_id": name, "model": "m", "attention": name, "status": "ok"}
        | {"decode_tok_per_s_median": speed, "waited_percent": waited}
        for name, speed, waited in (("sdpa", 438.0, 0.1), ("eager", 36.0, 51.0))
    ]
    write_rows(tmp_path / "cells.csv", columns.CELLS, rows)
    (found,) = explain_campaign(tmp_path)
    assert found.what == "no modes are compared: fewer than two cells have a figure to quote"
    assert found.figure == "1 not quotable"


def test_modes_are_compared_by_figures_that_may_be_quoted_alone(tmp_path):
    said = {"a": "ok", "b": "ok", "c": "unstable: runs differ 1.49x", "d": "FAIL: unequal work"}
    rows = [
        dict.fromkeys(columns.CELLS)
        | {"cell_id": name, "model": "m", "attention": name, "status": "ok", "verdict": verdict}
        | {"decode_tok_per_s_median": speed}
        for (name, verdict), speed in zip(said.items(), (20.0, 10.0, 90.0, 1.0), strict=True)
    ]
    write_rows(tmp_path / "cells.csv", columns.CELLS, rows)
    lines = [f"{found.what} ({found.figure})" for found in explain_campaign(tmp_path)]
    assert lines[:2] == [
        "modes are compared by 2 of 4 cells: the others have no figure to quote (1 unstable, "
        "1 FAIL)",
        "the fastest of them (a) decodes 2.0 times as fast as the slowest (b) (20.0 and 10.0 "
        "tok/s)",
    ]
    assert not any("attention: c" in line or "attention: d" in line for line in lines)
