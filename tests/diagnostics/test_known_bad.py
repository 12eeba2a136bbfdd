from __future__ import annotations

import datetime

import pytest

from qwencli.diagnostics.known_bad import FACTS, known_bad, meets, present
from tests.diagnostics.replay import machine


def hits(box):
    return {row.id for row in known_bad() if present(row, box)}


def torch(version, **more):
    return {"probes": {"torch": {"value": {"version": version, **more}}}}


def capability(*numbers):
    device = {"index": 0, "name": "a GPU", "uuid": None, "capability": list(numbers),
              "total_memory_bytes": 34_000_000_000}  # fmt: skip
    return {"devices": [device]}


GB10, B200 = capability(12, 1), capability(10, 0)
EXPANDABLE = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def test_rows_are_dated_sourced_and_well_formed():
    rows = known_bad()
    assert len({row.id for row in rows}) == len(rows)
    for row in rows:
        assert row.what
        assert row.fix
        assert row.noted >= datetime.date(2026, 1, 1)
        assert row.sources
        assert all(source.startswith("https://github.com/") for source in row.sources)
        for name, condition in row.when.items():
            if name == "variables":
                continue
            assert name in FACTS
            meets("1.0", condition)


@pytest.mark.parametrize(
    ("row", "change"),
    [
        ("torch-2.9.0-conv3d", torch("2.9.0+cu130", cudnn_version=91700)),
        ("torch-2.9-conv3d", torch("2.9.1+cu128", cudnn_version=91002)),
        ("bitsandbytes-before-0.50-on-sm_120", {"packages": {"bitsandbytes": "0.49.2"}}),
        ("bitsandbytes-without-blackwell", {"packages": {"bitsandbytes": "0.45.0"}}),
        ("flash-attn-without-sm_120", {"packages": {"flash-attn": "2.8.3"}}),
        ("triton-without-sm_120", {"packages": {"triton": "3.2.0"}}),
        ("triton-without-sm_121", {"packages": {"triton": "3.5.0"}, **torch("2.11", **GB10)}),
        ("torch-2.5.0-cudnn-attention", torch("2.5.0+cu124")),
        ("cudnn-attention-on-sm_100", {"model": "qwen2.5-vl-3b", **torch("2.13.0", **B200)}),
        ("alloc-conf-ignored", {"variables": EXPANDABLE, **torch("2.9.1")}),
    ],
)  # fmt: skip
def test_each_row_is_found(row, change):
    assert row in hits(machine("healthy-5090", **change))


def test_every_row_is_tried_above():
    marks = test_each_row_is_found.pytestmark[0].args[1]
    assert {row for row, _ in marks} == {row.id for row in known_bad()}


@pytest.mark.parametrize(
    "change",
    [
        torch("2.9.1+cu128", cudnn_version=91501),
        torch("2.10.0+cu128", cudnn_version=91002),
        torch("2.13.0", **B200),  # 8 key/value heads
        {"packages": {"flash-attn": "2.8.3.post1"}},
    ],
)
def test_what_only_looks_alike_is_not_found(change):
    assert hits(machine("healthy-5090", **change)) == set()
