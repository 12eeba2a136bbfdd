"""How many requests run at once, by the memory that is free beside a loaded model."""

from __future__ import annotations

import pytest

from qwencli.engine.native.batch_plan import BATCH_LIMITS, pages_for_captions, plan_batch
from qwencli.models.builtin import hub_config
from qwencli.models.shape_reader import read_shape

GIB = 2**30


def plan(free_bytes, name="qwen3-vl-4b", **other):
    settings = {"quantized_kv": False, "reserved": 0, "drafting": False, "dense_bytes": 0}
    return plan_batch(
        read_shape(hub_config(name)),
        BATCH_LIMITS["cuda"],
        max_seq_len=16384,
        value_bytes=2,
        free_bytes=free_bytes,
        **{**settings, **other},
    )


def test_all_rows_run_where_memory_is_not_known():
    whole = plan(None, dense_bytes=8 * GIB)
    assert whole.limits == BATCH_LIMITS["cuda"]
    assert not whole.keep_dense and whole.num_states == 0
    assert [use.split(" (")[0] for use in whole.parts] == ["pool for captions"]


@pytest.mark.parametrize(("free", "kept"), [(80, True), (24, False)])
def test_dequantized_weights_are_kept_where_captions_in_all_rows_leave_room(free, kept):
    without, beside = plan(free * GIB), plan(free * GIB, dense_bytes=8 * GIB)
    assert beside.keep_dense is kept
    assert beside.parts.get("weights once more, for batches") == (8 * GIB if kept else None)
    wanted = pages_for_captions(read_shape(hub_config("qwen3-vl-4b")), beside.limits)
    assert beside.num_pages >= min(without.num_pages, wanted)
