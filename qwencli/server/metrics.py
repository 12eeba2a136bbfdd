"""What a server counts: Prometheus's text at `/metrics`, and the moment's state for people."""

from __future__ import annotations

import operator
import time
from bisect import bisect_right
from collections import Counter
from dataclasses import asdict
from typing import Any

from qwencli.engine.machine.gpu_sensors import ClockSample, clock_samples
from qwencli.results import GenerationResult
from qwencli.server.answers import EngineHandle

_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
# How old clocks may be that are told: reading them takes the driver a moment.
_CLOCKS_S = 0.2


class _Histogram:
    def __init__(self, name: str, about: str) -> None:
        self._name, self._about = name, about
        self._counts = [0] * (len(_BOUNDS_S) + 1)
        self._sum = 0.0

    def add(self, *seconds: float) -> None:
        # A search for each bound is less than one for each token of an answer.
        ranked, below = sorted(seconds), 0
        for index, bound in enumerate(_BOUNDS_S):
            reached = bisect_right(ranked, bound)
            self._counts[index] += reached - below
            below = reached
            if below == len(ranked):
                break
        self._counts[-1] += len(ranked) - below
        self._sum += sum(ranked)

    def lines(self) -> list[str]:
        found = [f"# HELP {self._name} {self._about}", f"# TYPE {self._name} histogram"]
        total = 0
        for bound, count in zip((*map(str, _BOUNDS_S), "+Inf"), self._counts, strict=True):
            total += count
            found.append(f'{self._name}_bucket{{le="{bound}"}} {total}')
        return [*found, f"{self._name}_sum {self._sum}", f"{self._name}_count {total}"]


class Metrics:
    """Numbers of one server; of its event loop only.

    Args:
        replies: how many there were with each status.
    """

    def __init__(self, engine_thread: EngineHandle, model: str, replies: Counter[int]) -> None:
        self._thread, self._model, self._replies = engine_thread, model, replies
        self._ttft = _Histogram("qwencli_ttft_seconds", "From the request to the first token.")
        self._itl = _Histogram("qwencli_itl_seconds", "Between two tokens of an answer.")
        self._e2e = _Histogram("qwencli_e2e_seconds", "From the request to the last token.")
        self._tokens: Counter[str] = Counter()
        self._samples = clock_samples(engine_thread.engine.effective.device)
        self._clocks: tuple[float, ClockSample | None] = (float("-inf"), None)

    def answered(self, result: GenerationResult) -> None:
        timings = result.timings
        if timings.ttft_s is not None:
            self._ttft.add(timings.ttft_s)
        self._e2e.add(timings.e2e_s)
        self._itl.add(*map(operator.sub, result.token_t_s[1:], result.token_t_s))
        self._tokens["prompt"] += result.num_prompt_tokens or 0
        self._tokens["cached"] += result.num_cached_tokens
        self._tokens["image"] += result.num_image_tokens or 0
        self._tokens["generated"] += result.num_new_tokens

    def state(self) -> dict[str, Any]:
        """What the engine does at the moment."""
        pages = getattr(self._thread.engine, "kv_pages", None)
        clocks = self._clocks_now()
        running = self._thread.num_running
        return {
            "model": self._model,
            "running": running,
            "waiting": self._thread.num_unfinished - running,
            "rows": self._thread.max_rows,
            "idle_s": self._thread.idle_s,
            "kv_pages": None if pages is None else {"used": pages[0], "all": pages[1]},
            "effective": asdict(self._thread.engine.effective),
            "gpu": None if clocks is None else asdict(clocks),
        }

    def text(self) -> str:
        state = self.state()
        lines = self._ttft.lines() + self._itl.lines() + self._e2e.lines()
        lines += ["# TYPE qwencli_tokens_total counter"]
        lines += [
            f'qwencli_tokens_total{{kind="{kind}"}} {n}' for kind, n in sorted(self._tokens.items())
        ]
        lines += ["# TYPE qwencli_http_responses_total counter"]
        lines += [
            f'qwencli_http_responses_total{{status="{status}"}} {n}'
            for status, n in sorted(self._replies.items())
        ]
        gauges: dict[str, Any] = {
            "qwencli_requests_running": state["running"],
            "qwencli_requests_waiting": state["waiting"],
            "qwencli_rows": state["rows"],
        }
        if state["kv_pages"] is not None:
            gauges["qwencli_kv_pages_used"] = state["kv_pages"]["used"]
            gauges["qwencli_kv_pages"] = state["kv_pages"]["all"]
        for name in ("sm_clock_mhz", "mem_clock_mhz", "power_w", "temperature_c"):
            gauges[f"qwencli_gpu_{name}"] = (state["gpu"] or {}).get(name)
        for name, value in gauges.items():
            if value is not None:
                lines += [f"# TYPE {name} gauge", f"{name} {value}"]
        return "\n".join(lines) + "\n"

    def _clocks_now(self) -> ClockSample | None:
        read_s, clocks = self._clocks
        if time.monotonic() - read_s > _CLOCKS_S:
            clocks = next(self._samples, None)
            self._clocks = time.monotonic(), clocks
        return clocks
