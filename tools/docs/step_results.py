"""Reads what `benchmarks/decode_step.py` measured, and of models that run in rows alone
`benchmarks/rows_step.py`: results/DATE-CARD-step/*.json.

The newest folder says which card is shown. What it lacks comes from older folders of the same card;
of two files in a folder, the one that searched no tiles tells how the engine runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATTERN = "*-step/*.json"
# NVIDIA's data sheets, SXM modules: bytes a second.
VENDOR = {"NVIDIA H100 80GB HBM3": 3.35e12, "NVIDIA H200": 4.8e12}
Key = tuple[str, str, str, int]


@dataclass(frozen=True)
class Step:
    """One decode step as measured.

    Args:
        figures: one entry of "default" or "searched" in the file.
        bandwidth: bytes a second that this card read, in the same process.
    """

    model: str
    quantization: str
    kv_dtype: str
    gpu: str
    folder: str
    bandwidth: float
    figures: Mapping[str, Any]

    @property
    def context(self) -> int:
        return int(self.figures["context"])

    @property
    def key(self) -> Key:
        """What makes two steps comparable."""
        return self.model, self.quantization, self.kv_dtype, self.context

    @property
    def launches(self) -> int:
        """Of one token; 0 where they were not counted."""
        return sum(part["launches"] for part in self.figures["parts"].values())

    @property
    def weights(self) -> str:
        kv = "" if self.kv_dtype == "auto" else f", keys and values {self.kv_dtype}"
        return f"{self.quantization}{kv}"

    @property
    def share(self) -> float:
        """Of the vendor's bandwidth."""
        return self.bandwidth / vendor_bandwidth(self.gpu)


def vendor_bandwidth(gpu: str) -> float:
    """Bytes a second. Exits for a card that VENDOR does not have."""
    if gpu not in VENDOR:
        sys.exit(f"{gpu}: put its vendor's bandwidth into step_results.VENDOR")
    return VENDOR[gpu]


def steps_of(file: Path) -> list[Step]:
    """Every step of one token in a file, those with searched tiles where it has them."""
    document = json.loads(file.read_text(encoding="utf-8"))
    if "modes" in document:
        return [
            Step(
                document["model"],
                mode["mode"],
                "auto",
                document["gpu"],
                file.parent.name,
                document["read_bandwidth_bytes_per_s"],
                {
                    "context": mode["context"],
                    "step_us": mode["steps"]["1"]["us"],
                    "tok_per_s": mode["steps"]["1"]["tok_per_s"],
                    "bytes": mode["read_bytes"],
                    "percent_of_limit": mode["percent_of_limit"],
                    "parts": {},
                },
            )
            for mode in document["modes"]
        ]
    return [
        Step(
            row["model"],
            row["quantization"],
            row.get("kv_dtype", "auto"),
            document["gpu"],
            file.parent.name,
            document["read_bandwidth_bytes_per_s"],
            figures,
        )
        for row in document["rows"]
        if row.get("tokens", 1) == 1
        for figures in row.get("searched", row["default"])
    ]


def newest_steps(results: Path, gpu: str = "") -> list[Step]:
    """The newest step of each model, mode and context on a card, the newest one where none is
    named; in the order of models, modes and contexts. Empty where there is no result."""

    def age(file: Path) -> tuple[str, bool, str]:
        rows = json.loads(file.read_text(encoding="utf-8")).get("rows", [])
        return file.parent.name, all("search" not in row for row in rows), file.name

    steps = [step for file in sorted(results.glob(PATTERN), key=age) for step in steps_of(file)]
    if not gpu and steps:
        gpu = steps[-1].gpu
    found = {step.key: step for step in steps if step.gpu == gpu}
    modes = ("none", "8bit", "fp8", "4bit")
    return sorted(
        found.values(),
        key=lambda s: (s.model, modes.index(s.quantization), s.kv_dtype, s.context),
    )
