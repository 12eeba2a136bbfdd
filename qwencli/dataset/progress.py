"""How far a set is: a bar at a terminal, lines elsewhere, and how long it will take."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qwencli.dataset.pipeline import Captioned, Outcome
from qwencli.dataset.sinks import write_whole
from qwencli.models import quantized_cache
from qwencli.output import Output

# Between lines where there is no terminal; between new numbers in the bar.
LINE_EVERY_S, BAR_EVERY_S = 15.0, 0.2
# The rate is that of the last so many seconds: the first captions wait for graphs to be made.
_WINDOW_S = 60.0
_GPU_EVERY_S = 1.0
_SHORT = "less than a second"
# A rate is kept of runs of so many captions at least, and so many are kept.
FEWEST_FOR_A_RATE, _MOST_RATES = 8, 200


@dataclass(frozen=True)
class ProgressSnapshot:
    """How far a run is. `left_s` and `gpu_percent` are None where they are not known."""

    done: int
    total: int
    failed: int
    seconds: float
    captions_per_s: float
    tok_per_s: float
    left_s: float | None
    gpu_percent: float | None = None

    def __str__(self) -> str:
        parts = [f"{self.done} of {self.total}"]
        parts += [f"{self.failed} failed"] if self.failed else []
        parts += [f"{self.captions_per_s:.1f} captions/s, {self.tok_per_s:.0f} tok/s"]
        parts += [] if self.left_s is None else [f"{duration(self.left_s)} left"]
        parts += [] if self.gpu_percent is None else [f"GPU {self.gpu_percent:.0f}%"]
        return ", ".join(parts)


class Progress:
    """Counts outcomes and shows where a run stands, inside `shown`.

    Args:
        event: also told each line's snapshot (`--json`).
    """

    def __init__(
        self,
        total: int,
        output: Output,
        event: Callable[[ProgressSnapshot], None] = lambda snapshot: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self._output, self._event, self._clock = total, output, event, clock
        self._began_s = self._said_s = clock()
        self._done = self._failed = self._tokens = 0
        # When, how many were done, and their tokens.
        self._recent: deque[tuple[float, int, int]] = deque([(self._began_s, 0, 0)])
        self._advance: Callable[[int, str], None] | None = None
        self.gpu = GpuUse()

    @contextlib.contextmanager
    def shown(self, device: str) -> Iterator[None]:
        """Show it while the engine on `device` works."""
        self._began_s = self._said_s = self._clock()
        self._recent = deque([(self._began_s, 0, 0)])
        with self.gpu.watched(device), self._output.bar(self.total) as self._advance:
            yield
            if self._advance is not None:
                self._advance(self._done, str(self.snapshot()))

    def add(self, outcome: Outcome) -> None:
        now_s = self._clock()
        self._done += 1
        if isinstance(outcome, Captioned):
            self._tokens += outcome.result.num_new_tokens
        else:
            self._failed += 1
        if now_s - self._recent[-1][0] >= BAR_EVERY_S:
            self._recent.append((now_s, self._done, self._tokens))
            while len(self._recent) > 2 and now_s - self._recent[1][0] > _WINDOW_S:
                self._recent.popleft()
            if self._advance is not None:
                self._advance(self._done, str(self.snapshot()))
        if now_s - self._said_s >= LINE_EVERY_S:
            self._said_s = now_s
            snapshot = self.snapshot()
            self._event(snapshot)
            if self._advance is None:
                self._output.notice(str(snapshot))

    def snapshot(self) -> ProgressSnapshot:
        now_s = self._clock()
        since_s, done, tokens = self._recent[0]
        took_s = max(now_s - since_s, 1e-9)
        rate = (self._done - done) / took_s
        return ProgressSnapshot(
            done=self._done,
            total=self.total,
            failed=self._failed,
            seconds=now_s - self._began_s,
            captions_per_s=rate,
            tok_per_s=(self._tokens - tokens) / took_s,
            left_s=(self.total - self._done) / rate if rate else None,
            gpu_percent=self.gpu.percent,
        )


class GpuUse:
    """How busy GPUs are, as their driver says: now (`percent`), and over the whole run (`mean`)."""

    def __init__(self) -> None:
        self.percent: float | None = None
        self._sum, self._count = 0.0, 0

    @property
    def mean(self) -> float | None:
        return self._sum / self._count if self._count else None

    @contextlib.contextmanager
    def watched(self, devices: str) -> Iterator[None]:
        """Args: devices: their names, with commas between."""
        gpus = [name for each in devices.split(",") if (name := each.strip()).startswith("cuda")]
        if not gpus:
            yield
            return
        ended = threading.Event()
        thread = threading.Thread(
            target=self._watch, args=(gpus, ended), name="gpu use", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            ended.set()

    def _watch(self, gpus: Sequence[str], ended: threading.Event) -> None:
        from qwencli.engine.machine.host import gpu_use

        for percents in zip(*map(gpu_use, gpus), strict=False):
            self.percent = sum(percents) / len(percents)
            self._sum += self.percent
            self._count += 1
            if ended.wait(_GPU_EVERY_S):
                return


@dataclass(frozen=True)
class Rate:
    """What this machine reached with a model, and when."""

    captions_per_s: float
    captions: int
    device: str
    day: str

    def estimate(self, captions: int) -> str:
        takes = duration(captions / self.captions_per_s)
        return (
            f"{'' if takes == _SHORT else 'about '}{takes}, at the "
            f"{self.captions_per_s:.2f} captions/s that this machine reached with this model on "
            f"{self.device} ({self.captions} captions, {self.day})"
        )


def _rates_file() -> Path:
    return quantized_cache.cache_root().parent / "caption_rates.json"


def kept_rate(computes: Mapping[str, Any]) -> Rate | None:
    """The rate of an earlier run with the same model and modes."""
    found = _rates().get(json.dumps(computes, sort_keys=True, default=str))
    try:
        rate = Rate(**found) if isinstance(found, dict) else None
    except TypeError:
        return None
    return rate if rate and rate.captions_per_s > 0 else None


def keep_rate(computes: Mapping[str, Any], captions: int, seconds: float, device: str) -> None:
    """Keep what a run reached, for estimates; where the cache takes no file, nothing is kept."""
    if captions < FEWEST_FOR_A_RATE or seconds <= 0:
        return
    rates = _rates()
    key = json.dumps(computes, sort_keys=True, default=str)
    rates.pop(key, None)
    day = f"{datetime.now(UTC):%Y-%m-%d}"
    rates[key] = asdict(Rate(captions / seconds, captions, device, day))
    kept = dict(list(rates.items())[-_MOST_RATES:])
    with contextlib.suppress(OSError):
        path = _rates_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(kept, indent=1).encode())


def _rates() -> dict[str, Any]:
    try:
        rates = json.loads(_rates_file().read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return rates if isinstance(rates, dict) else {}


def duration(seconds: float) -> str:
    """As people say it: `12 s`, `3 min 20 s`, `2 h 5 min`, `3 days 4 h`."""
    if 0 < seconds < 1:
        return _SHORT
    whole = round(seconds)
    for unit, size, below, below_size in (
        ("days", 86400, "h", 3600),
        ("h", 3600, "min", 60),
        ("min", 60, "s", 1),
    ):
        if whole >= size:
            rest = whole % size // below_size
            return f"{whole // size} {unit}" + (f" {rest} {below}" if rest else "")
    return f"{whole} s"
