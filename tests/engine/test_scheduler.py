"""The scheduler and the page pool against a plain account of rows, pages and tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwencli.engine.cache.paged_kv import PAGE_SIZE, SCRATCH_PAGE, PagePool, pages_for
from qwencli.engine.request import Sequence
from qwencli.engine.scheduler import Limits, Scheduler

LIMITS = st.builds(
    Limits,
    max_rows=st.integers(1, 6),
    max_prefill_tokens=st.integers(8, 150),
    max_prompts=st.integers(1, 4),
)


class Device:
    """What steps leave on the device: which pages each row writes to, and how far it is."""

    def __init__(self, rows: int) -> None:
        self.tables: list[list[int]] = [[] for _ in range(rows)]

    def run(self, batch, scheduler) -> None:
        for source, place in batch.moves:
            self.tables[place] = list(self.tables[source])
        for row in batch.released:
            self.tables[row] = []
        tokens = 0
        for chunk in batch.prefill:
            tokens += chunk.stop - chunk.start
            assert chunk.stop > chunk.start
            if chunk.is_last:
                self.tables[chunk.sequence.row] = list(chunk.sequence.pages)
        assert tokens <= scheduler.limits.max_prefill_tokens
        # A row that is not decoded writes too, so no row may know pages of another.
        known = [page for table in self.tables for page in table]
        used = [page for each in scheduler.running for page in each.pages]
        assert len(known) == len(set(known)) and SCRATCH_PAGE not in known
        assert len(used) == len(set(used))
        for sequence in batch.decode:
            assert self.tables[sequence.row] == sequence.pages
            assert sequence.num_prompt_tokens + sequence.num_scheduled - 1 <= (
                len(sequence.pages) * PAGE_SIZE
            )


@settings(max_examples=60)
@given(limits=LIMITS, pages=st.integers(2, 12), data=st.data())
def test_requests_of_any_kind_all_end_and_no_page_is_lost_or_shared(limits, pages, data):
    pool = PagePool(pages)
    scheduler = Scheduler(limits, pool)
    device = Device(limits.max_rows)
    alive: dict[int, Sequence] = {}
    begun: list[int] = []
    in_flight: list[list[Sequence]] = []
    number = 0
    for turn in range(10_000):  # 80 requests of 300 tokens, eight at a time
        if turn < 40:
            for _ in range(data.draw(st.integers(0, 2))):
                sequence = Sequence(
                    number, data.draw(st.integers(1, 300)), data.draw(st.integers(1, 12))
                )
                if scheduler.fits(sequence.max_tokens):
                    scheduler.add(sequence)
                    alive[number] = sequence
                number += 1
            if alive and data.draw(st.integers(0, 5)) == 0:
                scheduler.finish(alive.pop(data.draw(st.sampled_from(sorted(alive)))))
        batch = scheduler.schedule()
        if batch is not None:
            device.run(batch, scheduler)
            if turn < 40 and batch.prefill and data.draw(st.integers(0, 9)) == 0:
                for chunk in reversed(batch.prefill):  # memory did not suffice
                    scheduler.requeue(chunk.sequence)
            else:
                begun += [chunk.sequence.request for chunk in batch.prefill if chunk.start == 0]
            given = [chunk.sequence for chunk in batch.prefill if chunk.is_last]
            in_flight.append([each for each in (*given, *batch.decode) if each.row is not None])
        # What a step gave is read one step later; some answers end before their last token.
        if len(in_flight) > 1 or (batch is None and in_flight):
            for sequence in in_flight.pop(0):
                stopped = turn < 40 and data.draw(st.integers(0, 9)) == 0
                over = sequence.num_scheduled >= sequence.max_new_tokens
                if (stopped or over) and sequence.request in alive:
                    scheduler.finish(alive.pop(sequence.request))
        if not alive and turn >= 40:
            break
    assert not alive and not scheduler.has_unfinished
    assert pool.num_free == pool.capacity
    assert begun == sorted(begun), "first come, first served"


def test_a_long_prompt_runs_in_parts_beside_the_rows_that_run():
    scheduler = Scheduler(Limits(4, 100, 4), PagePool(40))
    short, long = Sequence(0, 30, 50), Sequence(1, 350, 5)
    scheduler.add(short)
    assert [(c.start, c.stop) for c in scheduler.schedule().prefill] == [(0, 30)]
    scheduler.add(long)
    parts = []
    while not long.is_prefilled:
        batch = scheduler.schedule()
        parts += [(chunk.start, chunk.stop) for chunk in batch.prefill]
        assert short in batch.decode
    assert parts == [(0, 100), (100, 200), (200, 300), (300, 350)]


def test_a_request_that_has_to_wait_for_pages_is_not_overtaken():
    scheduler = Scheduler(Limits(4, 1000, 4), PagePool(1 + pages_for(200)))
    first, large, small = Sequence(0, 100, 10), Sequence(1, 150, 10), Sequence(2, 10, 5)
    for each in (first, large, small):
        scheduler.add(each)
    assert [chunk.sequence for chunk in scheduler.schedule().prefill] == [first]
    assert scheduler.schedule().prefill == ()
    scheduler.finish(first)
    assert [chunk.sequence for chunk in scheduler.schedule().prefill] == [large, small]


def test_rows_move_together_once_half_of_them_are_idle():
    scheduler = Scheduler(Limits(8, 1000, 8), PagePool(40))
    sequences = [Sequence(number, 10, 50) for number in range(6)]
    for each in sequences:
        scheduler.add(each)
    scheduler.schedule()
    for each in sequences[:4]:
        scheduler.finish(each)
    batch = scheduler.schedule()
    assert set(batch.moves) == {(5, 0), (4, 1)}
    assert sorted(each.row for each in batch.decode) == [0, 1]
    assert set(batch.released) == {2, 3, 4, 5}


@pytest.mark.parametrize("tokens", [1, PAGE_SIZE, PAGE_SIZE + 1])
def test_a_pool_hands_out_every_page_but_the_scratch_page(tokens):
    pool = PagePool(5)
    taken = []
    while (pages := pool.allocate(pages_for(tokens))) is not None:
        taken += pages
    assert sorted(taken) == list(range(1, 1 + len(taken))) and pool.num_free < pages_for(tokens)
    pool.free(taken)
    assert pool.num_free == pool.capacity
