"""The kernel that accepts and drafts, in Triton's interpreter, against the same token by token."""

from __future__ import annotations

import torch
from hypothesis import given, settings

from qwencli.engine.kernels.greedy_step import NOTHING_CHOSEN, verify_drafts_kernel
from qwencli.engine.spec_decode.ngram import LONGEST_NGRAM
from tests.engine.spec_decode.test_ngram import Case, check_rows, rows_of, several


@settings(max_examples=60)
@given(several)
def test_the_kernel_accepts_and_drafts_the_same(step: list[Case]) -> None:
    rows, drafts = rows_of(step)
    chosen = torch.tensor([case.chosen for case in step])
    best = (7 << 32) | (0xFFFFFFFF - chosen)
    verify_drafts_kernel[len(step),](
        best,
        rows.token,
        rows.slot,
        rows.position,
        rows.step,
        rows.done,
        rows.stop_ids,
        rows.seen,
        drafts.input_ids,
        drafts.ids,
        drafts.last_slot,
        drafts.verify_output,
        rows.seen.shape[1],
        drafts.ids.shape[1],
        SIZE=chosen.shape[1],
        STOPS=4,
        NUM_STOPS=3,
        NGRAM=LONGEST_NGRAM,
        BLOCK=16,
        PDL=False,
    )
    check_rows(step, rows, drafts)
    assert (best == NOTHING_CHOSEN).all()
