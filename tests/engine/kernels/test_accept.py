"""The kernel that accepts and drafts, in Triton's interpreter, against the same token by token."""

from __future__ import annotations

import torch
from hypothesis import given, settings

from qwencli.engine.kernels.greedy_step import NOTHING_CHOSEN, verify_drafts_kernel
from qwencli.engine.spec_decode.ngram import LONGEST_NGRAM, MAX_VERIFY_TOKENS
from tests.engine.spec_decode.test_ngram import Case, buffers, cases, check, num_matched_of


@settings(max_examples=60)
@given(cases())
def test_the_kernel_accepts_and_drafts_the_same(case: Case) -> None:
    sampling, drafts = buffers(case)
    size = len(case.chosen)
    best = torch.full((MAX_VERIFY_TOKENS,), NOTHING_CHOSEN)
    best[:size] = (7 << 32) | (0xFFFFFFFF - torch.tensor(case.chosen))
    verify_drafts_kernel[1,](
        best,
        sampling.token,
        sampling.slot,
        sampling.position,
        sampling.step,
        sampling.done,
        sampling.stop_ids,
        sampling.seen,
        drafts.input_ids,
        drafts.ids,
        drafts.last_slot,
        drafts.verify_output,
        SIZE=size,
        STOPS=4,
        NUM_STOPS=3,
        NGRAM=LONGEST_NGRAM,
        BLOCK=16,
        PDL=False,
    )
    check(case, sampling, drafts, num_matched_of(case))
    assert best.tolist() == [NOTHING_CHOSEN] * MAX_VERIFY_TOKENS
