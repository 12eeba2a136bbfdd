from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwencli.bench.plan.stopping import (
    Progress,
    RepetitionOptions,
    StopReason,
    StopRule,
    document,
    next_turn,
    noise_percent,
    progress_of,
    repetition,
    rule_of,
    stop_reason,
    stop_rule,
    turn_over,
)
from qwencli.errors import UsageError


def play(rule, speed, *, run_s=1.0):
    """Processes one after another, as the campaign runs them; returns what the cell ends with."""
    progress = Progress()
    for number in range(1, rule.processes + 1):
        if turn_over(rule, number, progress) is not None:
            continue
        progress = progress.plus({"status": "warmup", "e2e_s": run_s})
        turn = rule.turn(number)
        while turn.reached(progress, progress.process_runs[-1]) is None:
            speeds = {"decode_tok_per_s": speed(progress.runs), "e2e_s": run_s}
            progress = progress.plus({"status": "ok", **speeds})
    return progress


@given(st.integers(1, 40), st.integers(1, 8))
def test_a_fixed_number_is_spread_evenly(runs, processes):
    rule = StopRule(runs, runs, processes=min(processes, runs))
    progress = play(rule, lambda run: 10.0)
    assert progress.runs == runs
    assert len(progress.process_runs) == rule.processes
    assert max(progress.process_runs) - min(progress.process_runs) <= 1
    assert stop_reason(rule, progress) is StopReason.RUNS


@given(st.integers(3, 9), st.integers(0, 20), st.floats(0.1, 20), st.integers(1, 3), st.randoms())
@settings(max_examples=30)
def test_an_adaptive_cell_keeps_its_bounds_and_names_what_stopped_it(
    least, more, noise, processes, chance
):
    rule = StopRule(least, least + more, noise, processes=min(processes, least))
    progress = play(rule, lambda run: chance.uniform(5, 15))
    reason = stop_reason(rule, progress)
    assert least <= progress.runs <= least + more
    assert len(progress.process_runs) == rule.processes
    if reason is StopReason.NOISE:
        assert noise_percent(progress.speeds) <= noise
    else:
        assert reason is StopReason.MAX_RUNS
        assert progress.runs == least + more


def test_equal_runs_stop_at_the_fewest():
    progress = play(StopRule(5, 50, 1.0), lambda run: 10.0)
    assert progress.runs == 5


def test_time_counts_loads_and_warm_ups_but_never_cuts_below_the_fewest_runs():
    rule = StopRule(3, 50, 0.001, max_time_s=6.0)
    progress = play(rule, lambda run: 10.0 + run)
    assert (progress.runs, progress.spent_s) == (5, 6.0)
    assert stop_reason(rule, progress) is StopReason.TIME
    assert play(StopRule(3, 50, 0.001, max_time_s=0.5), lambda run: 10.0 + run).runs == 3


def test_runs_without_a_speed_never_look_steady():
    progress = play(StopRule(3, 7, 50.0), lambda run: None)
    assert progress.runs == 7


def test_rows_of_a_file_and_of_a_worker_count_alike():
    rows = [
        {"status": "warmup", "load_s": "2.0", "e2e_s": "1.5", "decode_tok_per_s": "4"},
        {"status": "ok", "load_s": "", "e2e_s": "1.0", "decode_tok_per_s": "9.5"},
        {"status": "oom", "load_s": "", "e2e_s": "", "decode_tok_per_s": ""},
        {"status": "warmup", "load_s": "2.0", "e2e_s": "1.0", "decode_tok_per_s": ""},
        {"status": "ok", "load_s": "", "e2e_s": "1.0", "decode_tok_per_s": ""},
    ]
    found = progress_of(rows)
    assert found == Progress((9.5,), 8.5, (1, 1))
    as_sent = [
        {k: v if k == "status" else (float(v) if v else None) for k, v in row.items()}
        for row in rows
    ]
    assert progress_of(as_sent) == found


