"""Columns of a campaign's CSV files, in order.

Other programs read these files by name: columns may be added at the end, and what is renamed is
still read by its old name (`RENAMED`).
What a sensor cannot read is an empty field, never zero. All `t_s` are seconds on the host's
`time.perf_counter` clock, which every process of one machine shares.
"""

from __future__ import annotations

from collections.abc import Mapping

# What columns were called in campaigns of earlier versions -> what they are called now.
RENAMED: Mapping[str, str] = {
    "bound": "bottleneck",
    "core_loop_us": "cpu_loop_us",
    "memory_walk_us": "pointer_chase_us",
    "watched_itl_ms": "itl_probe_on_ms",
    "bare_itl_ms": "itl_probe_off_ms",
}

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
