"""Drafts and what is accepted of them, against the same said token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwencli.engine.ops.decoder_ops import Drafts, SamplingBuffers
from qwencli.engine.ops.next_tokens import RowBuffers
from qwencli.engine.spec_decode import ngram
from qwencli.engine.spec_decode.ngram import LONGEST_NGRAM, MAX_VERIFY_TOKENS

CPU = torch.device("cpu")
WORDS = 6
SLOTS = 60


@dataclass(frozen=True)
class Case:
    """A text whose last token is not fed yet, what a step drafted, and what was likeliest."""

    text: list[int]
    drafts: list[int]
    chosen: list[int]
    stop_ids: list[int]
    room: int
    done: bool


@st.composite
def cases(draw: st.DrawFn, size: int) -> Case:
    words = st.integers(0, WORDS - 1)
    drafts = draw(st.lists(words, min_size=MAX_VERIFY_TOKENS, max_size=MAX_VERIFY_TOKENS))
    right = draw(st.integers(0, size))
    chosen = drafts[:right] + draw(
        st.lists(words, min_size=MAX_VERIFY_TOKENS, max_size=MAX_VERIFY_TOKENS)
    )
    return Case(
        text=draw(st.lists(words, min_size=1, max_size=40)),
        drafts=drafts,
        chosen=chosen[:size],
        stop_ids=draw(st.lists(words, max_size=2)),
        room=draw(st.integers(1, 12)),
        done=draw(st.integers(0, 5)) == 0,
    )


def buffers(case: Case) -> tuple[SamplingBuffers, Drafts]:
    slot = len(case.text) - 1
    drafts = ngram.empty_drafts(SLOTS, CPU)
    drafts.ids.fill_(3)  # what an earlier answer left
    drafts.ids[: len(case.text)] = torch.tensor(case.text, dtype=torch.int32)
    drafts.input_ids.copy_(torch.tensor([case.text[-1], *case.drafts]))
    drafts.last_slot.fill_(slot + case.room)
    stop_ids = torch.full((3, 1), -1)
    for row, stop_id in enumerate(case.stop_ids):
        stop_ids[row] = stop_id
    seen = torch.zeros(WORDS, dtype=torch.bool)
    seen[torch.tensor(case.text)] = True
    return SamplingBuffers(
        token=torch.tensor(case.text[-1:]),
        slot=torch.tensor([slot]),
        position=torch.tensor([slot - 2]),
        step=torch.tensor([5]),
        done=torch.tensor([case.done]),
        stop_ids=stop_ids,
        seen=seen,
        penalty=torch.tensor(1.0),
    ), drafts


# Rows of one step.
several = st.integers(1, MAX_VERIFY_TOKENS).flatmap(
    lambda size: st.lists(cases(size), min_size=1, max_size=3)
)


def rows_of(step: list[Case]) -> tuple[RowBuffers, Drafts]:
    """The buffers of all cases, a row each."""
    sampling, drafts = zip(*map(buffers, step), strict=True)
    made = [ngram.one_row(*pair) for pair in zip(sampling, drafts, strict=True)]

    def together(which: int, name: str) -> torch.Tensor:
        return torch.cat([getattr(pair[which], name).view(1, -1) for pair in made])

    def flat(which: int, name: str) -> torch.Tensor:
        return together(which, name).flatten()

    columns = ("token", "slot", "position", "step", "limit", "done", "penalty")
    rows = {name: flat(0, name) for name in columns}
    rows |= {name: together(0, name) for name in ("stop_ids", "seen")}
    return RowBuffers(**rows), Drafts(
        together(1, "input_ids"),
        together(1, "ids"),
        flat(1, "last_slot"),
        together(1, "verify_output"),
    )


def check_rows(step: list[Case], rows: RowBuffers, drafts: Drafts) -> None:
    for row, case in enumerate(step):
        own = slice(row, row + 1)
        sampling = SamplingBuffers(
            token=rows.token[own],
            slot=rows.slot[own],
            position=rows.position[own],
            step=rows.step[own],
            done=rows.done[own],
            stop_ids=rows.stop_ids[own].t(),
            seen=rows.seen[row],
            penalty=rows.penalty[own],
        )
        own_drafts = Drafts(
            drafts.input_ids[row], drafts.ids[row], drafts.last_slot[own], drafts.verify_output[row]
        )
        check(case, sampling, own_drafts, num_matched_of(case))


def taken_from(case: Case) -> list[int]:
    """The tokens that plain steps would have chosen one after the other."""
    taken: list[int] = []
    for index, token in enumerate(case.chosen):
        if case.done or len(taken) == case.room:
            break
        taken.append(token)
        if token in case.stop_ids or index == len(case.chosen) - 1 or token != case.drafts[index]:
            break
    return taken


def drafted_after(text: list[int]) -> list[int]:
    """What followed the last of the longest matches, going round where the text ends."""
    for length in range(min(LONGEST_NGRAM, len(text) - 1), 0, -1):
        for end in range(len(text) - 2, length - 2, -1):
            if text[end - length + 1 : end + 1] == text[-length:]:
                tail = text[end + 1 :]
                return [tail[k % len(tail)] for k in range(MAX_VERIFY_TOKENS)]
    return [text[-1]] * MAX_VERIFY_TOKENS


def check(case: Case, sampling: SamplingBuffers, drafts: Drafts, num_matched: int) -> None:
    taken = taken_from(case)
    text = case.text + taken
    assert drafts.verify_output[: 2 + len(case.chosen)].tolist() == [
        len(taken),
        num_matched,
        *case.chosen,
    ]
    assert int(sampling.token) == text[-1]
    assert [int(t) for t in (sampling.slot, sampling.position, sampling.step)] == [
        len(text) - 1, len(text) - 3, 5 + len(taken),
    ]  # fmt: skip
    ended = bool(taken) and (taken[-1] in case.stop_ids or len(taken) == case.room)
    assert bool(sampling.done) == (case.done or ended)
    assert set(sampling.seen.nonzero().flatten().tolist()) == set(text)
    assert drafts.ids[: len(text)].tolist() == text
    assert drafts.input_ids.tolist() == [text[-1], *drafted_after(text)]


def num_matched_of(case: Case) -> int:
    checked = max(len(case.chosen) - 1, 1)
    num_matched = 0
    while num_matched < checked and case.chosen[num_matched] == case.drafts[num_matched]:
        num_matched += 1
    return num_matched


@settings(max_examples=300)
@given(several)
def test_what_is_accepted_and_drafted(step: list[Case]) -> None:
    rows, drafts = rows_of(step)
    ngram.accept(torch.tensor([case.chosen for case in step]), rows, drafts)
    ngram.draft(rows, drafts, int(rows.slot.max()) + 1)
    check_rows(step, rows, drafts)


def test_a_text_that_repeats_is_drafted_beyond_its_end() -> None:
    assert drafted_after([1, 2, 3, 1, 2, 3]) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert drafted_after([4, 4]) == [4] * MAX_VERIFY_TOKENS
    assert drafted_after([4, 5]) == [5] * MAX_VERIFY_TOKENS
