"""Columns of a campaign's CSV files, in order, and what each may hold.

Other programs read these files by name: columns may be added at the end, and what is renamed is
still read by its old name (`row_file.RENAMED`). Of a table that was read what is wrong is named
with its file, line and column. Columns of newer versions are passed on unread; columns that came
after a file was written are empty in its rows.

What a sensor cannot read is an empty field, never zero. All `t_s` are seconds on the host's
`time.perf_counter` clock, which every process of one machine shares.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import NoReturn

from qwencli.bench.storage.row_file import Table
from qwencli.errors import BenchError

CELLS = (
    "cell_id", "model", "engine", "quantization", "attention", "cache", "load_mode",
    "status", "reason", "runs",
    "decode_tok_per_s_median", "decode_tok_per_s_min", "decode_tok_per_s_max",
    "run_ratio_max_min", "ttft_s_median",
    "itl_p50_ms", "itl_p90_ms", "itl_p99_ms", "itl_max_ms",
    "peak_allocated_bytes", "mbu_percent", "exact_match_percent", "verdict",
    "gap_count", "gap_lost_percent", "gap_causes", "slow_run_causes",
    "probe_overhead_percent", "probe_overhead_low_percent", "probe_overhead_high_percent",
    "sampler_overhead_percent", "sampler_overhead_low_percent", "sampler_overhead_high_percent",
    "kernels",
    "processes", "stop_reason", "noise_percent",
    "decode_tok_per_s_low", "decode_tok_per_s_high", "decode_tok_per_s_mad",
    "warm_up_ratio", "first_run_ratio", "level", "level_change_percent",
    "variance_within_run_percent", "variance_between_runs_percent",
    "variance_between_processes_percent",
    "bytes_per_token", "read_bandwidth_bytes_per_s", "launch_rate_per_s",
    "graph_launch_rate_per_s", "launches_per_token", "kernels_per_token", "gpu_busy_percent",
    "bottleneck",
    "mean_kl", "quality_samples",
    "kv_dtype",
    "speculate", "accept_percent_median", "speculation_gain_median",
    "main_thread_cpu_percent_min",
    "throttled_percent", "waited_percent", "helper_waited_percent", "stolen_percent",
    "paged_percent", "other_gpu_percent", "clock_held_percent", "core_slow_percent",
    "others_cpu_percent",
    "generate_tok_per_s_median", "generate_tok_per_s_min", "generate_tok_per_s_max",
    "generate_s_median", "num_new_tokens_median", "load_s_median", "stall_count_median",
    "stopped_percent",
)  # fmt: skip

RUNS = (
    "cell_id", "run", "status", "reason",
    "num_prompt_tokens", "num_image_tokens", "num_new_tokens",
    "load_s", "preprocess_s", "vision_encode_s", "prefill_s", "ttft_s", "decode_s", "e2e_s",
    "decode_tok_per_s", "itl_p50_ms", "itl_p99_ms", "itl_max_ms", "stall_count",
    "sm_clock_mhz_before", "sm_clock_mhz_mean", "sm_clock_mhz_min", "mem_clock_mhz_mean",
    "power_w_mean", "temperature_c_max", "throttle_reasons",
    "allocated_bytes", "reserved_bytes", "peak_allocated_bytes", "inactive_split_bytes",
    "fragmentation_percent", "num_alloc_retries",
    "process_cpu_percent", "main_thread_cpu_percent", "gc_pause_ms", "involuntary_switches",
    "ran_attention", "ran_quantization", "ran_cache", "text_sha256",
    "ran_kernels",
    "process",
    "ran_kv_dtype",
    "ran_speculate", "num_drafted", "num_accepted", "accept_percent", "speculation_gain",
    "cpu_loop_us", "pointer_chase_us",
    "ran_threads",
)  # fmt: skip

TOKENS = ("cell_id", "run", "token_index", "token_id", "t_s", "itl_ms", "gpu_ms")

GPU = (
    "cell_id", "run", "t_s", "gpu_index", "sm_clock_mhz", "mem_clock_mhz", "pstate",
    "power_w", "temperature_c", "utilization_percent", "memory_used_bytes",
    "throttle_reasons", "pcie_gen", "pcie_width", "compute_processes", "other_sm_percent",
    "max_sm_clock_mhz", "power_limit_percent",
)  # fmt: skip

HOST = (
    "cell_id", "run", "t_s", "event", "span_ms", "tokens",
    "main_cpu_ms", "process_cpu_ms", "other_python_ms", "runqueue_ms",
    "voluntary_switches", "involuntary_switches", "minor_faults", "major_faults",
    "system_busy_ms", "steal_ms", "device_allocs", "alloc_retries", "syncs",
    "core_mhz",
    "main_runqueue_ms", "helper_runqueue_ms", "helper_cpu_ms",
    "throttled_ms", "cpu_pressure_ms", "memory_pressure_ms", "io_pressure_ms",
)  # fmt: skip

PROBES = ("cell_id", "run", "sampler", "pair", "itl_probe_on_ms", "itl_probe_off_ms")

CAUSES = (
    "cell_id", "run", "scope", "token_index", "tokens", "t_s", "span_ms", "lost_ms",
    "cause", "confidence", "evidence",
)  # fmt: skip

# One row a cell, measured after its runs by the process that made them. Bandwidth and rates are
# those of the machine (see `engine.instruments.timing`), the rest is what the cell asks of it.
ROOFLINE = (
    "cell_id", "process", "reason",
    "read_bandwidth_bytes_per_s", "launch_rate_per_s", "graph_launch_rate_per_s",
    "bytes_per_token", "context_tokens",
    "launches_per_token", "kernels_per_token", "gpu_busy_ms_per_token",
)  # fmt: skip

# One row a sample, taken after the timed runs: a held-out picture with the answer and whether it
# is exactly right, or a passage with the divergence from the unquantized reference.
QUALITY = (
    "cell_id", "process", "reason", "sample", "exact", "expected", "answer",
    "positions", "mean_kl",
)  # fmt: skip

# The unquantized reference of each model that is not the bundled one: its likeliest tokens after
# each token of the passages (see `divergence`).
REFERENCE = ("model", "passage", "position", "token_id", "log_prob")

HINT = "restore the file, or measure again"

# Columns that hold words. All others hold a number, or nothing.
_WORDS = frozenset(
    {
        "cell_id", "model", "engine", "quantization", "attention", "cache", "load_mode", "kernels",
        "kv_dtype", "speculate", "status", "reason", "verdict", "gap_causes", "slow_run_causes",
        "stop_reason", "level", "bottleneck", "throttle_reasons", "text_sha256", "ran_attention",
        "ran_quantization", "ran_cache", "ran_kernels", "ran_kv_dtype", "ran_speculate", "event",
        "sampler", "scope", "cause", "evidence", "sample", "expected", "answer", "gpu_index",
        "condition", "observation", "value",
    }
)  # fmt: skip
# Counts, which are read as whole numbers.
_WHOLE = frozenset(
    {
        "run", "process", "token_index", "token_id", "tokens", "pair", "num_new_tokens", "exact",
        "positions", "passage", "position",
    }
)  # fmt: skip
# What others are divided by.
_ABOVE_ZERO = re.compile(r"decode_tok_per_s(_median|_min|_max)?|itl_probe_(on|off)_ms")
# Numbers that may lie below zero; prefill_s did in earlier versions (`campaign_files`).
_SIGNED = re.compile(
    r"prefill_s|temperature_c|log_prob|speculation_gain|overhead|level_change_percent"
)
# No time, rate or count lies outside; what does, overflows in a quotient.
_LEAST, MOST = 1e-12, 1e18


def check_table(
    table: Table,
    known: Sequence[str],
    first: int,
    filled: Collection[str] = (),
    choices: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> None:
    """Check each field by its column's kind, and give rows the columns that they lack.

    Column by column, because a long campaign has millions of fields.

    Args:
        known: columns, of which the `first` must be there; those of `filled` are never
            empty.
        choices: the words that a column may hold.

    Raises:
        BenchError: a column is missing, or a field holds what its column does not.
    """
    if not table.header:
        return
    for name in known[:first]:
        if name not in table.header:
            raise BenchError(f"{table.path} is broken: line 1 has no column {name}", HINT)
    lacking = dict.fromkeys((name for name in known if name not in table.header), "")
    for row in table.rows if lacking else ():
        row.update(lacking)
    for name in known:
        if name in lacking:
            continue
        values = [row[name] for row in table.rows]
        if name in filled and not all(values):
            refuse(table, values.index(""), name, "is empty")
        if name in choices:
            allowed = choices[name]
            kind = f"one of {', '.join(filter(None, allowed))}"
            wrong = next((at for at, value in enumerate(values) if value not in allowed), None)
        else:
            holds = _kind_of(name)
            kind, all_hold = _KINDS[holds]
            if all_hold(values):
                continue
            wrong = next((at for at, value in enumerate(values) if not holds(value)), None)
        if wrong is not None:
            refuse(table, wrong, name, f"{quoted(values[wrong])} is not {kind}")


def _is_word(text: str) -> bool:
    return True


def _is_whole(text: str) -> bool:
    return not text or (text.isascii() and text.isdigit() and len(text) <= 15)


def _is_amount(text: str) -> bool:
    if not text:
        return True
    try:
        value = float(text)
    except ValueError:
        return False
    return value == 0 or _LEAST <= value <= MOST


def _is_above_zero(text: str) -> bool:
    return not text or (_is_amount(text) and float(text) > 0)


def _is_signed(text: str) -> bool:
    return text != "-" and _is_amount(text.removeprefix("-"))


def _are_whole(values: Sequence[str]) -> bool:
    text = "".join(values)
    return text.isascii() and text.isdigit() and max(map(len, values)) <= 15


def _are_amounts(values: Sequence[str]) -> bool:
    try:
        numbers = [float(value) for value in values if value]
    except ValueError:
        return False
    if not math.isfinite(sum(numbers)) or min(numbers, default=0.0) < 0:
        return False
    return max(numbers, default=0.0) <= MOST and min(filter(None, numbers), default=1) >= _LEAST


# Whether a field is what its column holds -> what that is called, and whether all fields of a
# column surely are: several times as fast as one by one, and nearly always so.
_KINDS: Mapping[Callable[[str], bool], tuple[str, Callable[[Sequence[str]], bool]]] = {
    _is_word: ("a word", lambda values: True),
    _is_whole: ("a whole number from 0", _are_whole),
    _is_amount: ("a number from 0", _are_amounts),
    _is_above_zero: ("a number above 0", lambda values: False),
    _is_signed: ("a number", lambda values: False),
}


def _kind_of(name: str) -> Callable[[str], bool]:
    if name in _WORDS:
        return _is_word
    if name in _WHOLE:
        return _is_whole
    if _ABOVE_ZERO.fullmatch(name):
        return _is_above_zero
    return _is_signed if _SIGNED.search(name) else _is_amount


def quoted(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


def refuse(table: Table, place: int, column: str, why: str) -> NoReturn:
    """Raise a BenchError about a field of the row at `place`."""
    column = dict(zip(table.header, table.written, strict=True)).get(column, column)
    raise BenchError(
        f"{table.path} is broken: line {table.lines[place]}, column {column}: {why}", HINT
    )
