"""What a test looks at in a run: a column, something the condition observed, or made of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from qwencli.bench.report.cell_statistics import generate_s
from qwencli.bench.storage.columns import RUNS

# A row of runs.csv with what the condition observed in that run.
Row = Mapping[str, str]


def _of(row: Row, name: str) -> float:
    return float(row[name] or 0.0)


def _generate_tok_per_s(row: Row) -> float:
    return _of(row, "num_new_tokens") / (generate_s(row) or 0.0)


def _request_s(row: Row) -> float:
    return _of(row, "load_s") + _of(row, "e2e_s")


def _phases_share(row: Row) -> float:
    parts = ("preprocess_s", "vision_encode_s", "prefill_s")
    return sum(_of(row, part) for part in parts) / _of(row, "ttft_s")


def _first_forward_share(row: Row) -> float:
    device_s = _of(row, "vision_encode_s") + _of(row, "prefill_s")
    return float(row["first_forward_host_s"]) / device_s


def _first_stall(row: Row) -> float:
    return 1e3 * _of(row, "ttft_s") / float(row["itl_p50_ms"])


def _prompt_s(row: Row) -> float:
    return _of(row, "vision_encode_s") + _of(row, "prefill_s")


def _processor_share(row: Row) -> float:
    """That processor's share of the run, were it in place of ours."""
    slow = float(row["processor_s"])
    return slow / (_of(row, "e2e_s") - _of(row, "preprocess_s") + slow)


def _processor_ratio(row: Row) -> float:
    return float(row["processor_s"]) / float(row["preprocess_s"])


# Name -> from a row; KeyError and ValueError: this run does not have it.
DERIVED: Mapping[str, Callable[[Row], float]] = {
    "generate_tok_per_s": _generate_tok_per_s,
    "request_s": _request_s,
    "phases_share_of_ttft": _phases_share,
    "first_forward_share": _first_forward_share,
    "ttft_over_median_token": _first_stall,
    "prompt_s": _prompt_s,
    "processor_share": _processor_share,
    "processor_over_ours": _processor_ratio,
}
# What conditions observe (see `conditions`), and what loads show.
OBSERVED = (
    "processor_s", "first_forward_host_s", "sdpa_math_percent", "sdpa_changed_percent",
    "sdpa_calls", "load_peak_growth_bytes",
)  # fmt: skip
NAMES = (*RUNS, *OBSERVED, *DERIVED)
# What each figure is, for people.
WORDS: Mapping[str, str] = {
    "decode_tok_per_s": "decode tok/s",
    "generate_tok_per_s": "tokens over the time of the whole generate()",
    "ttft_s": "time to first token, s",
    "itl_p50_ms": "median token, ms",
    "load_s": "load, s",
    "load_peak_growth_bytes": "host memory that the load takes at most, bytes",
    "request_s": "load and answer together, s",
    "prompt_s": "vision and prefill, s",
    "vision_encode_s": "vision, s",
    "phases_share_of_ttft": "preprocess, vision and prefill as a share of TTFT",
    "first_forward_share": "time until the first pass returns on the host, over its GPU time",
    "ttft_over_median_token": "TTFT over the median token",
    "processor_share": "share of a run in transformers' image processor",
    "processor_over_ours": "transformers' image processor over ours",
    "sdpa_math_percent": "attention calls that the math backend took, %",
    "sdpa_changed_percent": "runs that used other backends than the first, %",
}


def value(metric: str, row: Row) -> float | None:
    """The metric in one run; None where the run does not have it."""
    try:
        made = DERIVED.get(metric)
        return float(row[metric]) if made is None else made(row)
    except (KeyError, ValueError, ZeroDivisionError):
        return None
