"""The scheduler and the page pool against a plain account of rows, pages and tokens."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from qwencli.engine.cache.paged_kv import PAGE_SIZE, SCRATCH_PAGE, PagePool, pages_for
from qwencli.engine.cache.prefix_cache import page_keys
from qwencli.engine.cache.recurrent_state import SnapshotPool
from qwencli.engine.request import Limits, Sequence
from qwencli.engine.scheduler import Scheduler

LIMITS = st.builds(
    Limits,
    max_rows=st.integers(1, 6),
    max_prefill_tokens=st.integers(8, 150),
    max_prompts=st.integers(1, 4),
    powers_of_two=st.booleans(),
    unstreamed_prefill_tokens=st.none() | st.integers(8, 400),
    unstreamed_prompts=st.integers(1, 4),
)


class Asked(Sequence):
    """A sequence with its tokens; those of the answer as they are chosen."""

    def __init__(self, number: int, prompt: list[int], max_new_tokens: int) -> None:
        keys = page_keys(prompt, PAGE_SIZE)
        super().__init__(number, len(prompt), max_new_tokens, keys)
        self.tokens: list[int] = []
        self.seen: list[int] = []
        self.grow(prompt)

    def grow(self, tokens: list[int]) -> None:
        for token in tokens:
            self.tokens.append(token)
            self.seen.append(hash((token, *self.seen[-1:])))


class Device:
    """What steps leave on the device: the pages of each row, and in each slot of the pool, and of
    the states, a number for all that what is stored there has seen."""

    def __init__(self, rows: int) -> None:
        self.tables: list[list[int]] = [[] for _ in range(rows)]
        self.places = [0] * rows
        self.stored: dict[int, int] = {}
        self.states: dict[int, int] = {}

    def run(self, batch, scheduler, fails=False, decodes=True) -> None:
        for source, place in batch.moves:
            self.tables[place] = list(self.tables[source])
            self.places[place] = self.places[source]
        for row in batch.released:
            self.tables[row] = []
        self.copy(batch.restored)
        for chunk in batch.prefill:
            assert chunk.stop > chunk.start
            self.write(chunk.sequence, chunk.start, chunk.stop, fails)
            if chunk.is_last and not fails:
                self.tables[chunk.sequence.row] = list(chunk.sequence.pages)
                self.places[chunk.sequence.row] = chunk.stop
        self.copy(batch.kept)
        assert all(each.row is None or each.row < scheduler.step_rows for each in batch.decode)
        for row, table in enumerate(self.tables[: scheduler.step_rows if decodes else 0]):
            decoded = [each for each in batch.decode if each.row == row]
            if not table:
                continue
            if decoded:
                (sequence,) = decoded
                assert table == sequence.pages and SCRATCH_PAGE not in table
                self.places[row] = sequence.num_prompt_tokens + sequence.num_scheduled - 2
                self.write(sequence, self.places[row], self.places[row] + 1)
            elif self.places[row] < len(table) * PAGE_SIZE:
                # A row that is not decoded writes too: what it writes is nobody's.
                at = table[self.places[row] // PAGE_SIZE] * PAGE_SIZE
                self.stored[at + self.places[row] % PAGE_SIZE] = 0

    def write(self, sequence, start, stop, garbage=False) -> None:
        """Run tokens, each seeing what is in the pages in front of it."""
        if start >= len(sequence.tokens):
            sequence.grow([(sequence.request + 1) << 20 | start])
        for place in range(stop):
            slot = sequence.pages[place // PAGE_SIZE] * PAGE_SIZE + place % PAGE_SIZE
            if place < start:
                assert self.stored[slot] == sequence.seen[place], "not what this sequence wrote"
            else:
                self.stored[slot] = 0 if garbage else sequence.seen[place]
        if sequence.state is not None:
            assert not start or self.states[sequence.state] == sequence.seen[start - 1]
            self.states[sequence.state] = 0 if garbage else sequence.seen[stop - 1]

    def copy(self, copies) -> None:
        for source, place in copies:
            self.states[place] = self.states[source]


# A history of 40 turns is one number: drawn choice by choice it takes minutes to shrink.
@settings(max_examples=150, phases=[Phase.explicit, Phase.generate])
@given(
    limits=LIMITS,
    pages=st.integers(2, 12),
    kept=st.none() | st.integers(0, 4),
    seed=st.integers(0, 2**32),
)
def test_requests_of_any_kind_all_end_and_nothing_is_lost_or_shared_wrongly(
    limits, pages, kept, seed
):
    """Neither a page nor, of models that have some, a state: as many are kept of others."""
    drawn = Random(seed)
    pool = PagePool(pages)
    num_states = 0 if kept is None else limits.max_rows + kept
    states = None if kept is None else SnapshotPool(1 + num_states)
    scheduler = Scheduler(limits, pool, states)
    device = Device(limits.max_rows)
    alive: dict[int, Asked] = {}
    begun: list[int] = []
    in_flight: list[list[tuple[Asked, int]]] = []
    number = 0
    for turn in range(10_000):  # 80 requests of 300 tokens, eight at a time
        if turn < 40:
            for _ in range(drawn.randint(0, 2)):
                common = drawn.choice([0, 0, 64, 130, 200])
                own = drawn.randint(1, 100)
                prompt = [*range(common), *range(1000 * number, 1000 * number + own)]
                sequence = Asked(number, prompt, drawn.randint(1, 70))
                if scheduler.fits(sequence.max_tokens):
                    scheduler.add(sequence)
                    alive[number] = sequence
                number += 1
            if alive and drawn.randint(0, 5) == 0:
                scheduler.finish(alive.pop(drawn.choice(sorted(alive))))
        streamed = drawn.random() < 0.5
        batch = scheduler.schedule(streamed=streamed, coming=drawn.randint(0, 3))
        if batch is not None:
            tokens = sum(chunk.stop - chunk.start for chunk in batch.prefill)
            assert tokens <= (limits.max_prefill_tokens if streamed else limits.most_prefill_tokens)
            short = turn < 40 and bool(batch.prefill) and drawn.randint(0, 9) == 0
            first = [c.sequence.request for c in batch.prefill if c.start == c.sequence.num_cached]
            begun += [each for each in first if each not in begun]
            decoded = [] if short else [each for each in batch.decode if each.row is not None]
            rows = max((each.row + 1 for each in decoded), default=0)
            starved = turn < 40 and rows > 1 and drawn.randint(0, 9) == 0
            device.run(batch, scheduler, fails=short, decodes=not starved)
            if starved:  # memory did not suffice for so many rows
                scheduler.run_fewer(decoded, rows // 2)
            for chunk in batch.prefill if short else ():
                scheduler.unkept(chunk.sequence, chunk.stop)
            for chunk in reversed(batch.prefill):
                if short:  # memory did not suffice
                    # One that was further keeps its place in front of those begun since.
                    if chunk.sequence.request in first:
                        begun.remove(chunk.sequence.request)
                    scheduler.requeue(chunk.sequence)
                else:
                    scheduler.written(chunk.sequence, chunk.stop)
            given = [chunk.sequence for chunk in batch.prefill if chunk.is_last]
            running = {
                each.request: each
                for each in (*given, *(() if starved else batch.decode))
                if each.row is not None
            }
            in_flight.append([(each, each.num_scheduled) for each in running.values()])
        # What a step gave is read one step later; some answers end before their last token.
        if len(in_flight) > 1 or (batch is None and in_flight):
            for sequence, count in in_flight.pop(0):
                stopped = turn < 40 and drawn.randint(0, 9) == 0
                if (stopped or count >= sequence.max_new_tokens) and sequence.request in alive:
                    known = sequence.num_prompt_tokens + count - 1
                    sequence.page_keys = page_keys(sequence.tokens[:known], PAGE_SIZE)
                    scheduler.written(sequence, known)
                    scheduler.finish(alive.pop(sequence.request))
        if not alive and turn >= 40:
            break
    assert not alive and not scheduler.has_unfinished
    assert pool.num_free == pool.capacity and not any(pool._users)
    assert states is None or states.num_free == num_states
    assert begun == sorted(begun), "first come, first served"


def test_prompts_that_nobody_waits_for_start_when_several_can():
    limits = Limits(32, 100, 64, unstreamed_prefill_tokens=1000, unstreamed_prompts=3)
    scheduler = Scheduler(limits, PagePool(100))
    sequences = [Sequence(number, 30, 50) for number in range(40)]
    for sequence in sequences:
        scheduler.add(sequence)
    # The first ones have nothing to wait for, and a step holds more of them.
    assert len(scheduler.schedule(streamed=False).prefill) == 32
    for number in range(3):
        assert not scheduler.schedule(streamed=False).prefill
        scheduler.finish(sequences[number])
    assert len(scheduler.schedule(streamed=False).prefill) == 3
    # Who reads along is not kept waiting.
    scheduler.finish(sequences[3])
    assert len(scheduler.schedule(streamed=True).prefill) == 1
    # Nor do the last wait for others that do not come, and may.
    for sequence in sequences[36:38]:
        scheduler.finish(sequence)
    assert len(scheduler.waiting) == 2
    for sequence in sequences[4:6]:
        scheduler.finish(sequence)
    assert not scheduler.schedule(streamed=False, coming=1).prefill
    assert len(scheduler.schedule(streamed=False).prefill) == 2


@pytest.mark.parametrize(("pages", "prompt"), [(100, 600), (40, 250)])
def test_large_prompts_wait_for_no_crowd_that_neither_a_step_nor_the_pool_holds(pages, prompt):
    limits = Limits(32, 100, 64, unstreamed_prefill_tokens=1000, unstreamed_prompts=3)
    scheduler = Scheduler(limits, PagePool(pages))
    small = [Sequence(number, 30, 30) for number in range(30)]
    for sequence in small:
        scheduler.add(sequence)
    assert len(scheduler.schedule(streamed=False).prefill) == 30
    for number in range(3):
        scheduler.add(Sequence(30 + number, prompt, 50))
    assert len(scheduler.schedule(streamed=False).prefill) == 1


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


# Of 8 prompts of 40 tokens, once where all may run in a step and once where 7 may.
@pytest.mark.parametrize(
    ("powers_of_two", "tokens", "begun"),
    [(True, 1000, [8]), (True, 310, [4, 4]), (False, 1000, [8]), (False, 310, [7, 1])],
)
def test_equal_prompts_start_in_powers_of_two_beside_rows_that_run(powers_of_two, tokens, begun):
    scheduler = Scheduler(Limits(9, tokens, 9, powers_of_two=powers_of_two), PagePool(40))
    scheduler.add(Sequence(0, 30, 50))
    scheduler.schedule()
    for number in range(8):
        scheduler.add(Sequence(1 + number, 40, 50))
    batches = [scheduler.schedule() for _ in begun]
    assert [len(batch.prefill) for batch in batches] == begun
    started = [chunk.sequence.request for batch in batches for chunk in batch.prefill]
    assert started == list(range(1, 9))
    assert not scheduler.schedule().prefill


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


def test_pages_are_found_by_their_keys_until_their_place_is_needed():
    pool = PagePool(5)
    first = pool.allocate(3)
    pool.publish(first, [b"a", b"b", b"c"])
    assert pool.share([b"a", b"b", b"x", b"c"]) == first[:2]
    pool.free(first)
    assert pool.num_free == 2, "two pages are still read by another"
    pool.free(first[:2])
    assert pool.num_free == pool.capacity
    # The page that nothing is known of, then c, the last of its sequence, and b.
    taken = pool.allocate(2)
    assert pool.share([b"a", b"b", b"c"]) == first[:2]
    assert pool.allocate(1) is None
    pool.free(first[:2])
    taken += pool.allocate(1)
    assert pool.share([b"a", b"b"]) == first[:1]
    pool.free(first[:1])
    pool.free(taken)
    assert pool.num_free == pool.capacity


def test_of_two_pages_with_one_key_the_first_is_found():
    pool = PagePool(5)
    one, other = pool.allocate(1), pool.allocate(1)
    pool.publish(one, [b"k"])
    pool.publish(other, [b"k"])
    pool.free(other)
    assert pool.share([b"k"]) == one
    pool.free(one)
    pool.free(one)
    assert pool.num_free == pool.capacity and pool.allocate(4) is not None


def test_late_parts_of_a_long_prompt_are_shorter_and_cost_the_same():
    limits = Limits(4, 2048, 4, context_worth=6144)
    scheduler = Scheduler(limits, PagePool(600))
    sequence = Sequence(0, 32_000, 5)
    scheduler.add(sequence)
    lengths = []
    while not sequence.is_prefilled:
        (chunk,) = scheduler.schedule().prefill
        lengths.append(chunk.stop - chunk.start)
        assert limits.cost(chunk.start, chunk.stop) <= 2048
    assert lengths == sorted(lengths, reverse=True)[:-1] + lengths[-1:]
    assert 1700 < lengths[0] < 1900 and 300 < lengths[-2] < 500
    assert limits.tokens_within(10**6, 1.0) == 1 and limits.tokens_within(0, 0.0) == 0


def turn(number: int, tokens: list[int], new: int) -> Sequence:
    return Sequence(number, len(tokens), new, page_keys(tokens, PAGE_SIZE), keys=tuple(tokens))


def begun(scheduler: Scheduler, sequence: Sequence) -> bool:
    """Whether it starts with the next step."""
    scheduler.add(sequence)
    batch = scheduler.schedule()
    if batch is None or not any(chunk.sequence is sequence for chunk in batch.prefill):
        return False
    scheduler.written(sequence, sequence.num_prompt_tokens)
    return True


def ended(scheduler: Scheduler, sequence: Sequence, tokens: list[int]) -> None:
    """It is over, and `tokens` have been fed."""
    sequence.page_keys = page_keys(tokens, PAGE_SIZE)
    scheduler.written(sequence, len(tokens))
    scheduler.keep_end(sequence, tokens[len(sequence.page_keys) * PAGE_SIZE :])
    scheduler.finish(sequence)


def test_the_end_of_an_answer_waits_for_room_and_gives_way() -> None:
    """Its page and its state go to the next turn, which may have to wait for other pages; they are
    free for others that need the room, too."""
    limits = Limits(max_rows=3, max_prefill_tokens=999, max_prompts=3)
    scheduler = Scheduler(limits, PagePool(6), SnapshotPool(6))
    said = list(range(100))
    first = turn(0, said[:90], 11)
    assert begun(scheduler, first)
    page, state = first.pages[1], first.state
    ended(scheduler, first, said)
    assert scheduler.pool.num_free == 5 and scheduler.states.num_free == 5
    other = turn(1, [7] * 60, 4)
    assert begun(scheduler, other)
    large = turn(2, [*said, 1, 2, 3], 200)
    assert not begun(scheduler, large)  # two pages are free, it needs three more
    assert scheduler.pool.num_free == 4 and scheduler.states.num_free == 4
    scheduler.finish(other)
    scheduler.schedule()
    assert (large.pages[1], large.state, large.num_cached) == (page, state, 100)
    scheduler.finish(large)
    # Once more, and then its page is another's.
    again = turn(3, said[:90], 11)
    assert begun(scheduler, again)
    ended(scheduler, again, said)
    assert begun(scheduler, turn(4, [9] * 300, 20))
    late = turn(5, [*said, 1], 3)
    assert not begun(scheduler, late)
    scheduler.finish(scheduler.find(4))
    scheduler.schedule()
    assert late.num_cached % PAGE_SIZE == 0 and late.row is not None
    scheduler.finish(late)
    assert scheduler.pool.num_free == 5 and scheduler.states.num_free == 5
