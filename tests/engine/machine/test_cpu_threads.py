from __future__ import annotations

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qwencli
from qwencli.engine.machine import cpu_threads
from qwencli.engine.machine.cpu_threads import computing_with, each_with, threads_for

SCENES = json.loads(
    (Path(qwencli.__file__).parent / "bundled/scenes/config.json").read_text(encoding="utf-8")
)


def larger(**text):
    return {**SCENES, "text_config": {**SCENES["text_config"], **text}}


@pytest.fixture
def cores(monkeypatch, tmp_path):
    def have(count, torch_threads=64, **files):
        for name, text in files.items():
            (tmp_path / name.replace("_", ".", 1)).write_text(text)
        monkeypatch.setattr(cpu_threads, "usable_cores", lambda: count)
        monkeypatch.setattr(torch, "get_num_threads", lambda: torch_threads)
        monkeypatch.setattr(cpu_threads, "cpu_groups", lambda: [tmp_path])
        cpu_threads._usable.cache_clear()

    cpu_threads._usable.cache_clear()
    yield have
    cpu_threads._usable.cache_clear()


def test_a_small_model_computes_on_one_core_and_a_large_one_on_all(cores):
    cores(8)
    assert threads_for(SCENES, None) == 1
    assert threads_for(larger(vocab_size=12_288), None) == 3
    assert threads_for(larger(vocab_size=151_936), None) == 8


def test_what_the_user_says_holds(cores):
    cores(8)
    assert threads_for(SCENES, 5) == 5


def test_a_model_of_unknown_shape_gets_what_there_is(cores):
    cores(8)
    assert threads_for({"model_type": "something else"}, None) == 8


@pytest.mark.parametrize(
    ("files", "threads"),
    [
        ({"cpu_max": "150000 100000\n"}, 2),
        ({"cpu_max": "max 100000\n"}, 8),
        ({"cpu_cfs_quota_us": "20000\n", "cpu_cfs_period_us": "100000\n"}, 1),
        ({"cpu_cfs_quota_us": "-1\n", "cpu_cfs_period_us": "100000\n"}, 8),
    ],
)
def test_a_limit_of_the_control_group_is_a_limit_of_threads(cores, files, threads):
    cores(8, **files)
    assert threads_for(larger(vocab_size=151_936), None) == threads


def test_threads_that_torch_was_given_are_not_exceeded(cores):
    cores(8, torch_threads=2)
    assert threads_for(larger(vocab_size=151_936), None) == 2


@pytest.mark.usefixtures("cores")
def test_threads_that_an_engine_computes_with_are_no_limit_of_another(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(cpu_threads, "usable_cores", lambda: before + 1)
    monkeypatch.setattr(cpu_threads, "cpu_groups", list)
    with computing_with(before + 1):
        assert threads_for(larger(vocab_size=151_936), None) == before


def test_threads_are_torchs_again_afterwards():
    before = torch.get_num_threads()
    with computing_with(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with computing_with(None):
        assert torch.get_num_threads() == before


@given(
    order=st.permutations([*range(4)] * 2),
    threads=st.lists(st.integers(1, 5), min_size=4, max_size=4),
    places=st.lists(st.integers(0, 2), min_size=4, max_size=4),
)
def test_blocks_of_any_threads_end_in_any_order(order, threads, places):
    """Block n wants threads[n] in the thread places[n]."""
    before = torch.get_num_threads()
    blocks = {}
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(ThreadPoolExecutor(1)) for _ in range(3)]
        for number in order:
            worker = workers[places[number]]
            if number in blocks:
                worker.submit(blocks.pop(number).__exit__, None, None, None).result()
            else:
                blocks[number] = computing_with(threads[number])
                worker.submit(blocks[number].__enter__).result()
            here = [each for each in blocks if places[each] == places[number]]
            wanted = threads[here[-1]] if here else before
            assert worker.submit(torch.get_num_threads).result() == wanted
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == before
    assert torch.get_num_threads() == before


def test_what_generators_give_in_turns_each_makes_with_its_own_threads():
    def seen():
        try:
            while True:
                yield torch.get_num_threads()
        finally:
            at_end.append(torch.get_num_threads())

    at_end = []
    before = torch.get_num_threads()
    one, two = each_with(before + 1, seen()), each_with(before + 2, seen())
    for _ in range(3):
        assert (next(one), torch.get_num_threads()) == (before + 1, before)
        assert (next(two), torch.get_num_threads()) == (before + 2, before)
    one.close()
    assert next(two) == before + 2
    del two
    assert (at_end, torch.get_num_threads()) == ([before + 1, before + 2], before)
    assert [*each_with(None, iter_of(3))] == [0, 1, 2]
    with pytest.raises(ZeroDivisionError):
        [*each_with(before + 1, (1 // each for each in iter_of(1)))]
    assert torch.get_num_threads() == before


def iter_of(count):
    yield from range(count)
