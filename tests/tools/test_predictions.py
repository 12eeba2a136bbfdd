"""The generated page of step times: read from results, the newest first, and labelled."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "tools" / "docs"
H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
STEP = {
    "context": 512,
    "step_us": [3100.0, 3130.0, 3110.0],
    "bytes": 8_000_000_000,
    "tok_per_s": 321.5,
    "percent_of_limit": 92.0,
    "parts": {
        "norm_qkv": {
            "launches": 36, "bytes": 3_000_000_000, "us": 1500.0, "percent_of_bandwidth": 71.4,
        },
        "choose": {
            "launches": 2, "bytes": 5_000_000_000, "us": 1600.0, "percent_of_bandwidth": 111.6,
        },
    },
}  # fmt: skip
LARGE = {**STEP, "bytes": 27_000_000_000}


def row(model: str = "a", quantization: str = "none", **steps: Any) -> dict[str, Any]:
    return {"model": model, "quantization": quantization, "default": [STEP], **steps}


def write(
    root: Path, name: str, *rows: dict[str, Any], gpu: str = H100, read: float = 2.8e12
) -> None:
    file = root / "results" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    document = {"gpu": gpu, "read_bandwidth_bytes_per_s": read, "rows": rows}
    file.write_text(json.dumps(document), encoding="utf-8")


@pytest.fixture
def docs(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(DOCS))
    import predictions

    return predictions


@pytest.fixture
def root(tmp_path: Path, docs: Any) -> Path:
    """A project with the results that the formula always reads."""
    (tmp_path / docs.OVERLAP).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / docs.OVERLAP, tmp_path / docs.OVERLAP)
    return tmp_path


def test_the_measured_gpu_is_predicted_as_measured(docs: Any, root: Path) -> None:
    write(root, "2026-01-01-h100-step/step.json", row())
    (step,) = docs.newest_steps(root / "results")
    assert docs.token_us(step, 2.8e12) == pytest.approx(3110.0)


def test_reading_follows_the_bandwidth_and_nothing_else_does(docs: Any, root: Path) -> None:
    write(root, "2026-01-01-h100-step/step.json", row())
    (step,) = docs.newest_steps(root / "results")
    reading = 8e9 / 2.8e12 * 1e6
    assert docs.token_us(step, 1.4e12) - 3110.0 == pytest.approx(reading)
    assert docs.token_us(step, 2.8e12, serial=2.0) == pytest.approx(3110.0 + 2.0 * 38)
    halved = docs.token_us(step, 2.8e12, factor=0.5)
    assert halved == pytest.approx(3110.0 - (3110.0 - reading) / 2)


def test_nothing_is_faster_than_reading(docs: Any, root: Path) -> None:
    """A step that seems to read faster than the memory does has nothing beyond reading."""
    write(root, "2026-01-01-h100-step/step.json", row(default=[{**STEP, "step_us": [2000.0]}]))
    (step,) = docs.newest_steps(root / "results")
    assert docs.token_us(step, 2.8e12) == pytest.approx(8e9 / 2.8e12 * 1e6)


def test_the_range_holds_the_prediction_and_the_limit_is_above(docs: Any, root: Path) -> None:
    write(root, "2026-01-01-h100-step/step.json", row(), row("b", default=[LARGE]))
    steps = docs.newest_steps(root / "results")
    rows = list(docs.predictions(steps, 3.0, (0.8, 0.9)))
    # 27 GB fit the card of 32 GiB alone.
    assert [(r[0].split()[-1], r[1]) for r in rows] == [("5090", "a"), ("5090", "b"), ("4090", "a")]
    for found in rows:
        low, high = (float(speed) for speed in found[5].split("-"))
        assert low < float(found[4].strip("*")) < high < float(found[6])


def test_newest_wins_and_the_same_card_fills_what_it_lacks(docs: Any, root: Path) -> None:
    new = {**STEP, "tok_per_s": 400.0}
    write(root, "2026-01-01-h100-step/a.json", row(), row(quantization="4bit"))
    write(root, "2026-01-02-h200-step/a.json", row(quantization="8bit"), gpu=H200)
    write(root, "2026-01-03-h100-step/a.json", row(default=[new]))
    steps = docs.newest_steps(root / "results")
    assert [(s.quantization, s.figures["tok_per_s"], s.gpu) for s in steps] == [
        ("none", 400.0, H100), ("4bit", 321.5, H100),
    ]  # fmt: skip
    page = docs.page(root)
    assert "`results/2026-01-01-h100-step/`, `results/2026-01-03-h100-step/`" in page
    assert "Not measured, so not predicted: a 8bit, a fp8." in page


def test_the_engines_own_tiles_win_over_a_search_of_the_same_day(docs: Any, root: Path) -> None:
    found = {"search": [], "searched": [{**STEP, "tok_per_s": 999.0}]}
    write(root, "2026-01-01-h100-step/search.json", row(**found), row("b", **found))
    write(root, "2026-01-01-h100-step/a.json", row())
    steps = docs.newest_steps(root / "results")
    assert [(s.model, s.figures["tok_per_s"]) for s in steps] == [("a", 321.5), ("b", 999.0)]


def test_the_page_says_what_it_is_and_where_from(docs: Any, root: Path) -> None:
    assert docs.page(root) is None
    write(root, "2026-01-01-h100-step/step.json", row("qwen3-vl-4b"))
    page = docs.page(root)
    assert "**These are predictions, not measurements" in page
    assert "`results/2026-01-01-h100-step/`" in page
    assert "which cost\n  3.7 us a kernel" in page
    accounting = page.split("## Accounting")[1]
    assert "| qwen3-vl-4b | none | 512 | whole step | 38 | 8000.0 | 3110 | 92 |" in accounting
    assert ',qwen3-vl-4b,none,512,"norm, QKV",36,3000.0,1500,71\n' in docs.details(root)


def test_what_was_measured_on_another_gpu_is_within_its_range(docs: Any) -> None:
    """The formula, from the committed results of one card to those of another."""
    steps = docs.newest_steps(ROOT / "results")
    rows = list(docs.tried(ROOT, steps, docs.serial_us(ROOT), docs.shares(ROOT)))
    assert rows
    for *_, span, measured, _ in rows:
        low, high = map(float, span.split("-"))
        assert low < float(measured) < high


def test_a_card_without_a_data_sheet_is_named(docs: Any, root: Path) -> None:
    write(root, "2026-01-01-b200-step/step.json", row(), gpu="NVIDIA B200")
    with pytest.raises(SystemExit, match="NVIDIA B200: put"):
        docs.page(root)


def test_what_launches_without_overlap_cost_is_read_from_the_measurement(docs: Any) -> None:
    assert docs.serial_us(ROOT) == pytest.approx((2909.384 - 2227.528) / 182, abs=1e-3)
