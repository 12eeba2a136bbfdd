from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwencli.bench.report.steadiness import variance_components, variance_shares

# After the example in Sokal and Rohlf, "Biometry", box 10.1: wings of mosquitoes, two measurements
# of each of four females from each of three cages.
MOSQUITOES = [
    [[58.5, 59.5], [77.8, 80.9], [84.0, 83.6], [70.1, 68.3]],
    [[69.8, 69.8], [56.0, 54.5], [50.7, 49.3], [63.8, 65.8]],
    [[56.6, 57.5], [77.8, 79.2], [69.9, 69.2], [62.1, 64.5]],
]


def draw(rng, processes, runs, tokens, sigmas):
    """Nested normal values with these standard deviations (token, run, process)."""
    token, run, process = sigmas
    found = []
    for _ in range(processes):
        level = 100 + process * rng.standard_normal()
        count = rng.integers(runs, runs + 4)
        levels = level + run * rng.standard_normal(count)
        found.append(
            [(lv + token * rng.standard_normal(rng.integers(tokens, 2 * tokens))).tolist()
             for lv in levels]
        )  # fmt: skip
    return found


def test_a_balanced_example_by_the_textbook_table():
    values = np.array(MOSQUITOES)  # [cages, females, measurements]
    females, cages = values.mean(axis=2), values.mean(axis=(1, 2))
    within = ((values - females[..., np.newaxis]) ** 2).sum() / 12
    among_females = 2 * ((females - cages[:, np.newaxis]) ** 2).sum() / 9
    among_cages = 8 * ((cages - values.mean()) ** 2).sum() / 2
    assert (among_cages, among_females, within) == pytest.approx(
        (332.838, 191.186, 1.302), abs=1e-3
    )
    found = variance_components(MOSQUITOES)
    assert found.within_run == pytest.approx(within)
    assert found.between_runs == pytest.approx((among_females - within) / 2)
    assert found.between_processes == pytest.approx((among_cages - among_females) / 8)


def test_shares_of_the_balanced_example():
    shares = variance_shares(MOSQUITOES)
    assert shares.within_run == pytest.approx(0.0114, abs=1e-4)
    assert shares.between_runs == pytest.approx(0.8332, abs=1e-4)
    assert shares.between_processes == pytest.approx(0.1554, abs=1e-4)


def test_unequal_numbers_recover_what_was_planted():
    rng = np.random.default_rng(0)
    found = variance_components(draw(rng, 300, 4, 10, (3.0, 2.0, 1.0)))
    assert found.within_run == pytest.approx(9.0, rel=0.05)
    assert found.between_runs == pytest.approx(4.0, rel=0.15)
    assert found.between_processes == pytest.approx(1.0, rel=0.4)


def test_estimates_are_unbiased_with_few_members():
    rng = np.random.default_rng(1)
    found = [variance_components(draw(rng, 4, 3, 3, (1.0, 1.0, 1.0))) for _ in range(400)]
    for level in ("within_run", "between_runs", "between_processes"):
        assert np.mean([getattr(f, level) for f in found]) == pytest.approx(1.0, abs=0.15)


def test_one_process_tells_nothing_between_processes():
    shares = variance_shares(MOSQUITOES[:1])
    assert shares.between_processes is None
    assert shares.within_run + shares.between_runs == pytest.approx(1.0)


def test_one_run_a_process_tells_nothing_between_runs():
    shares = variance_shares([process[:1] for process in MOSQUITOES])
    assert shares.between_runs is None
    assert shares.within_run + shares.between_processes == pytest.approx(1.0)


def test_one_run_is_all_within():
    shares = variance_shares([[[1.0, 2.0, 4.0]]])
    assert (shares.within_run, shares.between_runs, shares.between_processes) == (1.0, None, None)


@pytest.mark.parametrize("processes", [[], [[[1.0]]], [[[1.0], [2.0]]], [[[3.0, 3.0], [3.0, 3.0]]]])
def test_nothing_to_share(processes):
    assert variance_shares(processes) is None


def test_a_negative_estimate_counts_as_none():
    # Runs whose means are equal: less than tokens alone would make them differ.
    runs = [[[1.0, 3.0], [3.0, 1.0], [1.0, 3.0]]]
    assert variance_components(runs).between_runs < 0
    assert variance_shares(runs).between_runs == 0.0


TOKENS = st.lists(st.integers(1, 1000), min_size=1, max_size=6)
NESTED = st.lists(st.lists(TOKENS, min_size=1, max_size=5), min_size=1, max_size=4)


@given(NESTED, st.sampled_from([0.5, 4.0, 1000.0]))
def test_shares_sum_to_one_and_do_not_depend_on_the_unit(processes, factor):
    shares = variance_shares(processes)
    scaled = variance_shares([[[v * factor for v in run] for run in p] for p in processes])
    if shares is None:
        assert scaled is None
        return
    known = [s for s in vars(shares).values() if s is not None]
    assert sum(known) == pytest.approx(1.0)
    assert all(0 <= share <= 1 for share in known)
    assert [s for s in vars(scaled).values() if s is not None] == pytest.approx(known)
