"""Columns of a campaign's CSV files, in order.

Other programs read these files by name: columns may be added at the end, never renamed.
What a sensor cannot read is an empty field, never zero. All `t_s` are seconds on the host's
`time.perf_counter` clock, which every process of one machine shares.
"""

from __future__ import annotations

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
)  # fmt: skip

TOKENS = ("cell_id", "run", "token_index", "token_id", "t_s", "itl_ms", "gpu_ms")

GPU = (
    "cell_id", "run", "t_s", "gpu_index", "sm_clock_mhz", "mem_clock_mhz", "pstate",
    "power_w", "temperature_c", "utilization_percent", "memory_used_bytes",
    "throttle_reasons", "pcie_gen", "pcie_width", "compute_processes",
)  # fmt: skip

HOST = (
    "cell_id", "run", "t_s", "event", "span_ms", "tokens",
    "main_cpu_ms", "process_cpu_ms", "other_python_ms", "runqueue_ms",
    "voluntary_switches", "involuntary_switches", "minor_faults", "major_faults",
    "system_busy_ms", "steal_ms", "device_allocs", "alloc_retries", "syncs",
)  # fmt: skip

PROBES = ("cell_id", "run", "sampler", "pair", "watched_itl_ms", "bare_itl_ms")

CAUSES = (
    "cell_id", "run", "scope", "token_index", "tokens", "t_s", "span_ms", "lost_ms",
    "cause", "confidence", "evidence",
)  # fmt: skip
