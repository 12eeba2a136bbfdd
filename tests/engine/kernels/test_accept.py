"""The kernel that accepts and drafts, in Triton's interpreter, against the same token by token."""

from __future__ import annotations

import torch
from hypothesis import given, settings

from qwencli.engine.kernels.greedy_step import NOTHING_CHOSEN, verify_drafts_kernel
from qwencli.engine.spec_decode.ngram import LONGEST_NGRAM, MOST_FED
from tests.engine.spec_decode.test_ngram import Case, buffers, cases, check, hits_of


@settings(max_examples=60)
@given(cases())
def test_the_kernel_accepts_and_drafts_the_same(case: Case) -> None:
    choice, drafts = buffers(case)
    size = len(case.chosen)
    best = torch.full((MOST_FED,), NOTHING_CHOSEN)
    best[:size] = (7 << 32) | (0xFFFFFFFF - torch.tensor(case.chosen))
    verify_drafts_kernel[1,](
        best,
        choice.token,
        choice.slot,
        choice.position,
        choice.step,
        choice.done,
        choice.stop_ids,
        choice.seen,
        drafts.fed,
        drafts.ids,
        drafts.last_slot,
        drafts.record,
        SIZE=size,
        STOPS=4,
        NUM_STOPS=3,
        NGRAM=LONGEST_NGRAM,
        BLOCK=16,
        PDL=False,
    )
    check(case, choice, drafts, hits_of(case))
    assert best.tolist() == [NOTHING_CHOSEN] * MOST_FED
