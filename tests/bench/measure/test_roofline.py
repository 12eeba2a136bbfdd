from __future__ import annotations

import pytest

from qwencli.bench.measure.roofline import (
    Bottleneck,
    bottleneck,
    roofline_columns,
    with_best_limits,
)
from qwencli.bench.storage.columns import ROOFLINE

ROW = {
    **dict.fromkeys(ROOFLINE, ""),
    "cell_id": "c",
    "read_bandwidth_bytes_per_s": "1000000000",
    "launch_rate_per_s": "250000",
    "graph_launch_rate_per_s": "800000",
    "bytes_per_token": "8000000",
    "launches_per_token": "443",
    "kernels_per_token": "440",
    "gpu_busy_ms_per_token": "4.0",
}


def test_mbu_is_bytes_times_speed_over_bandwidth():
    found = roofline_columns(ROW, 100.0, 10.0)
    assert found["mbu_percent"] == pytest.approx(80.0)
    assert found["gpu_busy_percent"] == pytest.approx(40.0)
    assert found["bottleneck"] is Bottleneck.BANDWIDTH
    assert found["launches_per_token"] == 443.0
    # No GPU is busy for longer than there is time.
    assert roofline_columns(ROW, 100.0, 3.9)["gpu_busy_percent"] == 100.0


def test_what_was_not_measured_is_none():
    assert set(roofline_columns(None, 100.0, 10.0).values()) == {None}
    empty = dict.fromkeys(ROOFLINE, "")
    assert set(roofline_columns(empty, 100.0, 10.0).values()) == {None}
    assert roofline_columns(ROW, None, None)["mbu_percent"] is None


@pytest.mark.parametrize(
    ("mbu", "busy", "verdict"),
    [
        (60.0, 10.0, Bottleneck.BANDWIDTH),
        (59.9, 69.9, Bottleneck.HOST),
        (10.0, 70.0, Bottleneck.KERNELS),
        (None, 20.0, Bottleneck.HOST),
        (10.0, None, Bottleneck.NOT_BANDWIDTH),
        (None, None, None),
    ],
)
def test_the_rule(mbu, busy, verdict):
    assert bottleneck(mbu, busy) is verdict


def test_a_reading_taken_under_other_load_is_not_the_limit():
    slow = {**ROW, "cell_id": "slow", "read_bandwidth_bytes_per_s": "5"}
    small = {**ROW, "cell_id": "small", "bytes_per_token": "1", "launch_rate_per_s": "300000"}
    large = {**ROW, "cell_id": "large", "bytes_per_token": "9e9"}
    large["read_bandwidth_bytes_per_s"] = "900"
    found = with_best_limits([slow, ROW, small, large])
    assert found["slow"]["read_bandwidth_bytes_per_s"] == "1000000000"
    assert found["small"]["read_bandwidth_bytes_per_s"] == "1000000000"
    assert found["large"]["read_bandwidth_bytes_per_s"] == "900"
    assert {row["launch_rate_per_s"] for row in found.values()} == {"300000"}
    assert with_best_limits([]) == {}
