from __future__ import annotations

import time
from typing import Any

from benchmarks.comfyui_interference import Other, summary


def row(place: str, kind: str, speed: float) -> dict[str, Any]:
    return {"place": place, "disturbed_by": kind, "decode_tok_per_s": speed}


def test_each_place_has_its_ratio_with_and_without_a_disturbance() -> None:
    rows = [row("in-process", "idle", 100.0), row("in-process", "gpu", 25.0)]
    rows += [row("resident", "idle", 90.0), row("resident", "gpu", 60.0)]
    found = {(each["place"], each["disturbed_by"]): each for each in summary(rows)}
    assert found["in-process", "all"]["run_ratio_max_min"] == 4.0
    assert found["resident", "all"]["run_ratio_max_min"] == 1.5
    assert found["resident", "gpu"]["executions"] == 1
    assert found["in-process", "idle"]["run_ratio_max_min"] == 1.0


def test_the_other_thread_works_while_it_is_let() -> None:
    other = Other("cpu", side=8)
    with other.busy("idle"):
        time.sleep(0.01)
    assert other.turns == 0
    for kind in ("gpu", "prompt"):
        with other.busy(kind):
            while not other.turns:
                time.sleep(0.001)
        turns = other.turns
        time.sleep(0.01)
        assert other.turns == turns