def test_an_unfinished_cell_has_no_reason():
    rule = StopRule(4, 4, processes=2)
    assert next_turn(rule, Progress()) == 1
    assert next_turn(rule, Progress(process_runs=(2,))) == 2
    assert stop_reason(rule, Progress(process_runs=(2,))) is None
    assert next_turn(rule, Progress(process_runs=(2, 2))) is None


def test_noise_is_half_the_interval_over_the_median():
    assert noise_percent([10.0, 10.0]) is None
    assert noise_percent([10.0] * 5) == 0.0
    assert noise_percent([9.0, 10.0, 11.0]) == pytest.approx(10.0)


@pytest.mark.parametrize("rule", [StopRule(5, 5), StopRule(3, 9, 1.5, 60.0, 3)])
def test_the_plan_holds_the_rule(rule):
    assert rule_of({"runs": rule.max_runs, "stop": document(rule)}) == rule


def test_plans_from_before_there_was_a_rule():
    assert rule_of({"runs": 4}) == StopRule(4, 4)


def test_the_rule_in_words():
    assert repetition(StopRule(1, 1), 8) == "1 run of 8 tokens"
    assert repetition(StopRule(3, 9, 1.5, None, 3), 8) == (
        "3 to 9 runs of 8 tokens in 3 processes, until the speed is known within 1.5 %"
    )


@pytest.mark.parametrize(
    ("wanted", "rule"),
    [
        (RepetitionOptions(), StopRule(5, 5)),
        (RepetitionOptions(7, processes=2), StopRule(7, 7, processes=2)),
        (RepetitionOptions(max_noise=1.0), StopRule(5, 50, 1.0)),
        (RepetitionOptions(max_noise=1.0, max_runs=4), StopRule(4, 4, 1.0)),
        (RepetitionOptions(max_noise=1.0, min_runs=60), StopRule(60, 60, 1.0)),
        (RepetitionOptions(max_noise=1.0, max_time_s=9.0), StopRule(5, 50, 1.0, 9.0)),
    ],
)
def test_what_is_not_said_is_filled_in(wanted, rule):
    assert stop_rule(wanted) == rule


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (RepetitionOptions(5, max_noise=1.0), "exclude each other"),
        (RepetitionOptions(min_runs=3), "--min-runs goes with --max-noise"),
        (RepetitionOptions(max_time_s=3.0), "--max-time goes with --max-noise"),
        (RepetitionOptions(max_noise=0.0), "is not above zero"),
        (RepetitionOptions(max_noise=float("nan")), "is not above zero"),
        (
            RepetitionOptions(max_noise=1.0, min_runs=9, max_runs=8),
            "--min-runs 9 is above --max-runs 8",
        ),
        (RepetitionOptions(max_noise=1.0, max_runs=2), "an interval needs 3 runs"),
        (RepetitionOptions(2, processes=3), "2 runs cannot be spread"),
    ],
)
def test_contradictions_are_named(wanted, said):
    with pytest.raises(UsageError, match=said) as caught:
        stop_rule(wanted)
    assert caught.value.hint


def test_the_command_line_goes_over_the_matrix():
    matrix = RepetitionOptions(max_noise=1.0, max_runs=9, processes=2)
    assert RepetitionOptions().over(matrix) == matrix
    assert RepetitionOptions(3).over(matrix) == RepetitionOptions(3, processes=2)
    assert RepetitionOptions(max_noise=2.0).over(RepetitionOptions(3)) == RepetitionOptions(
        max_noise=2.0
    )
    assert RepetitionOptions(max_noise=2.0).over(matrix) == RepetitionOptions(
        None, 2.0, None, 9, None, 2
    )


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (StopRule(1, 1), "1 run of 1 token"),
        (StopRule(5, 5, processes=5), "5 runs of 1 token in 5 processes"),
        (
            StopRule(5, 50, max_noise=1.0),
            "5 to 50 runs of 1 token, until the speed is known within 1 %",
        ),
        (
            StopRule(5, 50, max_noise=0.5, processes=2),
            "5 to 50 runs of 1 token in 2 processes, until the speed is known within 0.5 %",
        ),
    ],
)
def test_repetition_in_words(rule, said):
    assert repetition(rule, 1) == said
