from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.docs import predictions

ROOT = Path(__file__).parents[2]
STEP = {
    "context": 512,
    "step_us": [2200.0, 2230.0, 2210.0],
    "bytes": 8_000_000_000,
    "tok_per_s": 452.5,
    "parts": {
        "norm_qkv": {"launches": 36, "bytes": 3_000_000_000},
        "choose": {"launches": 2, "bytes": 5_000_000_000},
    },
}
LARGE = {**STEP, "bytes": 27_000_000_000}
DOCUMENT = {
    "gpu": "NVIDIA H200",
    "read_bandwidth_bytes_per_s": 4.4e12,
    "rows": [
        {"model": "a", "quantization": "none", "default": [LARGE], "searched": [STEP]},
        {"model": "b", "quantization": "none", "default": [LARGE]},
    ],
}


def test_the_measured_gpu_is_predicted_as_measured() -> None:
    assert predictions.token_us(STEP, 4.4e12, 4.4e12) == 2210.0


def test_reading_follows_the_bandwidth_and_nothing_else_does() -> None:
    slower = predictions.token_us(STEP, 4.4e12, 2.2e12)
    assert slower - 2210.0 == pytest.approx(8e9 / 4.4e12 * 1e6)
    assert predictions.token_us(STEP, 4.4e12, 4.4e12, extra_us=2.0) == 2210.0 + 2.0 * 38
    beyond = 2210.0 - 8e9 / 4.4e12 * 1e6
    halved = predictions.token_us(STEP, 4.4e12, 4.4e12, factor=0.5)
    assert halved == pytest.approx(2210.0 - beyond / 2)


def test_rows_are_of_the_best_tiles_and_of_models_that_fit() -> None:
    rows = list(predictions.rows(DOCUMENT, 3.0))
    assert [(row[0].split()[-1], row[1]) for row in rows] == [
        ("5090", "a"), ("5090", "b"), ("4090", "a"),
    ]  # fmt: skip
    low, high = (float(speed) for speed in rows[0][6].split("-"))
    assert low < float(rows[0][5].strip("*")) < high < float(rows[0][7]) < 452.5


def test_the_page_says_what_it_is_and_where_from(tmp_path: Path) -> None:
    assert predictions.page(tmp_path) is None
    folder = tmp_path / "results" / "2026-01-01-h200-decode-step"
    folder.mkdir(parents=True)
    (folder / "step.json").write_text(json.dumps(DOCUMENT), encoding="utf-8")
    overlap = tmp_path / predictions.OVERLAP
    overlap.parent.mkdir()
    overlap.write_bytes((ROOT / predictions.OVERLAP).read_bytes())
    page = predictions.page(tmp_path)
    assert page is not None
    assert "**Predictions, not measurements.**" in page
    assert "results/2026-01-01-h200-decode-step" in page
    assert "which cost 3.7 us a" in page


def test_what_launches_without_overlap_cost_is_read_from_the_measurement() -> None:
    assert predictions.serial_us(ROOT) == pytest.approx((2909.384 - 2227.528) / 182, abs=1e-3)
