"""Drafts and what is accepted of them, against the same said token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwencli.engine.ops.decoder_ops import Choice, Drafts
from qwencli.engine.spec_decode import ngram
from qwencli.engine.spec_decode.ngram import LONGEST_NGRAM, MOST_FED

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
def cases(draw: st.DrawFn) -> Case:
    words = st.integers(0, WORDS - 1)
    size = draw(st.integers(1, MOST_FED))
    drafts = draw(st.lists(words, min_size=MOST_FED, max_size=MOST_FED))
    right = draw(st.integers(0, size))
    chosen = drafts[:right] + draw(st.lists(words, min_size=MOST_FED, max_size=MOST_FED))
    return Case(
        text=draw(st.lists(words, min_size=1, max_size=40)),
        drafts=drafts,
        chosen=chosen[:size],
        stop_ids=draw(st.lists(words, max_size=2)),
        room=draw(st.integers(1, 12)),
        done=draw(st.integers(0, 5)) == 0,
    )


def buffers(case: Case) -> tuple[Choice, Drafts]:
    slot = len(case.text) - 1
    drafts = ngram.empty_drafts(SLOTS, CPU)
    drafts.ids.fill_(3)  # what an earlier answer left
    drafts.ids[: len(case.text)] = torch.tensor(case.text, dtype=torch.int32)
    drafts.fed.copy_(torch.tensor([case.text[-1], *case.drafts]))
    drafts.last_slot.fill_(slot + case.room)
    stop_ids = torch.full((3, 1), -1)
    for row, stop_id in enumerate(case.stop_ids):
        stop_ids[row] = stop_id
    seen = torch.zeros(WORDS, dtype=torch.bool)
    seen[torch.tensor(case.text)] = True
    return Choice(
        token=torch.tensor(case.text[-1:]),
        slot=torch.tensor([slot]),
        position=torch.tensor([slot - 2]),
        step=torch.tensor([5]),
        done=torch.tensor([case.done]),
        stop_ids=stop_ids,
        seen=seen,
        penalty=torch.tensor(1.0),
    ), drafts


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
                return [tail[k % len(tail)] for k in range(MOST_FED)]
    return [text[-1]] * MOST_FED


def check(case: Case, choice: Choice, drafts: Drafts, hits: int) -> None:
    taken = taken_from(case)
    text = case.text + taken
    assert drafts.record[: 2 + len(case.chosen)].tolist() == [len(taken), hits, *case.chosen]
    assert int(choice.token) == text[-1]
    assert [int(t) for t in (choice.slot, choice.position, choice.step)] == [
        len(text) - 1, len(text) - 3, 5 + len(taken),
    ]  # fmt: skip
    ended = bool(taken) and (taken[-1] in case.stop_ids or len(taken) == case.room)
    assert bool(choice.done) == (case.done or ended)
    assert set(choice.seen.nonzero().flatten().tolist()) == set(text)
    assert drafts.ids[: len(text)].tolist() == text
    assert drafts.fed.tolist() == [text[-1], *drafted_after(text)]


def hits_of(case: Case) -> int:
    checked = max(len(case.chosen) - 1, 1)
    hits = 0
    while hits < checked and case.chosen[hits] == case.drafts[hits]:
        hits += 1
    return hits


@settings(max_examples=300)
@given(cases())
def test_what_is_accepted_and_drafted(case: Case) -> None:
    choice, drafts = buffers(case)
    ngram.accept(torch.tensor(case.chosen), choice, drafts)
    ngram.draft(choice, drafts, int(choice.slot) + 1)
    check(case, choice, drafts, hits_of(case))


def test_a_text_that_repeats_is_drafted_beyond_its_end() -> None:
    assert drafted_after([1, 2, 3, 1, 2, 3]) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert drafted_after([4, 4]) == [4] * MOST_FED
    assert drafted_after([4, 5]) == [5] * MOST_FED
