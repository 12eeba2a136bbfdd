"""One cell's rows, made up: quiet runs into which a test puts one disturbance and its traces."""

from __future__ import annotations

import random

from qwencli.bench.attribution.attribute import attribute
from qwencli.bench.storage import columns

CELL = "cell-1"
RUNS, TOKENS = 8, 100
TTFT_S = 0.05


class MadeCell:
    """`itl[run][i]` is the time (ms) between tokens i and i + 1 of run 1, 2, ..."""

    def __init__(self, itl_ms=3.0, on_gpu=True, seed=0):
        chance = random.Random(seed)
        self.on_gpu = on_gpu
        self.itl = {
            run: [itl_ms * (1 + chance.gauss(0, 0.01)) for _ in range(TOKENS - 1)]
            for run in range(1, RUNS + 1)
        }
        self.run_columns = {run: {} for run in self.itl}
        self.host = []
        self.gpu_figures = {run: {} for run in self.itl}  # of a run's samples
        self.gpu_moments = []  # (run, first token, last token, figures)
        self.phase_figures = {}  # (run, phase) -> figures

    def start_s(self, run):
        return 100.0 * run + TTFT_S

    def token_s(self, run, token):
        return self.start_s(run) + sum(self.itl[run][:token]) / 1e3

    def slow(self, run, token, lost_ms, **figures):
        """Token `token` comes late; the row of host.csv says so with these figures."""
        self.itl[run][token - 1] += lost_ms
        start, end = self.token_s(run, token - 1), self.token_s(run, token)
        span = 1e3 * (end - start)
        # Waiting for a GPU, the host's thread spins.
        self.event(run, "token", end, span, **{"tokens": 1, "main_cpu_ms": span, **figures})
        return start, end

    def event(self, run, event, end_s, span_ms, **figures):
        values = {"t_s": end_s, "event": event, "span_ms": span_ms, **figures}
        self.host.append(_row(columns.HOST, run, **values))

    def rows(self):
        runs, tokens, gpu = [], [], []
        host = list(self.host)
        for run, itl in self.itl.items():
            decode_s = sum(itl) / 1e3
            figures = {
                "status": "ok", "num_new_tokens": TOKENS, "ttft_s": TTFT_S, "decode_s": decode_s,
                "e2e_s": TTFT_S + decode_s, "decode_tok_per_s": len(itl) / decode_s,
                **self.run_columns[run],
            }  # fmt: skip
            runs.append(_row(columns.RUNS, run, **figures))
            for token in range(TOKENS):
                last = itl[token - 1] if token else None
                values = {"token_index": token, "t_s": self.token_s(run, token), "itl_ms": last}
                gpu_ms = (last or 50.0) if self.on_gpu else None
                tokens.append(_row(columns.TOKENS, run, **values, gpu_ms=gpu_ms))
            host += self._phases(run, figures["ttft_s"], decode_s)
            if self.on_gpu:
                gpu += self._samples(run, decode_s)
        return runs, tokens, host, gpu

    def _phases(self, run, ttft_s, decode_s):
        ends = {"prefill": self.start_s(run), "decode": self.start_s(run) + decode_s}
        for phase, span in (("prefill", 1e3 * ttft_s), ("decode", 1e3 * decode_s)):
            figures = {"main_cpu_ms": span, "process_cpu_ms": span, "runqueue_ms": 0.0, "tokens": 1}
            if phase == "decode":
                figures["tokens"] = TOKENS - 1
            figures |= self.phase_figures.get((run, phase), {})
            yield _row(columns.HOST, run, t_s=ends[phase], event=phase, span_ms=span, **figures)

    def _samples(self, run, decode_s):
        usual = {
            "gpu_index": 0, "sm_clock_mhz": 2800, "pstate": 0, "power_w": 400.0,
            "temperature_c": 60, "throttle_reasons": "none", "compute_processes": 1,
        }  # fmt: skip
        for number in range(int(decode_s / 0.02) + 1):
            at = self.start_s(run) + 0.02 * number
            figures = {**usual, **self.gpu_figures[run]}
            for disturbed, first, last, other in self.gpu_moments:
                if disturbed == run and self.token_s(run, first - 1) <= at + 0.02:
                    figures |= other if at - 0.02 <= self.token_s(run, last) else {}
            yield _row(columns.GPU, run, t_s=at, **figures)

    def findings(self, scope=None, device_busy_percent=None, disturbed=None):
        found = attribute(*self.rows(), {CELL: device_busy_percent}, {CELL: disturbed or {}})
        return [one for one in found if scope in (None, one.scope)]


def _row(names, run, **values):
    texts = {key: "" if value is None else str(value) for key, value in values.items()}
    return {**dict.fromkeys(names, ""), "cell_id": CELL, "run": str(run), **texts}
