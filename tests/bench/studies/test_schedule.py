"""Which arms share a process, and in which order the runs of one are made."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from qwencli.bench.studies.claim_file import ALL, choose
from qwencli.bench.studies.conditions import CONDITIONS, PLAIN, Load
from qwencli.bench.studies.schedule import lay_out, part_of

RUNS = 4


@pytest.fixture
def h200(gpu):
    return replace(gpu, capability=(9, 0), flash_attn_blocker="flash-attn is not installed")


def process_with(layout, claim, arm):
    place = layout.places[claim, arm]
    return next(p for p in layout.processes if p.name == place.process)


def test_arms_that_need_the_engine_loaded_alike_share_a_process(h200):
    layout = lay_out(choose([ALL]), "qwen3-vl-4b", h200, RUNS, 0)
    main = layout.processes[0]  # most claims look at it
    assert len(main.claims) > 15
    assert main.runs.count(PLAIN) == 2 * RUNS  # in the rounds, and after the stretches
    assert process_with(layout, "C03", "plain") == process_with(layout, "C09", "thread") == main
    assert process_with(layout, "C15", "qwen3") == main  # it names the model of the study
    assert process_with(layout, "C15", "qwen2_5").held == {"load_format": "dummy"}
    assert process_with(layout, "C23", "ptx").environment["CUDA_FORCE_PTX_JIT"] == "1"
    assert process_with(layout, "C23", "ptx") != main
    assert process_with(layout, "C22", "int8").held == {"max_new_tokens": 16}
    assert layout.blocked.keys() == {"C20", "C25"}
    assert "flash-attn" in layout.blocked["C20"]


def test_each_round_has_every_condition_once(h200):
    layout = lay_out(choose([ALL]), "qwen3-vl-4b", h200, RUNS, 0)
    for process in layout.processes:
        made = list(zip(process.runs, process.rounds, strict=True))
        in_rounds = {name for name, number in made if number}
        assert {name for name in process.runs if CONDITIONS[name].load is Load.ONCE} == (
            set(process.runs) - in_rounds
        )
        for number in range(1, RUNS + 1):
            assert sorted(name for name, n in made if n == number) == sorted(in_rounds)
        # A load that leaves another model is never the last of its round.
        for (name, number), (_, following) in itertools.pairwise(made):
            if CONDITIONS[name].load is Load.EACH and CONDITIONS[name].alters:
                assert following == number


def test_the_seed_decides_the_order(h200):
    orders = [
        lay_out(choose([ALL]), "qwen3-vl-4b", h200, RUNS, seed).processes[0].runs
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]


def test_on_a_cpu_the_native_engine_takes_its_nearest_cache(cpu):
    layout = lay_out(choose(["C06"]), "scenes", cpu, RUNS, 0)
    assert process_with(layout, "C06", "native_keep").cell.cache == "static"


def test_what_cannot_run_has_no_process_and_a_reason(cpu):
    layout = lay_out(choose(["C12", "C20", "C25"]), "scenes", cpu, RUNS, 0)
    assert layout.processes == ()
    assert set(layout.blocked) == {"C12", "C20", "C25"}
    assert all(place.blocked for place in layout.places.values())


def test_stretches_go_there_and_back(cpu):
    layout = lay_out(choose(["C22"]), "scenes", cpu, 5, 0)
    process = process_with(layout, "C22", "nf4_threshold")
    after = [name for name, n in zip(process.runs, process.rounds, strict=True) if not n]
    there, back = after[: 3 * 3], after[3 * 3 :]
    assert [there[i] for i in (0, 3, 6)] == [back[i] for i in (4, 2, 0)]
    assert all(after.count(name) == 5 for name in set(after))
    assert process.loads == 1 + 5 - (process.runs[5] == PLAIN)


def test_every_process_is_in_one_part_and_parts_are_about_equally_long(h200):
    processes = lay_out(choose([ALL]), "qwen3-vl-4b", h200, 3, 0).processes
    parts = [part_of(processes, part, 2) for part in (1, 2)]
    assert sorted(p.name for part in parts for p in part) == sorted(p.name for p in processes)
    weights = [sum(process.weight for process in part) for part in parts]
    assert max(weights) < 1.5 * min(weights)
    assert part_of(processes, 1, 1) == list(processes)
    # One GPU more than there are processes has nothing to do.
    assert part_of(processes, len(processes) + 1, len(processes) + 1) == []
